"""Masks as the networks see them: regions, signed distance maps, and back."""

from typing import TYPE_CHECKING

import numpy as np
from scipy.ndimage import distance_transform_edt

from alignflow_core.config import Task

if TYPE_CHECKING:
    import torch


def regions(masks: np.ndarray, task: Task) -> np.ndarray:
    """Class numbers uint8 [N, H, W] -> bool [N, C, H, W], one channel per foreground class.

    Nested classes become nested regions: class k covers ``label >= k`` (disc contains cup).
    """
    numbers = np.arange(1, len(task.classes) + 1, dtype=masks.dtype)[None, :, None, None]
    return masks[:, None] >= numbers if task.nested else masks[:, None] == numbers


def from_regions(channels: np.ndarray, task: Task) -> np.ndarray:
    """bool or score [N, C, H, W] (positive = inside) -> class numbers uint8 [N, H, W].

    Nested: region k counts only inside region k-1. Otherwise the highest positive score wins.
    """
    inside = channels > 0
    if task.nested:
        return np.cumprod(inside, axis=1).sum(axis=1).astype(np.uint8)
    best = channels.argmax(axis=1)
    return np.where(inside.any(axis=1), best + 1, 0).astype(np.uint8)


def region_dice(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Dice of regions bool [N, C, H, W], averaged over those that either has, [N]; 1 where neither has any.

    A region that both lack would count as found: of many classes of which an image shows one, hardly any Dice would be low. One of the two
    may have N = 1.
    """
    total = a.sum((2, 3)) + b.sum((2, 3))
    dice = 2 * (a & b).sum((2, 3)) / np.maximum(total, 1)
    n_present = (total > 0).sum(1)
    found: np.ndarray = np.where(n_present > 0, dice.sum(1) / np.maximum(n_present, 1), 1.0)
    return found


def signed_distance(masks: np.ndarray, task: Task, clip: float) -> "torch.Tensor":
    """Signed distance maps, positive inside, in units of ``clip`` pixels and cut to [-1, 1].

    Returns:
        float32 [N, C, H, W]; an empty region is -1 everywhere, a full one +1.
    """
    import torch  # here, since the report and the metrics want regions alone

    inside = regions(masks, task)
    maps = np.empty(inside.shape, np.float32)
    for n, c in np.ndindex(inside.shape[:2]):
        region = inside[n, c]
        if region.all() or not region.any():
            maps[n, c] = 1.0 if region.any() else -1.0
            continue
        distance = distance_transform_edt(region) - distance_transform_edt(~region)
        maps[n, c] = (distance - np.sign(distance) * 0.5) / clip
    return torch.from_numpy(maps.clip(-1, 1))


def condition(masks: np.ndarray, task: Task, clip: float) -> "torch.Tensor":
    """What the image flow is conditioned on: signed distance maps and regions as -1/1, float32 [N, 2C, H, W]."""
    import torch

    inside = torch.from_numpy(regions(masks, task)).float().mul(2).sub(1)
    return torch.cat([signed_distance(masks, task, clip), inside], dim=1)
