"""The project through DVC's own commands: everything once, then nothing, then exactly what a change reaches."""

import subprocess
from collections import Counter
from pathlib import Path

import pytest
import yaml
from toy_project import DOWNSTREAM_OF_REFERENCES, FAN_IN, REPOSITORY, calls, copied, rebuilt, replace_reference, run, set_param

STAGE_COUNT = 3 + 9 + 2 * 10  # domains, shared, targets


def repro(root: Path) -> Counter[str]:
    """``dvc repro``; returns the stages that ran."""
    calls(root)
    run(root, "-m", "dvc", "repro", "-q")
    return calls(root)


def test_a_clean_checkout_builds_everything_once(built_toy: Path, tmp_path: Path) -> None:
    ran = Counter((built_toy / "calls.txt").read_text().split())
    assert set(ran.values()) == {1}
    assert len(ran) == STAGE_COUNT
    root = copied(built_toy, tmp_path)
    assert repro(root) == Counter()
    assert "up to date" in run(root, "-m", "dvc", "status")


def test_a_replaced_reference_reaches_its_target_and_the_fan_in_only(built_toy: Path, tmp_path: Path) -> None:
    root = copied(built_toy, tmp_path)
    before = yaml.safe_load((root / "data.dvc").read_text())["outs"][0]["md5"]
    replace_reference(root, "amber")
    assert repro(root) == rebuilt("amber")
    assert yaml.safe_load((root / "data.dvc").read_text())["outs"][0]["md5"] != before, "the new data are versioned"
    assert repro(root) == Counter()


def test_a_lock_file_read_quickly_is_written_as_dvc_writes_it(built_toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dvc import dvcfile

    from pipelines import dvc_command

    monkeypatch.setattr(dvcfile, "modify_yaml", its_own := dvcfile.modify_yaml)
    dvc_command.read_lock_files_quickly()
    assert dvcfile.modify_yaml is not its_own
    stage = {"cmd": "python -m x " + "word " * 40, "params": {"params.yaml": {"a": None, "b": [], "c": 1e-5, "d": "2.0", "e": "/data/" + "x" * 120}}}
    written = {}
    for name, modify in (("theirs", its_own), ("ours", dvcfile.modify_yaml)):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "dvc.lock"
        file.write_text((built_toy / "dvc.lock").read_text())
        with modify(str(file)) as data:
            data["stages"]["report"] = stage
            data["stages"]["new"] = stage
        written[name] = file.read_bytes()
    assert written["ours"] == written["theirs"] and b"word word" in written["ours"]
    other = tmp_path / "dvc.yaml"
    other.write_text("a: 1  # a word\n")
    with dvcfile.modify_yaml(str(other)) as data:
        data["b"] = 2
    assert other.read_text() == "a: 1  # a word\nb: 2\n", "files that people write keep their comments"


@pytest.mark.nightly
def test_a_changed_setting_of_one_target(built_toy: Path, tmp_path: Path) -> None:
    root = copied(built_toy, tmp_path)
    set_param(root, 1.5, "targets", "dim", "align", "rho")
    assert repro(root) == rebuilt("dim") - Counter(["references@dim"])
    set_param(root, 0.3, "targets", "dim", "align", "rho")
    assert repro(root) == Counter(), "the run cache remembers"


def test_metrics_and_plots_are_declared(built_toy: Path) -> None:
    import json

    metrics = json.loads(run(built_toy, "-m", "dvc", "metrics", "show", "--json"))[""]["data"]
    assert metrics["artifacts/evaluate/amber/metrics.json"]["data"]["dice_aligned"] == 0.75
    plots = json.loads(run(built_toy, "-m", "dvc", "plots", "show", "--json"))
    assert "artifacts/compare/comparison.csv" in json.dumps(plots)


def test_the_built_in_data_are_what_data_dvc_names(tmp_path: Path) -> None:
    """A clean checkout holds no images: ``alignflow phantom .`` draws the very files that were versioned."""
    from alignflow_core.phantom import write_phantom

    write_phantom(tmp_path)
    run(tmp_path, "-m", "dvc", "init", "-q", "--no-scm")
    run(tmp_path, "-m", "dvc", "add", "-q", "--no-commit", "data")
    named, drawn = (yaml.safe_load((folder / "data.dvc").read_text())["outs"][0]["md5"] for folder in (REPOSITORY, tmp_path))
    assert drawn == named


@pytest.mark.nightly
def test_an_experiment_over_every_target(built_toy: Path, tmp_path: Path) -> None:
    root = copied(built_toy, tmp_path)
    for command in (["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    run(root, "-m", "dvc", "exp", "run", "-q", "-S", "reward=mmd")
    aligned_anew = [f"{stage}@{target}" for stage in DOWNSTREAM_OF_REFERENCES[1:] for target in ("amber", "dim")]
    assert calls(root) == Counter([*aligned_anew, *FAN_IN])
    shown = run(root, "-m", "dvc", "exp", "show", "--csv")
    assert "mmd" in shown and "dice_aligned" in shown
