"""Agreement of predicted and true masks, per image and foreground region."""

import numpy as np
from scipy.spatial import cKDTree

from alignflow_core.config import Task
from alignflow_core.masks import regions


def overlap(predicted: np.ndarray, truth: np.ndarray, task: Task) -> dict[str, np.ndarray]:
    """Dice, IoU and HD95 of every image and region.

    Args:
        predicted, truth: class numbers, uint8 [N, H, W].
        task: says what the regions are (nested: the disc includes the cup).

    Returns:
        ``dice``, ``iou`` in [0, 1] and ``hd95`` in pixels at working size, each float64 [N, C].
        Our choice where a region is empty: in both masks it is perfect agreement (1, 1, 0 pixels),
        in one of them a complete miss (0, 0, the image diagonal). MONAI gives NaN there, which drops
        exactly the images a segmenter failed on.
    """
    a, b = regions(predicted, task), regions(truth, task)
    both = (a & b).sum((2, 3)).astype(np.float64)
    total = (a.sum((2, 3)) + b.sum((2, 3))).astype(np.float64)
    hd95 = np.array([[hausdorff95(a[n, c], b[n, c]) for c in range(a.shape[1])] for n in range(len(a))]).reshape(both.shape)
    return {
        "dice": np.divide(2 * both, total, out=np.ones_like(both), where=total > 0),
        "iou": np.divide(both, total - both, out=np.ones_like(both), where=total > 0),
        "hd95": hd95,
    }


def hausdorff95(a: np.ndarray, b: np.ndarray) -> float:
    """Symmetric 95th-percentile surface distance in pixels: the larger of the two directed percentiles (MONAI's convention).

    Args:
        a, b: bool [H, W]. A surface is the region minus its 4-neighbour erosion; the image border counts as outside.
    """
    if not a.any() or not b.any():
        return 0.0 if a.any() == b.any() else float(np.hypot(*a.shape))
    edges = [_places(edge(region)) for region in (a, b)]
    trees = [cKDTree(points, compact_nodes=False, balanced_tree=False) for points in edges]
    return float(max(np.percentile(trees[1].query(edges[0])[0], 95), np.percentile(trees[0].query(edges[1])[0], 95)))


def edge(region: np.ndarray) -> np.ndarray:
    """Pixels of a region with a 4-neighbour outside it, bool [H, W]."""
    around = np.pad(region, 1)
    return region & ~(around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:])


def _places(pixels: np.ndarray) -> np.ndarray:
    """Row and column of each true pixel, float64 [n, 2]: argwhere in the type that the tree wants, in two thirds of its time."""
    return np.stack(np.divmod(np.flatnonzero(pixels), pixels.shape[1]), axis=1).astype(np.float64)


def vertical_ratio(masks: np.ndarray, task: Task) -> np.ndarray:
    """Vertical cup-to-disc ratio: height of the second region over height of the first, float64 [N].

    No cup gives 0, no disc NaN.
    """
    rows = np.asarray(regions(masks, task).any(axis=3))
    height = np.where(rows.any(2), rows.shape[2] - rows[:, :, ::-1].argmax(2) - rows.argmax(2), 0).astype(np.float64)
    return np.divide(height[:, 1], height[:, 0], out=np.full(len(masks), np.nan), where=height[:, 0] > 0)


def ratio_error(predicted: np.ndarray, truth: np.ndarray, task: Task) -> np.ndarray:
    """Absolute error of the vertical cup-to-disc ratio, float64 [N].

    A missed disc counts as a predicted ratio of 0; NaN where the truth has no disc.
    """
    return np.abs(np.nan_to_num(vertical_ratio(predicted, task), nan=0.0) - vertical_ratio(truth, task))
