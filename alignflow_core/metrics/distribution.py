"""Distances between two sets of feature vectors, float64 [n, D]; each needs its n, its floor and its interval beside it.

Exact, without a D x D matrix square root and with one Gram matrix for a whole kernel distance.
Too few vectors give NaN, never a number that looks like one.
"""

import numpy as np

from alignflow_core.metrics.jackknife import deal

NEIGHBOURS = 5
SHARE_OF = {"precision": "fake", "recall": "real", "coverage": "real"}  # measures that are a share of the images of one set
LEAST = {"fid": 0.0, "density": 0.0, "diversity": 0.0, "vendi": 1.0}

Features = np.ndarray


def frechet(x: Features, y: Features) -> float:
    """Fréchet distance (FID in this feature space) of the Gaussians fitted to x and y.

    ``|mean difference|^2 + tr(Cx + Cy - 2 (Cx Cy)^(1/2))`` with unbiased covariances. With ``Cx = A^T A``
    and ``Cy = B^T B`` the last trace is the sum of the singular values of ``A B^T``, an n x n matrix while
    n < D, D x D at most (by QR) otherwise. Biased upwards for few images: never print it without n.
    """
    if min(len(x), len(y)) < 2:
        return float("nan")
    a, b = _factor(x), _factor(y)
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + (a ** 2).sum() + (b ** 2).sum() - 2 * cross)


def _factor(x: Features) -> np.ndarray:
    """A with A^T A = covariance of x; at most D rows."""
    centred = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r")) if len(x) > x.shape[1] else centred


def kernel_distance(x: Features, y: Features) -> float:
    """KID: unbiased squared MMD with the kernel ``(u.v / D + 1)^3`` (Binkowski et al. 2018, arXiv 1801.01401), over all images at once."""
    both = np.concatenate([x, y])
    base = both @ both.T / x.shape[1] + 1
    return unbiased_mmd(base * base * base, len(x))


def cmmd(x: Features, y: Features) -> float:
    """Squared MMD with the Gaussian kernel :func:`similarity`, after CMMD (Jayasumana et al. 2024, arXiv 2401.09603).

    A characteristic kernel sees every difference between distributions, where FID and KID see the first two or three moments.
    Our choices: this product's descriptors in place of CLIP, the unbiased estimate (the biased one of CMMD is meant for
    thousands of images), no factor of 1000. At most 2.
    """
    both = np.concatenate([x, y])
    return unbiased_mmd(similarity(both), len(x))


def unbiased_mmd(gram: np.ndarray, n: int) -> float:
    """Unbiased squared MMD from the kernel [n + m, n + m] of both sets; may be negative, NaN with fewer than two members in a set."""
    m = len(gram) - n
    if min(n, m) < 2:
        return float("nan")
    inside_x = (gram[:n, :n].sum() - np.trace(gram[:n, :n])) / (n * (n - 1))
    inside_y = (gram[n:, n:].sum() - np.trace(gram[n:, n:])) / (m * (m - 1))
    return float(inside_x + inside_y - 2 * gram[:n, n:].mean())


def similarity(x: Features) -> np.ndarray:
    """Gaussian kernel ``exp(-|u - v|^2 / D)`` of all pairs, [n, n], 1 on the diagonal.

    Its bandwidth is ``sqrt(D / 2)``, about the distance of two real source images in ``features.FeatureSpace`` (median squared distance
    .53 D for fundus images, .59 D for phantoms): the median rule, but asked of the source once and not of each pair of sets, so that values compare.
    """
    return np.exp(-squared_distances(x, x) / x.shape[1])


def neighbourhoods(real: Features, fake: Features, k: int = NEIGHBOURS) -> dict[str, float]:
    """Precision, recall (Kynkäänniemi et al. 2019), density, coverage (Naeem et al. 2020) with k nearest neighbours."""
    if min(len(real), len(fake)) <= k:
        return dict.fromkeys(("precision", "recall", "density", "coverage"), float("nan"))
    between = squared_distances(real, fake)
    real_radius = np.partition(squared_distances(real, real), k, axis=1)[:, k]  # position 0 is the point itself
    fake_radius = np.partition(squared_distances(fake, fake), k, axis=1)[:, k]
    in_real = between < real_radius[:, None]
    return {
        "precision": float(in_real.any(0).mean()),
        "recall": float((between < fake_radius).any(1).mean()),
        "density": float(in_real.sum() / (k * len(fake))),
        "coverage": float((between.min(1) < real_radius).mean()),
    }


def squared_distances(x: Features, y: Features) -> np.ndarray:
    """[n, m] by one matrix product, centred first so that far-off sets lose no digits; equal rows are exactly 0 apart."""
    centre = y.mean(0) if len(y) else 0.0
    x, y = x - centre, y - centre
    norms = (x ** 2).sum(1)[:, None] + (y ** 2).sum(1)
    found = norms - 2 * x @ y.T
    return np.where(found > 1e-13 * norms, found, 0.0)


def diversity(x: Features) -> float:
    """Mean distance between two different members, divided by sqrt(D)."""
    n = len(x)
    return float("nan") if n < 2 else float(np.sqrt(squared_distances(x, x)).sum() / (n * (n - 1) * np.sqrt(x.shape[1])))


def vendi(kernel: np.ndarray) -> float:
    """Vendi score (Friedman and Dieng 2022, arXiv 2210.02410): exponential entropy of the eigenvalues of ``kernel / n``.

    The effective number of different members: 1 where all are alike, n where none resembles another.

    Args:
        kernel: similarities [n, n], 1 on the diagonal.
    """
    if len(kernel) < 2:
        return float("nan")
    shares = np.linalg.eigvalsh(kernel / len(kernel))
    shares = shares[shares > 1e-12]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def set_distances(fake: Features, real: Features) -> dict[str, float]:
    """Everything this module measures between a set and the real one, by name."""
    return {"kid": kernel_distance(fake, real), "cmmd": cmmd(fake, real), "fid": frechet(fake, real), **neighbourhoods(real, fake),
            "diversity": diversity(fake), "vendi": vendi(similarity(fake))}


def real_floor(real: Features, rng: np.random.Generator, groups: np.ndarray | None = None, splits: int = 20) -> dict[str, float]:
    """What real images score against real images: :func:`set_distances` of disjoint random halves, averaged.

    No method can be expected to do better. The halves are smaller than the full sets, which raises the floor of the biased FID a little.

    Args:
        real: features [n, D].
        groups: patient or sequence of each image; no patient is in both halves. Without it every image is its own.
    """
    found = []
    for _ in range(splits):
        half = deal(np.arange(len(real)) if groups is None else groups, 2, rng)
        found.append(set_distances(real[half == 0], real[half == 1]))
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}
