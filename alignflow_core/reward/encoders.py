"""Reward encoders: differentiable features of images, standardised by source statistics.

The encoder that rewards is never the encoder that measures (``metrics/features.py``).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from alignflow_core.errors import InputError


class StatConv(nn.Module):
    """Colour and texture statistics and fixed-seed random convolutions at three scales (our choice; no weights needed).

    Per image: channel means, deviations and correlations; colour on a 4x4 grid (illumination); means of random
    rectified colour projections (the colour distribution, so also contrast between regions); mean gradient size per channel
    and scale (sharpness, noise); mean and deviation of two random convolution layers per scale (texture).
    """

    colour: Tensor
    colour_bias: Tensor

    def __init__(self, width: int = 16, seed: int = 2604) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.register_buffer("colour", torch.randn(32, 3, 1, 1, generator=draw))
        self.register_buffer("colour_bias", torch.rand(32, generator=draw) * 1.6 - 0.8)
        for scale in range(3):
            self.register_buffer(f"first{scale}", torch.randn(width, 3, 3, 3, generator=draw) / 27**0.5)
            self.register_buffer(f"second{scale}", torch.randn(width, width, 3, 3, generator=draw) * (2 / (9 * width)) ** 0.5)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, D]."""
        parts = [functional.adaptive_avg_pool2d(images, 4).flatten(1), _moments(images), _correlations(images),
                 functional.relu(functional.conv2d(images, self.colour, self.colour_bias)).mean((2, 3))]
        x = images
        for scale in range(3):
            parts += [_gradient_size(x), _moments(hidden := functional.relu(functional.conv2d(x, getattr(self, f"first{scale}")))),
                      _moments(functional.relu(functional.conv2d(hidden, getattr(self, f"second{scale}"))))]
            x = functional.avg_pool2d(x, 2)
        return torch.cat(parts, dim=1)


def _moments(x: Tensor) -> Tensor:
    """Mean and deviation over space, [B, 2C]; the small constant keeps the root's gradient finite on flat images."""
    return torch.cat([x.mean((2, 3)), (x.var((2, 3)) + 1e-6).sqrt()], dim=1)


def _correlations(x: Tensor) -> Tensor:
    """Correlations between the three channels, [B, 3]."""
    centred = x - x.mean((2, 3), keepdim=True)
    unit = centred / (centred.square().mean((2, 3), keepdim=True) + 1e-4).sqrt()
    return torch.stack([(unit[:, a] * unit[:, b]).mean((1, 2)) for a, b in ((0, 1), (0, 2), (1, 2))], dim=1)


def _gradient_size(x: Tensor) -> Tensor:
    """Mean absolute difference of neighbours, across and down, [B, 6]."""
    return torch.cat([(x[..., 1:] - x[..., :-1]).abs().mean((2, 3)), (x[..., 1:, :] - x[..., :-1, :]).abs().mean((2, 3))], dim=1)


ENCODERS: dict[str, Callable[[], nn.Module]] = {"statconv": StatConv}


class Standardised(nn.Module):
    """An encoder whose features have mean 0 and deviation 1 on the source images it was fitted to."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: nn.Module, source_images: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        with torch.no_grad():
            features = torch.cat([encoder(chunk) for chunk in source_images.split(64)])
        std = features.std(0)
        self.register_buffer("mean", features.mean(0))
        # A feature that hardly varies at the source would drown all others: its scale is floored.
        self.register_buffer("std", std.clamp_min(float(std.median()) * 0.1 + 1e-6))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> standardised features [B, D]."""
        features: Tensor = (self.encoder(images) - self.mean) / self.std
        return features


def fit_encoder(name: str, source_images: Tensor) -> Standardised:
    """The named encoder, frozen and standardised on source images [N, 3, H, W] in [-1, 1].

    Raises:
        InputError: unknown name.
    """
    if name not in ENCODERS:
        raise InputError(f"encoder: unknown '{name}'{nearest(name, ENCODERS)}")
    encoder = ENCODERS[name]().to(source_images.device).requires_grad_(False)
    return Standardised(encoder, source_images).eval()
