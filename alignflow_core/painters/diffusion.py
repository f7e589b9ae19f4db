"""Denoising diffusion: DDPM training (arXiv 2006.11239), DDIM sampling (arXiv 2010.02502).

The literature counts its T = 1000 steps from data to noise; here as everywhere t runs from noise (0) to data (1), ``step = T (1 - t)``.
The noise schedule is that of DDPM, as in MONAI's ``DDIMScheduler``. That scheduler spaces its steps by T / (n - 1) but steps by T / n, so
that its chain does not visit the noise levels it computes; ours takes every step to the level where the next one starts.
"""

import torch
from torch import Tensor

from alignflow_core.config import Times
from alignflow_core.flow.path import VelocityModel, expand
from alignflow_core.painters.process import Noised

STEPS, BETA_FIRST, BETA_LAST = 1000, 1e-4, 2e-2


class Diffusion:
    """Variance-preserving noising, noise prediction: ``x_t = sqrt(a) x1 + sqrt(1 - a) x0``, a = product of the kept variances."""

    def __init__(self) -> None:
        self.alphas = (1 - torch.linspace(BETA_FIRST, BETA_LAST, STEPS, dtype=torch.float64)).cumprod(0).float()

    def noised(self, x1: Tensor, x0: Tensor, t: Tensor) -> Noised:
        """DDPM eq. 4; the target is the noise (eq. 14)."""
        kept = expand(self.alphas.to(x1)[step_of(t)], x1)
        return Noised(kept.sqrt() * x1 + (1 - kept).sqrt() * x0, t, x0, x0)

    def coupled(self, x0: Tensor, x1: Tensor, coupling: str) -> Tensor:
        """As drawn: ``coupling`` is that of flows and plays no part."""
        return x0

    def times(self, n: int, law: Times, generator: torch.Generator) -> Tensor:
        """Uniform over the T steps (DDPM, algorithm 1); ``law`` is that of flows and plays no part."""
        return time_of(torch.randint(STEPS, (n,), generator=generator))

    def clean(self, point: Noised, prediction: Tensor) -> Tensor:
        """DDIM eq. 9."""
        kept = expand(self.alphas.to(point.x_t)[step_of(point.t)], point.x_t)
        return (point.x_t - (1 - kept).sqrt() * prediction) / kept.sqrt()

    def sample(self, model: VelocityModel, x0: Tensor, cond: Tensor, n_steps: int) -> Tensor:
        """DDIM with eta = 0: deterministic in x0. Estimates of the data are clipped to [-1, 1]."""
        steps = torch.linspace(STEPS - 1, 0, n_steps).round().long().tolist()
        x = x0
        for now, after in zip(steps, [*steps[1:], None], strict=True):
            x = self.ddim_step(x, model(x, time_of(torch.full((len(x),), now, device=x.device)), cond), now, after)
        return x

    def ddim_step(self, x: Tensor, noise: Tensor, now: int, after: int | None) -> Tensor:
        """DDIM eq. 12 with sigma = 0 from step ``now`` to ``after``, ``None`` being the data itself."""
        kept = float(self.alphas[now])
        goal = 1.0 if after is None else float(self.alphas[after])
        data = ((x - (1 - kept) ** 0.5 * noise) / kept**0.5).clamp(-1, 1)
        return goal**0.5 * data + (1 - goal) ** 0.5 * noise


def time_of(step: Tensor) -> Tensor:
    """Steps of the literature, int [B] -> our times [B]."""
    return 1 - step.float() / STEPS


def step_of(t: Tensor) -> Tensor:
    """Our times [B] -> steps of the literature, int [B]."""
    return ((1 - t.float()) * STEPS).round().long().clamp(0, STEPS - 1)
