"""The copy check: planted copies are found, honest images are not, and the false-flag rate is what it says."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from alignflow_core.metrics.copying import copy_check, distances, novelty_check, thumbnails


def textures(n: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(n, 32, 32, 3))
    return (128 + 60 * np.stack([gaussian_filter(x, (3, 3, 0)) * 10 for x in noise])).clip(0, 255).astype(np.uint8)


def test_planted_copies_are_flagged_however_turned_and_tinted():
    bank, held_out, fresh = textures(30, 0), textures(60, 1), textures(20, 2)
    turned = np.rot90(bank[3], 1)[:, ::-1]
    tinted = (bank[7] * [0.5, 0.9, 0.7] + 20).astype(np.uint8)
    check = copy_check(np.concatenate([turned[None], tinted[None], fresh]), bank, held_out, np.arange(60), 0.01)
    assert check.flagged[:2].all() and check.nearest[:2].tolist() == [3, 7]
    assert check.flagged[2:].sum() <= 1
    assert check.distance[0] == pytest.approx(0, abs=0.02)
    assert check.false_flag_rate == pytest.approx(1 / 61)
    assert check.chance(1) == 0 and check.chance(60) == pytest.approx(4, abs=1)  # P(X > x) falls by half with each further flag


def test_false_flag_rate_of_fresh_real_images():
    rates = []
    for seed in range(6):
        check = copy_check(textures(100, 10 * seed), textures(20, 10 * seed + 1), textures(39, 10 * seed + 2), np.arange(39), 0.1)
        assert check.false_flag_rate == pytest.approx(0.1)
        rates.append(check.flagged.mean())
    assert np.mean(rates) < 0.2
    check = copy_check(textures(4, 1), textures(20, 2), textures(39, 3), np.arange(39), 1.0)
    assert check.threshold > 0, "the quantile of all is the largest"


def test_frames_of_one_sequence_do_not_calibrate_each_other():
    frames = np.repeat(textures(10, 3), 4, axis=0)
    check = copy_check(textures(5, 4), textures(10, 5), frames, np.repeat(np.arange(10), 4), 0.01)
    assert 0 < check.threshold < 10
    lone = copy_check(textures(5, 4), textures(10, 5), frames[:4], np.zeros(4), 0.01)
    assert np.isnan(lone.threshold) and np.isnan(lone.false_flag_rate) and not lone.flagged.any()


def test_distance_is_least_over_the_eight_symmetries():
    a = textures(1, 6)
    for turned in (np.rot90(a, 2, (1, 2)), a[:, :, ::-1], a.transpose(0, 2, 1, 3)):
        assert distances(thumbnails(turned), thumbnails(a))[0, 0] == pytest.approx(0, abs=0.02)


def test_novelty_needs_no_unseen_target_image():
    """Smooth source, rougher and tinted target: real target images pass although all lie far from the source; a turned copy does not."""
    def target(n: int, seed: int) -> np.ndarray:
        return (textures(n, seed) * [0.9, 0.6, 0.3] + np.random.default_rng(seed).normal(0, 8, (n, 32, 32, 3))).clip(0, 255).astype(np.uint8)

    references, fresh = target(8, 7), target(100, 8)
    copy = (references[4] * 0.9).astype(np.uint8)[::-1]
    ratio, flagged = novelty_check(np.concatenate([copy[None], fresh]), references, textures(80, 9), np.arange(80), 0.01, np.random.default_rng(0))
    assert flagged[0] and ratio[0] < 0.2 and flagged[1:].mean() <= 0.05
    assert np.median(ratio[1:]) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(("n", "groups"), [(12, 12), (40, 12), (8, 1), (8, 2)])
def test_few_source_images_or_patients_still_tell_a_copy(n: int, groups: int):
    """As many references as source images, or an image of every patient in any mock set: something stays to compare with."""
    references, fresh = textures(n, 7), textures(100, 8)
    _, flagged = novelty_check(np.concatenate([references[3:4], fresh]), references, textures(12, 9), np.arange(12) % groups, 0.01,
                               np.random.default_rng(0))
    assert flagged[0] and flagged[1:].mean() <= 0.1  # of 12 images hardly more can be asked


def test_twins_among_the_references_do_not_hide_copies():
    references, fresh = textures(8, 7), textures(100, 8)
    queries = np.concatenate([references[4:5] // 8 * 8, fresh])
    once, twice = (novelty_check(queries, bank, textures(80, 9), np.arange(80), 0.01, np.random.default_rng(0))
                   for bank in (references, np.concatenate([references, references[:6]])))
    assert np.array_equal(once[0], twice[0]) and twice[1][0] and twice[1][1:].mean() <= 0.05
