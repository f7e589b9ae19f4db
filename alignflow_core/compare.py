"""All targets, segmenters and arms side by side: means with intervals, paired differences, tests, share of the gap closed.

What the intervals mean: they are over the held-out test images (over patients or sequences where these are known) for the
trained networks at hand. Segmenter seeds are averaged per image first, so the intervals do not cover the luck of training a
generator or a segmenter anew; that needs several seeds and is a wider interval. Each segmenter architecture is compared and
tested by itself: what one finds does not depend on which others were trained.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from alignflow_core.metrics.comparison import compare, gap_closed
from alignflow_core.networks.registry import prefix
from alignflow_core.runner import Context

SOURCE = "source"  # the arm trained on real source pairs alone
HARM_BAR = 0.02  # Dice that an arm may lose on the source's own test images before it counts as harmed; less is of no consequence


def run(config: SimpleNamespace, inputs: Mapping[str, Path], out_dir: Path, context: Context) -> dict[str, float]:
    """Compare every arm with every baseline on every target, segmenter by segmenter.

    Writes ``comparison.parquet`` and ``.csv`` (classes averaged per image; an arm beside itself has its mean and no difference),
    ``per_class.parquet`` (the same with a ``class`` column), ``source_test.parquet`` (the same on the source's own test images, Dice against the arm
    ``source``, and whether an arm is ``harmed``: clearly worse there with every segmenter seed; no rows without that arm or such images) and
    ``gap.parquet`` (share of the gap between ``source`` and ``oracle`` that an arm closes).

    Returns:
        ``difference_<target>_<arm>_<baseline>`` in Dice and ``gap_closed_<target>_<arm>`` of the first segmenter architecture,
        with ``<architecture>/`` before the names of others.
    """
    values = _side_by_side(inputs, "metrics.parquet")
    table = compare(values, config.evaluate, config.seed)
    table.to_parquet(out_dir / "comparison.parquet", index=False)
    table.to_csv(out_dir / "comparison.csv", index=False, float_format="%.6g")
    by_class = [compare(part, config.evaluate, config.seed).assign(**{"class": str(name)}) for name, part in values.groupby("class", sort=False)]
    pd.concat(by_class or [table.assign(**{"class": ""})], ignore_index=True).to_parquet(out_dir / "per_class.parquet", index=False)
    at_home = _side_by_side(inputs, "source_test.parquet")
    there = compare(at_home, dataclasses.replace(config.evaluate, baselines=(SOURCE,)), config.seed) if SOURCE in set(at_home["arm"]) else table[:0]
    there.assign(harmed=_harmed(there, at_home)).to_parquet(out_dir / "source_test.parquet", index=False)
    gap = gap_closed(table)
    gap.to_parquet(out_dir / "gap.parquet", index=False)
    first = next(iter([*table["segmenter"], *at_home["segmenter"]]), "")
    dice = table[(table["metric"] == "dice") & table["difference"].notna()]
    numbers = {f"{prefix(row['segmenter'], first)}difference_{row['target']}_{row['arm']}_{row['baseline']}": row["difference"]
               for row in dice.to_dict("records")}
    numbers |= {f"{prefix(row['segmenter'], first)}gap_closed_{row['target']}_{row['arm']}": row["gap_closed"]
                for row in gap[gap["metric"] == "dice"].to_dict("records")}
    numbers = {name.replace("+", "_plus_"): float(value) for name, value in numbers.items() if np.isfinite(value)}
    return numbers | {"interval_level": config.evaluate.level}


def _side_by_side(inputs: Mapping[str, Path], file: str) -> pd.DataFrame:
    """One table of every target, as :mod:`evaluate` writes it; those without labels have no rows in ``metrics.parquet``."""
    tables = [pd.read_parquet(folder / file) for folder in inputs.values()]
    return pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)


def _harmed(there: pd.DataFrame, values: pd.DataFrame) -> "pd.Series[bool]":
    """Whether an arm lost more than :data:`HARM_BAR` for certain: over the images, and with its best segmenter against the worst of ``source``.

    Images alone do not tell: two trainings on the same pairs may differ by more.
    """
    seeds = values.groupby(["target", "segmenter", "arm", "segmenter_seed"])["value"].mean().groupby(level=["target", "segmenter", "arm"])
    best, worst = seeds.max().to_dict(), seeds.min().to_dict()
    rows = zip(there["target"], there["segmenter"], there["arm"], strict=True)
    beyond_luck = [best[target, segmenter, arm] < worst[target, segmenter, SOURCE] for target, segmenter, arm in rows]
    return (there["difference"] < -HARM_BAR) & (there["diff_ci_high"] < 0) & pd.Series(beyond_luck, index=there.index, dtype=bool)
