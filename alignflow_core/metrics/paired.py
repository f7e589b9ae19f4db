"""Image by image comparison of fakes with the real images they stand for: PSNR, SSIM, MS-SSIM and a perceptual distance.

Diagnostics only. A fake painted from a real image's mask need not equal that image, and these measures reward copying it.
Conventions are those of torchmetrics 1.9, to which the tests compare: data range 255, 11 x 11 Gaussian window of deviation 1.5,
mirrored borders (they count in SSIM; MS-SSIM's contrast terms leave them out), K1 = .01, K2 = .03, mean over colour channels.
"""

from pathlib import Path

import numpy as np
from scipy.ndimage import correlate1d

from alignflow_core.metrics.perceptual import lpips, lpips_standin

DATA_RANGE = 255.0
C1, C2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
MARGIN = 5
WINDOW = np.exp(-np.arange(-MARGIN, MARGIN + 1) ** 2 / (2 * 1.5 ** 2))
WINDOW /= WINDOW.sum()
BETAS = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])  # weights of the five scales, finest first


def paired(fake: np.ndarray, real: np.ndarray, lpips_weights: Path | None = None) -> dict[str, np.ndarray]:
    """Every paired measure of N image pairs.

    Args:
        fake, real: uint8 [N, H, W, 3]; ``fake[i]`` is compared with ``real[i]``.
        lpips_weights: safetensors file of :func:`perceptual.lpips`; without it there is no ``lpips``.

    Returns:
        float64 [N] by name: ``psnr`` (dB, infinite for equal images), ``ssim``, ``ms_ssim`` (at most 1; higher is nearer),
        ``lpips_standin`` and ``lpips`` (0 for equal images; lower is nearer).

    Raises:
        ValueError: shapes or types are not as described.
        InputError: the weights cannot be used.
    """
    if fake.shape != real.shape or fake.ndim != 4 or fake.shape[-1] != 3 or fake.dtype != np.uint8 or real.dtype != np.uint8:
        raise ValueError(f"paired wants two uint8 arrays [N, H, W, 3] of one shape, not {fake.dtype} {fake.shape} and {real.dtype} {real.shape}")
    found = {"psnr": psnr(fake, real), "ssim": ssim(fake, real), "ms_ssim": ms_ssim(fake, real), "lpips_standin": lpips_standin(fake, real)}
    return found if lpips_weights is None else found | {"lpips": lpips(fake, real, lpips_weights)}


def psnr(fake: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB, ``10 log10(255^2 / mean squared error)``, [N]; infinite for equal images."""
    errors = np.array([np.square(np.subtract(a, b, dtype=np.float64)).mean() for a, b in zip(fake, real, strict=True)])
    with np.errstate(divide="ignore"):
        return 10 * np.log10(DATA_RANGE ** 2 / errors)


def ssim(fake: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Structural similarity (Wang et al. 2004), [N]; NaN for images smaller than the window."""
    if n_scales(fake) == 0:
        return np.full(len(fake), np.nan)
    return np.array([_structure(a.astype(np.float64), b.astype(np.float64))[0] for a, b in zip(fake, real, strict=True)])


def ms_ssim(fake: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Multi-scale structural similarity (Wang et al. 2003), [N]; negative terms count as 0, as in torchmetrics.

    Five scales need a side of 176 pixels, below which torchmetrics refuses. Our choice: as many scales as leave the 11 x 11
    window room (:func:`n_scales`: 4 from 88, 3 from 44, 2 from 22 pixels), their weights divided by their sum. Values compare at one
    image size only.
    """
    scales = n_scales(fake)
    if scales == 0:
        return np.full(len(fake), np.nan)
    betas, found = BETAS[:scales] / BETAS[:scales].sum(), np.ones(len(fake))
    for i, (a, b) in enumerate(zip(fake.astype(np.float64), real.astype(np.float64), strict=True)):
        for scale, beta in enumerate(betas):
            similarity, contrast = _structure(a, b)
            found[i] *= max(similarity if scale == scales - 1 else contrast, 0.0) ** beta
            a, b = _halved(a), _halved(b)
    return found


def n_scales(images: np.ndarray) -> int:
    """Scales of MS-SSIM for images [N, H, W, 3]: at most five, each at least as large as the window; 0 for smaller images."""
    side = min(images.shape[1:3])
    return sum(side // 2 ** scale >= len(WINDOW) for scale in range(len(BETAS)))


def _structure(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean SSIM, and mean contrast-and-structure term away from the borders, of two images [H, W, 3] in [0, 255]."""
    mean_a, mean_b, square_a, square_b, product = (_blurred(x) for x in (a, b, a * a, b * b, a * b))
    variance_a, variance_b = np.maximum(square_a - mean_a ** 2, 0), np.maximum(square_b - mean_b ** 2, 0)
    contrast = (2 * (product - mean_a * mean_b) + C2) / (variance_a + variance_b + C2)
    luminance = (2 * mean_a * mean_b + C1) / (mean_a ** 2 + mean_b ** 2 + C1)
    return float((luminance * contrast).mean()), float(contrast[MARGIN:-MARGIN, MARGIN:-MARGIN].mean())


def _blurred(x: np.ndarray) -> np.ndarray:
    return np.asarray(correlate1d(correlate1d(x, WINDOW, axis=0, mode="mirror"), WINDOW, axis=1, mode="mirror"))


def _halved(x: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels; an odd last row or column is dropped."""
    h, w = x.shape[0] // 2, x.shape[1] // 2
    return x[:2 * h, :2 * w].reshape(h, 2, w, 2, 3).mean((1, 3))
