"""Classifier-free guidance as a wrapper around a velocity model (arXiv 2207.12598)."""

import torch
from torch import Tensor

from alignflow_core.flow.path import VelocityModel


def guided(velocity_model: VelocityModel, guidance_scale: float) -> VelocityModel:
    """v = v(null) + scale (v(cond) - v(null)); scale 1 is off and costs nothing. The null condition is zeros."""
    if guidance_scale == 1:
        return velocity_model

    def model(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        both = velocity_model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([torch.zeros_like(cond), cond]))
        null, conditioned = both.chunk(2)
        return null + guidance_scale * (conditioned - null)

    return model
