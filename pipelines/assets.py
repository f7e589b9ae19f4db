"""Dagster assets made from the stage registry: one noun per stage, its domains or targets as partitions.

What flows in from outside is observed: raw folders, and the resolved parameters of every stage and key.
Their data versions are content hashes, like those of the assets, so that only real change makes anything stale.
"""

import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import dagster as dg

from alignflow_core.artifact import json_hash, read_json, tree_hash
from alignflow_core.config import Project, load_project
from alignflow_core.errors import InputError, StageError
from alignflow_core.runner import chosen_files, code_hash, provenance_file, raw_dirs, stage_params
from alignflow_core.stages import STAGES, Stage, node_id
from pipelines import preview
from pipelines.checks import CHECKS, refused_input
from pipelines.descriptions import description, kinds
from pipelines.resources import ENDED_BY, PROCESS_TAG, NoDvcError, StageRunner, TransientStageError, this_process, without_file_names

# Young parts of Dagster, held in place by its pinned version: a check's state per partition, and observed inputs.
for _feature in ("partitions_def on an AssetCheckSpec", "observable_source_asset"):
    warnings.filterwarnings("ignore", message=f".*{_feature}.*")

FINGERPRINT_TAG, TAG_LENGTH = "alignflow/fingerprint", 63  # Dagster's limit
INPUTS_GROUP = "0_inputs"
RAW_ASSETS = {"data": "raw_domain", "references": "raw_references"}
PARAMS_ASSET = "params"
OWNER = "team:alignflow"
MAX_RETRIES, RETRY_SECONDS = 1, 20


def partitions(project: Project, scope: str) -> dg.StaticPartitionsDefinition | None:
    """Domains, bases, comparators, targets, or none for what is built once."""
    return None if scope == "project" else dg.StaticPartitionsDefinition(list(project.graph.names(scope)))


def stage_asset(project: Project, stage: Stage) -> dg.AssetsDefinition:
    """The asset of one stage: build the artifact, record it in MLflow, tell Dagster what it holds."""
    keys = partitions(project, stage.scope)
    checks = CHECKS.get(stage.name, ())
    specs = [dg.AssetCheckSpec(c.name, asset=stage.asset, description=c.description, blocking=c.blocking, partitions_def=keys) for c in checks]

    @dg.asset(
        key=stage.asset, group_name=stage.group, description=description(stage), partitions_def=keys, deps=dependencies(project, stage),
        owners=[OWNER], kinds=kinds(stage), tags={"alignflow/stage": stage.name, "alignflow/scope": stage.scope},
        code_version=code_version(project, stage), check_specs=specs,
    )
    def materialize(context: dg.AssetExecutionContext, runner: StageRunner) -> dg.MaterializeResult:
        key, root = (context.partition_key if context.has_partition_key else None), Path(runner.root)
        context.instance.add_run_tags(context.run_id, {PROCESS_TAG: this_process()})
        build(project, runner, stage.name, key)
        run = track(context, root, stage.name, key)
        provenance = read_json(provenance_file(root, stage.name, key))
        return dg.MaterializeResult(
            data_version=dg.DataVersion(provenance["content"]), tags={FINGERPRINT_TAG: provenance["fingerprint"][:TAG_LENGTH]},
            metadata=preview.metadata(root, stage.name, key, run), check_results=[check(root, key) for check in checks])

    return materialize


def code_version(project: Project, stage: Stage) -> str:
    """Hash of the code of a stage, and of whatever any of its keys chooses by name."""
    return code_hash(stage.name, {file for key in project.graph.keys(stage) for file in chosen_files(project, stage, key).values()})[:12]


def code_of(project: Project, stage: Stage, key: str | None) -> str:
    """Hash of the code of a stage for one key, what it chooses by name included."""
    return code_hash(stage.name, chosen_files(project, stage, key).values())


def build(project: Project, runner: StageRunner, stage: str, key: str | None) -> None:
    """Build the artifact. Only what a second try may cure is tried again.

    A ``RetryPolicy`` would try everything again, a run that a person has cancelled included. What ended the step is left whole in
    :data:`pipelines.resources.ENDED_BY`, for the terminal.

    Raises:
        Failure: bad input, or a stage that cannot give a usable artifact: what, why and what to do.
        RetryRequested: see :class:`pipelines.resources.TransientStageError`; after the last try it is a failure too.
    """
    node = node_id(stage, key)
    ENDED_BY.pop(node, None)
    try:
        refused = refused_input(project, Path(runner.root), stage, key)
        if refused:
            raise StageError(refused)
        runner.build(stage, key)
    except TransientStageError as error:
        ENDED_BY[node] = error
        raise dg.RetryRequested(max_retries=MAX_RETRIES, seconds_to_wait=RETRY_SECONDS) from error
    except Exception as error:
        ENDED_BY[node] = error
        if STAGES[stage].raw and not isinstance(error, StageError | NoDvcError):
            raise without_names(STAGES[stage], key, error) from None
        if isinstance(error, InputError | StageError):
            raise in_full(node, error) from None
        raise


def in_full(node: str, error: InputError | StageError) -> dg.Failure:
    """What Dagster is told where no name of a raw file can be in it."""
    problems = str(error).splitlines()
    remedies = [problem.rpartition("; ")[2] for problem in problems if "; " in problem]
    return dg.Failure(problems[0] if len(problems) == 1 else f"{problems[0]} (and {len(problems) - 1} more)", allow_retries=False, metadata={
        "problems": dg.MetadataValue.md("\n".join(f"- {problem}" for problem in problems)), "remedy": "; ".join(dict.fromkeys(remedies)),
        "stage": node})


def without_names(stage: Stage, key: str | None, error: Exception) -> dg.Failure:
    """What Dagster is told of a stage that reads raw files: their names can be those of patients, and its records are kept."""
    command = f"python -m alignflow_core stage {stage.name} --{stage.scope} {key}"
    count = len(str(error).splitlines()) if isinstance(error, InputError) else 1
    return dg.Failure(f"{count} problem(s), which may name files and so are told on a terminal only; '{command}' lists them", allow_retries=False,
                      metadata={"problems": count, "remedy": command, "stage": node_id(stage.name, key)})


def track(context: dg.AssetExecutionContext, root: Path, stage: str, key: str | None) -> str | None:
    """Record in MLflow and return the id of the run; a tracker that is locked or gone must not lose the artifact.

    ``alignflow sync`` makes up for what is missing.
    """
    from pipelines import tracking

    try:
        return tracking.record(root, stage, key)
    except Exception as error:
        context.log.warning(f"not recorded in MLflow ({error}); 'alignflow sync' will do it")
        return None


def dependencies(project: Project, stage: Stage) -> list[dg.AssetDep]:
    """Dependencies with their partition mappings, as :meth:`Graph.inputs` spells them out key by key."""
    graph = project.graph
    downstream: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))  # stage -> its key -> keys here
    for key in graph.keys(stage):
        for name, upstream_key in graph.inputs(stage, key).values():
            downstream[name][str(upstream_key)].add(str(key))
    found = [dg.AssetDep(STAGES[name].asset, partition_mapping=mapping(stage, STAGES[name], keys)) for name, keys in downstream.items()]
    if stage.raw:
        found.append(dg.AssetDep(RAW_ASSETS[stage.name], partition_mapping=dg.IdentityPartitionMapping()))
    nodes = {node_id(stage.name, key): key for key in graph.keys(stage)}
    params = (dg.SpecificPartitionsPartitionMapping(list(nodes)) if stage.scope == "project"
              else dg.StaticPartitionMapping({node: str(key) for node, key in nodes.items()}))
    return [*found, dg.AssetDep(PARAMS_ASSET, partition_mapping=params)]


def mapping(stage: Stage, upstream: Stage, keys: Mapping[str, set[str]]) -> dg.PartitionMapping | None:
    """Mapping from the keys of ``upstream`` to those of ``stage`` that read them."""
    if upstream.scope == "project":
        return None
    if stage.scope != "project":
        return dg.StaticPartitionMapping({key: sorted(readers) for key, readers in keys.items()})
    fan_in = any(spec == f"{upstream.name}:all" for spec in stage.inputs)
    return dg.AllPartitionMapping() if fan_in else dg.SpecificPartitionsPartitionMapping(list(keys))


def input_versions(root: Path) -> dict[tuple[str, str], str]:
    """Data version of everything that comes from outside: (observed asset, partition) -> hash."""
    project = load_project(root / "params.yaml")
    found = {}
    for stage, key in project.graph.nodes():
        found[PARAMS_ASSET, node_id(stage.name, key)] = json_hash(stage_params(project, stage, key))
        if stage.raw:
            paths = raw_dirs(project, stage, key, root).values()
            found[RAW_ASSETS[stage.name], str(key)] = "/".join(tree_hash(path) if path.exists() else "missing" for path in paths) or "drawn"
    return found


def observed_asset(name: str, text: str, keys: dg.PartitionsDefinition[str], root: Path) -> dg.SourceAsset:
    """An input from outside, observed partition by partition."""
    @dg.observable_source_asset(name=name, description=text, group_name=INPUTS_GROUP, partitions_def=keys)
    def observe() -> dg.DataVersionsByPartition:
        with without_file_names():
            return dg.DataVersionsByPartition({key: version for (asset, key), version in input_versions(root).items() if asset == name})

    return observe


def observed_assets(project: Project, root: Path) -> list[dg.SourceAsset]:
    """Raw folders by domain and by target, and the parameters by stage and key."""
    nodes = dg.StaticPartitionsDefinition([node_id(stage.name, key) for stage, key in project.graph.nodes()])
    domains, targets = (dg.StaticPartitionsDefinition(list(names)) for names in (project.domains, project.targets))
    return [
        observed_asset("raw_domain", "Folder of images and masks of a domain, as it was handed in.", domains, root),
        observed_asset("raw_references", "A target's folder of reference images or file of their moments; 'drawn' where they come out of the domain.",
                       targets, root),
        observed_asset(PARAMS_ASSET, "What params.yaml says to one stage and key.", nodes, root),
    ]
