"""Encoders, distances, gradient schemes: formulas re-derived, gradients against plain autograd."""

import pytest
import torch
from torch import nn

from alignflow_core.flow.solver import euler, time_grid
from alignflow_core.reward.distances import Reference, describe, frechet, skl
from alignflow_core.reward.encoders import fit_encoder
from alignflow_core.reward.gates import Probe
from alignflow_core.reward.gradient import last_k, sparse
from alignflow_core.seeding import generator


class TinyVelocity(nn.Module):
    """A small nonlinear velocity model in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 1, 3, padding=1)).double()

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([x, cond * t.view(-1, 1, 1, 1)], 1))


def grads(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def reward(x1: torch.Tensor) -> torch.Tensor:
    return -(x1 - 0.3).square().mean() - x1.mean((2, 3)).var()


@pytest.fixture
def problem() -> tuple[TinyVelocity, torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    x0, cond = torch.randn(2, 6, 1, 6, 6, generator=draw).double()
    return TinyVelocity(), x0, cond, time_grid(6).double()


def test_last_k_with_all_steps_is_full_back_propagation(problem) -> None:
    model, x0, cond, times = problem
    value = reward(euler(model, x0, cond, times))
    (-2.0 * value).backward()
    expected = grads(model)
    model.zero_grad()
    done = last_k(model, x0, cond, times, reward, 6, generator(0), 2.0)
    assert done.reward == pytest.approx(value.item()) and torch.allclose(grads(model), expected)


def test_sparse_with_all_steps_is_the_detached_input_gradient(problem) -> None:
    """K = N: the graph x1 = x0 + sum dt v(detached x_i) by autograd, and the cached value is the plain sample."""
    model, x0, cond, times = problem
    x, total = x0, x0
    for a, b in zip(times[:-1], times[1:], strict=True):
        velocity = model(x.detach(), a.expand(6), cond)
        total, x = total + (b - a) * velocity, (x + (b - a) * velocity).detach()
    (-reward(total)).backward()
    expected = grads(model)
    model.zero_grad()
    done = sparse(model, x0, cond, times, reward, 6, generator(0), 1.0)
    assert torch.allclose(grads(model), expected)
    with torch.no_grad():
        assert torch.allclose(done.x1, euler(model, x0, cond, times))


def test_sparse_is_unbiased(problem) -> None:
    """The mean over all draws of K = 1 equals K = N."""
    model, x0, cond, times = problem
    sparse(model, x0, cond, times, reward, 6, generator(0), 1.0)
    expected = grads(model)
    model.zero_grad()
    draws = 600
    for i in range(draws):
        sparse(model, x0, cond, times, reward, 1, generator("draw", i), 1.0 / draws)
    assert nn.functional.cosine_similarity(grads(model), expected, dim=0) > 0.98
    assert float(grads(model).norm() / expected.norm()) == pytest.approx(1, abs=0.1)


def test_frechet_is_zero_at_equal_moments_and_known_for_gaussians() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(4000, 3, generator=draw).double(), torch.randn(4000, 3, generator=draw).double() * 2 + 1
    plain = Reference(y, y.mean(0), y.std(0), torch.ones(3).double())
    assert float(frechet(x, plain)) == pytest.approx(1 + 1, rel=0.1)  # (0-1)^2 + (1-2)^2
    assert float(frechet(y, plain)) < 1e-6


def test_moments_shrink_small_shifts_and_keep_large_ones() -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(10, 2, generator=draw).double()
    features = features - features.mean(0)
    features[:, 0] += 8.0
    features[:, 1] += 0.01
    found = describe(features, prior_count=10)
    variance = features.var(0)
    assert float(found.mean[0]) == pytest.approx(8, rel=0.01) and float(found.mean[1]) == 0
    assert torch.allclose(found.std, ((10 * variance + 10) / 20).sqrt())
    assert torch.allclose(describe(features[:1], 10).std, torch.ones(2).double())  # one reference: the source's variance


def test_skl_is_symmetric_and_blind_to_a_common_offset() -> None:
    a, b, one = torch.randn(5, 7).double(), torch.randn(9, 7).double(), torch.ones(7).double()
    plain = lambda f: Reference(f, f.mean(0), f.std(0), one)  # noqa: E731
    assert float(skl(a, plain(b))) == pytest.approx(float(skl(b, plain(a))))
    assert float(skl(a + 100, plain(b))) == pytest.approx(float(skl(a, plain(b))))
    p, q = a.mean(0).softmax(0), b.mean(0).softmax(0)
    assert float(skl(a, plain(b))) == pytest.approx(float(((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2))


def test_encoder_is_standardised_differentiable_and_fixed() -> None:
    images = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = images * torch.linspace(0.2, 1, 40).view(-1, 1, 1, 1)
    encoder, again = fit_encoder("statconv", images), fit_encoder("statconv", images)
    features = encoder(images)
    assert torch.equal(features, again(images)) and features.mean(0).abs().max() < 1e-3
    assert torch.allclose(features.std(0).median(), torch.tensor(1.0), atol=0.01)
    flat = torch.zeros(2, 3, 32, 32, requires_grad=True)
    encoder(flat).sum().backward()
    assert flat.grad is not None and flat.grad.isfinite().all()


def test_probe_sees_a_collapse() -> None:
    probe = Probe(torch.zeros(8, 1, 2, 2), torch.zeros(8, 1, 2, 2), time_grid(2), repeats=4)
    spread = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    collapsed = spread.clone()
    collapsed[:4], collapsed[4:] = spread[0] + 0.01 * spread[:4], spread[4] + 0.01 * spread[4:]
    assert probe.diversity(collapsed) < 0.1 * probe.diversity(spread)
    x1, speed = probe.sample(lambda x, t, c: torch.full_like(x, 3.0))
    assert torch.allclose(x1, torch.full_like(x1, 3.0)) and speed == pytest.approx(3.0)
