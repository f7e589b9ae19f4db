"""MLflow: one run per stage and key, comparable by target, reward, encoder, gradient and number of references.

Metrics and curves are read from the artifact, which is their spool: nothing is lost while the tracker is gone.
No image and no name of a case goes in; the report, which shows references, stays a file on this machine.

A comparison is the parent of one small run per target, segmenter and arm. The evaluations themselves stay on their own: a run of MLflow
has one parent, and an evaluation that nothing has changed is part of every later comparison too.
"""

import base64
import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignflow_core.artifact import file_hash, read_json
from alignflow_core.config import ARMS, COLOUR, SHARED_ARMS, Project, in_order, load_project
from alignflow_core.networks.registry import prefix
from alignflow_core.runner import provenance_file
from alignflow_core.stages import STAGES, artifact_dir, node_id
from pipelines import models
from pipelines.versions import DIGEST_LENGTH, Versions, shown

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

FINGERPRINT = "alignflow.fingerprint"
RECORDED_AT = "alignflow.recorded_at"  # newest = the state of the project; a reverted one is found again, not recorded anew
PARENT, NOTE = "mlflow.parentRunId", "mlflow.note.content"  # MLflow's own
TABLES = {"compare": ("comparison", "gap", "per_class", "source_test"), "align": ("gates",), "evaluate": ("distances",)}  # none names a case
ADDRESSES = (("experiments", "artifact_location"), ("runs", "artifact_uri"), ("model_versions", "source"), ("model_versions", "storage_location"))
PARAM_BATCH, METRIC_BATCH, VALUE_LENGTH = 100, 1000, 6000  # limits of MLflow


def store_uri(root: Path) -> str:
    """The project's SQLite store."""
    return f"sqlite:///{root.resolve() / 'mlflow.db'}"


def follow(root: Path) -> None:
    """Tell the store of a project that was moved or copied where its files are: MLflow keeps absolute addresses and has no call that changes one."""
    file, here = root / "mlflow.db", (root.resolve() / "mlruns").as_uri()
    if not file.exists():
        return
    with contextlib.closing(sqlite3.connect(file)) as store, contextlib.suppress(sqlite3.OperationalError), store:  # locked, or not set up yet
        others = store.execute("SELECT DISTINCT artifact_location FROM experiments WHERE artifact_location LIKE 'file:%/mlruns' "
                               "AND artifact_location != ?", (here,)).fetchall()
        for (there,), (table, column) in itertools.product(others, ADDRESSES):
            store.execute(f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column} || '/', 1, ?) = ?",  # noqa: S608  # both ours
                          (here, len(there) + 1, len(there) + 1, there + "/"))


@cache
def client(root: Path) -> "MlflowClient":
    """Client of the project's store, one a process; the first call of all creates the store (several seconds)."""
    follow(root)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for chatty in ("alembic", "mlflow.store.db.utils"):  # 60 lines at the first call
        logging.getLogger(chatty).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=store_uri(root))


def record(root: Path, stage: str, key: str | None) -> str:
    """Record a built artifact, once, and register what it has measured (:mod:`pipelines.models`); returns the id of its run.

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
    # a fingerprint covers inputs, not outputs: a stage that was forced to run again may have another content
    query = f"tags.`{FINGERPRINT}` = '{provenance['fingerprint']}' and tags.content = '{provenance['content']}'"
    found = store.search_runs([experiment], query, max_results=1)
    if found and found[0].info.status == "FINISHED":
        run_id = str(found[0].info.run_id)
    else:
        for run in found:  # interrupted while it was being recorded
            _delete(store, experiment, run)
        run_id = _record(store, experiment, root, project, provenance)
    store.set_tag(run_id, RECORDED_AT, f"{time.time():.6f}")
    models.register(store, root, project, (stage, key), lambda *node: record(root, *node))
    return run_id


def _record(store: "MlflowClient", experiment: str, root: Path, project: Project, provenance: Mapping[str, Any]) -> str:
    """A new run, which began and ended when the stage did."""
    stage, key = provenance["stage"], provenance["key"]
    node, axes = node_id(stage, key), _axes(root, project, stage, key)
    tags = {"stage": stage, "node": node, "content": provenance["content"], "profile": provenance["profile"],
            FINGERPRINT: provenance["fingerprint"], **axes}
    started = int(1000 * provenance.get("started", time.time()))
    run_id = str(store.create_run(experiment, started, tags, node).info.run_id)
    _log_numbers(store, run_id, root / artifact_dir(stage, key), dict(_flat(provenance["params"])) | axes, _usage(provenance, started))
    _log_inputs(store, run_id, root, project, provenance)
    _log_files(store, run_id, root, project, stage, key)
    if stage == "compare":
        _log_arms(store, experiment, run_id, root, project, provenance)
    store.set_terminated(run_id, "FINISHED", started + int(1000 * provenance["seconds"]))
    return run_id


def _delete(store: "MlflowClient", experiment: str, run: "Run") -> None:
    """A run and those nested in it."""
    for child in store.search_runs([experiment], f"tags.`{PARENT}` = '{run.info.run_id}'"):
        store.delete_run(child.info.run_id)
    store.delete_run(run.info.run_id)


def attempt(root: Path, stage: str, key: str | None) -> str | None:
    """:func:`record` for those who would rather lose a record than a run: what went wrong, or ``None``."""
    try:
        record(root, stage, key)
    except Exception as error:
        return f"not recorded in MLflow ({error})"
    return None


def experiment_id(store: "MlflowClient", root: Path, project: Project) -> str:
    """Id of the experiment of the project's task, made if need be."""
    from mlflow.exceptions import MlflowException

    found = store.get_experiment_by_name(project.task.name)
    if found:
        return str(found.experiment_id)
    kind = {"mlflow.experimentKind": "custom_model_development"}  # the page opens on runs and curves, not on chat traces
    try:
        return str(store.create_experiment(project.task.name, artifact_location=(root / "mlruns").as_uri(), tags=kind))
    except MlflowException:  # another process was quicker
        again = store.get_experiment_by_name(project.task.name)
        if again is None:
            raise
        return str(again.experiment_id)


def _axes(root: Path, project: Project, stage: str, key: str | None) -> dict[str, str]:
    """What ablations are compared by, as tags and params."""
    scope = STAGES[stage].scope
    if scope != "target":
        return {} if scope == "project" else {scope: str(key)}
    target = project.targets[str(key)]
    count = _n_references(root, project, str(key))
    align, seed = _aligned_by(root, project, str(key), stage)
    return {"target": str(key), "domain": target.domain, "variant_of": target.variant_of or "", "n_references": str(count),
            "generator_seed": str(seed), **{name: str(align[name]) for name in ("reward", "encoder", "regions", "gradient")}}


def _n_references(root: Path, project: Project, target: str) -> int:
    """How many there are: a folder or file of references says so itself."""
    count, built = project.targets[target].references.count, root / artifact_dir("references", target) / "metrics.json"
    return int(read_json(built).get("n_references", count)) if built.exists() else count


def _aligned_by(root: Path, project: Project, target: str, stage: str) -> tuple[Mapping[str, Any], int]:
    """Settings and seed of the alignment that a stage rests on, as it was built: ``params.yaml`` may have been edited since."""
    now = dataclasses.asdict(project.targets[target].align)
    built = provenance_file(root, "align", target)
    if stage == "references" or not built.exists():
        return now, project.seed
    params = read_json(built)["params"]
    return params.get(f"targets.{target}.align", now), params.get("seed", project.seed)


def _flat(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Nested sections as dotted keys; of a path outside the project only that it is one."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{where}.{key}" if where else str(key))
    else:
        yield where, shown(str(value))


def _usage(provenance: Mapping[str, Any], started: int) -> "list[Metric]":
    """The machine while the stage ran, on MLflow's page "System metrics"; the step is the second."""
    from mlflow.entities import Metric

    return [Metric(f"system/{name}", float(value), started + int(1000 * sample["seconds"]), int(sample["seconds"]))
            for sample in provenance.get("usage", []) for name, value in sample.items() if name != "seconds"]


def _log_numbers(store: "MlflowClient", run_id: str, folder: Path, params: Mapping[str, str], metrics: "list[Metric]") -> None:
    """Params, final metrics and curves, in as few batches as MLflow allows."""
    import pandas as pd
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    values = [Param(name, value[:VALUE_LENGTH]) for name, value in params.items()]
    metrics = [*metrics, *(Metric(_plain(name), float(value), now, 0) for name, value in read_json(folder / "metrics.json").items())]
    curves = pd.read_parquet(folder / "curves.parquet")
    metrics += [Metric(f"curve/{_plain(name)}", float(value), now, int(step)) for step, name, value in curves.itertuples(index=False)]
    for start in range(0, len(values), PARAM_BATCH):
        store.log_batch(run_id, params=values[start:start + PARAM_BATCH])
    for start in range(0, len(metrics), METRIC_BATCH):
        store.log_batch(run_id, metrics=metrics[start:start + METRIC_BATCH])


def _plain(name: str) -> str:
    """A metric's name as MLflow allows it; classes may be called anything."""
    return re.sub(r"[^/\w.\- :]", "_", name.replace("+", "_plus_"))


def _log_inputs(store: "MlflowClient", run_id: str, root: Path, project: Project, provenance: Mapping[str, Any]) -> None:
    """Input artifacts and raw folders as datasets, named by node."""
    from mlflow.entities import DatasetInput, InputTag

    versions = Versions(root)
    nodes = project.graph.inputs(STAGES[provenance["stage"]], provenance["key"])
    found = [versions.artifact(nodes[name], content) for name, content in provenance["inputs"].items() if name in nodes]
    found += [versions.raw(provenance, dotted) for dotted in provenance["raw"]]
    if found:
        store.log_inputs(run_id, [DatasetInput(each, [InputTag("mlflow.data.context", "input")]) for each in found])


def _log_files(store: "MlflowClient", run_id: str, root: Path, project: Project, stage: str, key: str | None) -> None:
    """Tables and figures, none of which shows an image or names a case; of the report only where it lies."""
    import pandas as pd

    folder = root / artifact_dir(stage, key)
    for name in TABLES.get(stage, ()):
        if (folder / f"{name}.parquet").exists():
            store.log_table(run_id, pd.read_parquet(folder / f"{name}.parquet"), f"{name}.json")
    if (folder / "verdict.json").exists():
        verdict = read_json(folder / "verdict.json")
        store.log_dict(run_id, verdict, "verdict.json")
        store.set_tag(run_id, "verdict", "; ".join(_told(each) for each in verdict["rounds"]))
    for name, uri in _figures(root, folder, project, stage).items():
        store.log_text(run_id, base64.b64decode(uri.partition(",")[2]).decode(), f"figures/{name}.svg")
    page = folder / "index.html"
    if stage == "report" and page.exists():
        store.set_tag(run_id, "report", page.relative_to(root).as_posix())
        store.set_tag(run_id, "report_sha256", file_hash(page))


def _told(verdict: Mapping[str, Any]) -> str:
    """Why a round of stage 2 ended, which weights were kept and what the gates refused after them."""
    refused = f", refused later: {'; '.join(verdict['refused'])}" if verdict["refused"] else ""
    return f"round {verdict['round'] + 1}: {verdict['ended_because']} (step {verdict['ended_at']}); kept step {verdict['best_step']}{refused}"


def _figures(root: Path, folder: Path, project: Project, stage: str) -> dict[str, str]:
    """Name -> figure as the report draws it."""
    import pandas as pd

    if stage == "align" and (folder / "gates.parquet").exists():
        from alignflow_core import figures

        return {"gates": figures.gates(pd.read_parquet(folder / "gates.parquet"))}
    if stage != "compare":
        return {}
    from alignflow_core import figures
    from alignflow_core.ablations import by_axis, counted

    table = pd.read_parquet(folder / "comparison.parquet").query("metric == 'dice'")
    if table.empty:  # no target has labels
        return {}
    table = table[table["segmenter"] == table["segmenter"].iloc[0]]  # as in the report
    bases = [name for name, target in project.targets.items() if target.variant_of is None and name in set(table["target"])]
    drawn = {"dice": figures.forest(table.drop_duplicates(["target", "arm"]), bases, "Dice, mean over held-out test images")}
    for base in bases:
        own = counted(project.targets[base], root / artifact_dir("references", base))
        against, axes = by_axis({**project.targets, base: own}, base, table)
        drawn |= {f"ablation-{base}-{axis.name.replace(', ', '-')}": figures.ablation(axis, base, str(against)) for axis in axes}
    return drawn


def _log_arms(store: "MlflowClient", experiment: str, parent: str, root: Path, project: Project, provenance: Mapping[str, Any]) -> None:
    """One run per target, segmenter and arm below the comparison: what a chart of ablations takes for a line.

    Params are the settings of the target, under names that all targets share; arms that a variant has in common with its base are left out.
    """
    import pandas as pd
    from mlflow.entities import Metric, Param

    folder, now = root / artifact_dir("compare", None), int(time.time() * 1000)
    table, numbers = pd.read_parquet(folder / "comparison.parquet"), read_json(folder / "metrics.json")
    first = next(iter(table["segmenter"]), "")
    for names, rows in table.groupby(["target", "segmenter", "arm"], sort=False):
        target, segmenter, arm = map(str, names)
        if project.targets[target].variant_of and (arm in SHARED_ARMS or arm.removesuffix(COLOUR) in project.comparators):
            continue
        axes = _axes(root, project, "evaluate", target) | {"arm": arm, "segmenter": segmenter}
        settings = dataclasses.asdict(project.targets[target]) | {"align": _aligned_by(root, project, target, "evaluate")[0]}
        tags = axes | {PARENT: parent, "kind": "arm", "evaluation": provenance["inputs"][f"evaluate:{target}"], "profile": provenance["profile"]}
        gap = f"{prefix(segmenter, first)}gap_closed_{target}_{_plain(arm)}"
        metrics = _arm_numbers(rows) | ({"gap_closed": numbers[gap]} if gap in numbers else {})
        run_id = store.create_run(experiment, now, tags, f"{target} {prefix(segmenter, first)}{arm}").info.run_id
        store.log_batch(run_id, [Metric(name, value, now, 0) for name, value in metrics.items()],
                        [Param(*each) for each in (dict(_flat(settings)) | axes).items()])
        store.set_terminated(run_id, "FINISHED", now)
    store.set_tag(parent, NOTE, f"Targets and arms of this comparison alone: filter by ``tags.`{PARENT}` = '{parent}'`` "
                                "and choose the arm with ``and tags.arm = 'aligned+filtered'``, the segmenter with ``and tags.segmenter = 'unet'``.")


def _arm_numbers(rows: "pd.DataFrame") -> dict[str, float]:
    """``dice``, ``dice_ci_low``, ``dice_minus_source``, ``dice_minus_source_ci_low`` … of one target and arm."""
    found: dict[str, Any] = {}
    for row in rows.to_dict("records"):
        metric, difference = row["metric"], f"{row['metric']}_minus_{_plain(row['baseline'])}"
        found |= {metric: row["mean"], f"{metric}_ci_low": row["ci_low"], f"{metric}_ci_high": row["ci_high"], difference: row["difference"],
                  f"{difference}_ci_low": row["diff_ci_low"], f"{difference}_ci_high": row["diff_ci_high"]}
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def compare_table(root: Path, metric: str = "dice") -> str:
    """Targets and arms side by side as recorded in MLflow: mean and, where compared, its confidence interval.

    Args:
        root: project root.
        metric: as in ``comparison.parquet``: ``dice``, ``iou`` … of the first segmenter, ``segformer/dice`` of another.

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
    rows, params = [], root / "params.yaml"
    comparators = load_project(params).comparators if params.exists() else {}
    arms = in_order([*ARMS, *(arm for name in comparators for arm in (name, name + COLOUR))])
    for target, run in sorted(newest.items()):
        names = {arm: f"{metric}_{_plain(arm)}" for arm in arms}
        content = run.data.tags["content"][:DIGEST_LENGTH]
        cells = {arm: _cell(run.data.metrics[name], intervals.get((content, target, arm))) for arm, name in names.items() if name in run.data.metrics}
        rows.append({axis: run.data.tags.get(axis, "") for axis in ("target", "reward", "n_references", "gradient")} | cells)
    if not any(arm in row for row in rows for arm in arms):
        known = sorted({name.rsplit("_source", 1)[0] for run in newest.values() for name in run.data.metrics if name.endswith("_source")})
        raise InputError(f"metric '{metric}': not recorded (valid: {', '.join(known)})")
    table = pd.DataFrame(rows).fillna("")
    columns = ["target", "reward", "n_references", "gradient", *(arm for arm in arms if arm in table)]
    return str(table[columns].to_string(index=False))


def _cell(mean: float, compared: tuple[float, float, float] | None) -> str:
    """``0.871 [0.850, 0.889]``; where it was compared, the mean over patients or sequences that the interval is about."""
    return f"{mean:.3f}" if compared is None else "{:.3f} [{:.3f}, {:.3f}]".format(*compared)


def _intervals(store: "MlflowClient", experiments: list[str], metric: str) -> dict[tuple[str, str, str], tuple[float, float, float]]:
    """(content of the evaluation, target, arm) -> mean and its interval, from the newest comparison, which may be older than an evaluation.

    Where its file is gone, as where the store was copied alone, there are none.
    """
    from mlflow.exceptions import MlflowException

    runs = store.search_runs(experiments, "tags.stage = 'compare'", order_by=[f"tags.`{RECORDED_AT}` DESC"], max_results=1)
    if not runs:
        return {}
    datasets = [each.dataset for each in (runs[0].inputs.dataset_inputs if runs[0].inputs else [])]
    read = {each.name.partition("@")[2]: json.loads(each.source).get("content", each.digest)[:DIGEST_LENGTH] for each in datasets}
    try:
        table = json.loads(Path(store.download_artifacts(runs[0].info.run_id, "comparison.json")).read_text(encoding="utf-8"))
    except MlflowException:
        return {}
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    first = rows[0]["segmenter"] if rows else ""
    return {(read[row["target"]], row["target"], row["arm"]): (row["mean"], row["ci_low"], row["ci_high"]) for row in rows
            if prefix(row["segmenter"], first) + row["metric"] == metric}
