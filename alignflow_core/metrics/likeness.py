"""How alike two pictures of the same anatomy are, wherever a copy was moved, turned, enlarged, recoloured or made noisy.

Unrelated images of one anatomy look alike as a whole (correlations of .94 are usual), so what they have in common is taken
away first: what is left is middle-sized detail (vessels, folds, texture) at equal local contrast. The centre of one picture,
warped in every way of a small grid, is then laid over every place of the other, and the best correlation counts. Our choice.
"""

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates

SIDE, PATCH = 24, 18  # cells of a picture and of the centre that is searched for: a shift of an eighth of the width is found
SMOOTH, BACKGROUND, NEIGHBOURHOOD = 0.9, 5.0, 6.0  # Gaussian widths in cells: noise below, illumination above, local contrast
FLOOR = 0.3  # local contrast that counts as none, in deviations of the picture
WARPS = ((0.0, 1.0), (-8.0, 1.0), (8.0, 1.0), (0.0, 0.92), (0.0, 1.09))  # degrees, enlargement; each by eight symmetries
FIRST, THEN = ((0.0, 0.0), (0.5, 0.5)), ((0.0, 0.5), (0.5, 0.0))  # offsets in cells, down and right: a copy may lie between the cells
CANDIDATES = 32  # of each picture that are looked at under the second offsets too
CHUNK = 2**22  # numbers of one product

Offsets = tuple[tuple[float, float], ...]


def details(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] -> float32 [N, 24, 24]: middle-sized structure of the luminance at equal local contrast."""
    return np.stack([_detail(image) for image in images]) if len(images) else np.empty((0, SIDE, SIDE), np.float32)


def _detail(image: np.ndarray) -> np.ndarray:
    grey = Image.fromarray(np.asarray(image, np.float32).mean(2))
    small = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX), np.float64)
    plane = gaussian_filter((small - small.mean()) / (small.std() + 2.0), SMOOTH, mode="nearest")
    plane = plane - gaussian_filter(plane, BACKGROUND, mode="nearest")
    contrast = np.sqrt(gaussian_filter(plane * plane, NEIGHBOURHOOD, mode="nearest") + FLOOR**2)
    return (plane / contrast).astype(np.float32)


def unlikeness(queries: np.ndarray, others: np.ndarray, barred: np.ndarray | None = None) -> np.ndarray:
    """Square root of one minus the best correlation of every query with every other.

    Only the nearest by the first offsets are compared under the second too: what is far may look a little farther than it is.

    Args:
        queries, others: :func:`details`, [N, 24, 24] and [M, 24, 24].
        barred: pairs that are not to be compared, bool [N, M].

    Returns:
        [N, M], infinite where barred.
    """
    found = _correlations(queries, others, FIRST)
    if barred is not None:
        found[barred] = -np.inf
    for row, near in enumerate(np.argsort(-found, axis=1, kind="stable")[:, :CANDIDATES]):
        near = near[np.isfinite(found[row, near])]
        if len(near):
            found[row, near] = np.maximum(found[row, near], _correlations(queries[row:row + 1], others[near], THEN)[0])
    return np.sqrt(np.maximum(1 - found, 1e-6))


def _correlations(queries: np.ndarray, others: np.ndarray, offsets: Offsets) -> np.ndarray:
    """Best correlation over warps, symmetries, offsets and places, [N, M]."""
    found = np.empty((len(queries), len(others)))
    grid = _grid(offsets)
    size = max(1, CHUNK // (8 * grid.shape[1] * (SIDE - PATCH + 1) ** 2))
    for start in range(0, len(others), size):
        part = others[start:start + size]
        places = _windows(part)
        for row, query in enumerate(queries):
            alike = (_templates(query, grid) @ places).max(0)
            found[row, start:start + size] = alike.reshape(len(part), -1).max(1)
    return found


def _windows(planes: np.ndarray) -> np.ndarray:
    """Every 18 x 18 window of every plane, standardised, one a column: [324, N * 49]."""
    windows = np.lib.stride_tricks.sliding_window_view(planes, (PATCH, PATCH), axis=(1, 2))
    return np.ascontiguousarray(_unit(windows.reshape(-1, PATCH * PATCH)).T)


def _templates(plane: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The centre of a plane under every warp, offset and symmetry, standardised, one a row: [8 * warps * offsets, 324]."""
    warped = map_coordinates(plane, grid, order=1, mode="nearest")
    turned = [np.rot90(each, turns, (1, 2)) for each in (warped, warped[:, :, ::-1]) for turns in range(4)]
    return _unit(np.concatenate(turned).reshape(-1, PATCH * PATCH))


def _grid(offsets: Offsets) -> np.ndarray:
    """Rows and columns that the warped centres are read at, [2, warps * offsets, 18, 18]."""
    middle, axis = (SIDE - 1) / 2, np.arange(PATCH) - (PATCH - 1) / 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    places = []
    for degrees, scale in WARPS:
        cos, sin = np.cos(np.deg2rad(degrees)) / scale, np.sin(np.deg2rad(degrees)) / scale
        places += [(middle + dy + cos * y + sin * x, middle + dx - sin * y + cos * x) for dy, dx in offsets]
    return np.array(places).swapaxes(0, 1)


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows less their mean, of length one; of an even surface nothing is left."""
    centred = rows - rows.mean(1, keepdims=True)
    return np.asarray(centred / (np.linalg.norm(centred, axis=1, keepdims=True) + 1e-3), np.float32)
