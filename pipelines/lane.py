"""One Dagster run over the stale nodes of one lane: in this process, or in one of its own.

Dagster sets up logging anew for every run, which two threads of one process cannot do at once; lanes side by side so are processes.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignflow_core.artifact import read_json
from alignflow_core.config import Project, load_project
from alignflow_core.errors import InputError, StageError, exit_code
from alignflow_core.runner import plan_stage, provenance_file
from alignflow_core.stages import STAGES, node_id
from pipelines.plan import Lane, Node

if TYPE_CHECKING:
    import dagster as dg

QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}  # Dagster's own record keeps every line


def build_lane(root: Path, project: Project, job: "dg.JobDefinition", instance: "dg.DagsterInstance", lane: Lane, nodes: list[Node]) -> list[str]:
    """One Dagster run over the nodes of a lane; returns those whose artifact is another one than before."""
    import dagster as dg

    own = {node_id(stage.name, key) for stage, key in nodes}
    for stage, key in nodes:  # a missing input is a matter of one line, not of a failed run
        if not any(node_id(*each) in own for each in project.graph.inputs(stage, key).values()):
            plan_stage(project, root, stage, key)
    print(f"{lane}: {', '.join(stage.name for stage, _ in nodes)}", file=sys.stderr, flush=True)
    before = {node_id(stage.name, key): _state(root, stage.name, key) for stage, key in nodes}
    result = job.execute_in_process(run_config=QUIET, instance=instance, asset_selection=[dg.AssetKey(stage.asset) for stage, _ in nodes],
                                    partition_key=lane.key, raise_on_error=False)
    if not result.success:
        raise failure(result, nodes)
    return [node for (stage, key), node in zip(nodes, before, strict=True) if _state(root, stage.name, key) != before[node]]


def _state(root: Path, stage: str, key: str | None) -> tuple[str, float] | None:
    """What tells one building of an artifact from another."""
    file = provenance_file(root, stage, key)
    return (str(read_json(file)["fingerprint"]), file.stat().st_mtime) if file.exists() else None


def build_lane_apart(root: Path, mode: str, lane: Lane, nodes: list[Node]) -> list[str]:
    """:func:`build_lane` in a process of its own, which goes down with this one; same result, same errors."""
    from pipelines.resources import run_guarded

    with tempfile.NamedTemporaryFile(suffix=".json") as result:
        run_guarded([sys.executable, "-m", "pipelines.lane", "--root", str(root), "--mode", mode, "--result", result.name,
                     *(["--key", lane.key] if lane.key else []), lane.job, *(stage.name for stage, _ in nodes)], root)
        told = read_json(Path(result.name))
    if told["problems"]:
        raise InputError(*told["problems"]) if told["bad_input"] else StageError("\n".join(told["problems"]))
    built: list[str] = told["built"]
    return built


def main() -> int:
    """What :func:`build_lane_apart` starts."""
    import dagster as dg

    from pipelines.definitions import build_definitions
    from pipelines.resources import dagster_home

    parser = argparse.ArgumentParser(prog="python -m pipelines.lane", description=__doc__)
    for option in ("--root", "--result"):
        parser.add_argument(option, type=Path, required=True)
    parser.add_argument("--mode", required=True)
    parser.add_argument("--key")
    parser.add_argument("job")
    parser.add_argument("stages", nargs="+")
    options = parser.parse_args()
    nodes: list[Node] = [(STAGES[name], options.key) for name in options.stages]
    dagster_home(options.root)
    with dg.DagsterInstance.get() as instance:
        job = build_definitions(options.root, options.mode).resolve_implicit_global_asset_job_def()
        told: dict[str, Any] = {"built": [], "problems": [], "bad_input": False}
        try:
            told["built"] = build_lane(options.root, load_project(options.root / "params.yaml"), job, instance, Lane(options.job, options.key), nodes)
        except (InputError, StageError) as error:  # the caller raises it anew; scraped from the output it would come with those of others
            told |= {"problems": str(error).splitlines(), "bad_input": isinstance(error, InputError)}
    options.result.write_text(json.dumps(told), encoding="utf-8")
    return 0


def failure(result: Any, nodes: list[Node]) -> BaseException:
    """The error that ended a run in this process, as it came out of the stage; where it was no stage's, what Dagster has of it."""
    from pipelines.resources import ENDED_BY

    steps = {stage.asset: node_id(stage.name, key) for stage, key in nodes}
    events = [event for event in result.get_step_failure_events() if event.step_failure_data.error]
    if any("DagsterExecutionInterruptedError" in event.step_failure_data.error.to_string() for event in events):
        return KeyboardInterrupt()
    for event in events:
        node, told = steps.get(event.step_key, event.step_key), event.step_failure_data.error
        error = ENDED_BY.pop(node, None)
        if isinstance(error, InputError):
            return InputError(*(f"{node}: {problem}" for problem in str(error).splitlines()))
        if error is not None:
            return StageError(f"{node}: {error if isinstance(error, StageError) else f'{type(error).__name__}: {error}'}")
        while told.cause is not None:
            told = told.cause
        return StageError(f"{node}: {told.message}".strip())
    return StageError(f"{', '.join(steps.values())}: the run failed before its first step; Dagster's record says why")


if __name__ == "__main__":
    sys.exit(exit_code(main))
