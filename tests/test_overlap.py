"""Dice, IoU, HD95 and the cup-to-disc ratio against known answers, brute force and MONAI."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from alignflow_core.config import Task
from alignflow_core.metrics.overlap import hausdorff95, overlap, ratio_error, vertical_ratio

BINARY = Task()
REFUGE = Task(name="refuge", kind="refuge", classes=("disc", "cup"), nested=True)


def blobs(n: int, seed: int, size: int = 48) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(n, size, size))
    return np.stack([gaussian_filter(x, 4) > 0.02 for x in noise])


def square(top: int, height: int, size: int = 20) -> np.ndarray:
    mask = np.zeros((1, size, size), np.uint8)
    mask[0, top:top + height, 5:15] = 1
    return mask


def test_half_overlapping_squares():
    found = overlap(square(0, 10), square(5, 10), BINARY)
    assert found["dice"][0, 0] == pytest.approx(0.5)
    assert found["iou"][0, 0] == pytest.approx(1 / 3)
    assert found["hd95"][0, 0] == pytest.approx(5)


def test_empty_masks():
    empty, full = np.zeros((1, 6, 8), np.uint8), np.ones((1, 6, 8), np.uint8)
    assert [float(v[0, 0]) for v in overlap(empty, empty, BINARY).values()] == [1, 1, 0]
    for a, b in ((empty, full), (full, empty)):
        assert [float(v[0, 0]) for v in overlap(a, b, BINARY).values()] == [0, 0, 10]


def test_no_images():
    none = np.zeros((0, 6, 8), np.uint8)
    assert overlap(none, none, REFUGE)["hd95"].shape == (0, 2)


def test_nested_disc_includes_cup():
    truth = np.zeros((1, 8, 8), np.uint8)
    truth[0, 2:6, 2:6] = 1
    predicted = truth.copy()
    truth[0, 3:5, 3:5] = 2
    dice = overlap(predicted, truth, REFUGE)["dice"][0]
    assert dice.tolist() == [1.0, 0.0]


def test_hd95_equals_monai():
    import torch
    from monai.metrics import compute_hausdorff_distance

    a, b = blobs(12, 0), blobs(12, 1)
    theirs = compute_hausdorff_distance(torch.from_numpy(a)[:, None], torch.from_numpy(b)[:, None], include_background=True, percentile=95)
    ours = [hausdorff95(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(ours, theirs[:, 0].numpy(), atol=1e-5)


def test_vertical_ratio():
    mask = np.zeros((3, 20, 20), np.uint8)
    mask[0, 2:12, 3:9] = 1
    mask[0, 4:9, 4:6] = 2
    mask[1, 2:12, 3:9] = 1
    ratio = vertical_ratio(mask, REFUGE)
    assert ratio[:2].tolist() == [0.5, 0.0] and np.isnan(ratio[2])
    error = ratio_error(mask[[2, 1, 0]], mask[[0, 0, 2]], REFUGE)
    assert error[:2].tolist() == [0.5, 0.5] and np.isnan(error[2])
