"""Intervals and tests against scipy and by hand."""

import numpy as np
import pytest
from scipy import stats

from alignflow_core.metrics.statistics import bca_intervals, group_means, holm, signed_rank_p


def test_bca_equals_scipy():
    values = np.random.default_rng(0).gamma(1.0, size=(40, 2))
    low, high = bca_intervals(values, 0.95, 20_000, np.random.default_rng(1))
    for j in range(2):
        theirs = stats.bootstrap((values[:, j],), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(2)).confidence_interval
        assert (low[j], high[j]) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_bca_covers():
    rng = np.random.default_rng(3)
    low, high = bca_intervals(rng.normal(size=(50, 400)), 0.9, 1000, rng)
    assert ((low < 0) & (high > 0)).mean() == pytest.approx(0.9, abs=0.05)


def test_bca_counts_a_tie_as_half():
    """Resamples of few, mostly equal units often have the sample's mean up to rounding; counted as below it they would push the interval away."""
    values = np.array([0.33, 0.31, 0.31, 0.31, 0.31])[:, None]
    low, high = bca_intervals(values, 0.95, 2000, np.random.Generator(np.random.PCG64(0)))
    assert low[0] <= values.mean() <= high[0]
    exact = bca_intervals(values * 100 - 31, 0.95, 2000, np.random.Generator(np.random.PCG64(0)))  # 2, 0, 0, 0, 0: nothing is rounded
    assert [100 * low[0] - 31, 100 * high[0] - 31] == pytest.approx([exact[0][0], exact[1][0]], abs=1e-6)


def test_bca_of_constants_and_of_one_unit():
    low, high = bca_intervals(np.full((9, 1), 0.1), 0.95, 200, np.random.default_rng(0))
    assert (low[0], high[0]) == (pytest.approx(0.1), pytest.approx(0.1))
    assert np.isnan(bca_intervals(np.ones((1, 2)), 0.95, 200, np.random.default_rng(0))).all()


def test_same_seed_same_interval():
    values = np.random.default_rng(0).normal(size=(30, 1))
    first, again = (bca_intervals(values, 0.95, 700, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_signed_rank():
    differences = np.random.default_rng(4).normal(0.3, 1, size=25)
    assert signed_rank_p(differences) == pytest.approx(stats.wilcoxon(differences).pvalue)
    assert signed_rank_p(np.arange(1.0, 7.0)) == pytest.approx(2 / 2 ** 6)
    assert signed_rank_p(np.zeros(10)) == 1.0
    assert np.isnan(signed_rank_p(np.arange(5.0)))


def test_holm_by_hand():
    adjusted = holm(np.array([0.04, 0.01, np.nan, 0.03, 0.5]))
    assert adjusted[[0, 1, 3, 4]].tolist() == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert np.isnan(adjusted[2])


def test_group_means():
    values = np.array([[1.0, 0.0], [3.0, 2.0], [10.0, 4.0]])
    assert group_means(values, np.array(["b", "b", "a"])).tolist() == [[2.0, 1.0], [10.0, 4.0]]
