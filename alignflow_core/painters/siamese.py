"""Siamese-Diffusion's objective (arXiv 2505.06068; facts beyond the paper from its public code, github.com/Qiukunpeng/Siamese-Diffusion).

A mask branch and an image branch share all weights. The image branch is told the mask (without gradient) *and* the image itself, with a
weight that grows with the training step, and so predicts more truly; the mask branch is drawn towards its prediction. The base's decoder is
trained too, through the mask branch alone (theirs copies it for the other). Sampling uses the mask branch.
"""

from typing import Protocol

import torch
from torch import Tensor

from alignflow_core.config import ImageFlow
from alignflow_core.painters.process import Process
from alignflow_core.seeding import normal

AUGMENT_FROM = 1 / 3  # share of the training after which the mask branch also learns on the image branch's clean estimates
AUGMENT_LATEST = 0.8  # such estimates are used where little noise is left: step <= 200 of 1000


class Branched(Protocol):
    """What the objective asks of a painter: ``DenseControlNetPainter`` of ``controlnet.py`` has it."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Prediction from the mask alone."""

    def mask_hint(self, cond: Tensor) -> Tensor:
        """What tells the copy the mask."""

    def image_hint(self, image: Tensor, cond: Tensor) -> Tensor:
        """What tells the copy the image itself."""

    def residuals(self, x_t: Tensor, t: Tensor, hint: Tensor) -> list[Tensor]:
        """What the copy adds to the base."""

    def controlled(self, x_t: Tensor, t: Tensor, residuals: list[Tensor]) -> Tensor:
        """The base with these residuals added."""

    def held(self, x_t: Tensor, t: Tensor, residuals: list[Tensor]) -> Tensor:
        """The same, where the base's weights take no gradient."""


def loss(model: Branched, process: Process, x1: Tensor, cond: Tensor, settings: ImageFlow, draw: torch.Generator,
         done: float) -> Tensor:
    """``|e_m - e|^2 + |e_i - e|^2 + |e_m - sg(e_i)|^2``, and after a third of the training ``|e_m(x1 estimated by i) - e|^2``.

    Arguments as in ``denoise.py``; sg is a stop-gradient: the image branch is not pulled down to the mask branch. Its mask residuals carry no
    gradient either. An empty condition is empty for both branches.
    """
    x0 = normal(x1.shape, draw, x1.device)
    t = process.times(len(x1), settings.times, draw).to(x1)
    keep = (torch.rand(len(x1), generator=draw) >= settings.condition_dropout).to(x1)
    cond = cond * keep.view(-1, 1, 1, 1)
    x0 = process.coupled(x0, x1, settings.coupling)
    point = process.noised(x1, x0, t)
    by_mask, by_image = branches(model, point.x_t, t, x1, cond, done)
    total = sum(error(a, b).mean() for a, b in ((by_mask, point.target), (by_image, point.target), (by_mask, by_image.detach())))
    if done > AUGMENT_FROM:
        again = process.noised(process.clean(point, by_image).detach(), x0, t)
        total = total + (error(model(again.x_t, t, cond), again.target) * (t >= AUGMENT_LATEST)).mean()
    return torch.as_tensor(total)


def branches(model: Branched, x_t: Tensor, t: Tensor, image: Tensor, cond: Tensor, done: float) -> tuple[Tensor, Tensor]:
    """Predictions of the mask branch and of the image branch, [B, C, H, W] each."""
    by_mask = model.residuals(x_t, t, model.mask_hint(cond))
    by_image = model.residuals(x_t, t, model.image_hint(image, cond))
    both = [m.detach() + done * i for m, i in zip(by_mask, by_image, strict=True)]
    return model.controlled(x_t, t, by_mask), model.held(x_t, t, both)


def error(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference per image, [B]."""
    return (a.float() - b).square().mean((1, 2, 3))

