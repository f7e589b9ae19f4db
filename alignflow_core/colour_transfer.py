"""Cheap rivals of alignment: make source images look like a reference by their colours alone."""

import numpy as np

# CIE 1931 matrices of linear RGB and LMS as used by Reinhard et al., "Color transfer between images", 2001.
RGB_TO_LMS = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
LMS_TO_LAB = np.diag([1 / 3**0.5, 1 / 6**0.5, 1 / 2**0.5]) @ np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]])


def reinhard(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Give image i the l-alpha-beta mean and deviation of reference i: uint8 [N, H, W, 3] -> the same."""
    lab, target = _to_lab(images), _to_lab(references)
    axes = (1, 2)
    scale = target.std(axes, keepdims=True) / (lab.std(axes, keepdims=True) + 1e-6)
    moved = (lab - lab.mean(axes, keepdims=True)) * scale + target.mean(axes, keepdims=True)
    lms = 10 ** (moved @ np.linalg.inv(LMS_TO_LAB).T)
    return _to_bytes((lms @ np.linalg.inv(RGB_TO_LMS).T) * 255)


def fourier(images: np.ndarray, references: np.ndarray, beta: float) -> np.ndarray:
    """Swap the low-frequency amplitudes (a square of half-width beta * size) with the reference's (FDA, arXiv 2004.05498)."""
    spectrum, other = (np.fft.fftshift(np.fft.fft2(x.astype(np.float64), axes=(1, 2)), axes=(1, 2)) for x in (images, references))
    height, width = images.shape[1:3]
    half = max(1, int(beta * min(height, width)))
    rows, columns = (slice(n // 2 - half, n // 2 + half + 1) for n in (height, width))
    amplitude = np.abs(spectrum)
    amplitude[:, rows, columns] = np.abs(other)[:, rows, columns]
    mixed = np.fft.ifftshift(amplitude * np.exp(1j * np.angle(spectrum)), axes=(1, 2))
    return _to_bytes(np.fft.ifft2(mixed, axes=(1, 2)).real)


def _to_lab(images: np.ndarray) -> np.ndarray:
    lms = np.maximum(images / 255.0, 1 / 255) @ RGB_TO_LMS.T
    return np.log10(lms) @ LMS_TO_LAB.T


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)
