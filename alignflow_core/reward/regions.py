"""Regions of an image for region-aware rewards: from masks, or from a segmenter's confident pixels; and what a camera saw at all."""

import numpy as np
import torch
from scipy.ndimage import binary_propagation
from torch import Tensor, nn

from alignflow_core.config import Task

FRAME_LEVEL = 2 * 20 / 255 - 1  # no channel of a frame's pixel is brighter; JPEG noise on black stays below
MIN_PIXELS = 9.0  # of the smallest region that is described: fewer pixels say nothing about its deviation
LEAST_VIEW = 0.25  # of the image: a darker one is a dark image, not a framed one


def from_labels(labels: Tensor, n_classes: int) -> Tensor:
    """Class numbers [N, H, W] -> membership float [N, 1 + n_classes, H, W]: background, then every class; regions do not overlap."""
    numbers = torch.arange(n_classes + 1, dtype=labels.dtype, device=labels.device).view(-1, 1, 1)
    return (labels[:, None] == numbers).float()  # one_hot would first make eight bytes of each


def core(membership: Tensor, confident: Tensor) -> Tensor:
    """The part of each region that the segmenter is confident of too, [N, R, H, W]; the whole region where that is next to nothing.

    References show a segmenter's confident pixels only, and these are no fair sample of a region (the brightest part of a cup):
    images whose regions are known must be measured on pixels chosen in the same way.
    """
    both = membership * confident
    return torch.where(both.sum((2, 3), keepdim=True) >= MIN_PIXELS, both, membership)


@torch.no_grad()
def view(images: Tensor) -> Tensor:
    """Pixels that the camera saw: all but the black frame, which is dark and joined to the border.

    An endoscope's frame differs from site to site and would pass for tissue in every statistic (our choice).

    Args:
        images: [N, 3, H, W] in [-1, 1].

    Returns:
        [N, H, W], 1 in view and 0 on the frame; all 1 where less than a quarter of the image is lit.
    """
    dark = (images.amax(1) <= FRAME_LEVEL).cpu().numpy()
    border = np.ones(dark.shape[1:], bool)
    border[1:-1, 1:-1] = False
    seen = np.stack([~binary_propagation(border & d, mask=d) for d in dark]) if len(dark) else ~dark
    seen |= (seen.mean((1, 2), keepdims=True) < LEAST_VIEW)
    return torch.from_numpy(seen).to(images)


@torch.no_grad()
def from_segmenter(model: nn.Module, images: Tensor, task: Task, confidence: float, batch: int = 64) -> Tensor:
    """Pseudo-regions of unlabelled images: pixels whose class the segmenter gives at least ``confidence``, the rest in no region.

    Args:
        model: region logits [B, C, H, W] of images [N, 3, H, W] in [-1, 1]; averaged over the four flips.

    Returns:
        Membership as from :func:`from_labels`, 0 or 1, [N, 1 + C, H, W].
    """
    found = []
    for x in images.split(batch):
        views = [torch.flip(model(torch.flip(x, axes)).float().sigmoid(), axes) for axes in ((), (2,), (3,), (2, 3))]
        found.append(class_probabilities(torch.stack(views).mean(0), task))
    probability = torch.cat(found)
    return (probability >= confidence).float()


def class_probabilities(inside: Tensor, task: Task) -> Tensor:
    """Probabilities of (possibly nested) regions [N, C, H, W] -> of the classes, background first, [N, 1 + C, H, W], sum 1."""
    if task.nested:
        reach = torch.cumprod(inside, dim=1)  # region k counts only inside region k-1
        steps = torch.cat([torch.ones_like(reach[:, :1]), reach, torch.zeros_like(reach[:, :1])], dim=1)
        return steps[:, :-1] - steps[:, 1:]
    classes = torch.cat([1 - inside.amax(1, keepdim=True), inside], dim=1)
    return classes / classes.sum(1, keepdim=True).clamp_min(1e-6)
