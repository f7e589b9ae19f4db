"""Source images in the colours of references, region by region: what the denoising loss of the target's domain is shown.

Our choice. The reward alone has to invent the target's look from gradients through the sampler; a supervised signal that is nearly
right about colour and contrast leaves it what colour transfer cannot give: illumination, sharpness, noise, texture.
"""

import torch
from torch import Tensor
from torch.nn import functional

GAIN_LIMIT = 4.0  # of a region's deviation: flat regions say little about it
SEAM = 3  # pixels over which two regions' colours blend


def recolour(images: Tensor, membership: Tensor, references: Tensor, known: Tensor, partner: Tensor) -> Tensor:
    """Give every region of image i the channel means and deviations that it has in reference ``partner[i]``.

    Args:
        images: [N, 3, H, W] in [-1, 1].
        membership: [N, R, H, W], every pixel in one region.
        references: [n, 3, H, W].
        known: pixels of the references whose region is known, [n, R, H, W].
        partner: reference of each image, [N].

    Returns:
        [N, 3, H, W]. A region that the partner lacks takes the mean over the references that have it; one that none has is
        recoloured like the whole image.
    """
    theirs_mean, theirs_std, theirs_has = _statistics(references, known)
    whole_mean, whole_std, _ = _statistics(references, torch.ones_like(known[:, :1]))
    share = theirs_has / theirs_has.sum(0, keepdim=True).clamp_min(1)
    usual = [(value * share[..., None]).sum(0) for value in (theirs_mean, theirs_std)]
    somewhere, there = theirs_has.any(0)[None, :, None], theirs_has[partner][..., None].bool()
    mean = torch.where(somewhere, torch.where(there, theirs_mean[partner], usual[0]), whole_mean[partner])
    std = torch.where(somewhere, torch.where(there, theirs_std[partner], usual[1]), whole_std[partner])
    own_mean, own_std, _ = _statistics(images, torch.where(somewhere[..., None], membership, 1.0))
    gain = (std / own_std).clamp(1 / GAIN_LIMIT, GAIN_LIMIT)
    painted = (images[:, None] - own_mean[..., None, None]) * gain[..., None, None] + mean[..., None, None]
    blend = functional.avg_pool2d(membership, SEAM, stride=1, padding=SEAM // 2, count_include_pad=False)
    return (painted * blend[:, :, None]).sum(1).clamp(-1, 1)


def _statistics(images: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and deviation per region and channel [N, R, 3], and whether the region is there [N, R]."""
    mass = weights.sum((2, 3))
    share = weights / mass.clamp_min(1e-6)[..., None, None]
    mean = torch.einsum("nchw,nrhw->nrc", images, share)
    square = torch.einsum("nchw,nrhw->nrc", images.square(), share)
    return mean, (square - mean.square()).clamp_min(1e-4).sqrt(), (mass >= 9).float()
