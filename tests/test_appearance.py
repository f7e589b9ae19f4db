"""Named appearance numbers on images that are made to have them."""

import numpy as np
import pytest

from alignflow_core.config import Task
from alignflow_core.metrics.appearance import appearance

TASK = Task(classes=("spot",))


def picture(level: float, spot: float, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A grey 64 px image with a disc of another level and Gaussian noise; and the disc."""
    y, x = np.mgrid[:64, :64]
    mask = ((x - 32) ** 2 + (y - 32) ** 2 < 144).astype(np.uint8)
    image = level + spot * mask[..., None] + np.random.default_rng(seed).normal(0, noise, (64, 64, 1)) * np.ones(3)
    return np.clip(np.round(image), 0, 255).astype(np.uint8)[None], mask[None]


def test_colour_contrast_and_noise_are_what_was_put_in() -> None:
    image, mask = picture(100, 40, 5)
    found = appearance(image, mask, TASK).iloc[0]
    assert found[["red", "green", "blue"]].tolist() == pytest.approx([100 + 40 * mask.mean()] * 3, abs=0.5)
    assert found["contrast_spot"] == pytest.approx(40, abs=1)
    assert found["noise"] == pytest.approx(5, rel=0.12)


def test_blur_lowers_sharpness_and_a_gradient_raises_illumination() -> None:
    from scipy.ndimage import gaussian_filter

    image, mask = picture(100, 40, 5)
    blurred = gaussian_filter(image.astype(float), (0, 1.5, 1.5, 0)).astype(np.uint8)
    lit = (image.astype(int) + np.linspace(-40, 40, 64).astype(int)[None, None, :, None]).astype(np.uint8)
    sharp, soft, sloped = (appearance(each, mask, TASK).iloc[0] for each in (image, blurred, lit))
    assert soft["sharpness"] < 0.5 * sharp["sharpness"] and sloped["illumination"] > 2 * sharp["illumination"]
    assert sloped["noise"] == pytest.approx(sharp["noise"], rel=0.1), "noise is blind to slow changes"


def test_without_masks_or_regions_contrast_is_unknown() -> None:
    image, mask = picture(100, 40, 5)
    assert np.isnan(appearance(image, None, TASK)["contrast_spot"].iloc[0])
    assert np.isnan(appearance(image, 0 * mask, TASK)["contrast_spot"].iloc[0])
