"""Distances between image sets: known answers, textbook formulas, and what the descriptors see."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from alignflow_core.metrics.distribution import (
    cmmd,
    diversity,
    frechet,
    kernel_distance,
    neighbourhoods,
    real_floor,
    set_distances,
    similarity,
    vendi,
)
from alignflow_core.metrics.features import FeatureSpace, descriptors


def sets(n: int, m: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.normal(0.5, 1.5, size=(m, d))


@pytest.mark.parametrize(("n", "m", "d"), [(40, 55, 8), (7, 9, 20), (5, 60, 12)])
def test_frechet_equals_the_matrix_square_root(n, m, d):
    x, y = sets(n, m, d)
    cx, cy = np.cov(x.T), np.cov(y.T)
    with np.errstate(all="ignore"):
        root = np.linalg.eigvals(cx @ cy).clip(0).real ** 0.5 if min(n, m) <= d else np.diag(sqrtm(cx @ cy)).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cx) + np.trace(cy) - 2 * root.sum()
    assert frechet(x, y) == pytest.approx(expected, rel=1e-5)


def test_frechet_of_known_gaussians():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200_000, 2)) * [1, 2] + [3, 0]
    y = rng.normal(size=(200_000, 2)) * [2, 2]
    assert frechet(x, y) == pytest.approx(9 + 1, abs=0.06)  # |mean difference|^2 + sum (s1 - s2)^2
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_equals_the_double_sum():
    x, y = sets(6, 9, 4)

    def mmd(a, b):
        kernel = lambda u, v: (u @ v / 4 + 1) ** 3  # noqa: E731
        within = [sum(kernel(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j) / (len(s) * (len(s) - 1)) for s in (a, b)]
        return sum(within) - 2 * np.mean([[kernel(u, v) for v in b] for u in a])

    assert kernel_distance(x, y) == pytest.approx(mmd(x, y))


def test_kernel_distances_are_unbiased():
    rng = np.random.default_rng(2)
    for measure in (kernel_distance, cmmd):
        found = np.array([measure(rng.normal(size=(20, 6)), rng.normal(size=(25, 6))) for _ in range(300)])
        assert abs(found.mean()) < 3 * found.std() / np.sqrt(300)


def test_cmmd_equals_the_double_sum_and_the_law_of_two_normals():
    x, y = sets(6, 9, 4)
    mean = lambda a, b, skip: np.mean([np.exp(-((u - v) ** 2).sum() / 4) for i, u in enumerate(a) for j, v in enumerate(b) if not (skip and i == j)])  # noqa: E731
    assert cmmd(x, y) == pytest.approx(mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False))
    # for u - v ~ N(m, 2) per dimension and the kernel exp(-(u - v)^2 / D): E k = (1 + 4 / D)^(-1/2) exp(-m^2 / (D + 4)) each
    rng, shift, d = np.random.default_rng(3), 0.7, 3
    found = cmmd(rng.normal(size=(1000, d)), rng.normal(shift, 1, size=(1000, d)))
    assert found == pytest.approx(2 * (1 + 4 / d) ** (-d / 2) * (1 - np.exp(-d * shift ** 2 / (d + 4))), abs=0.02)
    assert cmmd(x, x + 1e3) == pytest.approx(2 * mean(x, x, True))


def test_vendi_counts_what_is_different():
    assert vendi(np.eye(7)) == pytest.approx(7) and vendi(np.ones((7, 7))) == pytest.approx(1)
    assert vendi(np.kron(np.eye(3), np.ones((4, 4)))) == pytest.approx(3)  # three kinds, four of each
    assert vendi(similarity(1e3 * np.eye(5))) == pytest.approx(5) and vendi(similarity(np.ones((5, 2)))) == pytest.approx(1)
    rho, n = 0.4, 6  # equal correlation: one eigenvalue 1 + (n - 1) rho, the others 1 - rho
    shares = np.array([1 + (n - 1) * rho, *[1 - rho] * (n - 1)]) / n
    assert vendi(np.where(np.eye(n), 1, rho)) == pytest.approx(np.prod(shares ** -shares))


def test_neighbourhoods_of_equal_far_and_collapsed_sets():
    x = np.random.default_rng(3).normal(size=(60, 3))
    same = neighbourhoods(x, x)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    assert same["density"] == pytest.approx(1.0)  # each point lies in the ball of itself and 4 of its neighbours' on average
    assert set(neighbourhoods(x, x + 100).values()) == {0}
    collapsed = neighbourhoods(x, np.repeat(x[:1], 20, 0) + 1e-6)
    assert collapsed["precision"] == 1 and collapsed["recall"] == 0 and collapsed["coverage"] < 0.5


def test_neighbourhoods_equal_the_definition():
    x, y = sets(12, 15, 3)
    radius = lambda s: [sorted(np.linalg.norm(s - p, axis=1))[5] for p in s]  # noqa: E731
    inside = np.array([[np.linalg.norm(a - b) < r for b in y] for a, r in zip(x, radius(x), strict=True)])
    covered = np.array([[np.linalg.norm(a - b) < r for b, r in zip(y, radius(y), strict=True)] for a in x])
    assert neighbourhoods(x, y) == pytest.approx({
        "precision": inside.any(0).mean(), "recall": covered.any(1).mean(),
        "density": inside.sum() / (5 * 15), "coverage": inside.any(1).mean()})


def test_too_few_images_give_nan():
    for n in (0, 1):
        assert all(np.isnan(value) for value in set_distances(np.ones((n, 4)), np.zeros((30, 4))).values())


def test_floor_of_identical_sources():
    x = np.random.default_rng(4).normal(size=(80, 5))
    floor = real_floor(x, np.random.default_rng(0))
    assert abs(floor["kid"]) < 0.1 and floor["precision"] > 0.8 and 0 < floor["fid"] < 1
    assert floor["diversity"] == pytest.approx(diversity(x), rel=0.05)
    assert floor == real_floor(x, np.random.default_rng(0))


def test_floor_never_parts_a_patient():
    one_each = np.random.default_rng(4).normal(size=(30, 5))
    twins, groups = np.repeat(one_each, 2, 0), np.repeat(np.arange(30), 2)
    apart, together = real_floor(twins, np.random.default_rng(0)), real_floor(twins, np.random.default_rng(0), groups)
    assert together["kid"] > apart["kid"] and together["fid"] > apart["fid"]


class Features(torch.nn.Module):
    """Passes features on, as torchmetrics wants an extractor to look."""

    num_features = 24

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(("n", "m"), [(80, 80), (60, 90)])
@pytest.mark.filterwarnings("ignore:.*save all extracted features")
def test_fid_and_kid_equal_torchmetrics(n, m):
    fid_peer, kid_peer = pytest.importorskip("torchmetrics.image.fid"), pytest.importorskip("torchmetrics.image.kid")
    x, y = sets(n, m, 24, seed=6)
    fid = fid_peer.FrechetInceptionDistance(feature=Features(), normalize=True).set_dtype(torch.float64)
    kid = kid_peer.KernelInceptionDistance(feature=Features(), normalize=True, subsets=1, subset_size=n)
    for features, real in ((y, True), (x, False)):
        fid.update(torch.from_numpy(features), real=real)
        kid.update(torch.from_numpy(features), real=real)
    assert frechet(x, y) == pytest.approx(float(fid.compute()), rel=1e-4)
    if n == m:  # theirs is for sets of one size
        assert kernel_distance(x, y) == pytest.approx(float(kid.compute()[0]), rel=1e-4)


@pytest.mark.parametrize("shift", [0.0, 0.3, 2.0])
def test_neighbourhoods_equal_prdc(shift):
    peer = pytest.importorskip("prdc")
    rng = np.random.default_rng(7)
    real, fake = rng.normal(size=(70, 6)), rng.normal(shift, 0.9, size=(50, 6))
    assert neighbourhoods(real, fake) == pytest.approx(peer.compute_prdc(real_features=real, fake_features=fake, nearest_k=5))


def test_descriptors_see_colour_blur_and_noise():
    rng = np.random.default_rng(5)
    ramp = np.linspace(40, 200, 32)[None, :, None, None] + np.zeros((8, 1, 32, 3))
    base = (ramp + rng.normal(0, 3, size=(8, 32, 32, 3))).clip(0, 255).astype(np.uint8)
    space = FeatureSpace.fit(base)
    own = np.abs(space(base)).mean()
    assert descriptors(base).shape == (8, 118) and np.isfinite(descriptors(base)).all()
    tinted = (base * [1, 0.8, 0.6]).astype(np.uint8)
    noisy = (base + rng.normal(0, 15, base.shape)).clip(0, 255).astype(np.uint8)
    for changed in (tinted, noisy):
        assert np.abs(space(changed)).mean() > 2 * own
    np.testing.assert_array_equal(space(base)[3], space(base[3:4])[0])


def test_descriptors_of_flat_images_are_finite():
    assert np.isfinite(FeatureSpace.fit(np.zeros((2, 16, 16, 3), np.uint8))(np.full((2, 16, 16, 3), 255, np.uint8))).all()
