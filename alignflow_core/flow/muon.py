"""Muon: momentum whose matrices are made orthogonal before each step (Jordan 2024, kellerjordan.github.io/posts/muon; arXiv 2502.16982).

``torch.optim.Muon`` takes no convolutions and works in bfloat16, which CPUs without units for it do many times slower; this one works in the
weights' own type.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

THIN = 8
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a quintic that takes singular values in (0, 1] to about .7 to 1.2 in five turns
TURNS = 5


def is_matrix(weight: Tensor) -> bool:
    """Whether a weight, its filters as rows, is broad enough for its directions to matter; others (biases, norms, colours in and out) keep AdamW."""
    return weight.ndim >= 2 and min(len(weight), weight[0].numel()) >= THIN


def _quintic(gram: Tensor) -> Tensor:
    """a + b g + c g^2 of square matrices g [..., n, n]."""
    a, b, c = COEFFICIENTS
    found = (torch.addmm if gram.ndim == 2 else torch.baddbmm)(gram, gram, gram, beta=b, alpha=c)
    found.diagonal(dim1=-2, dim2=-1).add_(a)
    return found


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with all singular values about 1 (Newton-Schulz), [R, C] -> [R, C], or of several [N, R, C].

    A turn takes x to p x, p = a + b g + c g^2 with g = x x^T, so all turns together are a polynomial of the first g: it is multiplied out among
    small matrices, and only g and the last product see the long side.
    """
    x = matrix / (matrix.norm() if matrix.ndim == 2 else matrix.norm(dim=(1, 2), keepdim=True)).clamp_min(1e-7)
    tall = matrix.shape[-2] > matrix.shape[-1]
    gram = x.mT @ x if tall else x @ x.mT
    p = product = _quintic(gram)
    for _ in range(TURNS - 1):
        gram = p @ gram @ p
        p = _quintic(gram)
        product = p @ product
    return x @ product if tall else product @ x


class Muon(torch.optim.Optimizer):
    """Of weights that :func:`is_matrix`; a convolution [O, I, h, w] is a matrix of O rows.

    Args:
        lr: spectral size of a step, some ten times that of AdamW.
        weight_decay: per step and unit of ``lr``.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One Nesterov step of every weight that has a gradient."""
        for group in self.param_groups:
            directions: dict[tuple[int, ...], list[tuple[nn.Parameter, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                past = self.state[p].setdefault("momentum", torch.zeros_like(p))
                past.lerp_(p.grad, 1 - group["momentum"])
                direction = p.grad.lerp(past, group["momentum"]).flatten(1)
                if p.is_cuda:
                    directions.setdefault(tuple(direction.shape), []).append((p, direction))
                else:
                    _move(p, orthogonal(direction), group)
            # A GPU takes equal shapes together: small products wait for their own start.
            for together in directions.values():
                for (p, _), direction in zip(together, orthogonal(torch.stack([each for _, each in together])), strict=True):
                    _move(p, direction, group)


def _move(p: nn.Parameter, direction: Tensor, group: dict[str, Any]) -> None:
    """One step against an orthogonal direction [R, C]; a matrix of more rows than columns keeps the size of its outputs."""
    direction *= max(1.0, len(direction) / direction.shape[1]) ** 0.5
    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction.view(p.shape), alpha=-group["lr"])
