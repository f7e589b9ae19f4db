"""Paired comparison of arms: bootstrap intervals, signed-rank tests, Holm's adjustment."""

import numpy as np
from scipy.special import ndtr, ndtri

FEWEST = 6  # pairs: below this no signed-rank test can reach p < .05


def group_means(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Average [n, k] rows within groups (patients or sequences), in order of appearance: images of one patient are not independent.

    Sorted by their opaque ids, groups would make the resamples of an interval depend on the key of the ids.
    """
    _, first, sorted_index, sorted_count = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(first)
    index, count = np.argsort(order)[sorted_index], sorted_count[order]
    total = np.zeros((len(count), values.shape[1]))
    np.add.at(total, index, values)
    return total / count[:, None]


def bca_intervals(values: np.ndarray, level: float, resamples: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Bias-corrected and accelerated bootstrap intervals (Efron 1987) of the column means.

    Args:
        values: float [n, k], n independent units; all columns share the resamples.
        level: e.g. 0.95.

    Returns:
        (low, high), each [k]. NaN for fewer than two units; a constant column gets its constant twice.
    """
    n, k = values.shape
    if n < 2:
        return np.full(k, np.nan), np.full(k, np.nan)
    mean = values.mean(0)
    means = bootstrap_means(values, resamples, rng)
    tied = np.abs(means - mean) <= 1e-12  # up to rounding: few or equal values make many
    below = ((means < mean) & ~tied).mean(0) + 0.5 * tied.mean(0)
    bias = ndtri(below.clip(0.5 / resamples, 1 - 0.5 / resamples))
    left_out = mean - (values.sum(0) - values) / (n - 1)
    cubes, squares = (left_out ** 3).sum(0), (left_out ** 2).sum(0)
    acceleration = np.divide(cubes, 6 * squares ** 1.5, out=np.zeros(k), where=squares > 1e-24)
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        shifted = bias + ndtri(tail)
        share = ndtr(bias + shifted / (1 - acceleration * shifted))
        ends.append(np.array([np.quantile(means[:, j], share[j]) for j in range(k)]))
    return ends[0], ends[1]


def bootstrap_means(values: np.ndarray, resamples: int, rng: np.random.Generator, chunk: int = 500) -> np.ndarray:
    """Column means of ``resamples`` resampled row sets, [resamples, k], as matrix products of row counts."""
    n, found = len(values), []
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        found.append(counts.astype(np.float64) @ values / n)
    return np.concatenate(found)


def signed_rank_p(differences: np.ndarray) -> float:
    """Two-sided Wilcoxon signed-rank p-value of paired differences.

    1.0 where all differences are zero; NaN for fewer than six pairs, which can prove nothing at 5 %.
    """
    if len(differences) < FEWEST:
        return float("nan")
    if not np.any(differences):
        return 1.0
    from scipy.stats import wilcoxon  # as dear as torch to import, and most who read tables test nothing

    return float(wilcoxon(differences).pvalue)


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down adjustment of one family of p-values (Holm 1979); NaN stays NaN and does not count."""
    adjusted = np.full(len(p_values), np.nan)
    known = np.flatnonzero(~np.isnan(p_values))
    order = known[np.argsort(p_values[known], kind="stable")]
    steps = p_values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted
