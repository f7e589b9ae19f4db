"""The training batches of painters: source images with their conditions, half of them mirrored."""

import torch
from torch import Tensor

from alignflow_core.pairs import unit


def training_batch(images: Tensor, cond: Tensor, n: int, flip: bool, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """``n`` rows of images uint8 [N, C, H, W] and conditions [N, D, H, W] drawn with replacement; rows, then mirrorings come from the CPU generator.

    Returns:
        x1 [n, C, H, W] in [-1, 1] and cond [n, D, H, W].
    """
    rows = torch.randint(len(images), (n,), generator=draw).to(images.device)
    x1, c = unit(images[rows]), cond[rows]
    if flip:
        flipped = (torch.rand(n, generator=draw) < 0.5).view(-1, 1, 1, 1).to(images.device)
        x1, c = torch.where(flipped, x1.flip(3), x1), torch.where(flipped, c.flip(3), c)
    return x1, c
