"""MLflow: one run per stage and key, found again instead of recorded twice; the comparison printed from them."""

import shutil
from pathlib import Path

import pytest
from toy_project import copied, run, set_param

from alignflow_core.config import load_project
from alignflow_core.errors import InputError
from alignflow_core.stages import node_id
from pipelines import tracking

RECORD = """
from pathlib import Path
from alignflow_core.config import load_project
from pipelines.tracking import record
for stage, key in load_project(Path("params.yaml")).graph.nodes():
    record(Path("."), stage.name, key)
"""
COMPARE = "from pathlib import Path; from pipelines.tracking import compare_table; print(compare_table(Path('.')))"


@pytest.fixture(scope="module")
def tracked(built_toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = copied(built_toy, tmp_path_factory.mktemp("tracked"))
    run(root, "-c", RECORD)
    return root


def runs_of(root: Path) -> list:
    store = tracking.client(root)
    return list(store.search_runs([e.experiment_id for e in store.search_experiments()]))


def test_one_run_per_stage_and_key(tracked: Path) -> None:
    names = sorted(each.info.run_name for each in runs_of(tracked))
    assert names == sorted(node_id(stage.name, key) for stage, key in load_project(tracked / "params.yaml").graph.nodes())
    run(tracked, "-c", RECORD)
    assert len(runs_of(tracked)) == len(names)


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
    assert datasets == {"data@amber", "targets.amber.references.dir"}
    assert runs["report"].data.tags["report"] == "artifacts/report/index.html"


def test_no_image_goes_in(tracked: Path) -> None:
    files = {file.name for file in (tracked / "mlruns").rglob("*") if file.is_file()}
    assert files == {"comparison.json"}


def test_targets_side_by_side(tracked: Path, tmp_path: Path) -> None:
    lines = run(tracked, "-c", COMPARE).splitlines()
    assert lines[0].split() == ["target", "reward", "n_references", "gradient", "source", "aligned"]
    assert lines[1].split()[:4] == ["amber", "frechet", "2", "sparse"]
    assert "0.750 [0.650, 0.850]" in lines[1] and len(lines) == 3
    changed = copied(tracked, tmp_path)
    set_param(changed, "skl", "targets", "dim", "align", "reward")
    store = "import sys; from pathlib import Path; from alignflow_core.runner import run_stage; from pipelines.tracking import record\n"
    stages = ("align", "sample_aligned", "filter", "segment_target", "evaluate")
    run(changed, "-c", store + f"for s in {stages}: run_stage(Path('.'), s, 'dim', quiet=True); record(Path('.'), s, 'dim')")
    last = run(changed, "-c", COMPARE).splitlines()[-1]
    assert last.split() == ["dim", "skl", "2", "sparse", "0.500", "0.750"], "an evaluation newer than the comparison has no interval yet"


def test_nothing_recorded(tmp_path: Path, tracked: Path) -> None:
    with pytest.raises(InputError, match="nothing recorded"):
        tracking.compare_table(tmp_path)
    shutil.copyfile(tracked / "mlflow.db", tmp_path / "mlflow.db")
    with pytest.raises(InputError, match=r"valid: .*dice"):
        tracking.compare_table(tmp_path, "dicee")
