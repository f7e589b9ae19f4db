"""Recolouring by region: moments by hand, regions that are missing, seams."""

import pytest
import torch

from alignflow_core.reward.recolour import recolour, refocus, spectral_gain, spectrum
from alignflow_core.reward.regions import view

ALL = torch.ones(3, 24, 24)


def striped(left: float, right: float, contrast: float, seed: int, n: int = 3) -> torch.Tensor:
    """Left and right halves of another level, noise of a deviation, [n, 3, 24, 24]."""
    noise = torch.randn(n, 3, 24, 24, generator=torch.Generator().manual_seed(seed))
    noise = noise / noise.std()
    level = torch.where(torch.arange(24) < 12, left, right)
    return level.expand(n, 3, 24, 24) + contrast * noise


def halves(n: int = 3) -> torch.Tensor:
    """Membership of the left and of the right half, [n, 2, 24, 24]."""
    left = (torch.arange(24) < 12).float().expand(n, 24, 24)
    return torch.stack([left, 1 - left], dim=1)


def test_every_region_gets_its_reference_moments() -> None:
    source, references = striped(-0.5, 0.5, 0.1, 0), striped(0.4, -0.2, 0.05, 1)
    partner = torch.tensor([2, 0, 1])
    painted = recolour(source, halves(), halves(), references, halves(), ALL, partner)
    for columns in (slice(0, 11), slice(13, 24)):  # away from the seam
        ours, theirs = painted[..., columns], references[partner][..., columns]
        assert torch.allclose(ours.mean((2, 3)), theirs.mean((2, 3)), atol=0.02)
        assert torch.allclose(ours.std((2, 3)), theirs.std((2, 3)), rtol=0.15)
    mixed = recolour(source, torch.ones(3, 1, 24, 24), torch.ones(3, 1, 24, 24), references, torch.ones(3, 1, 24, 24), ALL, partner)
    assert torch.allclose(mixed.mean((2, 3)), references[partner].mean((2, 3)), atol=0.02)
    assert mixed[..., :11].mean() < mixed[..., 13:].mean(), "without regions the contrast between them stays the source's"


def test_a_region_that_the_partner_lacks_takes_the_others() -> None:
    source, references = striped(-0.5, 0.5, 0.1, 0), striped(0.4, -0.2, 0.05, 1)
    known = halves()
    known[0, 1] = 0
    painted = recolour(source, halves(), halves(), references, known, ALL, torch.tensor([0, 0, 0]))
    assert painted[..., 13:].mean() == pytest.approx(-0.2, abs=0.03)
    known[:, 1] = 0  # nobody knows the right half: it is recoloured as a part of the whole image
    painted = recolour(source, halves(), halves(), references, known, ALL, torch.tensor([0, 1, 2]))
    whole = recolour(source, torch.ones(3, 1, 24, 24), torch.ones(3, 1, 24, 24), references, torch.ones(3, 1, 24, 24), ALL, torch.tensor([0, 1, 2]))
    assert torch.allclose(painted[..., 13:], whole[..., 13:], atol=1e-5)
    assert painted[..., :11].mean() == pytest.approx(0.4, abs=0.03)


def test_flat_regions_do_not_blow_up() -> None:
    flat = torch.zeros(2, 3, 24, 24)
    painted = recolour(flat, halves(2), halves(2), striped(0.4, -0.2, 0.3, 1), halves(), ALL, torch.tensor([0, 1]))
    assert painted.isfinite().all() and painted[..., :11].mean() == pytest.approx(0.4, abs=0.05)


def framed(images: torch.Tensor, left: int, top: int) -> torch.Tensor:
    """Black columns and rows, as an endoscope's frame, with the faint noise of a JPEG file."""
    images = images.clone()
    faint = -1 + 0.1 * torch.rand(len(images), 3, 24, 24, generator=torch.Generator().manual_seed(5))
    images[..., :left] = faint[..., :left]
    images[..., :top, :] = faint[..., :top, :]
    return images


def test_the_frame_is_what_is_dark_and_joined_to_the_border() -> None:
    images = framed(striped(-0.5, 0.5, 0.05, 0), 4, 2)
    images[:, :, 10:13, 10:13] = -1.0  # a shadow inside the view is no frame
    expected = torch.ones(24, 24)
    expected[:, :4], expected[:2] = 0, 0
    assert (view(images) == expected).all()
    assert (view(torch.full((1, 3, 24, 24), -0.99)) == 1).all(), "a dark image has no frame"


def test_frames_neither_count_nor_change() -> None:
    source, references, partner = striped(-0.5, 0.5, 0.1, 0), striped(0.4, -0.2, 0.05, 1), torch.tensor([2, 0, 1])
    ours, theirs = framed(source, 3, 0), framed(references, 0, 6)
    lit = halves() * view(ours)[:, None]
    painted = recolour(ours, lit, lit, theirs, halves() * view(theirs)[:, None], view(theirs), partner)
    assert torch.allclose(painted[..., 4:11].mean((2, 3)), references[partner][..., :11].mean((2, 3)), atol=0.03), "as if there were no frame"
    assert torch.equal(painted[..., :2], ours[..., :2])


def test_moments_of_a_biased_part_still_recolour_the_whole() -> None:
    """Only the brighter half of the region is measured, here and there: the mapping is that of the whole region."""
    source, references, partner = striped(-0.2, -0.2, 0.1, 0), striped(0.3, 0.3, 0.2, 1), torch.tensor([0, 1, 2])
    whole = torch.ones(3, 1, 24, 24)
    bright = [(x.mean(1, keepdim=True) > x.mean((1, 2, 3), keepdim=True)).float() for x in (source, references)]
    fair = recolour(source, whole, bright[0], references, bright[1], ALL, partner)
    unfair = recolour(source, whole, whole, references, bright[1], ALL, partner)
    assert (fair.mean((1, 2, 3)) - references.mean((1, 2, 3))).abs().max() < 0.03
    assert (unfair.mean((1, 2, 3)) - references.mean((1, 2, 3))).abs().min() > 0.05


def test_one_filter_takes_sharpness_and_noise_to_the_references() -> None:
    sharp = torch.rand(8, 3, 48, 48, generator=torch.Generator().manual_seed(0)) - 0.5
    seen = torch.ones(8, 48, 48)
    kernel = torch.full((3, 1, 3, 3), 1 / 9)
    blurred = torch.nn.functional.conv2d(torch.nn.functional.pad(sharp.flip(0), (1, 1, 1, 1), mode="reflect"), kernel, groups=3)
    gain = spectral_gain(spectrum(sharp, seen), spectrum(blurred, seen))
    assert (gain[:, :2] == 1).all() and (gain[:, 5] < 0.7).all()
    expected = torch.nn.functional.conv2d(torch.nn.functional.pad(sharp, (1, 1, 1, 1), mode="reflect"), kernel, groups=3)
    assert (refocus(sharp, gain, seen) - expected).square().mean() < 0.25 * (sharp - expected).square().mean()
    same = spectral_gain(spectrum(sharp, seen), spectrum(sharp, seen))
    assert torch.allclose(refocus(sharp, same, seen), sharp, atol=1e-4)
    hidden = seen.clone()
    hidden[:, :5] = 0
    assert torch.equal(refocus(sharp, gain, hidden)[:, :, :5], sharp[:, :, :5])


def test_a_frame_is_no_blur() -> None:
    texture = torch.rand(32, 3, 48, 48, generator=torch.Generator().manual_seed(0)) - 0.5
    lit = torch.ones(32, 48, 48)
    part = lit.clone()
    part[:, :, :21] = 0
    gain = spectral_gain(spectrum(texture[:16], lit[:16]), spectrum(torch.where(part[16:, None] > 0, texture[16:], -1.0), part[16:]))
    assert (gain[:, 2:].mean(1) - 1).abs().max() < 0.05
    assert spectrum(texture, torch.zeros(32, 48, 48)).isfinite().all()
