"""Recolouring by region: moments by hand, regions that are missing, seams."""

import pytest
import torch

from alignflow_core.reward.recolour import recolour


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
    painted = recolour(source, halves(), references, halves(), partner)
    for columns in (slice(0, 11), slice(13, 24)):  # away from the seam
        ours, theirs = painted[..., columns], references[partner][..., columns]
        assert torch.allclose(ours.mean((2, 3)), theirs.mean((2, 3)), atol=0.02)
        assert torch.allclose(ours.std((2, 3)), theirs.std((2, 3)), rtol=0.15)
    mixed = recolour(source, torch.ones(3, 1, 24, 24), references, torch.ones(3, 1, 24, 24), partner)
    assert torch.allclose(mixed.mean((2, 3)), references[partner].mean((2, 3)), atol=0.02)
    assert mixed[..., :11].mean() < mixed[..., 13:].mean(), "without regions the contrast between them stays the source's"


def test_a_region_that_the_partner_lacks_takes_the_others() -> None:
    source, references = striped(-0.5, 0.5, 0.1, 0), striped(0.4, -0.2, 0.05, 1)
    known = halves()
    known[0, 1] = 0
    painted = recolour(source, halves(), references, known, torch.tensor([0, 0, 0]))
    assert painted[..., 13:].mean() == pytest.approx(-0.2, abs=0.03)
    known[:, 1] = 0  # nobody knows the right half: it is recoloured as a part of the whole image
    painted = recolour(source, halves(), references, known, torch.tensor([0, 1, 2]))
    whole = recolour(source, torch.ones(3, 1, 24, 24), references, torch.ones(3, 1, 24, 24), torch.tensor([0, 1, 2]))
    assert torch.allclose(painted[..., 13:], whole[..., 13:], atol=1e-5)
    assert painted[..., :11].mean() == pytest.approx(0.4, abs=0.03)


def test_flat_regions_do_not_blow_up() -> None:
    flat = torch.zeros(2, 3, 24, 24)
    painted = recolour(flat, halves(2), striped(0.4, -0.2, 0.3, 1), halves(), torch.tensor([0, 1]))
    assert painted.isfinite().all() and painted[..., :11].mean() == pytest.approx(0.4, abs=0.05)
