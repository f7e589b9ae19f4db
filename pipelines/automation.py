"""Jobs that build a project part by part; sensors that notice changed inputs and, once switched on, build what is stale."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import dagster as dg

from alignflow_core.artifact import json_hash
from alignflow_core.config import Project, load_project
from alignflow_core.runner import provenance_file, raw_dirs
from alignflow_core.stages import Stage, artifact_dir, node_id
from pipelines.assets import code_of, input_versions, partitions
from pipelines.plan import Lane, causes, job_of, lanes, stale_nodes, upstream_lanes
from pipelines.resources import fail_dead_runs, nameless

DATA_VERSION_TAG = "dagster/data_version"
UNFINISHED = [dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED]


def jobs(project: Project) -> list[Any]:
    """In the order of a first build: every domain, what is shared, every target, the results."""
    texts = {
        "build_domain": "First: splits of the source and of every target domain.",
        "build_shared": "Second: stage 1, masks and segmenters that all targets share.",
        "build_base": "Where there are comparators: the painters that they freeze and add to.",
        "build_comparator": "Then every comparator: its painter, its images, its segmenters.",
        "build_target": "Third, for every target: alignment, synthesis, filtering, segmenters and its measurements.",
        "build_results": "Last: comparison and report over all targets.",
    }
    stages = {name: [stage for stage in project.graph.stages() if job_of(stage) == name] for name in texts}
    return [dg.define_asset_job(name, dg.AssetSelection.assets(*(stage.asset for stage in stages[name])), description=text,
                                partitions_def=partitions(project, stages[name][0].scope)) for name, text in texts.items() if stages[name]]


def new_observations(root: Path, instance: dg.DagsterInstance) -> Iterator[dg.AssetObservation]:
    """One observation for every input whose content differs from what Dagster last saw."""
    versions = input_versions(root)
    for asset in sorted({asset for asset, _ in versions}):
        seen = instance.event_log_storage.get_latest_tags_by_partition(  # one query an asset, where records would take one a partition
            dg.AssetKey(asset), dg.DagsterEventType.ASSET_OBSERVATION, [DATA_VERSION_TAG])
        for key in [key for name, key in versions if name == asset]:
            version = versions[asset, key]
            if seen.get(key, {}).get(DATA_VERSION_TAG) != version:
                yield dg.AssetObservation(asset, partition=key, tags={DATA_VERSION_TAG: version})


def observe(root: Path, instance: dg.DagsterInstance) -> None:
    """Tell Dagster which inputs have changed, and which of its runs are none."""
    fail_dead_runs(instance)
    for observation in new_observations(root, instance):
        instance.report_runless_asset_event(observation)


def signature(root: Path) -> str:
    """Names, sizes and times of the input files: cheap, and equal as long as nothing was touched."""
    project = load_project(root / "params.yaml")
    places = {place for stage, key in project.graph.nodes() for place in raw_dirs(project, stage, key, root).values()}
    files = [root / "params.yaml", *sorted(file for place in places for file in (place.rglob("*") if place.is_dir() else [place]))]
    return json_hash([(str(file), _touched(file)) for file in files])


def _touched(file: Path) -> tuple[int, int] | None:
    """Size and time of what a name leads to; those of a link that leads nowhere; nothing where nothing is."""
    for look in (file.stat, file.lstat):
        with suppress(OSError):
            found = look()
            return found.st_size, found.st_mtime_ns
    return None


def inputs_sensor(root: Path) -> dg.SensorDefinition:
    """Observes changed inputs, so that the interface shows what is stale; hashes files only if something was touched."""
    @dg.sensor(name="changed_inputs", minimum_interval_seconds=30, default_status=dg.DefaultSensorStatus.RUNNING,
               description="Looks at params.yaml and the raw folders and marks what depends on a changed one as stale. Builds nothing.")
    @nameless
    def changed_inputs(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        fail_dead_runs(context.instance)
        now = signature(root)
        if now == context.cursor:
            return dg.SkipReason("no input was touched")
        return dg.SensorResult(asset_events=list(new_observations(root, context.instance)), cursor=now)

    return changed_inputs


def stale_sensor(root: Path, lane_jobs: Sequence[Any]) -> dg.SensorDefinition:
    """Builds what is stale, for those who switch it on: GPU hours must not burn by surprise.

    A lane that came into ``params.yaml`` after its job was loaded has to wait: Dagster refuses a request for a partition it does not know,
    and with it all others.
    """
    loaded = {Lane(job.name, key) for job in lane_jobs for key in (job.partitions_def.get_partition_keys() if job.partitions_def else [None])}

    @dg.sensor(name="build_stale", minimum_interval_seconds=30, default_status=dg.DefaultSensorStatus.STOPPED,
               jobs=lane_jobs,
               description="Builds what 'alignflow plan' calls stale: one run a domain, a target, and for what they share. Off until switched on.")
    @nameless
    def build_stale(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        fail_dead_runs(context.instance)
        busy = context.instance.get_runs(dg.RunsFilter(statuses=UNFINISHED), limit=1)
        if busy:
            return dg.SkipReason(f"run {busy[0].run_id[:8]} is not finished")
        project = load_project(root / "params.yaml")
        nodes = list(project.graph.nodes())
        added = [str(lane) for lane in lanes(nodes) if lane not in loaded]
        reload = f"; press Reload for what params.yaml has of late: {', '.join(added)}" if added else ""
        code = sorted({code_of(project, stage, key) for stage, key in nodes})
        now = json_hash([signature(root), code, sorted(map(str, loaded)), *(_built_at(root, stage, key) for stage, key in nodes)])
        if now == context.cursor:  # hashing everything is for when something was touched
            return dg.SkipReason(f"nothing was touched since the last look{reload}")
        requests = [request for request in run_requests(root) if Lane(str(request.job_name), request.partition_key) in loaded]
        return dg.SensorResult(run_requests=requests, skip_reason=None if requests else f"nothing to build now{reload}", cursor=now)

    return build_stale


def run_requests(root: Path) -> Iterator[dg.RunRequest]:
    """A run for every stale lane that reads from no other stale one; the next look finds the lanes after it.

    The key of a run is what it starts from: what failed is tried again only after something has changed.
    """
    project = load_project(root / "params.yaml")
    stale = stale_nodes(project, root, project.graph.nodes())
    waiting = lanes(stale)
    for lane, nodes in waiting.items():
        if not upstream_lanes(project, lane, nodes) & waiting.keys():
            seen = [(node_id(stage.name, key), list(causes(project, root, stage, key)), code_of(project, stage, key), _built_at(root, stage, key))
                    for stage, key in nodes]
            state = json_hash([seen, sorted((*place, version) for place, version in input_versions(root).items())])
            yield dg.RunRequest(run_key=f"{lane.job}-{lane.key}-{state[:16]}", job_name=lane.job, partition_key=lane.key,
                                asset_selection=[dg.AssetKey(stage.asset) for stage, _ in nodes])


def _built_at(root: Path, stage: Stage, key: str | None) -> list[int | None]:
    """When the artifact there was built, and when a file of its folder last came or went: a state that comes back is another one."""
    places = (provenance_file(root, stage.name, key), root / artifact_dir(stage.name, key))
    return [place.stat().st_mtime_ns if place.exists() else None for place in places]
