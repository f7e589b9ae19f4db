"""The descriptor space in which images are *measured*; the reward lives in another one.

A generator tuned by a reward may please the reward's encoder alone, so nothing that the reward sees
is used here: no random convolutions and no moments of colour. Our choice, computed offline without
any weights: histograms of colour and opponent colour (appearance of camera and lamp), rotation-
invariant uniform local binary patterns at two radii (texture; Ojala et al. 2002), and the radial
power spectrum (blur and noise). It is no Inception: values compare within this product only.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import map_coordinates

HISTOGRAM_BINS = 16
SPECTRUM_BANDS = 10
LBP_RADII = (1.0, 2.5)
LBP_POINTS = 8


@dataclass(frozen=True)
class FeatureSpace:
    """Descriptors standardised by the source domain's real images and compressed by ``asinh``.

    Another camera may lie fifty deviations away from the source in one descriptor. Beyond a few deviations
    ``asinh`` grows like a logarithm, so that no single descriptor drowns the others; near the source it is the identity.

    Attributes:
        mean, scale: float64 [D].
    """

    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def fit(cls, source: np.ndarray) -> "FeatureSpace":
        """Fit on real source images, uint8 [N, H, W, 3].

        The scale is the deviation joined with its median over the descriptors, so that a colour
        the source never shows does not outweigh everything else in the target.
        """
        found = descriptors(source)
        deviation = found.std(axis=0)
        return cls(found.mean(axis=0), np.hypot(deviation, max(float(np.median(deviation)), 1e-6)))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, 3] -> standardised descriptors, float64 [N, D]."""
        return np.arcsinh((descriptors(images) - self.mean) / self.scale)


def descriptors(images: np.ndarray) -> np.ndarray:
    """Raw descriptors of images, uint8 [N, H, W, 3] -> float64 [N, 118]. Each image is treated alone."""
    return np.stack([_describe(np.asarray(image, np.float64) / 255) for image in images]) if len(images) else np.empty((0, 118))


def _describe(image: np.ndarray) -> np.ndarray:
    """Descriptors of one image in [0, 1], [H, W, 3] -> [118]. Histograms enter as square roots (Hellinger)."""
    red, green, blue = np.moveaxis(image, 2, 0)
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    planes = (red, green, blue, (red - green + 1) / 2, (red + green - 2 * blue + 2) / 4)
    histograms = [_soft_histogram(plane) for plane in planes]
    patterns = [_local_binary_patterns(luminance, radius) for radius in LBP_RADII]
    return np.concatenate([*(np.sqrt(h) for h in histograms + patterns), _radial_spectrum(luminance), _gradient_quantiles(luminance)])


def _soft_histogram(plane: np.ndarray) -> np.ndarray:
    """Shares of linearly interpolated bins of a plane in [0, 1], [16]."""
    position = plane.ravel().clip(0, 1) * (HISTOGRAM_BINS - 1)
    low = np.minimum(position.astype(int), HISTOGRAM_BINS - 2)
    part = position - low
    count = np.bincount(low, 1 - part, HISTOGRAM_BINS) + np.bincount(low + 1, part, HISTOGRAM_BINS)
    return count / plane.size


def _local_binary_patterns(plane: np.ndarray, radius: float) -> np.ndarray:
    """Shares of the rotation-invariant uniform patterns of 8 neighbours at ``radius`` pixels, [10]."""
    margin = int(np.ceil(radius))
    rows, columns = np.mgrid[margin:plane.shape[0] - margin, margin:plane.shape[1] - margin]
    angles = 2 * np.pi * np.arange(LBP_POINTS) / LBP_POINTS
    around = np.stack([map_coordinates(plane, [rows - radius * np.sin(a), columns + radius * np.cos(a)], order=1) for a in angles])
    above = around >= plane[rows, columns] - 1e-9  # interpolation must not turn a flat area into noise
    changes = (above != np.roll(above, 1, axis=0)).sum(axis=0)
    pattern = np.where(changes <= 2, above.sum(axis=0), LBP_POINTS + 1)
    return np.bincount(pattern.ravel(), minlength=LBP_POINTS + 2) / pattern.size


def _radial_spectrum(plane: np.ndarray) -> np.ndarray:
    """Log power in rings from the lowest to the Nyquist frequency, Hann-windowed, [10]."""
    window = np.outer(np.hanning(plane.shape[0]), np.hanning(plane.shape[1]))
    power = np.abs(np.fft.fft2((plane - plane.mean()) * window)) ** 2
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(plane.shape[0]), np.fft.fftfreq(plane.shape[1]), indexing="ij"))
    band = np.minimum((frequency / 0.5 * SPECTRUM_BANDS).astype(int), SPECTRUM_BANDS)  # beyond Nyquist: dropped
    total, count = np.bincount(band.ravel(), power.ravel(), SPECTRUM_BANDS + 1), np.bincount(band.ravel(), minlength=SPECTRUM_BANDS + 1)
    return np.log10(total / np.maximum(count, 1) + 1e-8)[:SPECTRUM_BANDS]


def _gradient_quantiles(plane: np.ndarray) -> np.ndarray:
    """Quantiles of the gradient's length (contrast of edges), [8]."""
    return np.quantile(np.hypot(*np.gradient(plane)), np.linspace(0.15, 0.99, 8))
