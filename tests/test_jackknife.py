"""Intervals of set measures: textbook errors, whole patients, honest coverage."""

import numpy as np
import pytest
from scipy.stats import norm, t

from alignflow_core.metrics.distribution import LEAST, SHARE_OF, diversity, kernel_distance, set_distances
from alignflow_core.metrics.jackknife import deal, estimates, standard_error, wilson


def interval(measure, x, y, groups_x=None, groups_y=None, seed=0, **options):
    groups = [np.arange(len(s)) if g is None else g for s, g in ((x, groups_x), (y, groups_y))]
    return estimates(measure, x, y, *groups, np.random.default_rng(seed), **options)


def test_error_of_a_difference_of_means_is_the_textbook_one():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 1)), rng.normal(1, 3, size=(14, 1))
    found = interval(lambda a, b: {"difference": float(b.mean() - a.mean())}, x, y)["difference"]
    parts = x.var(ddof=1) / 20, y.var(ddof=1) / 14
    assert found.error == pytest.approx(np.sqrt(sum(parts)))
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 19 + parts[1] ** 2 / 13)
    assert found.high - found.value == pytest.approx(found.error * t.ppf(0.975, freedom)) == pytest.approx(found.value - found.low)
    assert standard_error(np.arange(20.0), np.ones(3))[1] == pytest.approx(19)  # a side that does not vary adds nothing


def test_error_of_kid_equals_leaving_each_image_out():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(6, 4)), rng.normal(0.5, 1.5, size=(9, 4))
    left_x = np.array([kernel_distance(np.delete(x, i, 0), y) for i in range(6)])
    left_y = np.array([kernel_distance(x, np.delete(y, i, 0)) for i in range(9)])
    assert interval(set_distances, x, y)["kid"].error == pytest.approx(np.sqrt(5 * left_x.var() + 8 * left_y.var()))


def test_patients_stay_whole_and_widen_the_interval():
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(30), 3)
    blocks = deal(groups, 20, rng)
    assert all(len(set(blocks[groups == g])) == 1 for g in range(30)) and set(blocks) == set(range(20))
    assert len(set(deal(np.arange(5), 20, rng))) == 5 and len(deal(np.arange(0), 20, rng)) == 0
    twins, y = np.repeat(rng.normal(size=(30, 4)), 3, 0), rng.normal(0.5, 1, size=(200, 4))
    alone, together = interval(set_distances, twins, y)["cmmd"], interval(set_distances, twins, y, groups)["cmmd"]
    assert alone.value == together.value and together.error > 1.2 * alone.error


def test_wilson_is_the_binomial_one_and_never_a_point():
    p, n, z = 0.3, 50, norm.ppf(0.975)
    centre, half = (p + z * z / 2 / n) / (1 + z * z / n), z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    assert wilson(p, np.sqrt(p * (1 - p) / n), 80, z) == pytest.approx((centre - half, centre + half))
    assert wilson(p, 1e-9, n, z) == pytest.approx((centre - half, centre + half))  # never worth more images than there are
    assert wilson(1.0, np.nan, n, z) == pytest.approx((n / (n + z * z), 1)) and wilson(0.0, np.nan, n, z) == pytest.approx((0, z * z / (n + z * z)))
    ends = [(wilson(0.0, np.nan, n, z)[0], wilson(1.0, np.nan, n, z)[1]) for n in range(1, 50)]
    assert set(ends) == {(0.0, 1.0)}  # no 3e-18 in a table


def test_what_cannot_be_known_is_nan():
    x, y = np.random.default_rng(3).normal(size=(6, 3)), np.random.default_rng(4).normal(size=(30, 3))
    found = interval(set_distances, x, y, share_of=SHARE_OF, least=LEAST)
    assert np.isfinite(found["density"].value) and np.isnan(found["density"].low)  # without one of six, five neighbours are too many
    assert np.isfinite([found["kid"].low, found["fid"].high, found["vendi"].low]).all() and found["vendi"].low >= 1
    one_patient = interval(set_distances, x, y, np.zeros(6))["kid"]
    assert np.isfinite(one_patient.value) and np.isnan(one_patient.error) and np.isnan(one_patient.high)
    assert all(np.isnan(each.low) for each in interval(set_distances, x[:0], y, share_of=SHARE_OF, least=LEAST).values())


def test_intervals_cover_what_the_measure_gives_on_average():
    rng = np.random.default_rng(5)
    pairs = [(rng.normal(size=(40, 4)), rng.normal(0.5, 1.2, size=(40, 4))) for _ in range(60)]
    every = [interval(set_distances, x, y, seed=i, share_of=SHARE_OF, least=LEAST) for i, (x, y) in enumerate(pairs)]
    for name in ("kid", "cmmd", "fid", "precision", "recall", "density", "coverage", "diversity", "vendi"):
        centre = np.mean([each[name].value for each in every])
        assert np.mean([each[name].low <= centre <= each[name].high for each in every]) >= 0.85, name
    assert np.mean([each["diversity"].error for each in every]) == pytest.approx(np.std([diversity(x) for x, _ in pairs]), rel=0.3)
