"""What is stale and why, by the fingerprints on disk; and building just that, through Dagster.

Dagster knows staleness per partition but shows it neither transitively nor above the partition, and it
does not look at the disk. The fingerprints of :mod:`alignflow_core.runner` do, so they decide here.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignflow_core.artifact import read_json, tree_hash
from alignflow_core.config import Project, load_project
from alignflow_core.errors import InputError, StageError
from alignflow_core.runner import chosen_files, code_hash, plan_stage, provenance_file, raw_dirs, stage_params
from alignflow_core.stages import STAGES, Stage, artifact_dir, node_id

if TYPE_CHECKING:
    from dagster import Definitions

Node = tuple[Stage, str | None]

QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}  # Dagster's own record keeps every line


def plan(root: Path) -> list[tuple[str, str]]:
    """Every stale node, after all it depends on, with the cause in words: ``("align@amber", "params changed: …")``.

    What depends on a stale node is listed too, though it may turn out up to date once that is rebuilt.

    Raises:
        InputError: ``params.yaml`` is missing or wrong.
    """
    root = root.resolve()
    project = load_project(root / "params.yaml")
    stale: dict[str, str] = {}
    for stage, key in project.graph.nodes():
        reasons = list(causes(project, root, stage, key))
        upstream = dict.fromkeys(node_id(*each) for each in project.graph.inputs(stage, key).values())
        waiting = [node for node in upstream if node in stale]
        if waiting and not reasons:
            reasons = [f"upstream stale: {', '.join(waiting)}"]
        if reasons:
            stale[node_id(stage.name, key)] = "; ".join(reasons)
    return list(stale.items())


def causes(project: Project, root: Path, stage: Stage, key: str | None) -> Iterator[str]:
    """Why an artifact does not fit the project as it lies on disk; nothing where it does."""
    file, folder = provenance_file(root, stage.name, key), root / artifact_dir(stage.name, key)
    if not file.exists() or not folder.is_dir():
        yield "not built yet"
        return
    recorded = read_json(file)
    if recorded["content"] != tree_hash(folder):
        yield "files of the artifact changed"
    changed = list(_differing(recorded["params"], stage_params(project, stage, key)))
    if changed:
        yield f"params changed: {', '.join(changed)}"
    if recorded["code"] != code_hash(stage.name, chosen_files(project, stage, key).values()):
        yield "code changed"
    for dotted, raw in raw_dirs(project, stage, key, root).items():
        if not raw.is_dir():
            yield f"raw folder {raw} ({dotted}) is missing"
        elif recorded["raw"].get(dotted) != tree_hash(raw):
            yield f"raw folder {raw.relative_to(root) if raw.is_relative_to(root) else raw} changed"
    inputs = {name: provenance_file(root, *node) for name, node in project.graph.inputs(stage, key).items()}
    for name, upstream in inputs.items():
        if upstream.exists() and recorded["inputs"].get(name) != read_json(upstream)["content"]:
            yield f"input {name} changed"
    gone = recorded["inputs"].keys() - inputs.keys()
    if gone:
        yield f"inputs no longer read: {', '.join(sorted(gone))}"


def _differing(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Dotted keys whose values differ. JSON has turned tuples into lists and keys into text."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        after = {str(key): value for key, value in after.items()}
        for key in sorted(before.keys() | after.keys()):
            yield from _differing(before.get(key), after.get(key), f"{where}.{key}" if where else key)
    elif (list(before) if isinstance(before, tuple) else before) != (list(after) if isinstance(after, tuple) else after):
        yield where


def materialize(root: Path, selection: str | None = None, target: str | None = None, mode: str = "dvc") -> list[str]:
    """Build through Dagster, so that it appears there; returns the nodes that were materialised, in order.

    Args:
        root: project root.
        selection: Dagster asset selection such as ``key:"synthetic_images"+``; all of it is materialised (what is up to
            date costs a second). Without it, only what is stale, each looked at after its inputs were rebuilt.
        target: only this target; without a selection with everything it needs.
        mode: ``dvc`` or ``inline``, see :class:`pipelines.resources.StageRunner`.

    Raises:
        InputError: unknown target, empty or wrong selection, bad input of a stage.
        StageError: a stage that failed.
    """
    import dagster as dg

    from pipelines.automation import observe
    from pipelines.definitions import build_definitions
    from pipelines.resources import dagster_home

    root = root.resolve()
    project = load_project(root / "params.yaml")
    if target is not None and target not in project.targets:
        raise InputError(f"target '{target}': not one of {', '.join(project.targets)}")
    definitions = build_definitions(root, mode)
    nodes = list(chosen(project, None if selection is None else selected_stages(definitions, selection), target))
    dagster_home(root)
    with dg.DagsterInstance.get() as instance:
        observe(root, instance)
        job = definitions.resolve_implicit_global_asset_job_def()
        built = []
        for stage, key in nodes:
            if selection is None and not any(causes(project, root, stage, key)):
                continue
            plan_stage(project, root, stage, key)  # a missing input is a matter of one line, not of a failed run
            print(node_id(stage.name, key), file=sys.stderr, flush=True)
            result = job.execute_in_process(run_config=QUIET, instance=instance, asset_selection=[dg.AssetKey(stage.asset)], partition_key=key,
                                            raise_on_error=False)
            if not result.success:
                raise failure(result, node_id(stage.name, key))
            built.append(node_id(stage.name, key))
    return built


def selected_stages(definitions: "Definitions", selection: str) -> set[str]:
    """Names of the stages whose assets a Dagster selection holds."""
    import dagster as dg

    try:
        keys = dg.AssetSelection.from_string(selection).resolve(definitions.resolve_asset_graph())
    except dg.DagsterError as error:
        raise InputError(f"selection '{selection}': {' '.join(str(error).split())}; write for instance key:report or key:\"metrics\"+") from error
    found = {stage.name for stage in STAGES.values() if dg.AssetKey(stage.asset) in keys}
    if not found:
        raise InputError(f"selection '{selection}': holds no asset; valid: {', '.join(stage.asset for stage in STAGES.values())}")
    return found


def chosen(project: Project, names: set[str] | None, target: str | None) -> Iterator[Node]:
    """Nodes in building order, narrowed to stages and to one target (with all it needs where no stages are named)."""
    needed = _needed(project, target) if target else None
    for stage, key in project.graph.nodes():
        if (names is None or stage.name in names) and (needed is None or node_id(stage.name, key) in needed):
            yield stage, key


def _needed(project: Project, target: str) -> set[str]:
    """A target's nodes and everything upstream of them."""
    found: set[str] = set()

    def visit(name: str, key: str | None) -> None:
        if node_id(name, key) not in found:
            found.add(node_id(name, key))
            for upstream in project.graph.inputs(STAGES[name], key).values():
                visit(*upstream)

    for stage in STAGES.values():
        if stage.scope == "target":
            visit(stage.name, target)
    return found


def failure(result: Any, node: str) -> BaseException:
    """The error that ended a run, as it came out of the stage, unwrapped from Dagster's."""
    errors = [event.step_failure_data.error for event in result.get_step_failure_events() if event.step_failure_data.error]
    if any("DagsterExecutionInterruptedError" in error.to_string() for error in errors):
        return KeyboardInterrupt()
    for error in errors:
        while error.cause is not None:
            error = error.cause
        bad_input = error.message.partition(f"{InputError.__name__}: ")[2]
        if bad_input:
            return InputError(*(f"{node}: {line}" for line in bad_input.strip().splitlines()))
        return StageError(f"{node}: {error.message.partition(f'{StageError.__name__}: ')[2] or error.message}".strip())
    return StageError(f"{node}: the run failed before its first step; Dagster's record says why")
