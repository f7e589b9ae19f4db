"""What a generative process is to an objective and to sampling. Times run from noise (0) to data (1) in all of them."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from alignflow_core.config import Times
from alignflow_core.flow.path import VelocityModel


@dataclass(frozen=True)
class Noised:
    """Data on its way to noise: x_t [B, C, H, W] at times t [B], what a network is to predict there, and the noise x0 that was mixed in."""

    x_t: Tensor
    t: Tensor
    target: Tensor
    x0: Tensor


class Process(Protocol):
    """Noising and its inversion."""

    def noised(self, x1: Tensor, x0: Tensor, t: Tensor) -> Noised:
        """x1 [B, C, H, W] mixed with the noise x0 at times t [B]."""

    def coupled(self, x0: Tensor, x1: Tensor, coupling: str) -> Tensor:
        """The noise x0 [B, C, H, W] in the order in which it goes with the data x1, as ``image_flow.coupling`` asks."""

    def times(self, n: int, law: Times, generator: torch.Generator) -> Tensor:
        """Training times, [n] on the CPU."""

    def clean(self, point: Noised, prediction: Tensor) -> Tensor:
        """The data that a prediction at a point stands for, [B, C, H, W]."""


class Sampled(Process, Protocol):
    """A process with a sampler of its own: all but the flow, which is drawn by ``flow/solver.py`` as stage 1 is."""

    def sample(self, model: VelocityModel, x0: Tensor, cond: Tensor, n_steps: int) -> Tensor:
        """Noise x0 -> data, one call of ``model(x_t, t, cond)`` a step."""
