"""All targets and arms side by side: means with intervals, paired differences, tests, share of the gap closed.

What the intervals mean: they are over the held-out test images (over patients or sequences where these are known) for the
trained networks at hand. Segmenter seeds are averaged per image first, so the intervals do not cover the luck of training a
generator or a segmenter anew; that needs several seeds and is a wider interval.
"""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from alignflow_core.config import ARMS
from alignflow_core.errors import InputError
from alignflow_core.metrics.statistics import bca_intervals, group_means, holm, signed_rank_p
from alignflow_core.runner import Context
from alignflow_core.seeding import derive_seed

COLUMNS = ["target", "arm", "baseline", "metric", "n", "mean", "ci_low", "ci_high",
           "difference", "diff_ci_low", "diff_ci_high", "p_value", "p_adjusted"]

ERRORS = ("hd95", "cdr_error")  # metrics where lower is better


def run(config: SimpleNamespace, inputs: Mapping[str, Path], out_dir: Path, context: Context) -> dict[str, float]:
    """Compare every arm with every baseline on every target.

    Writes ``comparison.parquet`` and ``.csv`` (classes averaged per image; an arm beside itself has its mean and no difference),
    ``per_class.parquet`` (the same with a ``class`` column) and ``gap.parquet``
    (share of the gap between ``source`` and ``oracle`` that an arm closes).

    Returns:
        ``difference_<target>_<arm>_<baseline>`` in Dice and ``gap_closed_<target>_<arm>``.
    """
    values = pd.concat([pd.read_parquet(folder / "metrics.parquet") for folder in inputs.values()], ignore_index=True)
    table = compare(values, config.evaluate, config.seed)
    table.to_parquet(out_dir / "comparison.parquet", index=False)
    table.to_csv(out_dir / "comparison.csv", index=False, float_format="%.6g")
    by_class = [compare(part, config.evaluate, config.seed).assign(**{"class": str(name)}) for name, part in values.groupby("class", sort=False)]
    pd.concat(by_class, ignore_index=True).to_parquet(out_dir / "per_class.parquet", index=False)
    gap = gap_closed(table)
    gap.to_parquet(out_dir / "gap.parquet", index=False)
    dice = table[(table["metric"] == "dice") & table["difference"].notna()]
    numbers = {f"difference_{row['target']}_{row['arm']}_{row['baseline']}": row["difference"] for row in dice.to_dict("records")}
    numbers |= {f"gap_closed_{row['target']}_{row['arm']}": row["gap_closed"] for row in gap[gap["metric"] == "dice"].to_dict("records")}
    numbers = {name.replace("+", "_plus_"): float(value) for name, value in numbers.items() if np.isfinite(value)}
    return numbers | {"interval_level": config.evaluate.level}


def compare(values: pd.DataFrame, settings: SimpleNamespace, seed: int) -> pd.DataFrame:
    """Long per-image values (as ``evaluate`` writes them) -> one row per target, arm, baseline and metric.

    Args:
        settings: ``bootstrap``, ``level``, ``baselines``.
        seed: of the resampling; targets and metrics draw independently.

    Raises:
        InputError: no baseline is among the arms.
    """
    if not set(settings.baselines) & set(values["arm"]):
        raise InputError(f"evaluate.baselines: none of {', '.join(settings.baselines)} was trained; add one to segment.arms")
    frames = []
    for target, metric in _distinct(values, "target", "metric"):
        part = values[(values["target"] == target) & (values["metric"] == metric)]
        images = part.groupby(["group", "case_id", "arm"], sort=False)["value"].mean().unstack("arm", sort=False)  # over classes and seeds
        units = group_means(images.to_numpy(), images.index.get_level_values("group").to_numpy())
        arms = {arm: units[:, images.columns.get_loc(arm)] for arm in ARMS if arm in images.columns}
        rng = np.random.Generator(np.random.PCG64(derive_seed(seed, "compare", target, metric)))
        frames.append(_compare_arms(arms, settings, rng).assign(target=target, metric=metric))
    table = pd.concat(frames, ignore_index=True)
    table["p_adjusted"] = table.groupby(["metric", "baseline"])["p_value"].transform(lambda p: holm(p.to_numpy()))
    return table[COLUMNS]


def _compare_arms(arms: dict[str, np.ndarray], settings: SimpleNamespace, rng: np.random.Generator) -> pd.DataFrame:
    """Rows of one target and metric; ``arms`` holds one value per unit (patient, sequence or image) in the same order."""
    pairs = [(arm, baseline) for baseline in settings.baselines if baseline in arms for arm in arms]
    columns = np.stack([*arms.values(), *(arms[arm] - arms[baseline] for arm, baseline in pairs)], axis=1)
    low, high = bca_intervals(columns, settings.level, settings.bootstrap, rng)
    position = {arm: i for i, arm in enumerate(arms)}
    rows = []
    for j, (arm, baseline) in enumerate(pairs, start=len(arms)):
        i, difference = position[arm], columns[:, j]
        paired = ((np.nan,) * 4 if arm == baseline
                  else (difference.mean(), low[j], high[j], signed_rank_p(difference)))
        rows.append((arm, baseline, len(difference), columns[:, i].mean(), low[i], high[i], *paired))
    return pd.DataFrame(rows, columns=["arm", "baseline", "n", "mean", "ci_low", "ci_high", "difference", "diff_ci_low", "diff_ci_high", "p_value"])


def gap_closed(table: pd.DataFrame) -> pd.DataFrame:
    """(arm - source) / (oracle - source) per target, arm and metric; empty where either end is missing, NaN where there is no gap to close.

    Errors are counted downwards, so that the share reads the same.
    """
    rows = []
    for target, metric in _distinct(table, "target", "metric"):
        arms = table[(table["target"] == target) & (table["metric"] == metric)].drop_duplicates("arm").set_index("arm")["mean"]
        if not {"source", "oracle"} <= set(arms.index):
            continue
        better = arms * (-1 if metric in ERRORS else 1)
        gap = better["oracle"] - better["source"]
        rows += [(target, arm, metric, (value - better["source"]) / gap if gap > 0 else np.nan) for arm, value in better.items()]
    return pd.DataFrame(rows, columns=["target", "arm", "metric", "gap_closed"])


def _distinct(table: pd.DataFrame, *columns: str) -> list[tuple[str, ...]]:
    """Distinct value tuples in order of appearance."""
    return list(dict.fromkeys(zip(*(table[column] for column in columns), strict=True)))
