"""The probability path. **The** convention of this package, stated once and converted nowhere else.

x0 is noise, x1 is data, t in [0, 1] runs from noise to data::

    x_t = (1 - t) x0 + t x1          velocity = dx_t/dt = x1 - x0

Networks are called ``velocity_model(x_t, t, cond)`` with t of shape (B,). Rectified flow,
arXiv 2209.03003; flow matching, arXiv 2210.02747. (diffusers, SD3 and FLUX reverse both time and
velocity; MONAI's ``RFlowScheduler`` reverses time only.)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from alignflow_core.config import Times

VelocityModel = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PathSample:
    """A point on the path and the velocity there: x_t and velocity [B, C, H, W], t [B]."""

    x_t: Tensor
    velocity: Tensor
    t: Tensor


def sample_path(x0: Tensor, x1: Tensor, t: Tensor) -> PathSample:
    """The point at time t on the straight path from x0 to x1, [B, C, H, W]."""
    time = expand(t, x1)
    return PathSample((1 - time) * x0 + time * x1, x1 - x0, t)


def expand(t: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return t.view(-1, *[1] * (like.ndim - 1))


def sample_times(n: int, law: Times, generator: torch.Generator) -> Tensor:
    """Training times, [n] on the CPU: logit-normal (arXiv 2403.03206, section 3.1) mixed with uniform.

    The uniform share is our choice: it keeps the ends of the path trained. ``shift`` s > 1 moves
    times towards noise for large images, t <- t / (t + s (1 - t)) (the same paper's eq. 23 in our time).
    """
    t = torch.sigmoid(law.mean + law.std * torch.randn(n, generator=generator))
    uniform = torch.rand(n, generator=generator)
    t = torch.where(torch.rand(n, generator=generator) < law.uniform_share, uniform, t)
    return t / (t + law.shift * (1 - t))
