"""The project through DVC's own commands: everything once, then nothing, then exactly what a change reaches."""

import copy
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import yaml
from toy_project import DOWNSTREAM_OF_STAGE_2, FAN_IN, REPOSITORY, calls, copied, rebuilt, replace_reference, run, set_param

from pipelines import dvc_command, dvc_lock
from pipelines.versions import Versions

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


AWKWARD = {"cmd": "python -m x " + "word " * 40, "deps": [{"path": "a b/ü", "md5": "1.dir"}], "params": {"params.yaml": {
    "a": None, "b": [], "c": 1e-5, "d": "2.0", "e": "/data/" + "x" * 120, "f": "two\n\nlines\n", "g": {}, "h": {"report": {"cmd": "x"}}}}}


@pytest.mark.parametrize("names", [["report"], ["new"], ["data@amber", "report", "new", "newer@x-y_1"]])
def test_a_lock_file_changed_by_its_entries_is_as_dvc_writes_it(built_toy: Path, names: list[str]) -> None:
    from dvc.utils.serialize import dumps_yaml, loads_yaml

    text = (built_toy / "dvc.lock").read_text()
    whole = loads_yaml(text)
    for datasets in ({}, {"datasets": [{"name": "d", "url": "u", "lock": {"report": {"cmd": "y"}}}]}):
        theirs = whole | {"stages": whole["stages"] | {name: copy.deepcopy(AWKWARD) for name in names}} | datasets
        before = dumps_yaml(whole | datasets)
        ours = dvc_lock.replaced(before, {name: dumps_yaml({"stages": {name: AWKWARD}}).removeprefix("stages:\n") for name in names})
        assert ours == dumps_yaml(theirs)
        assert all(dvc_lock.entry(ours, name)["deps"] == AWKWARD["deps"] for name in names)
        assert dvc_lock.entry(ours, "align@amber")["outs"] == whole["stages"]["align@amber"]["outs"]
    assert dvc_lock.entry(text, "amber") == dvc_lock.entry("", "report") == {}
    assert dvc_lock.replaced("", {"report": "x"}) is dvc_lock.replaced("schema: '2.0'\nstages: {}\n", {"report": "x"}) is None


def test_half_a_lock_says_less_and_never_something_else(built_toy: Path, tmp_path: Path) -> None:
    """DVC's own command writes the file in place, and others look at it meanwhile."""
    text = (built_toy / "dvc.lock").read_text()
    start, end = dvc_lock.span(text, "align@amber") or (0, 0)
    whole = Versions(built_toy).md5(("align", "amber"), "outs", "artifacts/align/amber")
    shutil.copytree(built_toy / "artifacts" / "align", tmp_path / "artifacts" / "align")
    found = set()
    for cut in range(start, end + 1):
        (tmp_path / "dvc.lock").write_text(text[:cut])
        found.add(Versions(tmp_path).md5(("align", "amber"), "outs", "artifacts/align/amber"))
    assert whole and found == {None, whole}


def test_dvc_writes_the_same_lock_by_our_command(built_toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dvc.dvcfile import Lockfile
    from dvc.utils.serialize import dumps_yaml, loads_yaml

    monkeypatch.setattr(Lockfile, "dump_stages", its_own := Lockfile.dump_stages)
    dvc_command.rewrite_only_what_changes()
    assert Lockfile.dump_stages is not its_own
    root, lock, stages = copied(built_toy, tmp_path), tmp_path / "project" / "dvc.lock", ["data@amber", "references@amber"]
    replace_reference(root, "amber")
    before = loads_yaml(lock.read_text())["stages"]
    for expected in (list(before), stages):
        run(root, "-m", "pipelines.dvc_command", "repro", "--quiet", "--single-item", *stages)
        now = loads_yaml(lock.read_text())["stages"]
        assert lock.read_text() == dumps_yaml({"schema": "2.0", "stages": now}), "to the byte as DVC writes what it says"
        assert list(now) == expected and now["references@amber"] != before["references@amber"]
        lock.unlink()


@pytest.mark.nightly
def test_a_changed_setting_of_one_target(built_toy: Path, tmp_path: Path) -> None:
    root = copied(built_toy, tmp_path)
    set_param(root, 1.5, "targets", "dim", "align", "rho")
    assert repro(root) == Counter([*(f"{stage}@dim" for stage in DOWNSTREAM_OF_STAGE_2), *FAN_IN]), "no baseline is trained anew"
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
    aligned_anew = [f"{stage}@{target}" for stage in DOWNSTREAM_OF_STAGE_2 for target in ("amber", "dim")]
    assert calls(root) == Counter([*aligned_anew, *FAN_IN])
    shown = run(root, "-m", "dvc", "exp", "show", "--csv")
    assert "mmd" in shown and "dice_aligned" in shown
