"""Distances between two sets of feature vectors, float64 [n, D]; each needs its n and its floor beside it.

Exact, without a D x D matrix square root and with one Gram matrix for a whole kernel distance.
Too few vectors give NaN, never a number that looks like one.
"""

import numpy as np

NEIGHBOURS = 5

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


def kernel_distance(x: Features, y: Features) -> tuple[float, float]:
    """KID: unbiased squared MMD with the kernel ``(u.v / D + 1)^3`` (Binkowski et al. 2018), and its jackknife standard error.

    All leave-one-out values follow from the row sums of one Gram matrix. Unbiased, so it may be negative.
    """
    n, m = len(x), len(y)
    if min(n, m) < 3:
        return float("nan"), float("nan")
    both = np.concatenate([x, y])
    gram = (both @ both.T / x.shape[1] + 1) ** 3
    np.fill_diagonal(gram, 0)
    xx, yy, xy = gram[:n, :n].sum(1), gram[n:, n:].sum(1), gram[:n, n:]
    total_x, total_y, total_xy = xx.sum(), yy.sum(), xy.sum()
    inside_x, inside_y = total_x / (n * (n - 1)), total_y / (m * (m - 1))
    without_x = (total_x - 2 * xx) / ((n - 1) * (n - 2)) + inside_y - 2 * (total_xy - xy.sum(1)) / ((n - 1) * m)
    without_y = inside_x + (total_y - 2 * yy) / ((m - 1) * (m - 2)) - 2 * (total_xy - xy.sum(0)) / (n * (m - 1))
    variance = (n - 1) * without_x.var() + (m - 1) * without_y.var()
    return float(inside_x + inside_y - 2 * total_xy / (n * m)), float(np.sqrt(variance))


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
    centre = y.mean(0)
    x, y = x - centre, y - centre
    norms = (x ** 2).sum(1)[:, None] + (y ** 2).sum(1)
    found = norms - 2 * x @ y.T
    return np.where(found > 1e-13 * norms, found, 0.0)


def diversity(x: Features) -> float:
    """Mean distance between two different members, divided by sqrt(D)."""
    n = len(x)
    return float("nan") if n < 2 else float(np.sqrt(squared_distances(x, x)).sum() / (n * (n - 1) * np.sqrt(x.shape[1])))


def set_distances(fake: Features, real: Features) -> dict[str, float]:
    """Everything this module measures between a set and the real one, by name; ``kid_error`` is KID's standard error."""
    kid, error = kernel_distance(fake, real)
    return {"kid": kid, "kid_error": error, "fid": frechet(fake, real), **neighbourhoods(real, fake), "diversity": diversity(fake)}


def real_floor(real: Features, rng: np.random.Generator, splits: int = 20) -> dict[str, float]:
    """What real images score against real images: :func:`set_distances` of disjoint random halves, averaged.

    No method can be expected to do better. The halves are smaller than the full sets, which raises the floor of the biased FID a little.
    """
    half, found = len(real) // 2, []
    for _ in range(splits):
        order = rng.permutation(len(real))
        found.append(set_distances(real[order[:half]], real[order[half:2 * half]]))
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}
