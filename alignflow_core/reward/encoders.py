"""What an encoder is, and its features of whole images and of regions, standardised by source statistics.

The encoder that rewards is never the encoder that measures (``metrics/features.py``).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from alignflow_core.registry import load
from alignflow_core.reward.regions import MIN_PIXELS, view
from alignflow_core.reward.registry import ENCODERS

BORDER_POWER = 4
LEAST_WEIGHT = 1e-20  # less than a region of any size has: nine pixels in cells of 32 have 6e-9


class Encoder(nn.Module, ABC):
    """A frozen, differentiable network whose maps are pooled to features (over the whole image or over a region)."""

    @abstractmethod
    def maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps [B, C_i, H_i, W_i], of any number and size, of images [B, 3, H, W] in [-1, 1]."""

    def layout(self, images: Tensor) -> Tensor:
        """Features [B, E] that only whole images have (where things are); none by default."""
        return images.new_zeros(len(images), 0)


@dataclass(frozen=True)
class Material:
    """What an encoder may be built from.

    Attributes:
        source, references: images [N, 3, H, W] in [-1, 1]; the references are those that are aligned to.
        stage1: checkpoint folder of the stage-1 flow.
        weights: what ``align.encoder_weights`` names.
        seed: the project's.
        work_dir: survives an interruption.
    """

    source: Tensor
    references: Tensor
    stage1: Path
    weights: Path | str | None
    seed: int
    work_dir: Path


def build(name: str, material: Material) -> Encoder:
    """The named encoder, frozen, in evaluation mode, on the device of the images.

    Raises:
        InputError: its weights are missing or do not fit.
    """
    encoder: Encoder = load(ENCODERS, name)(material)
    return encoder.to(material.source.device).requires_grad_(False).eval()


class Standardised(nn.Module):
    """Features of images or regions with mean 0 and deviation 1 on the source images they were fitted to; frames are left out.

    Args:
        encoder: frozen encoder.
        images: source images [N, 3, H, W] in [-1, 1].
        weights: membership of every pixel in each of R regions, [N, R, H, W] in [0, 1]; R = 0 for none.
    """

    def __init__(self, encoder: Encoder, images: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.moments: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            chunks = [self._raw(x, w) for x, w in zip(images.split(64), weights.split(64), strict=True)]
        for parts in zip(*chunks, strict=True):
            features = torch.cat(parts)
            if len(features) < 2:  # a region that the source lacks is never described
                self.moments.append((features.new_zeros(features.shape[1]), features.new_ones(features.shape[1])))
                continue
            std = features.std(0)
            # A feature that hardly varies at the source would drown all others: its scale is floored.
            self.moments.append((features.mean(0), std.clamp_min(float(std.median()) * 0.1 + 1e-6)))

    def forward(self, images: Tensor, weights: Tensor) -> list[Tensor]:
        """[B, 3, H, W], [B, R, H, W] -> features of the whole [B, D], then of each region [b, E] of the b images that have it."""
        return [(f - mean) / std for f, (mean, std) in zip(self._raw(images, weights), self.moments, strict=True)]

    def _raw(self, images: Tensor, weights: Tensor) -> list[Tensor]:
        maps, seen = self.encoder.maps(images), view(images)
        whole = torch.cat([self.encoder.layout(images), *(pool(m, _on_grid(seen, m)) for m in maps)], dim=1)
        found = [whole]
        for region in (weights * seen[:, None]).unbind(1):
            there = region.sum((1, 2)) >= MIN_PIXELS
            found.append(torch.cat([pool(m[there], _on_grid(region[there], m)) for m in maps], dim=1))
        return found


class Restored(Standardised):
    """Standardised by statistics fitted elsewhere: mean and scale [D] of the whole image, then of each region."""

    def __init__(self, encoder: Encoder, moments: list[tuple[Tensor, Tensor]]) -> None:
        nn.Module.__init__(self)
        self.encoder, self.moments = encoder, moments


def _on_grid(region: Tensor, x: Tensor) -> Tensor:
    """Membership [B, H, W] on the grid of a map [B, C, h, w]; cells that reach over the region's border hardly count."""
    return functional.adaptive_avg_pool2d(region, (x.shape[2], x.shape[3])) ** BORDER_POWER


def pool(x: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean and deviation over space, [B, C, H, W], [B, H, W] -> [B, 2C].

    The small constant keeps the root's gradient finite on flat images.
    """
    share = (weights / weights.sum((1, 2), keepdim=True).clamp_min(LEAST_WEIGHT)).unsqueeze(1)
    mean = (x * share).sum((2, 3))
    variance = ((x - mean[..., None, None]).square() * share).sum((2, 3))
    return torch.cat([mean, (variance + 1e-6).sqrt()], dim=1)
