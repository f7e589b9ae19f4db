"""Tell Dagster, MLflow and DVC what a command in a terminal has built: ``dvc repro``, or an inline run, of which DVC knows nothing either."""

from pathlib import Path
from typing import TYPE_CHECKING

from alignflow_core.artifact import read_json
from alignflow_core.config import Project, load_project
from alignflow_core.errors import StageError
from alignflow_core.runner import provenance_file
from alignflow_core.stages import Stage, node_id
from pipelines.plan import causes
from pipelines.versions import NodeName

if TYPE_CHECKING:
    import dagster as dg


def sync(root: Path) -> list[str]:
    """Report every up-to-date artifact that Dagster has not seen, record every one that MLflow lacks, and let ``dvc.lock`` name it.

    Returns:
        the nodes reported to Dagster.

    Raises:
        StageError: MLflow could not be told of some; Dagster was told of all.
    """
    import dagster as dg

    from pipelines import tracking
    from pipelines.automation import observe
    from pipelines.checks import evaluations
    from pipelines.definitions import build_definitions
    from pipelines.resources import commit_unrecorded, dagster_home

    root = root.resolve()
    project = load_project(root / "params.yaml")
    graph = build_definitions(root).resolve_asset_graph()
    dagster_home(root)
    reported, problems, current = list[str](), list[str](), list[NodeName]()
    with dg.DagsterInstance.get() as instance:
        observe(root, instance)
        for stage, key in project.graph.nodes():
            if any(causes(project, root, stage, key)):
                continue
            current.append((stage.name, key))
            run = None
            try:
                run = tracking.record(root, stage.name, key)
            except Exception as error:
                problems.append(f"{node_id(stage.name, key)}: not recorded in MLflow ({error}); run 'alignflow sync' again")
            if _seen(instance, stage, key) != fingerprint_tag(root, stage, key):
                instance.report_runless_asset_event(_materialization(root, project, instance, graph, stage, key, run))
                for evaluation in evaluations(root, stage, key):
                    instance.report_runless_asset_event(evaluation)
                reported.append(node_id(stage.name, key))
    commit_unrecorded(root, current)
    if problems:  # Dagster has been told of everything all the same
        raise StageError("\n".join(problems))
    return reported


def fingerprint_tag(root: Path, stage: Stage, key: str | None) -> str:
    """Fingerprint of the artifact on disk, as far as it fits into a tag."""
    from pipelines.assets import TAG_LENGTH

    return str(read_json(provenance_file(root, stage.name, key))["fingerprint"])[:TAG_LENGTH]


def _seen(instance: "dg.DagsterInstance", stage: Stage, key: str | None) -> str | None:
    """Fingerprint of the artifact that Dagster holds for the latest one."""
    import dagster as dg

    from pipelines.assets import FINGERPRINT_TAG

    filters = dg.AssetRecordsFilter(dg.AssetKey(stage.asset), asset_partitions=None if key is None else [key])
    records = instance.fetch_materializations(filters, limit=1).records
    latest = records[0].asset_materialization if records else None
    return (latest.tags or {}).get(FINGERPRINT_TAG) if latest else None


def _materialization(root: Path, project: Project, instance: "dg.DagsterInstance", graph: "dg.AssetGraph", stage: Stage, key: str | None,
                     run: str | None) -> "dg.AssetMaterialization":
    """What Dagster would have logged had it built the artifact just now, after all of its inputs.

    Without the versions and the event ids of the inputs it would show everything as stale.
    """
    import dagster as dg

    from pipelines import preview
    from pipelines.assets import FINGERPRINT_TAG, code_version

    provenance = read_json(provenance_file(root, stage.name, key))
    tags = {
        "dagster/data_version": provenance["content"], "dagster/data_version_is_user_provided": "true",
        "dagster/code_version": code_version(project, stage), FINGERPRINT_TAG: fingerprint_tag(root, stage, key),
    }
    for upstream in graph.get(dg.AssetKey(stage.asset)).parent_keys:
        event = latest_event(instance, upstream)
        logged = event and (event.asset_materialization or event.asset_observation)
        if event and logged:
            tags[f"dagster/input_data_version/{upstream.to_user_string()}"] = (logged.tags or {})["dagster/data_version"]
            tags[f"dagster/input_event_pointer/{upstream.to_user_string()}"] = str(event.storage_id)
    return dg.AssetMaterialization(stage.asset, partition=key, tags=tags, metadata=preview.metadata(root, stage.name, key, run))


def latest_event(instance: "dg.DagsterInstance", asset: "dg.AssetKey") -> "dg.EventLogRecord | None":
    """Last materialisation of an asset in any partition, or observation of an input from outside."""
    for fetch in (instance.fetch_materializations, instance.fetch_observations):
        records = fetch(asset, limit=1).records
        if records:
            return records[0]
    return None
