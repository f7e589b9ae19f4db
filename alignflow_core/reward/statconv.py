"""The default reward encoder: colour and texture statistics and fixed-seed random convolutions (our choice; no weights needed)."""

import torch
from torch import Tensor
from torch.nn import functional

from alignflow_core.reward.encoders import Encoder, Material


class StatConv(Encoder):
    """Three scales of random rectified convolutions, random colour projections, gradient sizes, colour layout.

    Maps: the channels; random rectified colour projections (the colour distribution); at three scales the sizes of the gradients
    per channel (sharpness, noise) and two random convolution layers (texture). Layout: colour on a 4x4 grid (illumination)
    and the correlations between channels.
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

    def maps(self, images: Tensor) -> list[Tensor]:
        """See :class:`Encoder`."""
        found = [images, functional.relu(functional.conv2d(images, self.colour, self.colour_bias))]
        x = images
        for scale in range(3):
            hidden = functional.relu(functional.conv2d(_mirrored(x), getattr(self, f"first{scale}")))
            found += [_gradient_size(x), hidden, functional.relu(functional.conv2d(_mirrored(hidden), getattr(self, f"second{scale}")))]
            x = functional.avg_pool2d(x, 2)
        return found

    def layout(self, images: Tensor) -> Tensor:
        """See :class:`Encoder`."""
        return torch.cat([_cells(images, 4).flatten(1), _correlations(images)], dim=1)


def build(material: Material) -> StatConv:
    """The encoder; it needs no material."""
    return StatConv()


def _mirrored(x: Tensor) -> Tensor:
    """One pixel more on every side, so that a map's cells lie over their pixels; put together by hand, as the gradient of
    PyTorch's own reflection padding is not deterministic on CUDA."""
    x = torch.cat([x[..., 1:2], x, x[..., -2:-1]], dim=-1)
    return torch.cat([x[..., 1:2, :], x, x[..., -2:-1, :]], dim=-2)


def _gradient_size(x: Tensor) -> Tensor:
    """Absolute differences of neighbours, across and down, [B, C, H, W] -> [B, 2C, H - 1, W - 1]."""
    return torch.cat([(x[..., :-1, 1:] - x[..., :-1, :-1]).abs(), (x[..., 1:, :-1] - x[..., :-1, :-1]).abs()], dim=1)


def _cells(images: Tensor, n: int) -> Tensor:
    """Means of n x n equal parts of [B, C, H, W]; on a GPU by sums whose gradient does not vary from run to run."""
    if images.is_cuda and not images.shape[2] % n and not images.shape[3] % n:
        return images.unflatten(3, (n, -1)).unflatten(2, (n, -1)).mean((3, 5))
    return functional.adaptive_avg_pool2d(images, n)


def _correlations(x: Tensor) -> Tensor:
    """Correlations between the three channels, [B, 3]."""
    centred = x - x.mean((2, 3), keepdim=True)
    unit = centred / (centred.square().mean((2, 3), keepdim=True) + 1e-4).sqrt()
    return torch.stack([(unit[:, a] * unit[:, b]).mean((1, 2)) for a, b in ((0, 1), (0, 2), (1, 2))], dim=1)
