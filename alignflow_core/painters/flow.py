"""Flow matching as a process: ``flow/`` seen through the interface that diffusion shares."""

import torch
from torch import Tensor

from alignflow_core.config import Times
from alignflow_core.flow.coupling import couple
from alignflow_core.flow.path import expand, sample_path, sample_times
from alignflow_core.painters.process import Noised


class Flow:
    """Straight paths, velocity prediction (``flow/path.py``)."""

    def noised(self, x1: Tensor, x0: Tensor, t: Tensor) -> Noised:
        """The point at time t and the velocity there."""
        point = sample_path(x0, x1, t)
        return Noised(point.x_t, t, point.velocity, x0)

    def coupled(self, x0: Tensor, x1: Tensor, coupling: str) -> Tensor:
        """As in stage 1."""
        return couple(coupling, x0, x1)

    def times(self, n: int, law: Times, generator: torch.Generator) -> Tensor:
        """As in stage 1."""
        return sample_times(n, law, generator)

    def clean(self, point: Noised, prediction: Tensor) -> Tensor:
        """``x_t + (1 - t) v``."""
        return point.x_t + (1 - expand(point.t, point.x_t)) * prediction
