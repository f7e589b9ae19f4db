"""Differential privacy of the references in stage 2: DP-SGD (arXiv 1607.00133), clipped, summed and accounted by Opacus.

A record is one reference that is aligned to. The reward is split into one reward per reference, each pulling to the features of that one
alone; every gradient is brought to the same norm (normalised clipping, arXiv 2206.07136: no threshold to choose), noise is added to
their sum, and only then does the optimiser see it. All references take part in every step, so nothing is gained by sampling
and the mechanism is Gaussian. The denoising loss reads source pairs alone and needs no noise.
"""

import hashlib
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from alignflow_core.config import Privacy
from alignflow_core.errors import InputError
from alignflow_core.site_key import pseudonym

EXTRA = "align.privacy.epsilon: needs Opacus; install the extra 'dp' (pip install -e '.[dp]'), or set it to null"
SAMPLE_RATE = 1.0


class PrivateSum:
    """The noised mean of the references' gradients, and what it has cost.

    Args:
        privacy: the budget.
        n_steps: optimiser steps that will be taken.
        salt: everything the weights depend on, hashed. Noise is drawn from the site key and this: a resumed run repeats it, whoever lacks
            the key cannot, and two runs that differ in anything never share it (their difference would show what they differ in).

    Raises:
        InputError: Opacus is not installed, or the budget cannot be kept.
    """

    def __init__(self, privacy: Privacy, n_steps: int, salt: str) -> None:
        try:
            from opacus.accountants.utils import get_noise_multiplier
        except ImportError as error:
            raise InputError(EXTRA) from error
        self.privacy, self.n_steps, self.salt = privacy, n_steps, salt
        try:
            self.noise_multiplier = float(get_noise_multiplier(
                target_epsilon=float(privacy.epsilon or 0), target_delta=privacy.delta, sample_rate=SAMPLE_RATE, steps=n_steps, accountant="rdp"))
        except ValueError as error:
            raise InputError(f"align.privacy: epsilon {privacy.epsilon} at delta {privacy.delta} cannot be kept over {n_steps} steps ({error}); "
                             "raise epsilon or lower align.training.steps") from error

    def add(self, parameters: list[nn.Parameter], gradients: Iterator[tuple[Tensor, ...]], n: int, norm: float, step: int) -> None:
        """Add to the parameters' gradients the mean of n gradients of norm ``norm`` each, with noise.

        Args:
            gradients: of each reference, one tensor per parameter; read one by one, so that only one is in memory.
            step: no two calls of a run may name the same one.
        """
        from opacus.optimizers import DPOptimizer

        own = [p.grad for p in parameters]
        summed = DPOptimizer(torch.optim.SGD(parameters, lr=0.0), noise_multiplier=0.0, max_grad_norm=norm, expected_batch_size=n)
        for i, gradient in enumerate(gradients):
            length = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradient]))
            for parameter, g in zip(parameters, gradient, strict=True):
                parameter.grad_sample = (g * (norm / length.clamp_min(1e-30)))[None]  # type: ignore[attr-defined]
            summed.signal_skip_step(i + 1 < n)
            summed.pre_step()
        draw = self._generator(step)
        for parameter, before in zip(parameters, own, strict=True):
            noise = torch.from_numpy(draw.standard_normal(tuple(parameter.shape), np.float32)).to(parameter)
            parameter.grad = cast(Tensor, parameter.grad) + self.noise_multiplier * norm / n * noise
            parameter.grad_sample = parameter.summed_grad = None  # type: ignore[attr-defined]
            if before is not None:
                parameter.grad = parameter.grad + before

    def _generator(self, step: int) -> np.random.Generator:
        """Of the noise of a step, seeded by all 256 bits of its keyed hash: torch's on a CPU would keep 32, which can be tried one by one."""
        seed = int(pseudonym("noise", f"{self.salt}/{step}", 64), 16)
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, pool_size=8)))

    def spent(self, n: int) -> dict[str, Any]:
        """What the finished weights promise about each of the n references, by the accountant."""
        from opacus.accountants import RDPAccountant

        accountant = RDPAccountant()
        accountant.history = [(self.noise_multiplier, SAMPLE_RATE, self.n_steps)]
        return {"epsilon": float(accountant.get_epsilon(delta=self.privacy.delta)), "delta": self.privacy.delta,
                "noise_multiplier": self.noise_multiplier, "steps": self.n_steps, "sample_rate": SAMPLE_RATE, "n_records": n,
                "record": "one reference that is aligned to, its gradient in the sum or left out; their number is public",
                "accountant": f"RDP, Opacus {version('opacus')}"}


def salt(*parts: bytes) -> str:
    """One hash of everything that the weights depend on."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()
