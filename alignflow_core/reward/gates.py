"""What is watched during alignment, on a fixed set of (mask, noise)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from alignflow_core.flow.path import VelocityModel


@dataclass(frozen=True)
class Probe:
    """The fixed set: noise [M, C, H, W], conditions [M, D, H, W], the solver's times; rows in groups of ``repeats`` share a mask."""

    x0: Tensor
    cond: Tensor
    times: Tensor
    repeats: int

    @torch.no_grad()
    def sample(self, velocity_model: VelocityModel) -> tuple[Tensor, float]:
        """Euler samples [M, C, H, W] and the root mean square velocity along the way."""
        x, energy = self.x0, 0.0
        for a, b in zip(self.times[:-1].tolist(), self.times[1:].tolist(), strict=True):
            velocity = velocity_model(x, x.new_full((len(x),), a), self.cond)
            energy += (b - a) * float(velocity.float().square().mean())
            x = x + (b - a) * velocity
        return x, energy**0.5

    def diversity(self, features: Tensor) -> float:
        """Mean distance between samples of the same mask, in features [M, D] scaled by their own deviation.

        The scale is taken over the whole set, so that a change of contrast is not mistaken for a loss of diversity.
        """
        scaled = (features - features.mean(0)) / (features.std(0) + 1e-6)
        groups = scaled.unflatten(0, (-1, self.repeats))
        return float(torch.cdist(groups, groups).sum() / (len(groups) * self.repeats * (self.repeats - 1)))
