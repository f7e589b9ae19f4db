"""The training batches of painters: source images with their conditions, half of them mirrored."""

import torch
from torch import Tensor


def training_batch(images: Tensor, cond: Tensor, n: int, flip: bool, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """``n`` rows of images [N, C, H, W] and conditions [N, D, H, W] drawn with replacement; rows, then mirrorings come from the CPU generator."""
    rows = torch.randint(len(images), (n,), generator=draw).to(images.device)
    x1, c = images[rows], cond[rows]
    if flip:
        flipped = (torch.rand(n, generator=draw) < 0.5).view(-1, 1, 1, 1).to(images.device)
        x1, c = torch.where(flipped, x1.flip(3), x1), torch.where(flipped, c.flip(3), c)
    return x1, c
