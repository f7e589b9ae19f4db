"""``alignflow pool``: runs that differ in their seed, as one table per target and segmenter architecture.

A trained network is a draw. Values are averaged per image over generator and segmenter seeds before intervals are taken over images (or patients);
how much the seeds themselves turn stands beside them, as the deviation of an arm's mean from seed to seed.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from alignflow_core.config import ARMS, COLOUR, Evaluate, Project, load_project
from alignflow_core.errors import InputError
from alignflow_core.metrics.comparison import compare, gap_closed
from alignflow_core.validation import nearest

NOT_COMPARED = ("seed", "profile", "machine", "report")  # runs to pool may differ in these
PLACES = ("dir", "file")  # of images, which are compared themselves


def pooled(runs: Sequence[Path], baselines: Sequence[str]) -> str:
    """Markdown tables of the finished runs in these folders.

    Args:
        runs: run folders; the same domains, tasks and targets, another ``seed`` each.
        baselines: arms that the others are compared with, beside those of ``evaluate.baselines``.

    Raises:
        InputError: a run is unfinished, two share a seed, other settings or test images differ, or a baseline is no arm.
    """
    projects = {run: load_project(run / "params.yaml") for run in runs}
    first = projects[runs[0]]
    problems = [f"{run}: has seed {project.seed}, as {other} has; run it with another seed=N"
                for i, (run, project) in enumerate(projects.items()) for other in runs[:i] if projects[other].seed == project.seed]
    problems += [f"{run}: differs from {runs[0]} in {', '.join(differing)}; pool runs that differ in their seed alone"
                 for run, project in projects.items() if (differing := _other_settings(first, project))]
    known = [*ARMS, *(name for comparator in first.comparators for name in (comparator, comparator + COLOUR))]
    problems += [f"--baseline {name}: unknown arm{nearest(name, known)}" for name in baselines if name not in known]
    problems += [f"{run}: target {target} is not evaluated yet; finish the run" for run, project in projects.items() for target in project.targets
                 if not (run / "artifacts" / "evaluate" / target / "metrics.parquet").exists()]
    problems += [f"{runs[0]}: target {name} has no labels, and nothing to pool" for name, target in first.targets.items()
                 if not first.domains[target.domain].labelled]
    if problems:
        raise InputError(*problems)
    values = pd.concat([pd.read_parquet(run / "artifacts" / "evaluate" / target / "metrics.parquet")
                        for run, project in projects.items() for target in project.targets], ignore_index=True)
    _refuse_other_images(values)
    settings = dataclasses.replace(first.evaluate, baselines=tuple(dict.fromkeys([*first.evaluate.baselines, *baselines])))
    return "\n".join(_tables(values, settings))


def _other_settings(one: Project, other: Project) -> list[str]:
    """Settings that decide numbers and differ, apart from the seed: an arm's mean over runs would be one of unequal things."""
    here, there = (_deciding(dataclasses.asdict(project)) for project in (one, other))
    return sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))


def _deciding(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{above}{key}"
        if name not in NOT_COMPARED and key not in PLACES:
            found |= _deciding(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def _refuse_other_images(values: pd.DataFrame) -> None:
    """Seeds must be compared on the same test images."""
    for target, part in values.groupby("target"):
        tested = {frozenset(own["case_id"]) for _, own in part.groupby("generator_seed")}
        if len(tested) > 1:
            raise InputError(f"target {target}: the runs were tested on other images; keep data.seed and the raw folders the same")


def _tables(values: pd.DataFrame, settings: Evaluate) -> list[str]:
    table = compare(values, settings, seed=0)
    gap = gap_closed(table).query("metric == 'dice'").dropna(subset="gap_closed")
    per_seed = values[values["metric"] == "dice"].groupby(["target", "segmenter", "arm", "generator_seed", "segmenter_seed"])["value"].mean()
    several, level = table["segmenter"].nunique() > 1, f"{100 * settings.level:g} %"
    lines = []
    for names, part in table.groupby(["target", "segmenter"], sort=False):
        target, segmenter = map(str, names)
        dice = part[part["metric"] == "dice"]
        means = part.drop_duplicates(["arm", "metric"]).pivot(index="arm", columns="metric", values="mean")
        own = values[(values["target"] == target) & (values["segmenter"] == segmenter)]
        baselines = list(dict.fromkeys(dice["baseline"]))
        counts = [own[f"{kind}_seed"].nunique() for kind in ("generator", "segmenter")]
        versus_all = "".join(f" minus `{name}` [{level}] |" for name in baselines)
        shares = gap[(gap["target"] == target) & (gap["segmenter"] == segmenter)].set_index("arm")["gap_closed"].to_dict()  # none without an oracle
        name = f"{target}, {segmenter}" if several else target
        lines += [f"**{name}**: {dice['n'].iloc[0]} test units, {counts[0]} generator × {counts[1]} segmenter seeds", "",
                  f"| arm | Dice [{level}] | ± over seeds | IoU | HD95 px |{versus_all}{' gap closed |' if shares else ''}",
                  "|---" * (5 + len(baselines) + bool(shares)) + "|"]
        for arm in dict.fromkeys(dice["arm"]):
            rows = dice[dice["arm"] == arm].set_index("baseline")
            one = rows.iloc[0]
            seeds = per_seed[target, segmenter, arm]
            versus = [f"{r['difference']:+.3f} [{r['diff_ci_low']:+.3f}, {r['diff_ci_high']:+.3f}]" if name in rows.index
                      and pd.notna((r := rows.loc[name])["difference"]) else "" for name in baselines]
            share = [f"{100 * shares[arm]:.0f} %" if arm in shares else ""] if shares else []
            deviation = f"{seeds.std():.3f}" if len(seeds) > 1 else "–"
            cells = [arm, f"{one['mean']:.3f} [{one['ci_low']:.3f}, {one['ci_high']:.3f}]", deviation, f"{means.loc[arm, 'iou']:.3f}",
                     f"{means.loc[arm, 'hd95']:.1f}", *versus, *share]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines
