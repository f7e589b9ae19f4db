"""Adding a hospital, taking one out, a project of one's own, and experiments over every target."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from alignflow_core.config import build_project, load_project, read_params
from alignflow_core.errors import InputError
from pipelines import dvcfile, targets
from pipelines.cli import main
from pipelines.compose import write_text
from pipelines.scaffold import init


def test_a_new_hospital_changes_nothing_of_the_others(smoke_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dvcfile.write(smoke_root)
    before, graph = read_params(smoke_root / "params.yaml"), yaml.safe_load((smoke_root / "dvc.yaml").read_text())
    shutil.copytree(smoke_root / "data/target/amber", smoke_root / "data/target/north")
    shutil.copytree(smoke_root / "data/references/amber", smoke_root / "data/references/north")
    arguments = ["target", "add", "north", "--references", str(smoke_root / "data/references/north"), "--like", "violet", "--root", str(smoke_root)]
    assert main(arguments) == 0
    after = read_params(smoke_root / "params.yaml")
    assert {name: value for name, value in after["targets"].items() if name != "north"} == before["targets"]
    assert after["targets"]["north"] == before["targets"]["violet"] | {
        "domain": "north", "references": before["targets"]["violet"]["references"] | {"dir": "data/references/north"}}
    assert after["domains"]["north"] == {"dir": "data/target/north", "labelled": True}
    stages = yaml.safe_load((smoke_root / "dvc.yaml").read_text())["stages"]
    assert stages["align"]["foreach"].keys() == {"amber", "violet", "north"}
    assert {name: entry["foreach"]["amber"] for name, entry in stages.items() if "amber" in entry.get("foreach", {})} == {
        name: entry["foreach"]["amber"] for name, entry in graph["stages"].items() if "amber" in entry.get("foreach", {})}
    assert main(["target", "list", "--root", str(smoke_root)]) == 0
    assert "north: domain north, references data/references/north, frechet on statconv" in capsys.readouterr().out
    assert main(["target", "remove", "north", "--root", str(smoke_root)]) == 0
    assert read_params(smoke_root / "params.yaml") == before
    assert yaml.safe_load((smoke_root / "dvc.yaml").read_text()) == graph


def test_another_reference_set_of_the_same_hospital(smoke_root: Path) -> None:
    targets.add(smoke_root, "amber-k4", "4", like="amber")
    added = load_project(smoke_root / "params.yaml").targets["amber-k4"]
    assert (added.domain, added.references.dir, added.references.count) == ("amber", None, 4)
    assert targets.remove(smoke_root, "amber-k4") == ["amber-k4"]


def test_problems_are_told_at_once_and_nothing_is_written(smoke_root: Path) -> None:
    before = (smoke_root / "params.yaml").read_text()
    for arguments, words in (
        (("north", "/nowhere/refs"), ["'north': has no images to be measured on", "/nowhere/refs"]),
        (("amber", "4", "amber"), ["'amber': is there already"]),
        (("a b", "4", "amber"), ["'a b': a name is"]),
        (("north", "4", "amberr"), ["did you mean 'amber'"]),
    ):
        with pytest.raises(InputError) as caught:
            targets.add(smoke_root, *arguments)
        assert all(word in str(caught.value) for word in words)
    with pytest.raises(InputError, match="did you mean 'violet'"):
        targets.remove(smoke_root, "violett")
    targets.remove(smoke_root, "violet")
    with pytest.raises(InputError, match="is the last one"):
        targets.remove(smoke_root, "amber")
    targets.add(smoke_root, "violet", str(smoke_root / "data/references/violet"))
    assert read_params(smoke_root / "params.yaml") == yaml.safe_load(before), "taken out and put back"


def test_variants_go_with_their_target(smoke_root: Path) -> None:
    assert main(["ablate", "reward=skl", "--target", "amber", "--root", str(smoke_root)]) == 0
    assert targets.remove(smoke_root, "amber") == ["amber", "amber-skl"]


def test_one_reward_for_every_target(smoke_root: Path) -> None:
    assert main(["ablate", "reward=skl", "--target", "amber", "--root", str(smoke_root)]) == 0
    plain = read_params(smoke_root / "params.yaml")
    project = build_project(plain | {"reward": "mmd", "encoder": "flow"})
    assert {name: (each.align.reward, each.align.encoder) for name, each in project.targets.items()} == {
        "amber": ("mmd", "flow"), "violet": ("mmd", "flow"), "amber-skl": ("skl", "statconv")}
    with pytest.raises(InputError, match=r"unknown|not one of|did you mean"):
        build_project(plain | {"reward": "mdm"})


def test_init_writes_a_project_that_the_data_fit_into(phantom_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "mine"
    assert main(["init", "--root", str(root), "--source", "a", "--target", "b", "--references", "4", "--task", "refuge", "profile=smoke"]) == 0
    assert "dvc add data" in capsys.readouterr().out
    for place, origin in (("source/a", "source/standard"), ("target/b", "target/amber")):
        shutil.copytree(phantom_root / "data" / origin, root / "data" / place, dirs_exist_ok=True)
        assert main(["check", str(root / "data" / place), "--task", "refuge"]) == 0
    project = load_project(root / "params.yaml")
    assert (project.source, list(project.targets), project.targets["b"].references.count) == ("a", ["b"], 4)
    assert dvcfile.is_current(root) and (root / ".dvc").is_dir() and (root / ".git").is_dir()
    assert main(["plan", "--check", "--root", str(root)]) == 3
    assert main(["init", "--root", str(root), "--source", "a", "--target", "b", "--task", "refuge"]) == 2
    assert "a project is here already" in capsys.readouterr().err


def test_init_where_git_ignores_it_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    (tmp_path / ".gitignore").write_text("/runs/\n")
    assert main(["init", "--root", str(tmp_path / "runs/clinic"), "--source", "a", "--target", "b", "--task", "binary"]) == 2
    assert "git ignores it" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_init_with_reference_folders(tmp_path: Path) -> None:
    steps = init(tmp_path / "mine", "a", ["b", "c"], None, "binary", ["profile=smoke"])
    assert (tmp_path / "mine/data/references/c/images").is_dir()
    assert "reference images into data/references/b, data/references/c" in steps[1]
    with pytest.raises(InputError, match="is a target too"):
        init(tmp_path / "other", "a", ["a"], None, "binary", [])
    assert not (tmp_path / "other").exists()


def test_init_and_add_without_labels(phantom_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "mine"
    steps = init(root, "a", ["b", "c"], 4, "refuge", ["profile=smoke"], ["c"])
    assert (root / "data/target/b/masks").is_dir() and not (root / "data/target/c/masks").exists()
    assert "images, and masks where there is a folder for them, into" in steps[1]
    assert "alignflow check data/target/c --task refuge --unlabelled" in steps
    assert [domain.labelled for domain in load_project(root / "params.yaml").domains.values()] == [True, True, False]
    with pytest.raises(InputError, match="--unlabelled d: not a target"):
        init(tmp_path / "other", "a", ["b"], 4, "refuge", [], ["d"])
    shutil.copytree(phantom_root / "data/target/amber/images", tmp_path / "new")
    command = ["target", "add", "new", "--references", "4", "--domain", str(tmp_path / "new"), "--root", str(root)]
    assert main(command) == 2 and "images: no such folder" in capsys.readouterr().err
    assert main([*command, "--unlabelled"]) == 0
    assert not load_project(root / "params.yaml").domains["new"].labelled


def test_init_interrupted_anywhere_is_completed_by_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``params.yaml``, which says that a project is there, comes last."""
    root, whole = tmp_path / "mine", tmp_path / "whole"
    command = ["--source", "a", "--target", "b", "--task", "binary", "profile=smoke"]
    assert main(["init", "--root", str(whole), *command]) == 0
    written = sorted(file.name for file in whole.iterdir())

    for name in ("dagster.yaml", "config", "dvc.yaml", "params.yaml"):
        def interrupted(file: Path, text: str, name: str = name) -> None:
            if file.name == name:
                raise KeyboardInterrupt
            write_text(file, text)

        monkeypatch.setattr("pipelines.scaffold.write_text", interrupted)
        assert main(["init", "--root", str(root), *command]) == 130
        assert not (root / "params.yaml").exists()
    monkeypatch.setattr("pipelines.scaffold.write_text", write_text)
    assert main(["init", "--root", str(root), *command]) == 0
    assert sorted(file.name for file in root.iterdir()) == written and (root / ".dvc/config").read_text() == (whole / ".dvc/config").read_text()


@pytest.mark.parametrize("task", [["--task", "phantom"], ["--task", "binary", "task=phantom"]])
def test_the_built_in_data_do_not_replace_ones_own(task: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--root", str(tmp_path / "mine"), "--source", "a", "--target", "b", *task]) == 2
    assert "task" in capsys.readouterr().err and not (tmp_path / "mine").exists()


def test_the_steps_of_init_can_be_followed_in_one_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--root", str(tmp_path / "my project"), "--source", "a", "--target", "b", "--task", "binary"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"1. cd '{tmp_path / 'my project'}'\n2. put images") and told.count("cd ") == 1


def test_an_experiment_leaves_the_targets_their_own(smoke_root: Path) -> None:
    file = smoke_root / "params.yaml"
    file.write_text(file.read_text().replace("\nreward: null", "\nreward: mmd"))
    assert load_project(file).targets["amber"].align.reward == "mmd"
    targets.add(smoke_root, "amber-k4", "4", like="amber")
    after = read_params(file)
    assert (after["reward"], after["targets"]["amber"]["align"]["reward"]) == ("mmd", "frechet")


def test_a_domain_of_others_is_not_replaced(smoke_root: Path) -> None:
    targets.add(smoke_root, "amber-k4", "4", like="amber")
    targets.remove(smoke_root, "amber")
    with pytest.raises(InputError, match="'amber' is another folder already"):
        targets.add(smoke_root, "amber", "4", domain=smoke_root / "data/target/violet")


def test_init_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    init(tmp_path / "mine", "a", ["b"], 4, "binary", ["profile=smoke"])
    told = subprocess.run([sys.executable, "-m", "dvc", "status"], cwd=tmp_path / "mine", capture_output=True, text=True, check=False)
    assert "not a git repository" not in told.stderr.lower()
    assert "no_scm = true" in (tmp_path / "mine/.dvc/config").read_text()
