"""ODE solvers from noise (t = 0) to data (t = 1): plain functions with one signature; ``x + dt v`` in one pass over memory."""

from collections.abc import Callable

import torch
from torch import Tensor

from alignflow_core.flow.path import VelocityModel

Solver = Callable[[VelocityModel, Tensor, Tensor, Tensor], Tensor]


def time_grid(n_steps: int) -> Tensor:
    """``n_steps + 1`` even times from 0 to 1."""
    return torch.linspace(0, 1, n_steps + 1)


def euler(velocity_model: VelocityModel, x0: Tensor, cond: Tensor, times: Tensor) -> Tensor:
    """Explicit Euler, order 1, one call a step. x0 [B, C, H, W], times [n + 1]."""
    x = x0
    for t, dt in _steps(x0, times):
        x = torch.add(x, velocity_model(x, t, cond), alpha=dt)
    return x


def midpoint(velocity_model: VelocityModel, x0: Tensor, cond: Tensor, times: Tensor) -> Tensor:
    """Explicit midpoint rule, order 2, two calls a step."""
    x = x0
    for t, dt in _steps(x0, times):
        half = torch.add(x, velocity_model(x, t, cond), alpha=dt / 2)
        x = torch.add(x, velocity_model(half, t + dt / 2, cond), alpha=dt)
    return x


def heun(velocity_model: VelocityModel, x0: Tensor, cond: Tensor, times: Tensor) -> Tensor:
    """Heun's method (explicit trapezoid), order 2, two calls a step."""
    x = x0
    for t, dt in _steps(x0, times):
        v = velocity_model(x, t, cond)
        x = torch.add(x, v + velocity_model(torch.add(x, v, alpha=dt), t + dt, cond), alpha=dt / 2)
    return x


SOLVERS: dict[str, Solver] = {"euler": euler, "midpoint": midpoint, "heun": heun}


def _steps(x0: Tensor, times: Tensor) -> list[tuple[Tensor, float]]:
    """Start time of each step as [B] and its length. The times are views of one tensor: filling one a step takes as long as the step's arithmetic."""
    grid, starts = times.tolist(), times.to(x0)[:-1, None].expand(-1, len(x0)).unbind()
    return [(t, b - a) for t, a, b in zip(starts, grid[:-1], grid[1:], strict=True)]
