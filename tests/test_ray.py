"""Stages as tasks of a Ray cluster on this machine."""

from collections import Counter
from pathlib import Path

import pytest
from toy_project import TARGETS, calls, copied, rebuilt, replace_reference, run

from alignflow_core.artifact import tree_hash

pytestmark = pytest.mark.nightly
pytest.importorskip("dagster_ray", reason="extra 'ray' is not installed")

# Targets whose alignment ends only when all of them are at it, if they are asked to.
MEETING = f"""
import os, time
from alignflow_core.toy import build


def run(config, inputs, out_dir, context):
    if "MEET" in os.environ:
        (context.root / f"{{context.key}}.here").touch()
        until = time.monotonic() + 60
        while not all((context.root / f"{{target}}.here").exists() for target in {TARGETS}):
            if time.monotonic() > until:
                raise RuntimeError("the other target never came")
            time.sleep(0.1)
    if os.environ.get("FAIL") == context.key:
        raise RuntimeError("made to fail")
    return build(config, inputs, out_dir, context)
"""

JOB = """
import sys
from pathlib import Path
import dagster as dg
from dagster_ray import LocalRay
from pipelines.ray_cluster import on_ray
from pipelines.resources import dagster_home

root = Path(".").resolve()
dagster_home(root)
cluster = LocalRay(ray_init_options={"num_cpus": 4, "include_dashboard": False})
definitions = on_ray(root, cluster)
with dg.DagsterInstance.get() as instance:
    if sys.argv[1] == "job":
        result = definitions.resolve_job_def("build_on_ray").execute_in_process(instance=instance, raise_on_error=False)
    else:
        result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance, asset_selection=[dg.AssetKey(sys.argv[1])], partition_key=sys.argv[2], raise_on_error=False)
    error = result.all_events and [e.step_failure_data.error for e in result.get_step_failure_events()]
    print("success" if result.success else error[0].cause.message if error[0].cause else error[0].message)
"""


@pytest.fixture
def changed(built_toy: Path, tmp_path: Path) -> Path:
    """A built project in which one reference of every target has been replaced since."""
    root = copied(built_toy, tmp_path)
    (root / "alignflow_core" / "align.py").write_text(MEETING)
    for target in TARGETS:
        replace_reference(root, target)
    return root


def test_targets_are_built_side_by_side_with_the_same_results(changed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = copied(changed, tmp_path / "here")
    run(here, "-m", "dvc", "repro", "-q")
    monkeypatch.setenv("MEET", "1")
    assert run(changed, "-c", JOB, "job").splitlines()[-1] == "success"
    assert calls(changed) == calls(here) == rebuilt("amber") | rebuilt("dim")
    assert tree_hash(changed / "artifacts" / "compare") == tree_hash(here / "artifacts" / "compare")
    for target in TARGETS:
        assert tree_hash(changed / "artifacts" / "align" / target) == tree_hash(here / "artifacts" / "align" / target)
    assert "up to date" in run(changed, "-m", "dvc", "status")


def test_one_asset_of_one_target(changed: Path) -> None:
    assert run(changed, "-c", JOB, "reference_set", "dim").splitlines()[-1] == "success"
    assert calls(changed) == Counter(["references@dim"])


def test_a_failed_target_does_not_stop_the_others(changed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL", "dim")
    said = run(changed, "-c", JOB, "job")
    assert said.count("align@dim: ") == 1 and "sample_aligned@dim" not in said
    assert calls(changed) == rebuilt("amber") - Counter(["compare", "report"]) + Counter(["references@dim", "segment_baselines@dim"])


def test_no_name_of_a_raw_file_reaches_dagsters_records(changed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (changed / "alignflow_core" / "data.py").write_text("""
import os
from alignflow_core import toy
from alignflow_core.errors import InputError


def build(config, inputs, out_dir, context):
    if context.key == os.environ.get("UNREADABLE"):
        raise InputError("jane-doe.png: not an image; remove it")
    return toy.build(config, inputs, out_dir, context)


def __getattr__(name):
    return build
""")
    monkeypatch.setenv("UNREADABLE", "dim")
    said = run(changed, "-c", JOB, "job")
    assert "data@dim: 1 problem(s)" in said and "stage data --domain dim" in said
    for kept in (changed / ".alignflow" / "dagster").rglob("*"):
        assert kept.is_dir() or b"jane-doe" not in kept.read_bytes(), kept
