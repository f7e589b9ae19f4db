"""The command line: exit codes, words of errors, what is written and what is not."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from provenance import of_one_piece
from stopwatch import timed

from alignflow_core.artifact import exclusive
from alignflow_core.config import Task, load_project
from alignflow_core.errors import InputError
from alignflow_core.pairs import Pairs, write_pairs
from alignflow_core.stages import artifact_dir
from pipelines import preview, tracking
from pipelines.checks import CHECKS
from pipelines.cli import main
from pipelines.compose import RUN_LOCK, write_params
from pipelines.compose import options as names
from pipelines.export import mask_values
from pipelines.local import run_all


def test_help_answers_at_once() -> None:
    command = [sys.executable, "-m", "pipelines.cli", "--help"]
    done, seconds = timed(lambda: subprocess.run(command, capture_output=True, text=True, check=True), 1.5)
    assert seconds <= 1.5  # 0.05 s on an idle machine; the promise is 0.5 s
    assert "raw folders -> report" in done.stdout


@pytest.mark.parametrize("lines", [1, 100_000], ids=["at the end", "in between"])
def test_a_reader_that_has_seen_enough_is_no_error(lines: int) -> None:
    command = f"import sys; from alignflow_core.errors import exit_code; sys.exit(exit_code(lambda: print({lines} * 'word ') or 0))"
    done = subprocess.run(["bash", "-c", '{ sleep 0.3; "$0" -c "$1"; echo "$?" >&2; } | true', sys.executable, command], capture_output=True,
                          text=True, check=False)
    assert done.stderr == "141\n"


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["run", "--source", "x"], ["export", "x", "--format", "zip", "--out", "y"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_compose_writes_params_and_checks_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--root", str(tmp_path)]
    assert main(["compose", "--check", *root]) == 2  # nothing there yet
    assert main(["compose", "profile=smoke", "seed=3", *root]) == 0
    assert yaml.safe_load((tmp_path / "params.yaml").read_text(encoding="utf-8"))["seed"] == 3
    assert main(["compose", "--check", "profile=smoke", "seed=3", *root]) == 0
    capsys.readouterr()
    assert main(["compose", "--check", "profile=smoke", *root]) == 3
    assert "differs in seed" in capsys.readouterr().err
    assert main(["compose", "sede=3", *root]) == 2
    assert "error: configuration: sede: unknown key (did you mean 'seed'?)" in capsys.readouterr().err


def test_compose_drops_no_data_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Domains that only params.yaml knows are not composed away; targets, which can be added again, are named."""
    root = ["--root", str(tmp_path)]
    assert main(["compose", "profile=cpu", *root]) == 0
    assert main(["compose", "profile=smoke", *root]) == 0  # whose built-in targets are fewer
    assert "params.yaml: target dim is no longer in it" in capsys.readouterr().err
    assert main(["init", "--root", str(tmp_path / "own"), "--source", "a", "--target", "b", "--task", "binary"]) == 0
    file = tmp_path / "own" / "params.yaml"
    before = file.read_bytes()
    assert main(["compose", "profile=smoke", "--root", str(file.parent)]) == 2
    told = capsys.readouterr().err
    assert "has the domains a, b, which composing it anew would drop" in told and file.read_bytes() == before
    for broken in ("source: [", "domains: 3\ntargets: [1]\n", "domains: [a]\n"):  # composing is the remedy
        file.write_text(broken, encoding="utf-8")
        assert main(["compose", "profile=smoke", "--root", str(file.parent)]) == 0


@pytest.mark.parametrize("command", ["phantom", "demo --out", "compose --root", "paper --task phantom --out", "doctor --root",
                                     "init --source a --target b --task binary --root"])
def test_a_file_in_the_place_of_a_folder_is_told(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert main([*command.split(), str(tmp_path / "file")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and str(tmp_path / "file") in told and "folder" in told
    assert (tmp_path / "file").read_text() == "mine"


def test_other_errors_of_the_system_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (OSError(errno.EIO, "Input/output error", "disk"), FileNotFoundError("a mistake of the program"), TypeError("another")):
        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("pipelines.local.write_builtin_data", fail)
        with pytest.raises(type(error)):
            main(["phantom", str(tmp_path)])


def test_check_lists_every_problem(phantom_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = phantom_root / "data" / "source" / "standard"
    assert main(["check", str(good), "--task", "refuge"]) == 0
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    images = sorted((bad / "images").iterdir())
    (bad / "masks" / images[0].name).unlink()
    images[1].write_bytes(b"no picture")
    capsys.readouterr()
    assert main(["check", str(bad), "--task", "refuge"]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert images[0].stem in told
    assert images[1].name in told
    assert main(["check", str(bad), "--task", "refuge", "--json"]) == 2
    assert len(json.loads(capsys.readouterr().out)["problems"]) >= 2
    assert main(["check", str(good), "--task", "refuse"]) == 2
    assert "did you mean 'refuge'" in capsys.readouterr().err


def run_arguments(root: Path, out: Path, **changed: str) -> list[str]:
    """A whole ``alignflow run`` on the small phantom, profile smoke."""
    given = {"source": str(root / "data/source/standard"), "target": f"amber={root / 'data/target/amber'}", "references": "5",
             "task": "refuge", "out": str(out)} | changed
    return ["run", *(word for name, value in given.items() for word in (f"--{name}", value)), "--quiet", "profile=smoke"]


@pytest.mark.parametrize(("changed", "words"), [
    ({"source": "/nowhere/at-all"}, ["/nowhere/at-all"]),
    ({"target": "amber"}, ["NAME=DIR"]),
    ({"target": "am ber=/nowhere"}, ["letters, digits", "/nowhere"]),
    ({"target": "08=/nowhere"}, ["YAML reads '08' as a number", "site08"]),
    ({"references": "/no/references"}, ["/no/references", "no such folder"]),
    ({"references": "0"}, ["references.count", "at least 1"]),
    ({"task": "phantom"}, ["--task phantom", "refuge"]),
    ({"task": "binry"}, ["did you mean 'binary'"]),
])
def test_bad_input_to_run_writes_nothing(changed: dict[str, str], words: list[str], phantom_root: Path, tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    assert main(run_arguments(phantom_root, tmp_path / "out", **changed)) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in words), told
    assert not (tmp_path / "out").exists()


def test_run_lists_the_problems_of_all_folders_at_once(phantom_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "source" / "images").mkdir(parents=True)
    (tmp_path / "target" / "images").mkdir(parents=True)
    arguments = run_arguments(phantom_root, tmp_path / "out", source=str(tmp_path / "source"), target=f"t={tmp_path / 'target'}")
    assert main([*arguments, "align.rhoo=1"]) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in (str(tmp_path / "source"), str(tmp_path / "target"), "align.rhoo"))
    assert not (tmp_path / "out").exists()


def test_a_target_without_masks_is_told_and_can_be_wanted(phantom_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(phantom_root / "data/target/amber/images", tmp_path / "new" / "images")
    arguments = run_arguments(phantom_root, tmp_path / "run", target=f"new={tmp_path / 'new'}")
    assert main(arguments) == 2
    assert "has no masks/, by which results are measured; add them, or take 'alignflow run --unlabelled new'" in capsys.readouterr().err
    assert main([*arguments, "--unlabelled", "nwe"]) == 2
    assert "--unlabelled nwe: not a target (did you mean 'new'?)" in capsys.readouterr().err and not (tmp_path / "run").exists()

    assert main([*arguments, "--unlabelled", "new"]) == 0
    page = Path(capsys.readouterr().out.removeprefix("report: ").strip()).read_text(encoding="utf-8")
    assert "No image of new has a label here" in page and "On the source's own test images" in page and "Mean Dice on the held-out" not in page
    numbers = json.loads((tmp_path / "run" / artifact_dir("evaluate", "new") / "metrics.json").read_text())
    assert not any("dice_" in name and "source_dice_" not in name for name in numbers) and "source_dice_aligned_plus_filtered" in numbers
    assert np.isfinite(numbers["kid_aligned"]), "pictures are compared all the same"
    assert main(["pool", str(tmp_path / "run")]) == 2 and "has no labels, and nothing to pool" in capsys.readouterr().err
    for stage, key in load_project(tmp_path / "run" / "params.yaml").graph.nodes():
        for check in CHECKS.get(stage.name, ()):
            found = check(tmp_path / "run", key)
            assert found.passed or not check.blocking, (stage.name, check.name, found.metadata)
        tracking.record(tmp_path / "run", stage.name, key)
        assert preview.metadata(tmp_path / "run", stage.name, key)


def test_run_builds_a_report_then_finds_it_up_to_date_and_exports(phantom_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = run_arguments(phantom_root, out)
    assert main(arguments) == 0
    page = Path(capsys.readouterr().out.removeprefix("report: ").strip())
    assert page.stat().st_size > 10_000
    built = page.stat().st_mtime_ns
    assert main([word for word in arguments if word != "--quiet"]) == 0
    told = capsys.readouterr().err
    assert "built in" not in told
    assert told.count("up to date") == 21
    assert page.stat().st_mtime_ns == built

    assert main(["export", str(out), "--out", str(tmp_path / "pairs")]) == 2
    assert "not calibrated" in capsys.readouterr().err, "ten test images are too few"
    assert main(["export", str(out), "--out", str(tmp_path / "pairs"), "--on-copy", "keep", "--accept-copies"]) == 0
    table = pd.read_csv(tmp_path / "pairs" / "amber" / "manifest.csv")
    kept = pd.read_parquet(out / artifact_dir("filter", "amber") / "manifest.parquet")["kept"].sum()
    for part in ("images", "masks"):
        assert {file.stem for file in (tmp_path / "pairs" / "amber" / part).iterdir()} == set(table["pair_id"].astype(str))
    assert len(table) == kept


def test_a_run_under_way_keeps_its_settings(phantom_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stages read params.yaml as they begin: no other command may change it, nor build beside the first."""
    root = tmp_path / "run"
    write_params(root / "params.yaml", ["profile=smoke"])
    before = (root / "params.yaml").read_bytes()
    (root / "data").mkdir()
    with exclusive(root / RUN_LOCK):
        for command in (["demo", "--out", str(root), "profile=smoke", "align.rho=0.7"], ["ablate", "--root", str(root), "reward=skl"],
                        ["target", "remove", "amber", "--root", str(root)]):
            assert main(command) == 2
            assert f"run.lock: in use by pid {os.getpid()}" in capsys.readouterr().err
        with pytest.raises(InputError, match="in use by pid"):
            run_all(root)
    assert (root / "params.yaml").read_bytes() == before
    assert main(["ablate", "--root", str(root), "reward=skl"]) == 0


def test_a_command_given_again_loses_no_variant(phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant stays what it changes of its base, whatever else the command changes."""
    monkeypatch.setattr("pipelines.local.run_all", lambda root, *_: root)
    monkeypatch.setattr("pipelines.local.write_builtin_data", lambda root: None)
    for command in (run_arguments(phantom_root, tmp_path / "run"), ["demo", "--out", str(tmp_path / "demo"), "profile=smoke"]):
        file = tmp_path / command[0] / "params.yaml"
        assert main(command) == 0
        assert main(["ablate", "--root", str(file.parent), "--target", "amber", "reward=skl,mmd"]) == 0
        before = file.read_bytes()
        assert main(command) == 0
        assert file.read_bytes() == before
        assert main([*command, "align.rho=0.7"]) == 0
        project = load_project(file)
        assert project.targets["amber-mmd"].align == dataclasses.replace(project.targets["amber"].align, reward="mmd")
        assert project.targets["amber-mmd"].align.rho == 0.7


def test_a_command_given_otherwise_loses_no_project(phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("pipelines.local.run_all", lambda root, *_: root)
    monkeypatch.setattr("pipelines.local.write_builtin_data", lambda root: None)
    own, two = tmp_path / "own", tmp_path / "two"
    assert main(["init", "--root", str(own), "--source", "a", "--target", "b", "--task", "binary"]) == 0
    demo = ["demo", "profile=smoke", "--out"]
    assert main([*demo, str(two)]) == 0
    one = run_arguments(phantom_root, tmp_path / "run")
    assert main([*one, "--target", f"violet={phantom_root / 'data/target/violet'}"]) == 0
    for root, command, words in ((own, [*demo, str(own)], "has the domains a, b, which composing it anew would drop"),
                                 (own, run_arguments(phantom_root, own), "has the domains a, b"),
                                 (two, [*demo, str(two), "targets.violet=null"], "has the targets violet, which this command would drop"),
                                 (tmp_path / "run", one, "has the domains violet")):
        file = root / "params.yaml"
        before = file.read_bytes()
        assert main(command) == 2
        assert words in capsys.readouterr().err and file.read_bytes() == before


def test_interruption_is_exit_code_130(phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr("alignflow_core.runner.run_stage", interrupted)
    assert main([*run_arguments(phantom_root, tmp_path / "out"), "--jobs", "1"]) == 130
    assert "the same command continues" in capsys.readouterr().err


def write_banks(root: Path, n: int = 60) -> None:
    """Data and references of noise, so that the copy audit has what it needs."""
    rng = np.random.default_rng(1)
    for node, m in (("data/standard", n), ("data/amber", n), ("data/violet", n), ("references/amber", 4), ("references/violet", 4)):
        ids = [f"{node}{i}" for i in range(m)]
        table = pd.DataFrame({"case_id": ids, "group": ids, "split": ["train" if i % 2 else "test" for i in range(m)]})
        (root / "artifacts" / node).mkdir(parents=True)
        write_pairs(root / "artifacts" / node, Pairs(rng.integers(0, 256, (m, 8, 8, 3), dtype=np.uint8), None, tuple(ids), table))


def test_export_writes_masks_as_the_task_reads_them(smoke_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for target in ("amber", "violet"):
        folders = [smoke_root / artifact_dir(stage, target) for stage in ("sample_aligned", "filter")]
        for folder in folders:
            folder.mkdir(parents=True)
        ids = [f"p{i}" for i in range(4)]
        images = rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
        masks = rng.integers(0, 3, (4, 8, 8), dtype=np.uint8)
        write_pairs(folders[0], Pairs(images, masks, tuple(ids), pd.DataFrame({"pair_id": ids, "mask_id": ids, "seed": range(4)})))
        pd.DataFrame({"pair_id": ids, "kept": [True, False, True, True], "reason": ["", "copy", "", ""],
                      "novelty": 1.0}).to_parquet(folders[1] / "manifest.parquet")
    write_banks(smoke_root)
    of_one_piece(smoke_root)
    out = tmp_path / "pairs"
    (out.parent / "file").write_text("")
    assert main(["export", str(smoke_root), "--out", str(out.parent / "file" / "pairs")]) == 2
    assert "Not a directory; a file is where a folder is meant" in capsys.readouterr().err
    assert main(["export", str(smoke_root), "--out", str(out)]) == 0
    assert sorted(file.name for file in (out / "violet" / "masks").iterdir()) == ["p0.png", "p2.png", "p3.png"]
    assert np.array_equal(np.array(Image.open(out / "violet/images/p2.png")), images[2])
    assert np.array_equal(np.array(Image.open(out / "violet/masks/p2.png")), np.array([255, 128, 0], np.uint8)[masks[2]])
    assert main(["export", str(smoke_root), "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err


def test_mask_values_of_every_kind_of_task() -> None:
    assert mask_values(Task(kind="binary")).tolist() == [0, 255]
    assert mask_values(Task(kind="refuge", classes=("disc", "cup"), nested=True)).tolist() == [255, 128, 0]
    assert mask_values(Task(kind="labels", classes=("a", "b"), values={0: 0, 10: 2, 20: 1, 30: 1})).tolist() == [0, 20, 10]
    deep = mask_values(Task(kind="labels", values={0: 0, 1000: 1}))
    assert deep.tolist() == [0, 1000] and deep.dtype == np.uint16


def test_phantom_refuses_to_overwrite(phantom_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["phantom", str(phantom_root)]) == 2
    assert "exists" in capsys.readouterr().err


def test_doctor_tells_what_is_missing_and_how_to_mend_it(smoke_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--root", str(smoke_root), "--json"])
    findings = {(f["subject"], f["state"]): f["remedy"] for f in json.loads(capsys.readouterr().out)}
    assert findings["data", "data/source/standard: 28 images"] == ""
    references = smoke_root / "data/references/amber"
    for file in (references / "images").iterdir():
        file.rename(references / file.name)
    (references / "images").rmdir()
    (references / "groups.csv").write_text("stem,patient\n")
    main(["doctor", "--root", str(smoke_root), "--json"])
    findings = {(f["subject"], f["state"]): f["remedy"] for f in json.loads(capsys.readouterr().out)}
    assert findings["data", "data/references/amber: 6 images"] == ""
    assert main(["doctor", "--root", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert main(["doctor", "--root", str(tmp_path)]) == 1
    assert "alignflow compose" in capsys.readouterr().out


def test_help_of_check_names_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    told = capsys.readouterr().out
    assert all(name in told for name in names("task"))
