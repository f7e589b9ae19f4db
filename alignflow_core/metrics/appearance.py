"""How images look, in numbers that a person can name: colour, contrast between regions, sharpness, noise.

Measured for source, stage 1, aligned, references and target test images, they say *what* was aligned and what was not.
"""

import numpy as np
import pandas as pd
from scipy.ndimage import convolve, distance_transform_edt, gaussian_filter, laplace

from alignflow_core.config import Task
from alignflow_core.masks import regions

CHANNELS = ("red", "green", "blue")
# Immerkaer 1996, "Fast noise variance estimation": blind to constant, linear and quadratic intensity.
NOISE_KERNEL = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float64)


def appearance(images: np.ndarray, masks: np.ndarray | None, task: Task) -> pd.DataFrame:
    """One row per image.

    Args:
        images: uint8 [N, H, W, 3].
        masks: class numbers uint8 [N, H, W]; without them contrasts are NaN.

    Returns:
        Columns ``red``, ``green``, ``blue`` (mean, 0 to 255), ``contrast_<class>`` (mean luminance inside the class region minus
        that of a band of equal width around it, in grey levels; NaN where there is none), ``sharpness`` (mean absolute Laplacian
        over the luminance's deviation), ``noise`` (standard deviation in grey levels), ``illumination`` (deviation of the
        luminance blurred over a quarter of the side).
    """
    luminance = images.astype(np.float64) @ (0.299, 0.587, 0.114)
    table = pd.DataFrame(images.reshape(len(images), -1, 3).mean(1), columns=list(CHANNELS))
    inside = None if masks is None else regions(np.asarray(masks), task)
    for c, name in enumerate(task.classes):
        table[f"contrast_{name}"] = np.nan if inside is None else [_contrast(y, m) for y, m in zip(luminance, inside[:, c], strict=True)]
    table["sharpness"] = [np.abs(laplace(y)).mean() / max(float(y.std()), 1e-6) for y in luminance]
    table["noise"] = [np.sqrt(np.pi / 2) * np.abs(convolve(y, NOISE_KERNEL, mode="reflect")).mean() / 6 for y in luminance]
    table["illumination"] = [gaussian_filter(y, y.shape[0] / 4, mode="reflect").std() for y in luminance]
    return table


def _contrast(luminance: np.ndarray, region: np.ndarray) -> float:
    """Mean inside minus mean of the band around, as wide as a quarter of the region's own diameter."""
    if not region.any() or region.all():
        return float("nan")
    width = max(2.0, np.sqrt(region.sum() / np.pi) / 2)
    around = ~region & (distance_transform_edt(~region) <= width)
    return float(luminance[region].mean() - luminance[around].mean())
