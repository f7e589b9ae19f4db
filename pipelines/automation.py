"""Jobs that build a project part by part, and the sensor that notices changed inputs. Nothing here starts a build by itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from alignflow_core.artifact import json_hash
from alignflow_core.config import Project, load_project
from alignflow_core.runner import raw_dirs
from alignflow_core.stages import STAGES
from pipelines.assets import input_versions, partitions

DATA_VERSION_TAG = "dagster/data_version"


def jobs(project: Project) -> list[Any]:
    """In the order of a first build: every domain, what is shared, every target, the results."""
    results = [s.asset for s in STAGES.values() if any(spec.endswith(":all") for spec in s.inputs)]
    shared = [s.asset for s in STAGES.values() if s.scope == "project" and s.asset not in results]
    domains, targets = ([s.asset for s in STAGES.values() if s.scope == scope] for scope in ("domain", "target"))
    parts = [
        ("build_domain", "domain", domains, "First: splits of the source and of every target domain."),
        ("build_shared", "project", shared, "Second: stage 1, masks and segmenters that all targets share."),
        ("build_target", "target", targets, "Third, for every target: alignment, synthesis, filtering, segmenters and its measurements."),
        ("build_results", "project", results, "Last: comparison and report over all targets."),
    ]
    return [dg.define_asset_job(name, dg.AssetSelection.assets(*names), description=text, partitions_def=partitions(project, scope))
            for name, scope, names, text in parts]


def new_observations(root: Path, instance: dg.DagsterInstance) -> Iterator[dg.AssetObservation]:
    """One observation for every input whose content differs from what Dagster last saw."""
    for (asset, key), version in input_versions(root).items():
        seen = instance.fetch_observations(dg.AssetRecordsFilter(dg.AssetKey(asset), asset_partitions=[key]), limit=1).records
        latest = seen[0].asset_observation if seen else None
        if latest is None or (latest.tags or {}).get(DATA_VERSION_TAG) != version:
            yield dg.AssetObservation(asset, partition=key, tags={DATA_VERSION_TAG: version})


def observe(root: Path, instance: dg.DagsterInstance) -> None:
    """Tell Dagster which inputs have changed."""
    for observation in new_observations(root, instance):
        instance.report_runless_asset_event(observation)


def signature(root: Path) -> str:
    """Names, sizes and times of the input files: cheap, and equal as long as nothing was touched."""
    project = load_project(root / "params.yaml")
    folders = {folder for stage, key in project.graph.nodes() for folder in raw_dirs(project, stage, key, root).values()}
    files = [root / "params.yaml", *sorted(file for folder in folders for file in folder.rglob("*"))]
    return json_hash([(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files])


def inputs_sensor(root: Path) -> dg.SensorDefinition:
    """Observes changed inputs, so that the interface shows what is stale; hashes files only if something was touched."""
    @dg.sensor(name="changed_inputs", minimum_interval_seconds=30, default_status=dg.DefaultSensorStatus.RUNNING,
               description="Looks at params.yaml and the raw folders and marks what depends on a changed one as stale. Builds nothing.")
    def changed_inputs(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        now = signature(root)
        if now == context.cursor:
            return dg.SkipReason("no input was touched")
        return dg.SensorResult(asset_events=list(new_observations(root, context.instance)), cursor=now)

    return changed_inputs
