"""What is watched during alignment, on a fixed set of (mask, noise), and the limits that it must keep."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from alignflow_core.config import Gates
from alignflow_core.flow.path import VelocityModel
from alignflow_core.metrics.copying import distances, thumbnails

RATIOS = ("diversity_ratio", "velocity_ratio", "agreement_ratio", "copy_ratio")
COPY = 0.05  # distance between thumbnails below which an image is a copy, and nearer makes no difference


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
    """How much nearer images come to the references they were aligned to than to held-out ones: 1 is no copying, whatever the look.

    Geometric mean over images of (distance to the nearest aligning reference) / (distance to the nearest held-out one), over what the
    same references would give if divided at random: the aligning ones are more, so that the nearest of them is nearer by chance alone
    to any image that looks like the target. Without held-out references the plain distance. Images uint8 [N, H, W, 3], compared as
    standardised thumbnails.
    """
    small, n = thumbnails(images), len(aligning)
    near = _logs(small, aligning)
    if held_out is None:
        return float(np.exp(near.min(1).mean()))
    both = np.concatenate([near, _logs(small, held_out)], 1)
    by_chance = np.sort(both, 1) @ (_nearest_of(n, len(both[0])) - _nearest_of(len(held_out), len(both[0])))
    return float(np.exp((both[:, :n].min(1) - both[:, n:].min(1) - by_chance).mean()))


def _logs(small: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Logarithms of the distances from thumbnails to references, [N, M]."""
    return np.log(np.maximum(distances(small, thumbnails(references)), COPY))


def _nearest_of(m: int, n: int) -> np.ndarray:
    """Probability that the nearest of m references, drawn at random from n, is the k-th nearest of all, [n]."""
    return np.array([math.comb(n - 1 - k, m - 1) for k in range(n)]) / math.comb(n, m)


def failures(ratios: dict[str, float], limits: Gates) -> list[str]:
    """Which limits the ratios break, in words: ``diversity ratio 0.71 < 0.8``."""
    below = {"diversity_ratio": limits.diversity, "agreement_ratio": limits.agreement, "copy_ratio": limits.copying}
    found = [f"{name.replace('_', ' ')} {ratios[name]:.2f} < {low:g}" for name, low in below.items() if ratios[name] < low]
    if ratios["velocity_ratio"] > limits.velocity:
        found.append(f"velocity ratio {ratios['velocity_ratio']:.2f} > {limits.velocity:g}")
    return found
