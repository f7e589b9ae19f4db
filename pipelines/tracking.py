"""MLflow: one run per stage and key, comparable by target, reward, encoder, gradient and number of references.

Metrics and curves are read from the artifact, which is their spool: nothing is lost while the tracker is gone.
No image and no case id that is not opaque goes in; the report, which shows references, stays a file on this machine.
"""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignflow_core.artifact import file_hash, read_json
from alignflow_core.config import ARMS, Project, load_project
from alignflow_core.runner import provenance_file
from alignflow_core.stages import STAGES, artifact_dir, node_id

if TYPE_CHECKING:
    from mlflow import MlflowClient

FINGERPRINT = "alignflow.fingerprint"
RECORDED_AT = "alignflow.recorded_at"  # newest = the state of the project; a reverted one is found again, not recorded anew
PARAM_BATCH, METRIC_BATCH, VALUE_LENGTH, DIGEST_LENGTH = 100, 1000, 6000, 36  # limits of MLflow


def store_uri(root: Path) -> str:
    """The project's SQLite store."""
    return f"sqlite:///{root.resolve() / 'mlflow.db'}"


def client(root: Path) -> "MlflowClient":
    """Client of the project's store; the first call creates it (several seconds)."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for chatty in ("alembic", "mlflow.store.db.utils"):  # 60 lines at the first call
        logging.getLogger(chatty).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=store_uri(root))


def record(root: Path, stage: str, key: str | None) -> str:
    """Record a built artifact, once; returns the id of its run.

    Args:
        root: project root.
        stage: stage name.
        key: domain or target, ``None`` for a project-wide stage.

    Raises:
        InputError: the artifact is not built.
    """
    root = root.resolve()
    provenance = read_json(provenance_file(root, stage, key))
    project = load_project(root / "params.yaml")
    store = client(root)
    experiment = experiment_id(store, root, project)
    node = node_id(stage, key)
    now = f"{time.time():.6f}"
    # a fingerprint covers inputs, not outputs: a stage that was forced to run again may have another content
    query = f"tags.`{FINGERPRINT}` = '{provenance['fingerprint']}' and tags.content = '{provenance['content']}'"
    found = store.search_runs([experiment], query, max_results=1)
    if found and found[0].info.status == "FINISHED":
        store.set_tag(found[0].info.run_id, RECORDED_AT, now)
        return str(found[0].info.run_id)
    if found:  # interrupted while it was being recorded
        store.delete_run(found[0].info.run_id)
    axes = _axes(root, project, stage, key)
    tags = {"stage": stage, "node": node, "content": provenance["content"], "profile": provenance["profile"],
            FINGERPRINT: provenance["fingerprint"], **axes}
    run_id = str(store.create_run(experiment, run_name=node, tags=tags).info.run_id)
    _log_numbers(store, run_id, root / artifact_dir(stage, key), axes | dict(_flat(provenance["params"])))
    _log_inputs(store, run_id, project, provenance)
    _log_files(store, run_id, root, stage, key)
    store.set_tag(run_id, RECORDED_AT, now)
    store.set_terminated(run_id, "FINISHED")
    return run_id


def experiment_id(store: "MlflowClient", root: Path, project: Project) -> str:
    """Id of the experiment of the project's task, made if need be."""
    found = store.get_experiment_by_name(project.task.name)
    if found:
        return str(found.experiment_id)
    kind = {"mlflow.experimentKind": "custom_model_development"}  # the page opens on runs and curves, not on chat traces
    return str(store.create_experiment(project.task.name, artifact_location=(root / "mlruns").as_uri(), tags=kind))


def _axes(root: Path, project: Project, stage: str, key: str | None) -> dict[str, str]:
    """What ablations are compared by, as tags and params."""
    if STAGES[stage].scope == "domain":
        return {"domain": str(key)}
    if STAGES[stage].scope == "project":
        return {}
    target = project.targets[str(key)]
    drawn = root / artifact_dir("references", key) / "metrics.json"  # a folder of references says itself how many there are
    count = int(read_json(drawn).get("n_references", target.references.count)) if drawn.exists() else target.references.count
    return {"target": str(key), "domain": target.domain, "reward": target.align.reward, "encoder": target.align.encoder,
            "regions": target.align.regions, "variant_of": target.variant_of or "",
            "gradient": target.align.gradient, "n_references": str(count), "generator_seed": str(project.seed)}


def _flat(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Nested sections as dotted keys."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{where}.{key}" if where else str(key))
    else:
        yield where, str(value)


def _log_numbers(store: "MlflowClient", run_id: str, folder: Path, params: Mapping[str, str]) -> None:
    """Params, final metrics and curves, in as few batches as MLflow allows."""
    import pandas as pd
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    values = [Param(name, value[:VALUE_LENGTH]) for name, value in params.items()]
    metrics = [Metric(name, float(value), now, 0) for name, value in read_json(folder / "metrics.json").items()]
    curves = pd.read_parquet(folder / "curves.parquet")
    metrics += [Metric(f"curve/{name.replace('+', '_plus_')}", float(value), now, int(step)) for step, name, value in curves.itertuples(index=False)]
    for start in range(0, len(values), PARAM_BATCH):
        store.log_batch(run_id, params=values[start:start + PARAM_BATCH])
    for start in range(0, len(metrics), METRIC_BATCH):
        store.log_batch(run_id, metrics=metrics[start:start + METRIC_BATCH])


def _log_inputs(store: "MlflowClient", run_id: str, project: Project, provenance: Mapping[str, Any]) -> None:
    """Input artifacts and raw folders as datasets, named by node, with their content hashes as digests."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    nodes = project.graph.inputs(STAGES[provenance["stage"]], provenance["key"])
    datasets = {node_id(*nodes[name]) if name in nodes else name: digest for name, digest in provenance["inputs"].items()}
    inputs = [DatasetInput(Dataset(name, digest[:DIGEST_LENGTH], "artifact", '{"kind": "content hash"}'), [InputTag("mlflow.data.context", "input")])
              for name, digest in (datasets | dict(provenance["raw"])).items()]
    if inputs:
        store.log_inputs(run_id, inputs)


def _log_files(store: "MlflowClient", run_id: str, root: Path, stage: str, key: str | None) -> None:
    """The comparison as a table; of the report only where it lies."""
    import pandas as pd

    folder = root / artifact_dir(stage, key)
    if stage == "compare":
        store.log_table(run_id, pd.read_parquet(folder / "comparison.parquet"), "comparison.json")
    page = folder / "index.html"
    if stage == "report" and page.exists():
        store.set_tag(run_id, "report", page.relative_to(root).as_posix())
        store.set_tag(run_id, "report_sha256", file_hash(page))


def compare_table(root: Path, metric: str = "dice") -> str:
    """Targets and arms side by side as recorded in MLflow: mean and, where compared, its confidence interval.

    Args:
        root: project root.
        metric: as in ``comparison.parquet``: ``dice``, ``iou`` …

    Raises:
        InputError: nothing is recorded, or no such metric.
    """
    import pandas as pd

    from alignflow_core.errors import InputError

    if not (root / "mlflow.db").exists():
        raise InputError(f"{root / 'mlflow.db'}: nothing recorded yet; run 'alignflow materialize' or 'alignflow sync'")
    store = client(root)
    experiments = [e.experiment_id for e in store.search_experiments()]
    runs = store.search_runs(experiments, "tags.stage = 'evaluate'", order_by=[f"tags.`{RECORDED_AT}` DESC"])
    newest = {run.data.tags["target"]: run for run in reversed(runs)}
    if not newest:
        raise InputError(f"{root / 'mlflow.db'}: no evaluation recorded yet; run 'alignflow materialize' or 'alignflow sync'")
    intervals = _intervals(store, experiments, metric)
    rows = []
    for target, run in sorted(newest.items()):
        names = {arm: f"{metric}_{arm.replace('+', '_plus_')}" for arm in ARMS}
        content = run.data.tags["content"][:DIGEST_LENGTH]
        cells = {arm: _cell(run.data.metrics[name], intervals.get((content, target, arm))) for arm, name in names.items() if name in run.data.metrics}
        rows.append({axis: run.data.tags.get(axis, "") for axis in ("target", "reward", "n_references", "gradient")} | cells)
    if not any(arm in row for row in rows for arm in ARMS):
        known = sorted({name.rsplit("_source", 1)[0] for run in newest.values() for name in run.data.metrics if name.endswith("_source")})
        raise InputError(f"metric '{metric}': not recorded (valid: {', '.join(known)})")
    table = pd.DataFrame(rows).fillna("")
    columns = ["target", "reward", "n_references", "gradient", *(arm for arm in ARMS if arm in table)]
    return str(table[columns].to_string(index=False))


def _cell(mean: float, compared: tuple[float, float, float] | None) -> str:
    """``0.871 [0.850, 0.889]``; where it was compared, the mean over patients or sequences that the interval is about."""
    return f"{mean:.3f}" if compared is None else "{:.3f} [{:.3f}, {:.3f}]".format(*compared)


def _intervals(store: "MlflowClient", experiments: list[str], metric: str) -> dict[tuple[str, str, str], tuple[float, float, float]]:
    """(content of the evaluation, target, arm) -> mean and its interval, from the newest comparison, which may be older than an evaluation."""
    runs = store.search_runs(experiments, "tags.stage = 'compare'", order_by=[f"tags.`{RECORDED_AT}` DESC"], max_results=1)
    if not runs:
        return {}
    read = {each.dataset.name.partition("@")[2]: each.dataset.digest for each in (runs[0].inputs.dataset_inputs if runs[0].inputs else [])}
    table = json.loads(Path(store.download_artifacts(runs[0].info.run_id, "comparison.json")).read_text(encoding="utf-8"))
    rows = (dict(zip(table["columns"], row, strict=True)) for row in table["data"])
    return {(read[row["target"]], row["target"], row["arm"]): (row["mean"], row["ci_low"], row["ci_high"]) for row in rows if row["metric"] == metric}
