"""Are synthetic images copies of images the generator has seen?

An image is suspicious when it lies much closer to something the method was given (the *bank*: the
references, or the source training images) than to real images of the same kind the method never saw
(*held out*). How close is too close is read off real images: each held-out image is asked the same
question, so the rate of false flags is known and not guessed.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from alignflow_core.metrics.likeness import details, unlikeness

SIDE = 16
SOURCE_POOL = 400  # source images from which mock reference sets are drawn
TWIN = 1e-6  # distance between thumbnails of equal content, by rounding alone
TAIL = 4.0  # deviations below the median ratio of real images at which a flag begins: of a normal law 1 in 30 000 lies lower
TWICE = 6.0  # deviations below the median at which a held-out image is no yardstick: somebody is in the bank and held out, under two names
LEAST_HELD_OUT = 20  # real images that a threshold can be read off: fewer leave false flags above 1 in 21


@dataclass(frozen=True)
class CopyCheck:
    """Result for N queries.

    Attributes:
        nearest: row of the nearest bank image, int [N].
        distance: to that image (:func:`alignflow_core.metrics.likeness.unlikeness`; 0 is a copy, 1 unrelated), [N].
        ratio: that distance over the distance to the nearest held-out image, [N]; small means copied.
        threshold: ratios below it are flagged.
        flagged: bool [N].
        rank, n_calibration: the threshold is at most the rank-th smallest ratio of so many held-out images.
        n_twice: held-out images that are themselves near copies of bank images, and left out of the calibration.
    """

    nearest: np.ndarray
    distance: np.ndarray
    ratio: np.ndarray
    threshold: float
    flagged: np.ndarray
    rank: int
    n_calibration: int
    n_twice: int = 0

    @property
    def false_flag_rate(self) -> float:
        """Bound on the probability that a fresh real image is flagged (if it is exchangeable with the held-out ones)."""
        return self.rank / (self.n_calibration + 1) if self.rank else float("nan")

    @property
    def calibrated(self) -> bool:
        """Whether enough real images were held out for the threshold to mean something."""
        return self.rank > 0 and self.n_calibration >= LEAST_HELD_OUT

    def chance(self, n: int) -> float:
        """Flags among n fresh real images that chance explains at most: 95 % quantile of the beta-binomial law, NaN if uncalibrated."""
        from scipy.stats import betabinom  # as dear as torch to import, and only flags that are counted need it

        return float(betabinom.ppf(0.95, n, self.rank, self.n_calibration + 1 - self.rank)) if self.rank else float("nan")


def thumbnails(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] -> float64 [N, 16, 16, 3], each channel of each image standardised: neither resizing nor recolouring hides a copy."""
    small = [np.asarray(Image.fromarray(np.ascontiguousarray(i)).resize((SIDE, SIDE), Image.Resampling.BOX), np.float64) for i in images]
    stack = np.stack(small)
    return (stack - stack.mean((1, 2), keepdims=True)) / (stack.std((1, 2), keepdims=True) + 4.0)


def distances(queries: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """Distance of every query to every bank thumbnail, the least over the 8 flips and quarter turns, [N, M]."""
    flat = bank.reshape(len(bank), -1)
    turned = [np.rot90(q, turns, (1, 2)) for q in (queries, queries[:, :, ::-1]) for turns in range(4)]
    likeness = np.full((len(queries), len(bank)), -np.inf)  # norms are those of the unturned, so the nearest has the largest product
    for query in turned:
        np.maximum(likeness, query.reshape(len(query), -1) @ flat.T, out=likeness)
    squares = (queries ** 2).sum((1, 2, 3))[:, None] + (flat ** 2).sum(1) - 2 * likeness
    return np.sqrt(np.maximum(squares, 0) / flat.shape[1])


def copy_check(queries: np.ndarray, bank: np.ndarray, held_out: np.ndarray, groups: np.ndarray, quantile: float) -> CopyCheck:
    """Flag the queries that lie closer to the bank than real images do.

    The threshold is the lower of two: the ``quantile`` of real images' ratios, and their median less :data:`TAIL` deviations. The
    first bounds false flags without any law; the second, where ratios spread as they usually do, makes them so rare that a large
    set is not flagged by its size alone. Held-out images that are near copies of bank images (an eye photographed twice, under two
    names) are set aside first: a single one of them would make the check blind.

    Args:
        queries, bank, held_out: uint8 [N, H, W, 3], at least one bank image.
        groups: patient or sequence of each held-out image; a held-out image is not compared with its own group,
            or the frames of one video would look like copies of each other.
        quantile: share of real images that may be flagged. With n held-out images the least possible bound is 1 / (n + 1).

    Returns:
        A check whose ratios are NaN and flags false where fewer than two groups are held out.
    """
    known, unseen, asked = details(bank), details(held_out), details(queries)
    to_bank = unlikeness(asked, known)
    nearest, distance = to_bank.argmin(1), to_bank.min(1)
    if len(set(groups)) < 2:
        return CopyCheck(nearest, distance, np.full(len(queries), np.nan), float("nan"), np.zeros(len(queries), bool), 0, 0)
    ratio = distance / unlikeness(asked, unseen).min(1)
    among = unlikeness(unseen, unseen, barred=groups[:, None] == groups[None, :])
    real = unlikeness(unseen, known).min(1) / among.min(1)
    twice = real < _below_median(real, TWICE)
    calibration = np.sort(real[~twice])
    rank = min(len(calibration), max(1, int(quantile * (len(calibration) + 1))))
    threshold = min(float(calibration[rank - 1]), _below_median(real, TAIL))
    return CopyCheck(nearest, distance, ratio, threshold, ratio < threshold, rank, len(calibration), int(twice.sum()))


def _below_median(ratios: np.ndarray, deviations: float) -> float:
    """Median less so many deviations, of the logarithms; the deviation from the lower quartile, which few odd images do not move."""
    low, middle = np.quantile(np.log(ratios), [0.25, 0.5])
    return float(np.exp(middle - deviations * (middle - low) / 0.6745))


def novelty_check(queries: np.ndarray, references: np.ndarray, source: np.ndarray, groups: np.ndarray, quantile: float,
                  rng: np.random.Generator, draws: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Copies of references, for a method that has no other image of the target.

    Without unseen target images the yardstick is the references' own spacing (the median distance from one to the nearest
    other), and how small a ratio real images reach is learned on the source, where mock reference sets of the same size
    are drawn (of half of the source's images at most, and never of all its groups, or nothing would be left to compare them with). Source
    images themselves are no yardstick: whatever has come to look like the target lies nearer to the references.

    Args:
        queries, references, source: uint8 [N, H, W, 3].
        groups: patient or sequence of each source image.
        quantile: share of real images that may be flagged, as far as the target's spacing is like the source's
            (a single reference has no spacing: then only as far as the target is as varied as the source).

    Returns:
        Distance to the nearest reference in units of the spacing, [N], and which are flagged, bool [N]: none where the source is one image.
    """
    bank = thumbnails(references)
    ratio = distances(thumbnails(queries), bank).min(1) / _spacing(distances(bank, bank))
    if len(source) < 2:
        return ratio, np.zeros(len(ratio), bool)
    pool = np.unique(np.linspace(0, len(source) - 1, min(SOURCE_POOL, len(source))).astype(int))
    groups = groups[pool] if len(set(groups[pool])) > 1 else pool  # frames of a single sequence are compared with each other: better than nothing
    among = distances(small := thumbnails(source[pool]), small)
    n = min(len(references), len(pool) // 2)
    found = []
    for _ in range(draws):
        order = rng.permutation(len(pool))
        fresh = ~np.isin(groups, groups[order[:n]])
        if not fresh.any():  # few groups, and an image of each was drawn: that of the last stays out
            fresh = groups == groups[order[-1]]
        mock = order[~fresh[order]][:n]
        found.append(among[np.ix_(fresh, mock)].min(1) / _spacing(among[np.ix_(mock, mock)]))
    threshold = np.quantile(np.concatenate(found), quantile)
    return ratio, ratio < threshold


def _spacing(among: np.ndarray) -> float:
    """Median distance to the nearest other member, twins counted once, from distances [n, n]; 1 for a single one (thumbnails are standardised)."""
    single = ~np.tril(among < TWIN, -1).any(1)
    apart = among[np.ix_(single, single)] + np.diag(np.full(single.sum(), np.inf))
    return float(np.median(apart.min(1))) if len(apart) > 1 else 1.0
