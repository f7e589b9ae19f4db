"""The plain objective: predict what was mixed in."""

import torch
from torch import Tensor, nn

from alignflow_core.config import ImageFlow
from alignflow_core.painters.process import Process
from alignflow_core.seeding import normal


def loss(model: nn.Module, process: Process, x1: Tensor, cond: Tensor, settings: ImageFlow, draw: torch.Generator, done: float) -> Tensor:
    """Mean squared error of the prediction; DDPM eq. 14, for flows arXiv 2210.02747 eq. 9.

    Args:
        x1: data [B, C, H, W]; cond: [B, D, H, W], zeros with probability ``condition_dropout``.
        draw: CPU generator; noise, times and dropout come from it in this order, as in ``flow/loss.py``.
        done: share of the training steps that are done, in [0, 1]; plays no part here.
    """
    x0 = normal(x1.shape, draw, x1.device)
    t = process.times(len(x1), settings.times, draw).to(x1)
    keep = (torch.rand(len(x1), generator=draw) >= settings.condition_dropout).to(x1)
    x0 = process.coupled(x0, x1, settings.coupling)
    point = process.noised(x1, x0, t)
    return (model(point.x_t, point.t, cond * keep.view(-1, 1, 1, 1)).float() - point.target).square().mean()
