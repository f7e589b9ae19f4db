"""Dagster over a built project: what it shows as stale, what it rebuilds, what its checks say."""

from collections import Counter
from pathlib import Path

import dagster as dg
import pandas as pd
import pytest
from toy_project import calls, copied, rebuilt, replace_reference, run

from alignflow_core.artifact import write_json
from alignflow_core.stages import STAGES
from pipelines import checks, lane

PLAN = "from pathlib import Path; from pipelines.plan import plan; print(*(f'{node}: {cause}' for node, cause in plan(Path('.'))), sep='\\n')"
MATERIALIZE = "from pathlib import Path; from pipelines.build import materialize; print(*materialize(Path('.'), mode='inline'))"
MATERIALIZE_BY_DVC = MATERIALIZE.replace(", mode='inline'", "")
SELECTION = "from pathlib import Path; from pipelines.build import materialize; print(*materialize(Path('.'), 'key:reference_set', 'dim'))"
SYNC = "from pathlib import Path; from pipelines.sync import sync; print(*sync(Path('.')))"

# what the web page asks for: status of every (asset, partition), after looking at the inputs
STALE = """
from pathlib import Path
import dagster as dg
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.loader import LoadingContextForTest
from alignflow_core.config import load_project
from alignflow_core.stages import node_id
from pipelines.automation import observe
from pipelines.definitions import build_definitions
from pipelines.resources import dagster_home

root = Path(".").resolve()
dagster_home(root)
with dg.DagsterInstance.get() as instance:
    observe(root, instance)
    resolver = CachingStaleStatusResolver(instance, build_definitions(root).resolve_asset_graph(), LoadingContextForTest(instance))
    for stage, key in load_project(root / "params.yaml").graph.nodes():
        status = resolver.get_status(dg.AssetKey(stage.asset), key).value
        if status != "FRESH":
            print(f"{node_id(stage.name, key)}:{status}")
"""


@pytest.fixture(scope="module")
def synced(built_toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project after ``dvc repro`` and ``alignflow sync``."""
    root = copied(built_toy, tmp_path_factory.mktemp("synced"))
    reported = run(root, "-c", SYNC).split()
    assert len(reported) == 32
    return root


def test_sync_shows_everything_fresh_and_is_idempotent(synced: Path) -> None:
    assert run(synced, "-c", STALE).split() == []
    assert run(synced, "-c", SYNC).split() == []


def test_a_replaced_reference_in_dagster(synced: Path, tmp_path: Path) -> None:
    root = copied(synced, tmp_path)
    replace_reference(root, "amber")
    assert run(root, "-c", STALE).split() == ["references@amber:STALE"]
    lines = run(root, "-c", PLAN).splitlines()
    assert lines[0] == "references@amber: 1 reference image replaced"
    assert lines[1] == "align@amber: upstream stale: references@amber"
    assert Counter(line.partition(":")[0] for line in lines) == rebuilt("amber")
    assert Counter(run(root, "-c", MATERIALIZE).split()) == rebuilt("amber")
    assert calls(root) == rebuilt("amber")
    assert run(root, "-c", STALE).split() == []
    assert run(root, "-c", MATERIALIZE).split() == []


def test_a_selection_through_dvc(built_toy: Path, tmp_path: Path) -> None:
    root = copied(built_toy, tmp_path)
    before = (root / "data.dvc").read_text()
    replace_reference(root, "dim")
    assert run(root, "-c", SELECTION).split() == ["references@dim"]
    assert calls(root) == Counter(["references@dim"])
    assert run(root, "-c", PLAN).splitlines()[0] == "align@dim: input references changed", "what depends on it was not selected"
    assert (root / "data.dvc").read_text() != before, "the new data are versioned"
    assert run(root, "-m", "dvc", "status", "references@dim").startswith("Data and pipelines are up to date")


def test_what_was_built_without_dvc_is_written_into_its_lock_and_not_built_again(built_toy: Path, tmp_path: Path) -> None:
    root = copied(built_toy, tmp_path)
    replace_reference(root, "amber")
    assert Counter(run(root, "-c", MATERIALIZE).split()) == rebuilt("amber")
    calls(root)
    assert run(root, "-c", MATERIALIZE_BY_DVC).split() == []
    run(root, "-m", "dvc", "commit", "-q", "-f", "data.dvc")  # the picture itself
    run(root, "-m", "dvc", "repro", "-q")
    assert calls(root) == Counter()


def test_an_outdated_dvc_yaml_is_told(built_toy: Path, tmp_path: Path) -> None:
    root = copied(built_toy, tmp_path)
    replace_reference(root, "dim")
    (root / "dvc.yaml").write_text((root / "dvc.yaml").read_text().replace("artifacts/labeller", "artifacts/image_flow", 1))
    with pytest.raises(AssertionError, match=r"dvc\.yaml: out of date; run 'python -m pipelines\.dvcfile' there"):
        run(root, "-c", SELECTION)
    assert calls(root) == Counter()


def test_sync_tells_dagster_though_mlflow_is_gone(built_toy: Path, tmp_path: Path) -> None:
    root = copied(built_toy, tmp_path)
    (root / "mlflow.db").unlink()
    (root / "mlflow.db").mkdir()
    with pytest.raises(AssertionError, match="report: not recorded in MLflow"):
        run(root, "-c", SYNC)
    assert run(root, "-c", STALE).split() == []


def test_touched_artifacts_and_changed_code_are_noticed(built_toy: Path, tmp_path: Path) -> None:
    root = copied(built_toy, tmp_path)
    (root / "artifacts" / "align" / "dim" / "given.txt").write_text("edited by hand")
    with (root / "alignflow_core" / "report.py").open("a") as stream:
        stream.write("# another line\n")
    lines = run(root, "-c", PLAN).splitlines()
    assert lines[0] == "align@dim: files of the artifact were altered"
    assert lines[-1] == "report: code changed: report.py"


def ended_by(error: BaseException) -> dg.ExecuteInProcessResult:
    """A run in which a step raised this."""
    @dg.asset(name=STAGES["data"].asset)
    def failing() -> None:
        raise error

    return dg.materialize([failing], raise_on_error=False)


FAILING = [(STAGES["data"], "dim")]


def test_errors_that_no_stage_raised_come_out_of_dagster() -> None:
    assert "ValueError: 7" in str(lane.failure(ended_by(ValueError(7)), FAILING))
    assert isinstance(lane.failure(ended_by(dg.DagsterExecutionInterruptedError()), FAILING), KeyboardInterrupt)


def manifests(root: Path, references: dict[str, list[str]]) -> None:
    """Artifacts of one target whose test set holds the patient ``p2`` and the image ``h2``."""
    for folder, table in {
        "data/amber": {"case_id": ["1", "2"], "group": ["p1", "p2"], "image_sha256": ["h1", "h2"], "split": ["train", "test"]},
        "references/amber": references,
    }.items():
        (root / "artifacts" / folder).mkdir(parents=True)
        pd.DataFrame(table).to_parquet(root / "artifacts" / folder / "manifest.parquet")


@pytest.mark.parametrize(("references", "passed"), [
    ({"group": ["p1"], "image_sha256": ["h1"]}, True),
    ({"group": ["p3"], "image_sha256": ["h2"]}, False),
    ({"group": ["p2"], "image_sha256": ["h3"]}, False),
])
def test_leakage_check(smoke_root: Path, references: dict[str, list[str]], passed: bool) -> None:
    manifests(smoke_root, references)
    assert checks.references_disjoint(smoke_root, "amber").passed is passed


@pytest.mark.parametrize(("value", "passed"), [(0.5, True), (float("nan"), False), (float("inf"), False)])
def test_finite_losses(tmp_path: Path, value: float, passed: bool) -> None:
    folder = tmp_path / "artifacts" / "align" / "amber"
    folder.mkdir(parents=True)
    pd.DataFrame({"step": [0], "metric": ["loss"], "value": [value]}).to_parquet(folder / "curves.parquet")
    assert checks.finite_losses("align").function(tmp_path, "amber").passed is passed


@pytest.mark.parametrize(("flags", "passed"), [(1, True), (3, False)])
def test_copy_check_against_chance(tmp_path: Path, flags: int, passed: bool) -> None:
    folder = tmp_path / "artifacts" / "privacy" / "amber"
    folder.mkdir(parents=True)
    table = {"kept": [True] * 10, "bank": ["references"] * 10, "flagged": [True] * flags + [False] * (10 - flags)}
    pd.DataFrame(table).to_parquet(folder / "copying.parquet")
    write_json(folder / "metrics.json", {"copy_chance_limit_references": 2.0})
    assert checks.no_copies(tmp_path, "amber").passed is passed
