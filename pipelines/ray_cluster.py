"""The same assets on Ray: point ``workspace.yaml`` at this module instead of ``pipelines.definitions`` (extra ``ray``).

An asset's stage then runs as a task of a Ray cluster, and the job ``build_on_ray`` hands over everything that is stale at once: tasks wait
for those they read from, so that targets are built side by side. A task is what Dagster would have started here, ``dvc repro`` of one stage,
in the project folder that all workers share.
"""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import ray
from dagster_ray import LocalRay, RayResource
from ray.exceptions import RayTaskError, TaskCancelledError

from alignflow_core.config import load_project
from alignflow_core.errors import InputError, StageError
from alignflow_core.stages import STAGES, Stage, node_id
from pipelines.definitions import build_definitions
from pipelines.plan import plan
from pipelines.resources import StageRunner, project_root
from pipelines.sync import sync

GRACE_SECONDS = 60.0  # for training loops to save their state

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def build_stage(root: str, stage: str, key: str | None, *after: str) -> str:
    """One task: build an artifact on the machine that Ray has chosen; ``after`` are the tasks it had to wait for."""
    cards = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    if cards:  # Ray hands out cards one by one, so one lock for the whole machine would be too much
        os.environ["ALIGNFLOW_GPU_LOCK"] = str(Path.home() / ".cache" / "alignflow" / f"gpu-{socket.gethostname()}-{'-'.join(map(str, cards))}.lock")
    StageRunner(root=root).build(stage, key)
    return node_id(stage, key)


class RawFolders:
    """Stages that read raw folders, one after another: each versions the data, which DVC refuses while another stage reads them."""

    def build_stage(self, *arguments: Any) -> str:
        """As :func:`build_stage`."""
        return build_stage(*arguments)


def fan_out(root: Path, nodes: Sequence[tuple[Stage, str | None]]) -> list[str]:
    """Build artifacts on the connected cluster, each after those of them that it reads; returns their names.

    A stage asks for ``machine.threads`` CPUs, and for one GPU if it wants one and the cluster has any. Where one fails, what does not
    depend on it is still built.

    Args:
        root: project root, the same path on every worker.
        nodes: stages and keys in building order, as :meth:`alignflow_core.stages.Graph.nodes` lists them.

    Raises:
        InputError: no DVC project.
        StageError: stages that failed, with what they said.
    """
    if not (root / ".dvc").is_dir():
        raise InputError(f"{root}: not a DVC project; run 'git init' and 'dvc init' there")
    project = load_project(root / "params.yaml")
    n_gpus = 1 if project.machine.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1 else 0
    raw_folders: Any = ray.remote(RawFolders).options(num_cpus=0).remote()
    tasks: dict[str, Any] = {}
    for stage, key in nodes:
        node = node_id(stage.name, key)
        upstream = {node_id(*each) for each in project.graph.inputs(stage, key).values()}
        build = raw_folders.build_stage.options(name=node) if stage.raw else ray.remote(build_stage).options(
            name=node, num_cpus=project.machine.threads, num_gpus=n_gpus if stage.gpu else 0, max_retries=0)
        tasks[node] = build.remote(str(root), stage.name, key, *(tasks[each] for each in tasks if each in upstream))
    try:
        ray.wait(list(tasks.values()), num_returns=len(tasks))
    except BaseException:
        for task in tasks.values():
            ray.cancel(task)
        ray.wait(list(tasks.values()), num_returns=len(tasks), timeout=GRACE_SECONDS)
        raise
    return results(tasks)


def results(tasks: dict[str, Any]) -> list[str]:
    """Names of finished tasks; what failed is named once, not again for all that waited for it."""
    first: BaseException | None = None
    problems: dict[str, str] = {}  # what was said -> who said it first: tasks that waited for a failed one repeat it
    for node, task in tasks.items():
        try:
            ray.get(task)
        except (RayTaskError, TaskCancelledError) as error:
            cause = getattr(error, "cause", None) or error
            first = first or cause
            problems.setdefault(str(cause), node)
    if problems:
        raise StageError("; ".join(f"{node}: {said}" for said, node in problems.items())) from first
    return list(tasks)


class RayStageRunner(StageRunner):
    """Builds one artifact as a task of a Ray cluster.

    Attributes:
        cluster: ``LocalRay``, which joins the cluster that ``RAY_ADDRESS`` names, or another resource of dagster-ray.
    """

    cluster: dg.ResourceDependency[RayResource]

    def build(self, stage: str, key: str | None) -> None:
        """See :meth:`StageRunner.build`; errors come back as what they were."""
        try:
            fan_out(Path(self.root), [(STAGES[stage], key)])
        except StageError as error:
            raise error.__cause__ if isinstance(error.__cause__, InputError | StageError) else error from None


def on_ray(root: Path, cluster: RayResource) -> dg.Definitions:
    """The project's definitions with every stage on a cluster, and the job ``build_on_ray``."""
    @dg.op(description="Everything stale as tasks of the cluster, then told to Dagster and MLflow.")
    def fan_out_stale(context: dg.OpExecutionContext, cluster: RayResource) -> None:
        stale = {node for node, _ in plan(root)}
        nodes = [(stage, key) for stage, key in load_project(root / "params.yaml").graph.nodes() if node_id(stage.name, key) in stale]
        context.log.info(f"built on Ray: {', '.join(fan_out(root, nodes))}")
        sync(root)

    @dg.job(description="Build everything that is stale on the Ray cluster, targets side by side.", executor_def=dg.in_process_executor)
    def build_on_ray() -> None:
        fan_out_stale()

    here = build_definitions(root)
    return dg.Definitions(assets=here.assets, jobs=[*(here.jobs or []), build_on_ray], sensors=here.sensors, executor=here.executor,
                          resources={"runner": RayStageRunner(root=str(root), cluster=cluster), "cluster": cluster})


@dg.definitions
def defs() -> dg.Definitions:
    """On the cluster that ``RAY_ADDRESS`` names; without one a run starts Ray on this machine."""
    return on_ray(project_root(), LocalRay())
