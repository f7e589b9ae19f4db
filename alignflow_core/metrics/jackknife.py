"""Standard errors and intervals of measures between two sets of images, by the delete-a-group jackknife.

A bootstrap draws some images twice. To a nearest-neighbour measure these are perfect matches, and they shrink the spread that FID,
KID and diversity measure, so that the resampled values lie about another centre. Leaving images out makes no duplicates.
Blocks of about a twentieth rather than single images suit measures that jump (k-th neighbours; Shao and Wu 1989), cost 40
evaluations whatever n is, and keep a patient's images together. By the inequality of Efron and Stein (1981) the jackknife's
variance is on average not too small, for any measure of independent units.

The intervals are for what the measure gives on average at this n: a bias such as that of FID is not taken out.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import t as student

BLOCKS = 20
Measure = Callable[[np.ndarray, np.ndarray], dict[str, float]]


@dataclass(frozen=True)
class Estimate:
    """A value, its standard error, and the ends of its interval; NaN where the data cannot tell."""

    value: float
    error: float
    low: float
    high: float


def deal(groups: np.ndarray, blocks: int, rng: np.random.Generator) -> np.ndarray:
    """Number of the block of every image, int [n]: whole groups (patients or sequences) dealt at random, as equally as they go.

    Groups count in order of appearance: sorted by their opaque ids, the blocks would depend on the key of the ids.
    """
    index, names = pd.factorize(groups)
    block_of = rng.permutation(len(names)) % min(blocks, max(len(names), 1))
    return np.asarray(block_of[index])


def estimates(measure: Measure, fake: np.ndarray, real: np.ndarray, fake_groups: np.ndarray, real_groups: np.ndarray, rng: np.random.Generator,
              share_of: Mapping[str, str] | None = None, least: Mapping[str, float] | None = None, level: float = 0.95) -> dict[str, Estimate]:
    """Every measure with its interval; both sets vary.

    Args:
        measure: called with features [n, D] of the fakes and [m, D] of the real images.
        fake_groups, real_groups: the independent unit of each image.
        share_of: measures that are a share of the ``"fake"`` or ``"real"`` images, for which the interval is Wilson's.
        least: smallest possible value of other measures, at which their intervals end.
        level: of the intervals, e.g. 0.95.
    """
    fake_blocks, real_blocks = deal(fake_groups, BLOCKS, rng), deal(real_groups, BLOCKS, rng)
    units = {"fake": len(np.unique(fake_groups)), "real": len(np.unique(real_groups))}
    values = measure(fake, real)
    sides = (_without([measure(fake[fake_blocks != b], real) for b in _numbers(fake_blocks)], values),
             _without([measure(fake, real[real_blocks != b]) for b in _numbers(real_blocks)], values))
    found = {}
    for name, value in values.items():
        error, freedom = standard_error(*(side[name] for side in sides))
        quantile = float(student.ppf((1 + level) / 2, freedom))
        if share_of and name in share_of:
            low, high = wilson(value, error, units[share_of[name]], quantile)
        else:
            low, high = float(np.maximum(value - quantile * error, (least or {}).get(name, -np.inf))), value + quantile * error
        found[name] = Estimate(value, error, low, high)
    return found


def _numbers(blocks: np.ndarray) -> Iterable[int]:
    return range(blocks.max() + 1) if len(blocks) else ()


def _without(found: list[dict[str, float]], names: Iterable[str]) -> dict[str, np.ndarray]:
    return {name: np.array([each[name] for each in found]) for name in names}


def standard_error(*sides: np.ndarray) -> tuple[float, float]:
    """Error from the values without each block, one array per set, and its degrees of freedom (Welch and Satterthwaite).

    NaN (and infinite degrees) where a set has a single block, a value is unknown, or all values agree: then the data know no error.
    """
    parts = [((len(side) - 1) * side.var(), len(side) - 1) for side in sides if len(side) > 1]
    total = float(sum(variance for variance, _ in parts))
    if len(parts) < len(sides) or not total > 0:
        return float("nan"), float("inf")
    return float(np.sqrt(total)), total ** 2 / sum(variance ** 2 / freedom for variance, freedom in parts)


def wilson(share: float, error: float, units: int, quantile: float) -> tuple[float, float]:
    """Wilson's interval (1927) of a share in [0, 1] that has this standard error: never a point, not even at 0 and 1.

    The error says how many independent images the share is worth, ``share (1 - share) / error^2``, at most ``units``;
    at 0 and 1, where no block may disagree, it is worth all of them.
    """
    worth = min(share * (1 - share) / error ** 2, units) if 0 < share < 1 else float(max(units, 1))
    centre, spread = share + quantile ** 2 / (2 * worth), share * (1 - share) / worth + quantile ** 2 / (4 * worth ** 2)
    width, total = quantile * np.sqrt(spread), 1 + quantile ** 2 / worth
    low, high = float((centre - width) / total), float((centre + width) / total)
    return 0.0 if share <= 0 else low, 1.0 if share >= 1 else high  # exactly, not up to rounding
