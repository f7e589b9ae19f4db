"""What ``workspace.yaml`` points Dagster at: the project in the current folder, or in ``ALIGNFLOW_ROOT``."""

from pathlib import Path

import dagster as dg

from alignflow_core.config import load_project
from pipelines.assets import observed_assets, stage_asset
from pipelines.automation import inputs_sensor, jobs, signature, stale_sensor
from pipelines.freshness import freshness_checks, freshness_sensor
from pipelines.resources import StageRunner, project_root


def build_definitions(root: Path, mode: str = "dvc") -> dg.Definitions:
    """Everything Dagster shows of a project; ``mode`` is that of :class:`StageRunner`.

    Raises:
        InputError: ``params.yaml`` is missing or wrong.
    """
    project = load_project(root / "params.yaml")
    lane_jobs = jobs(project)
    return dg.Definitions(
        assets=[*(stage_asset(project, stage) for stage in project.graph.stages()), *observed_assets(project, root)],
        asset_checks=freshness_checks(root), jobs=lane_jobs,
        sensors=[inputs_sensor(root), stale_sensor(root, lane_jobs), freshness_sensor(root, signature)],
        resources={"runner": StageRunner(root=str(root), mode=mode)}, executor=dg.in_process_executor)


@dg.definitions
def defs() -> dg.Definitions:
    """Built when Dagster asks, so that importing this module needs no project."""
    return build_definitions(project_root())
