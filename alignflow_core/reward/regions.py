"""Regions of an image for region-aware rewards: from masks, or from a segmenter's confident pixels."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from alignflow_core.config import Task


def from_labels(labels: Tensor, n_classes: int) -> Tensor:
    """Class numbers [N, H, W] -> membership float [N, 1 + n_classes, H, W]: background, then every class; regions do not overlap."""
    return functional.one_hot(labels.long(), n_classes + 1).permute(0, 3, 1, 2).float()


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
