"""The denoising loss of both stages."""

import torch
from torch import Tensor

from alignflow_core.config import Times
from alignflow_core.flow.coupling import couple
from alignflow_core.flow.path import VelocityModel, sample_path, sample_times
from alignflow_core.seeding import normal


def flow_matching_loss(velocity_model: VelocityModel, x1: Tensor, cond: Tensor, times: Times, generator: torch.Generator,
                       coupling: str = "independent", condition_dropout: float = 0.0,
                       rows: slice = slice(None)) -> Tensor:
    """Conditional flow matching loss, E |v(x_t, t, cond) - (x1 - x0)|^2 (arXiv 2210.02747, eq. 9).

    Args:
        x1: data [B, C, H, W].
        cond: condition [B, D, H, W]; replaced by zeros with probability ``condition_dropout`` per row.
        generator: CPU generator; noise, times and dropout come from it in this order.
        rows: those whose loss is computed, after noise was drawn and coupled for all: one process's part of a shared batch.

    Returns:
        scalar mean squared error.
    """
    x0 = normal(x1.shape, generator, x1.device)
    t = sample_times(len(x1), times, generator).to(x1)
    keep = (torch.rand(len(x1), generator=generator) >= condition_dropout).to(x1)
    point = sample_path(couple(coupling, x0, x1), x1, t)
    prediction = velocity_model(point.x_t[rows], t[rows], (cond * keep.view(-1, 1, 1, 1))[rows])
    return (prediction.float() - point.velocity[rows]).square().mean()
