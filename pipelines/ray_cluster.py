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
from pipelines.assets import without_names
from pipelines.definitions import build_definitions
from pipelines.plan import plan
from pipelines.resources import NoDvcError, StageRunner, project_root
from pipelines.sync import sync

GRACE_SECONDS = 60.0  # for training loops to save their state

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


class ClusterError(StageError):
    """Stages that failed on the cluster.

    Attributes:
        causes: stage with its key, such as ``align@amber`` -> what ended its task.
    """

    def __init__(self, causes: dict[str, Exception]) -> None:
        super().__init__("; ".join(f"{node}: {cause}" for node, cause in causes.items()))
        self.causes = causes


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
        ClusterError: some stages failed.
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
    causes: dict[str, Exception] = {}
    for node, task in tasks.items():
        try:
            ray.get(task)
        except (RayTaskError, TaskCancelledError) as error:
            cause = getattr(error, "cause", None) or error
            if str(cause) not in map(str, causes.values()):  # tasks that waited for a failed one repeat what it said
                causes[node] = cause
    if causes:
        raise ClusterError(causes)
    return list(tasks)


def for_the_record(nodes: Sequence[tuple[Stage, str | None]], failed: ClusterError) -> dg.Failure:
    """What Dagster, whose records are kept, is told of failed tasks: all they said, but for those that may name raw files."""
    told = []
    for stage, key in nodes:
        node = node_id(stage.name, key)
        if node in failed.causes:
            cause = failed.causes[node]
            may_name_files = stage.raw and not isinstance(cause, StageError | NoDvcError)
            told.append(f"{node}: {without_names(stage, key, cause).description if may_name_files else cause}")
    return dg.Failure("; ".join(told), allow_retries=False)


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
        except ClusterError as failed:
            cause = failed.causes[node_id(stage, key)]
            raise cause if isinstance(cause, InputError | StageError) else failed from None


def on_ray(root: Path, cluster: RayResource) -> dg.Definitions:
    """The project's definitions with every stage on a cluster, and the job ``build_on_ray``."""
    @dg.op(description="Everything stale as tasks of the cluster, then told to Dagster and MLflow.")
    def fan_out_stale(context: dg.OpExecutionContext, cluster: RayResource) -> None:
        stale = {node for node, _ in plan(root)}
        nodes = [(stage, key) for stage, key in load_project(root / "params.yaml").graph.nodes() if node_id(stage.name, key) in stale]
        try:
            built = fan_out(root, nodes)
        except ClusterError as failed:
            raise for_the_record(nodes, failed) from None
        context.log.info(f"built on Ray: {', '.join(built)}")
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
