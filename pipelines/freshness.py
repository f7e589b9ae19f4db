"""Freshness of what people read, the comparison and the report, by content rather than by age.

Dagster's ``FreshnessPolicy`` counts hours since the last materialisation. Here hours say nothing: a report of last year whose
inputs are unchanged is fresh, one of a minute ago is not if a reference set was replaced since. Dagster's own status by data
version looks one step back only, so that the report would pass while something far upstream is stale.
"""

from collections.abc import Callable
from pathlib import Path

import dagster as dg

from alignflow_core.artifact import json_hash
from alignflow_core.config import load_project
from alignflow_core.runner import provenance_file
from alignflow_core.stages import STAGES
from pipelines.assets import code_of
from pipelines.plan import plan
from pipelines.resources import nameless, without_file_names
from pipelines.versions import shown_cause

RESULTS, UP_TO_DATE = ("compare", "report"), "up_to_date"


def up_to_date(stale_nodes: list[tuple[str, str]], stage: str) -> dg.AssetCheckResult:
    """Whether everything that these results rest on is as params.yaml, the raw folders and the code would have it now, by a :func:`plan`."""
    stale = {node: cause for node, cause in stale_nodes if stage == "report" or node != "report"}
    first = next(iter(stale.items()), None)
    return dg.AssetCheckResult(passed=not stale, severity=dg.AssetCheckSeverity.WARN, metadata={
        "stale": len(stale), "first": f"{first[0]}: {shown_cause(first[1])}" if first else "", "nodes": ", ".join(stale)})


def freshness_checks(root: Path) -> list[dg.AssetChecksDefinition]:
    """The same question to both, asked after every build of theirs and by hand."""
    def check(stage: str) -> dg.AssetChecksDefinition:
        @dg.asset_check(asset=STAGES[stage].asset, name=UP_TO_DATE,
                        description="Nothing that these results rest on has changed since; 'alignflow plan' says what did.")
        def fresh() -> dg.AssetCheckResult:
            with without_file_names():
                return up_to_date(plan(root), stage)

        return fresh

    return [check(stage) for stage in RESULTS]


def freshness_sensor(root: Path, signature: Callable[[Path], str]) -> dg.SensorDefinition:
    """Looks again whenever an input was touched or an artifact built, so that the report turns yellow by itself.

    Args:
        root: project root.
        signature: see :func:`pipelines.automation.signature`.
    """
    @dg.sensor(name="stale_results", minimum_interval_seconds=120, default_status=dg.DefaultSensorStatus.RUNNING,
               description="Marks the comparison and the report when something they rest on has changed. Builds nothing.")
    @nameless
    def stale_results(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        project = load_project(root / "params.yaml")
        nodes = list(project.graph.nodes())
        files = [provenance_file(root, stage.name, key) for stage, key in nodes]
        code = sorted({code_of(project, stage, key) for stage, key in nodes})
        now = json_hash([signature(root), code, [file.stat().st_mtime_ns if file.exists() else None for file in files]])
        built = [stage for stage in RESULTS if provenance_file(root, stage, None).exists()]
        if now == context.cursor or not built:
            return dg.SkipReason("nothing was touched" if built else "no results yet")
        stale = plan(root)
        results = {stage: up_to_date(stale, stage) for stage in built}
        return dg.SensorResult(cursor=now, asset_events=[
            dg.AssetCheckEvaluation(asset_key=dg.AssetKey(STAGES[stage].asset), check_name=UP_TO_DATE, passed=result.passed,
                                    severity=result.severity, metadata=result.metadata) for stage, result in results.items()])

    return stale_results
