"""Build what is stale, and only that, through Dagster: one run a lane, lanes that do not need each other side by side."""

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

from alignflow_core.config import Project, load_project
from alignflow_core.errors import InputError, StageError
from alignflow_core.stages import STAGES, node_id
from pipelines.lane import build_lane, build_lane_apart
from pipelines.plan import Lane, Node, lanes, stale_nodes, upstream_lanes
from pipelines.workers import default_jobs

if TYPE_CHECKING:
    import dagster as dg


def materialize(root: Path, selection: str | None = None, target: str | None = None, mode: str = "dvc", jobs: int | None = None) -> list[str]:
    """Build through Dagster, so that it appears there; returns the nodes whose artifact was built anew, lane by lane.

    Args:
        root: project root.
        selection: Dagster asset selection such as ``key:"synthetic_images"+``; all of it is materialised (what is up to
            date costs a second). Without it, only what is stale; a lane is looked at after the lanes that it reads from were built,
            so that nothing follows a rebuilt artifact that came out identical.
        target: only this target; without a selection with everything it needs.
        mode: ``dvc`` or ``inline``, see :class:`pipelines.resources.StageRunner`.
        jobs: lanes built at once; as many as the cores hold ``machine.threads`` if not given, one with ``inline``. Stages that want an
            accelerator still take turns.

    Raises:
        InputError: unknown target, empty or wrong selection, bad input of a stage.
        StageError: a stage that failed; lanes that do not need it have been built all the same.
    """
    import dagster as dg

    from pipelines.automation import observe
    from pipelines.definitions import build_definitions
    from pipelines.resources import commit_unrecorded, dagster_home

    root = root.resolve()
    project = load_project(root / "params.yaml")
    if target is not None and target not in project.targets:
        raise InputError(f"target '{target}': not one of {', '.join(project.targets)}")
    definitions = build_definitions(root, mode)
    nodes = list(chosen(project, None if selection is None else selected_stages(definitions, selection), target))
    if not nodes:
        raise InputError(f"selection '{selection}': holds nothing that target '{target}' needs; leave out --target, or select what it is built from")
    dagster_home(root)
    with dg.DagsterInstance.get() as instance:
        observe(root, instance)
        job = definitions.resolve_implicit_global_asset_job_def()

        def build(lane: Lane, own: list[Node], apart: bool) -> list[str]:
            wanted = own if selection is not None else stale_nodes(project, root, own)
            if not wanted:
                return []
            return build_lane_apart(root, mode, lane, wanted) if apart else build_lane(root, project, job, instance, lane, wanted)

        todo = lanes(nodes)
        if selection is None:  # a lane that is up to date and reads from none that is not need not be looked at again
            stale = {node_id(stage.name, key) for stage, key in stale_nodes(project, root, nodes)}
            if mode == "dvc":
                commit_unrecorded(root, [(stage.name, key) for stage, key in nodes if node_id(stage.name, key) not in stale])
            todo = {lane: own for lane, own in todo.items() if any(node_id(stage.name, key) in stale for stage, key in own)}
        return in_order(project, todo, build, 1 if mode == "inline" else jobs or default_jobs(project))


def in_order(project: Project, todo: dict[Lane, list[Node]], build: Callable[[Lane, list[Node], bool], list[str]], jobs: int) -> list[str]:
    """Call ``build(lane, nodes, apart)`` for every lane after those it reads from, ``jobs`` at a time; what they returned, joined.

    ``apart`` is false for a lane that nothing else runs beside: it is built in this thread, others in threads of their own.
    When one fails, those that need it are left out, the others are built, and then the failure is raised.
    """
    from pipelines.resources import STOPPING, stop_all

    STOPPING.clear()
    waiting = {lane: upstream_lanes(project, lane, own) & todo.keys() for lane, own in todo.items()}
    built: list[str] = []
    errors: list[Exception] = []
    running: dict[Future[list[str]], Lane] = {}

    def done(lane: Lane, nodes: list[str]) -> None:
        built.extend(nodes)
        for needed in waiting.values():
            needed.discard(lane)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            while running or any(not needed for needed in waiting.values()):
                ready = [lane for lane, needed in waiting.items() if not needed]
                if not running and (jobs == 1 or len(ready) == 1):
                    del waiting[ready[0]]
                    try:
                        done(ready[0], build(ready[0], todo[ready[0]], False))
                    except (InputError, StageError) as error:
                        errors.append(error)
                    continue
                for lane in ready:
                    running[pool.submit(build, lane, todo[lane], True)] = lane
                    del waiting[lane]
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    lane, problem = running.pop(future), future.exception()
                    if problem is None:
                        done(lane, future.result())
                    else:
                        errors.append(problem if isinstance(problem, InputError | StageError) else StageError(f"{lane}: {problem!r}"))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop_all()
            raise
    if errors:
        raise joined(errors)
    return built


def joined(errors: list[Exception]) -> Exception:
    """One error that says what several said; bad input before failure."""
    if len(errors) == 1:
        return errors[0]
    lines = [line for error in errors for line in str(error).splitlines()]
    return InputError(*lines) if all(isinstance(error, InputError) for error in errors) else StageError("\n".join(lines))


def selected_stages(definitions: "dg.Definitions", selection: str) -> set[str]:
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
