"""What is watched during alignment, on a fixed set of (mask, noise), and the limits that it must keep."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from alignflow_core.config import Gates
from alignflow_core.flow.path import VelocityModel
from alignflow_core.metrics.copying import distances, thumbnails

RATIOS = ("diversity_ratio", "velocity_ratio", "agreement_ratio", "copy_ratio")


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


def closeness(images: np.ndarray, aligning: np.ndarray, held_out: np.ndarray | None) -> float:
    """Median distance of images to the nearest reference they were aligned to, over that to the nearest held-out one.

    A model that copies comes nearer to the former alone; one that takes on the target's look comes nearer to both.
    Without held-out references the plain distance. Images uint8 [N, H, W, 3], compared as standardised thumbnails.
    """
    small = thumbnails(images)
    near = distances(small, thumbnails(aligning)).min(1)
    if held_out is None:
        return float(np.median(near))
    return float(np.median(near / np.maximum(distances(small, thumbnails(held_out)).min(1), 1e-9)))


def failures(ratios: dict[str, float], limits: Gates) -> list[str]:
    """Which limits the ratios break, in words: ``diversity ratio 0.71 < 0.8``."""
    below = {"diversity_ratio": limits.diversity, "agreement_ratio": limits.agreement, "copy_ratio": limits.copying}
    found = [f"{name.replace('_', ' ')} {ratios[name]:.2f} < {low:g}" for name, low in below.items() if ratios[name] < low]
    if ratios["velocity_ratio"] > limits.velocity:
        found.append(f"velocity ratio {ratios['velocity_ratio']:.2f} > {limits.velocity:g}")
    return found
