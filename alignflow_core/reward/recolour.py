"""Source images in the colours of references, region by region: what the denoising loss of the target's domain is shown.

Our choice. The reward alone has to invent the target's look from gradients through the sampler; a supervised signal that is nearly
right about colour, contrast and, by one filter for all images, sharpness and noise leaves it what these cannot give: illumination, texture.
"""

import torch
from torch import Tensor
from torch.nn import functional

GAIN_LIMIT = 4.0  # of a region's deviation: flat regions say little about it
SEAM = 3  # pixels over which two regions' colours blend
BANDS = 12  # of spatial frequency, from none to the corner's 1/sqrt(2) cycles per pixel
LONG_WAVES = 2  # first bands, which are left alone: what varies slowly belongs to the regions' colours
PADDING = 8


def recolour(images: Tensor, membership: Tensor, measured: Tensor, references: Tensor, known: Tensor, seen: Tensor, partner: Tensor) -> Tensor:
    """Give every region of image i the channel means and deviations that it has in reference ``partner[i]``.

    Args:
        images: [N, 3, H, W] in [-1, 1].
        membership: [N, R, H, W]; pixels in no region keep their colours.
        measured: the part of each region [N, R, H, W] whose moments are compared; chosen as ``known`` is, its bias cancels.
        references: [n, 3, H, W].
        known: pixels of the references whose region is known, [n, R, H, W].
        seen: pixels of the references that are not frame, [n, H, W].
        partner: reference of each image, [N].

    Returns:
        [N, 3, H, W]. A region that the partner lacks takes the mean over the references that have it; one that none has is
        recoloured like the whole image.
    """
    theirs_mean, theirs_std, theirs_has = _statistics(references, known)
    whole_mean, whole_std, _ = _statistics(references, seen[:, None])
    share = theirs_has / theirs_has.sum(0, keepdim=True).clamp_min(1)
    usual = [(value * share[..., None]).sum(0) for value in (theirs_mean, theirs_std)]
    somewhere, there = theirs_has.any(0)[None, :, None], theirs_has[partner][..., None].bool()
    mean = torch.where(somewhere, torch.where(there, theirs_mean[partner], usual[0]), whole_mean[partner])
    std = torch.where(somewhere, torch.where(there, theirs_std[partner], usual[1]), whole_std[partner])
    own_mean, own_std, _ = _statistics(images, torch.where(somewhere[..., None], measured, membership.sum(1, keepdim=True)))
    gain = (std / own_std).clamp(1 / GAIN_LIMIT, GAIN_LIMIT)
    painted = (images[:, None] - own_mean[..., None, None]) * gain[..., None, None] + mean[..., None, None]
    blend = functional.avg_pool2d(membership, SEAM, stride=1, padding=SEAM // 2, count_include_pad=False)
    return ((painted * blend[:, :, None]).sum(1) + images * (1 - blend.sum(1, keepdim=True))).clamp(-1, 1)


def spectrum(images: Tensor, seen: Tensor) -> Tensor:
    """Mean power per channel and band of spatial frequency [3, BANDS] of images [N, 3, H, W], of what ``seen`` [N, H, W] shows of each."""
    mean, _, _ = _statistics(images, seen[:, None])
    taper = torch.hann_window(images.shape[2], periodic=False)[:, None] * torch.hann_window(images.shape[3], periodic=False)
    window = seen * taper.to(images)
    energy = window.square().sum((1, 2)).clamp_min(1e-6)  # a frame leaves less of it, and would pass for blur
    power = (torch.fft.rfft2((images - mean[:, 0, :, None, None]) * window[:, None]).abs().square() / energy[:, None, None, None]).mean(0)
    share = _bands(images)
    return torch.einsum("chw,khw->ck", power, share) / share.sum((1, 2)).clamp_min(1e-6)


def spectral_gain(own: Tensor, theirs: Tensor) -> Tensor:
    """Factor per channel and band [3, BANDS] that takes images of one mean power to another: the blur or noise between two cameras."""
    gain = (theirs / own.clamp_min(1e-12)).sqrt().clamp(1 / GAIN_LIMIT, GAIN_LIMIT)
    return torch.cat([torch.ones_like(gain[:, :LONG_WAVES]), gain[:, LONG_WAVES:]], dim=1)


def refocus(images: Tensor, gain: Tensor, seen: Tensor) -> Tensor:
    """Images [N, 3, H, W] with every band multiplied by its gain [3, BANDS]; pixels that were not seen [N, H, W] stay as they are."""
    padded = functional.pad(images, (PADDING,) * 4, mode="reflect")
    factor = torch.einsum("ck,khw->chw", gain, _bands(padded))
    changed = torch.fft.irfft2(torch.fft.rfft2(padded) * factor, s=padded.shape[2:])[..., PADDING:-PADDING, PADDING:-PADDING]
    return torch.where(seen[:, None].bool(), changed.clamp(-1, 1), images)


def _bands(images: Tensor) -> Tensor:
    """Share of each frequency of ``rfft2`` in each band [BANDS, H, W // 2 + 1]; two neighbours share what lies between them, sum 1."""
    radius = (torch.fft.fftfreq(images.shape[2])[:, None].square() + torch.fft.rfftfreq(images.shape[3]).square()).sqrt()
    place = radius * (2**0.5) * (BANDS - 1)
    return (1 - (place - torch.arange(BANDS)[:, None, None]).abs()).clamp_min(0).to(images)


def _statistics(images: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and deviation per region and channel [N, R, 3], and whether the region is there [N, R]."""
    mass = weights.sum((2, 3))
    share = weights / mass.clamp_min(1e-6)[..., None, None]
    mean = torch.einsum("nchw,nrhw->nrc", images, share)
    square = torch.einsum("nchw,nrhw->nrc", images.square(), share)
    return mean, (square - mean.square()).clamp_min(1e-4).sqrt(), (mass >= 9).float()
