"""MLflow: one run per stage and key, found again instead of recorded twice; the comparison and what it is nested from."""

import json
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from toy_project import copied, run, set_param

from alignflow_core.artifact import read_json, tree_hash, write_json
from alignflow_core.config import load_project
from alignflow_core.errors import InputError
from alignflow_core.runner import provenance_file
from alignflow_core.stages import node_id
from alignflow_core.usage import sampled
from pipelines import tracking

RECORD = """
from pathlib import Path
from alignflow_core.config import load_project
from pipelines.tracking import record
for stage, key in load_project(Path("params.yaml")).graph.nodes():
    record(Path("."), stage.name, key)
"""
BUILD = RECORD.replace("pipelines.tracking import record", "alignflow_core.runner import run_stage").replace("record(", "run_stage(")
COMPARE = "from pathlib import Path; from pipelines.tracking import compare_table; print(compare_table(Path('.')))"


@pytest.fixture(scope="module")
def tracked(built_toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = copied(built_toy, tmp_path_factory.mktemp("tracked"))
    run(root, "-c", RECORD)
    return root


def runs_of(root: Path, query: str = "") -> list:
    store = tracking.client(root)
    return list(store.search_runs([e.experiment_id for e in store.search_experiments()], query))


def test_classes_may_be_called_anything() -> None:
    """MLflow allows letters, digits and ``/_.- :`` in the name of a metric."""
    assert tracking._plain("obey_IRF (fluid)") == "obey_IRF _fluid_" and tracking._plain("dice_aligned+filtered") == "dice_aligned_plus_filtered"


def test_one_run_per_stage_and_key(tracked: Path) -> None:
    every = runs_of(tracked)
    names = sorted(each.info.run_name for each in every if tracking.PARENT not in each.data.tags)
    assert names == sorted(node_id(stage.name, key) for stage, key in load_project(tracked / "params.yaml").graph.nodes())
    run(tracked, "-c", RECORD)
    assert len(runs_of(tracked)) == len(every)


def nested_in(root: Path, parent: str) -> dict:
    return {each.info.run_name: each for each in runs_of(root, f"tags.`{tracking.PARENT}` = '{parent}'")}


def test_a_comparison_is_the_parent_of_its_targets_and_arms(tracked: Path, tmp_path: Path) -> None:
    root = copied(tracked, tmp_path)
    first, = runs_of(root, "tags.stage = 'compare'")
    arms = nested_in(root, first.info.run_id)
    assert sorted(arms) == ["amber aligned", "amber source", "dim aligned", "dim source"]
    aligned = arms["amber aligned"].data
    assert aligned.metrics == {"dice": 0.75, "dice_ci_low": pytest.approx(0.65), "dice_ci_high": pytest.approx(0.85), "dice_minus_source": 0.25,
                               "dice_minus_source_ci_low": pytest.approx(0.15), "dice_minus_source_ci_high": pytest.approx(0.35)}
    assert set(arms["amber source"].data.metrics) == {"dice", "dice_ci_low", "dice_ci_high"}
    assert {"target": "amber", "arm": "aligned", "reward": "frechet", "n_references": "2", "generator_seed": "0"}.items() <= aligned.tags.items()
    assert {"arm": "aligned", "align.rho": "0.3", "references.count": "2"}.items() <= aligned.params.items(), "names that all targets share"
    assert aligned.tags["evaluation"] == read_json(provenance_file(root, "evaluate", "amber"))["content"]
    # a variant has the arms of its own only; the earlier comparison keeps its runs
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["targets"]["dim-skl"] = params["targets"]["dim"] | {"variant_of": "dim", "align": params["targets"]["dim"]["align"] | {"reward": "skl"}}
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    run(root, "-c", BUILD)
    newest = tracking.record(root, "compare", None)
    assert sorted(nested_in(root, newest)) == sorted([*arms, "dim-skl aligned"])
    assert "ablation-dim-align.reward.svg" in [Path(each.path).name for each in tracking.client(root).list_artifacts(newest, "figures")]
    assert {each.info.run_id for each in nested_in(root, first.info.run_id).values()} == {each.info.run_id for each in arms.values()}


def test_an_interrupted_comparison_is_recorded_anew(tracked: Path, tmp_path: Path) -> None:
    root = copied(tracked, tmp_path)
    first, = runs_of(root, "tags.stage = 'compare'")
    store = tracking.client(root)
    store.update_run(first.info.run_id, "RUNNING")
    store.delete_run(next(iter(nested_in(root, first.info.run_id).values())).info.run_id)
    second = tracking.record(root, "compare", None)
    assert second != first.info.run_id
    assert len(nested_in(root, second)) == 4 and not nested_in(root, first.info.run_id)


def test_digests_are_those_of_dvc_where_its_lock_knows_the_artifact(tracked: Path, tmp_path: Path) -> None:
    lock = yaml.safe_load((tracked / "dvc.lock").read_text())["stages"]
    datasets = {each.dataset.name: each.dataset for node in ("references@amber", "align@amber")
                for each in runs_of(tracked, f"tags.node = '{node}'")[0].inputs.dataset_inputs}
    expected = {"references@amber": ("references@amber", "outs", "artifacts/references/amber"),
                "image_flow": ("image_flow", "outs", "artifacts/image_flow"),
                "targets.amber.references.dir": ("references@amber", "deps", "data/references/amber")}
    for name, (node, side, path) in expected.items():
        md5 = next(each["md5"] for each in lock[node][side] if each["path"] == path)
        assert datasets[name].digest == md5 and len(md5) == 36 and "DVC" in datasets[name].profile
        assert json.loads(datasets[name].source) == {"path": path, "md5": md5, "content": tree_hash(tracked / path)}
    root = copied(tracked, tmp_path)
    file = provenance_file(root, "references", "amber")  # built again by 'alignflow run': the lock is about an earlier build
    write_json(file, read_json(file) | {"seconds": 9.0})
    set_param(root, "skl", "targets", "amber", "align", "reward")
    run(root, "-m", "alignflow_core", "stage", "align", "--target", "amber")
    again = tracking.client(root).get_run(tracking.record(root, "align", "amber"))
    newest = {each.dataset.name: each.dataset for each in again.inputs.dataset_inputs}
    assert newest["references@amber"].digest == read_json(file)["content"][:36] and "AlignFlow" in newest["references@amber"].profile
    assert "DVC" in newest["image_flow"].profile


def test_use_of_the_machine(tracked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sampled(interval=0.01, limit=8) as samples:
        block = bytearray(200 * 2 ** 20)
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            sum(range(1000))
    assert 2 <= len(samples) < 8 and len(block) > 0, "thinned out"
    assert max(each["memory_mb"] for each in samples) > 200 and max(each["cpu_percent"] for each in samples) > 10
    cuda = SimpleNamespace(is_initialized=lambda: True, memory_reserved=lambda: 3 * 2 ** 20, utilization=lambda: 50)
    monkeypatch.setitem(sys.modules, "torch.cuda", cuda)
    with sampled(interval=0.01) as samples:
        time.sleep(0.1)
    assert samples[0]["gpu_memory_mb"] == 3.0 and samples[0]["gpu_percent"] == 50.0
    root = copied(tracked, tmp_path)
    file = provenance_file(root, "align", "amber")
    usage = [{"seconds": 1.0, "cpu_percent": 90.0, "memory_mb": 500.0}, {"seconds": 2.0, "cpu_percent": 110.0, "memory_mb": 600.0}]
    write_json(file, read_json(file) | {"fingerprint": "another", "started": 1000.0, "seconds": 2.5, "usage": usage})
    found = tracking.client(root).get_run(tracking.record(root, "align", "amber"))
    curve = tracking.client(root).get_metric_history(found.info.run_id, "system/memory_mb")
    assert [(each.timestamp, each.step, each.value) for each in curve] == [(1_001_000, 1, 500.0), (1_002_000, 2, 600.0)]
    assert (found.info.start_time, found.info.end_time) == (1_000_000, 1_002_500)


def test_a_lost_tracker_hurts_no_run(tracked: Path, tmp_path: Path) -> None:
    root = copied(tracked, tmp_path)
    assert tracking.attempt(root, "align", "amber") is None
    (root / "mlflow.db").write_text("not a database")
    assert "not recorded in MLflow" in str(tracking.attempt(root, "align", "amber"))


def test_nothing_is_lost_while_the_tracker_is_locked_or_gone(tracked: Path, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """A thousand points of a curve: the artifact is their spool, the next attempt replays it."""
    root = copied(tracked, tmp_path)
    curve = pd.DataFrame({"step": range(1000), "metric": "loss", "value": np.linspace(1, 0, 1000)})
    curve.to_parquet(root / "artifacts/align/amber/curves.parquet")
    file = provenance_file(root, "align", "amber")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"content": "another", "fingerprint": "another"}))
    holder = sqlite3.connect(root / "mlflow.db")
    holder.execute("BEGIN EXCLUSIVE")
    assert "not recorded in MLflow" in str(tracking.attempt(root, "align", "amber"))
    holder.rollback()
    holder.close()
    again = "from pathlib import Path; from pipelines.tracking import attempt; print(attempt(Path('.'), 'align', 'amber'))"
    (root / "mlflow.db").rename(root / "elsewhere.db")
    (root / "mlflow.db").write_text("gone")
    assert "not recorded in MLflow" in run(root, "-c", again)
    (root / "elsewhere.db").replace(root / "mlflow.db")
    assert run(root, "-c", again).strip() == "None", "the same command makes up for it"
    (run_of,) = (each for each in runs_of(root) if each.info.run_name == "align@amber" and each.data.tags["content"] == "another")
    points = tracking.client(root).get_metric_history(run_of.info.run_id, "curve/loss")
    assert [(point.step, point.value) for point in points] == list(zip(curve["step"], curve["value"], strict=True))
    record_property("figure", ("tracker locked, then gone", "0 of 1,000 points lost"))


def test_what_a_run_holds(tracked: Path) -> None:
    runs = {each.info.run_name: each for each in runs_of(tracked)}
    align, evaluate = runs["align@amber"], runs["evaluate@dim"]
    axes = {"target": "amber", "domain": "amber", "reward": "frechet", "encoder": "statconv", "gradient": "sparse", "n_references": "2"}
    assert axes.items() <= align.data.tags.items()
    assert axes.items() <= align.data.params.items()
    assert align.data.params["targets.amber.align.rho"] == str(load_project(tracked / "params.yaml").targets["amber"].align.rho)
    assert evaluate.data.metrics["dice_aligned"] == 0.75
    curve = tracking.client(tracked).get_metric_history(align.info.run_id, "curve/loss")
    assert [(point.step, point.value) for point in curve] == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    datasets = {each.dataset.name for each in runs["references@amber"].inputs.dataset_inputs}
    assert datasets == {"data@amber", "data@standard", "targets.amber.references.dir"}
    assert runs["report"].data.tags["report"] == "artifacts/report/index.html"


def test_axes_are_those_that_were_built(tracked: Path, tmp_path: Path) -> None:
    """params.yaml may be edited while a stage trains."""
    root = copied(tracked, tmp_path)
    before = tracking._axes(root, load_project(root / "params.yaml"), "evaluate", "amber")
    set_param(root, "mmd", "targets", "amber", "align", "reward")
    set_param(root, 7, "seed")
    after = load_project(root / "params.yaml")
    assert tracking._axes(root, after, "evaluate", "amber") == before and before["reward"] != "mmd"
    assert tracking._axes(root, after, "references", "amber")["reward"] == "mmd", "nothing was aligned to these yet"


def test_why_stage_two_ended_is_a_tag(tracked: Path) -> None:
    aligned = runs_of(tracked, "tags.stage = 'align'")
    assert aligned
    for found in aligned:
        assert found.data.tags["verdict"] == "round 1: all steps are done (step 2); kept step 2, refused later: copy ratio 0.80 < 0.9"


def test_no_image_goes_in(tracked: Path) -> None:
    files = {file.name: file for file in (tracked / "mlruns").rglob("*") if file.is_file()}
    ablations = {name for name in files if name.startswith("ablation-")}
    assert set(files) - ablations == {"comparison.json", "source_test.json", "dice.svg", "gates.json", "gates.svg", "verdict.json"}
    assert all("<image" not in file.read_text() for name, file in files.items() if name.endswith(".svg"))


def test_targets_side_by_side(tracked: Path, tmp_path: Path) -> None:
    lines = run(tracked, "-c", COMPARE).splitlines()
    assert lines[0].split() == ["target", "reward", "n_references", "gradient", "source", "aligned"]
    assert lines[1].split()[:4] == ["amber", "frechet", "2", "sparse"]
    assert "0.750 [0.650, 0.850]" in lines[1] and len(lines) == 3
    changed = copied(tracked, tmp_path)
    set_param(changed, "skl", "targets", "dim", "align", "reward")
    store = "import sys; from pathlib import Path; from alignflow_core.runner import run_stage; from pipelines.tracking import record\n"
    stages = ("align", "sample_aligned", "filter", "segment_aligned", "segment_filtered", "evaluate")
    run(changed, "-c", store + f"for s in {stages}: run_stage(Path('.'), s, 'dim', quiet=True); record(Path('.'), s, 'dim')")
    last = run(changed, "-c", COMPARE).splitlines()[-1]
    assert last.split() == ["dim", "skl", "2", "sparse", "0.500", "0.750"], "an evaluation newer than the comparison has no interval yet"


def test_a_project_that_was_copied_keeps_its_own_files(tracked: Path, tmp_path: Path) -> None:
    before = tree_hash(tracked / "mlruns")
    root = copied(tracked, tmp_path)
    set_param(root, 0.5, "targets", "dim", "align", "rho")
    run(root, "-c", BUILD)
    run(root, "-c", RECORD)
    assert {each.info.artifact_uri.rpartition("/mlruns/")[0] for each in runs_of(root)} == {root.as_uri()}
    assert tree_hash(tracked / "mlruns") == before
    shutil.rmtree(root / "mlruns")
    assert "0.750 [0.650, 0.850]" not in run(root, "-c", COMPARE), "the means without the intervals, which lay in these files"


def test_nothing_recorded(tmp_path: Path, tracked: Path) -> None:
    with pytest.raises(InputError, match="nothing recorded"):
        tracking.compare_table(tmp_path)
    shutil.copyfile(tracked / "mlflow.db", tmp_path / "mlflow.db")
    with pytest.raises(InputError, match=r"valid: .*dice"):
        tracking.compare_table(tmp_path, "dicee")
