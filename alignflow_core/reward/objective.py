"""What stage 2 lowers: the distance of samples to the reference set, of whole images and region by region."""

import torch
from torch import Tensor

from alignflow_core.config import Align
from alignflow_core.registry import load
from alignflow_core.reward.encoders import Standardised
from alignflow_core.reward.moments import Moments, Reference, describe, moments, shrunk
from alignflow_core.reward.registry import DISTANCES

Known = list[Reference | None]


class Objective:
    """A distance over the whole image joined with its mean over regions (``align.region_share``).

    Pooled by region, features tell *which* tissue must change its look; a global distance can be met by changing the wrong one.
    A region that no reference or fewer than two samples have is left out.
    """

    def __init__(self, encoder: Standardised, settings: Align) -> None:
        self.encoder, self.settings = encoder, settings
        self.distance = load(DISTANCES, settings.reward)

    @torch.no_grad()
    def describe(self, images: Tensor, regions: Tensor) -> Known:
        """What the references, [n, 3, H, W] with regions [n, R, H, W], are known to look like; first the whole image."""
        return [describe(f, self.settings.prior_count) if len(f) else None for f in self.encoder(images, regions)]

    def known(self, found: list[Moments | None]) -> Known:
        """The same from moments alone, as :func:`measured` takes them; distances then have no features to look at."""
        return [None if each is None else shrunk(each, each.mean.new_zeros(0, len(each.mean)), self.settings.prior_count) for each in found]

    def __call__(self, features: list[Tensor], reference: Known) -> Tensor:
        """Distance of a set of features (as the encoder returns them) to a reference, a scalar."""
        parts: list[Tensor] = [self.distance(f, known, self.settings.temperature)
                               for f, known in zip(features, reference, strict=True) if known is not None and len(f) > 1]
        if len(parts) == 1:
            return parts[0]
        return (1 - self.settings.region_share) * parts[0] + self.settings.region_share * torch.stack(parts[1:]).mean()


@torch.no_grad()
def measured(encoder: Standardised, images: Tensor, regions: Tensor) -> list[Moments | None]:
    """Moments of the whole and of every region of references, [n, 3, H, W] with regions [n, R, H, W]; ``None`` for a region that none has."""
    return [moments(f) if len(f) else None for f in encoder(images, regions)]


def steadied(features: list[Tensor], past: list[Tensor]) -> list[Tensor]:
    """Features of a batch joined with those of earlier samples.

    The batch is only a part of the set whose moments are compared: its gradient is scaled back up.
    """
    joined = []
    for now, before in zip(features, past, strict=True):
        whole = (len(before) + len(now)) / max(1, len(now))
        joined.append(torch.cat([before, now * whole + now.detach() * (1 - whole)]))
    return joined
