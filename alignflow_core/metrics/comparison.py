"""Arms side by side: means with intervals, paired differences, tests, share of the gap closed; units are patients, sequences or images."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from alignflow_core.config import Evaluate, in_order
from alignflow_core.errors import InputError
from alignflow_core.metrics.statistics import bca_intervals, group_means, holm, signed_rank_p
from alignflow_core.seeding import derive_seed

COLUMNS = ["target", "segmenter", "arm", "baseline", "metric", "n", "mean", "ci_low", "ci_high",
           "difference", "diff_ci_low", "diff_ci_high", "p_value", "p_adjusted"]

ERRORS = ("hd95", "cdr_error")  # metrics where lower is better


def compare(values: pd.DataFrame, settings: Evaluate, seed: int) -> pd.DataFrame:
    """Long per-image values (as ``evaluate`` writes them) -> one row per target, segmenter, arm, baseline and metric.

    Args:
        settings: ``bootstrap``, ``level``, ``baselines``. Each baseline, metric and segmenter is a family of tests, adjusted over all targets and
            arms; what a variant of a target shares with it is one test.
        seed: of the resampling; targets and metrics draw independently, segmenters alike.

    Returns:
        the columns :data:`COLUMNS`; no rows where there are no values, since no target has labels.

    Raises:
        InputError: a target has no baseline among its arms.
    """
    trained = {str(target): set(part["arm"]) for target, part in values.groupby("target", sort=False)}
    if without := [target for target, arms in trained.items() if not arms & set(settings.baselines)]:
        raise InputError(f"evaluate.baselines: none of {', '.join(settings.baselines)} was trained for {', '.join(without)}; "
                         f"name one that was, such as {next(iter(in_order(trained[without[0]])))}, or add one to segment.arms")
    frames = []
    for target, segmenter, metric in _distinct(values, "target", "segmenter", "metric"):
        part = values[(values["target"] == target) & (values["segmenter"] == segmenter) & (values["metric"] == metric)]
        images = part.groupby(["group", "case_id", "arm"], sort=False)["value"].mean().unstack("arm", sort=False)  # over classes and seeds
        units = group_means(images.to_numpy(), images.index.get_level_values("group").to_numpy())
        arms = {arm: units[:, images.columns.get_loc(arm)] for arm in in_order(images.columns)}
        rng = np.random.Generator(np.random.PCG64(derive_seed(seed, "compare", target, metric)))
        found = _compare_arms(arms, settings, rng).assign(target=target, segmenter=segmenter, metric=metric)
        cases = hashlib.sha256("\n".join(map(str, images.index.get_level_values("case_id"))).encode()).hexdigest()
        frames.append(found.assign(test=cases + found["arm"] + found["test"]))
    if not frames:
        return pd.DataFrame({name: pd.Series(dtype=object if name in COLUMNS[:5] else float) for name in COLUMNS})
    table = pd.concat(frames, ignore_index=True)
    for _, family in table.groupby(["segmenter", "metric", "baseline"]):
        once = family.drop_duplicates("test")
        adjusted = dict(zip(once["test"], holm(once["p_value"].to_numpy()), strict=True))
        table.loc[family.index, "p_adjusted"] = family["test"].map(adjusted)
    return table[COLUMNS]


def _compare_arms(arms: dict[str, np.ndarray], settings: Evaluate, rng: np.random.Generator) -> pd.DataFrame:
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
        test = hashlib.sha256(difference.tobytes()).hexdigest()
        rows.append((arm, baseline, len(difference), columns[:, i].mean(), low[i], high[i], *paired, test))
    names = ["arm", "baseline", "n", "mean", "ci_low", "ci_high", "difference", "diff_ci_low", "diff_ci_high", "p_value", "test"]
    return pd.DataFrame(rows, columns=names)


def gap_closed(table: pd.DataFrame) -> pd.DataFrame:
    """(arm - source) / (oracle - source) per target, segmenter, arm and metric; empty where either end is missing, NaN where there is no gap.

    Errors are counted downwards, so that the share reads the same.
    """
    rows = []
    for target, segmenter, metric in _distinct(table, "target", "segmenter", "metric"):
        part = table[(table["target"] == target) & (table["segmenter"] == segmenter) & (table["metric"] == metric)]
        arms = part.drop_duplicates("arm").set_index("arm")["mean"]
        if not {"source", "oracle"} <= set(arms.index):
            continue
        better = arms * (-1 if metric in ERRORS else 1)
        gap = better["oracle"] - better["source"]
        rows += [(target, segmenter, arm, metric, (value - better["source"]) / gap if gap > 0 else np.nan) for arm, value in better.items()]
    return pd.DataFrame(rows, columns=["target", "segmenter", "arm", "metric", "gap_closed"])


def beside_variants(table: pd.DataFrame, names: Sequence[str], arms: Sequence[str]) -> tuple[str | None, list[dict[str, Any]]]:
    """A target beside its variants, each by the first of ``arms`` that it has.

    Args:
        table: what :func:`compare` found of one metric and one segmenter.
        names: the target, then its variants.
        arms: in the order in which they are looked for.

    Returns:
        The arm that all are compared with, ``stage1`` or, where no segmenter was trained on stage 1, ``source`` (``None`` without either),
        and the rows of those that have one.
    """
    found = set(table.loc[table["target"] == names[0], "baseline"])
    against = next((arm for arm in ("stage1", "source") if arm in found), None)
    rows = []
    for name in names:
        own = table[(table["target"] == name) & (table["baseline"] == against)].set_index("arm")
        arm = next((each for each in arms if each in own.index), None)
        if arm is not None:
            rows.append({"name": name, "arm": arm, **{str(column): value for column, value in own.loc[arm].items()}})
    return against, rows


def _distinct(table: pd.DataFrame, *columns: str) -> list[tuple[str, ...]]:
    """Distinct value tuples in order of appearance."""
    return list(dict.fromkeys(zip(*(table[column] for column in columns), strict=True)))
