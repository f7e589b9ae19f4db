"""Encoders, distances, gradient schemes: formulas re-derived, gradients against plain autograd."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from alignflow_core.config import Align, Gates
from alignflow_core.flow.solver import euler, time_grid
from alignflow_core.registry import load
from alignflow_core.reward import distances, registry
from alignflow_core.reward.distances import frechet, skl
from alignflow_core.reward.encoders import Encoder, Material
from alignflow_core.reward.gates import Probe, closeness, failures
from alignflow_core.reward.gradient import full, last_k, random_k, sparse
from alignflow_core.reward.moments import Reference, describe
from alignflow_core.reward.objective import Objective, steadied
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


def test_last_k_is_back_propagation_through_the_last_k_steps(problem) -> None:
    """DRaFT-K (arXiv 2309.17400): what was sampled before them is a constant."""
    model, x0, cond, times = problem
    with torch.no_grad():
        begun = euler(model, x0, cond, times[:5])
    (-2.0 * reward(euler(model, begun, cond, times[4:]))).backward()
    expected = grads(model)
    model.zero_grad()
    last_k(model, x0, cond, times, reward, 2, generator(0), 2.0)
    assert torch.allclose(grads(model), expected)


def test_random_k_cuts_network_calls_and_never_the_path(problem) -> None:
    """AlignProp (arXiv 2310.03739): call i is detached where its own draw from 0 to N is above i, the last one never; the value is the sample's."""
    model, x0, cond, times = problem
    seen = set()
    for seed in range(20):
        cuts = torch.randint(7, (6,), generator=generator(seed)).tolist()
        kept = tuple(i >= cut or i == 5 for i, cut in enumerate(cuts))
        x = x0
        for i, keep in enumerate(kept):
            velocity = model(x, times[i].expand(6), cond)
            x = x + (times[i + 1] - times[i]) * (velocity if keep else velocity.detach())
        value = reward(x)
        (-2.0 * value).backward()
        expected = grads(model)
        model.zero_grad()
        done = random_k(model, x0, cond, times, reward, 1, generator(seed), 2.0)
        assert done.reward == pytest.approx(value.item()) and torch.allclose(grads(model), expected)
        model.zero_grad()
        seen.add(kept)
    assert len(seen) > 5


@pytest.mark.parametrize(("scheme", "k"), [(last_k, 6), (full, 1)])
def test_exact_schemes_are_back_propagation_through_the_solver(problem, scheme, k: int) -> None:
    model, x0, cond, times = problem
    value = reward(euler(model, x0, cond, times))
    (-2.0 * value).backward()
    expected = grads(model)
    model.zero_grad()
    done = scheme(model, x0, cond, times, reward, k, generator(0), 2.0)
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
    assert float(frechet(x, plain(y))) == pytest.approx(np.log(1 + (1 + 1) / 2.5), rel=0.1)  # (0-1)^2 + (1-2)^2 over (1 + 4) / 2
    assert float(frechet(y, plain(y))) < 1e-6


def test_frechet_neither_drowns_in_one_feature_nor_forgives_its_rest() -> None:
    """A feature fifty deviations away does not outweigh ten that are two away, and two left of fifty still count as two."""
    far, near = torch.zeros(9, 11).double(), torch.zeros(9, 11).double()
    goal = torch.tensor([50.0] + [2.0] * 10).double()
    reference = Reference(goal.expand(9, 11), goal, torch.full((11,), 1e-3).double(), goal, goal)
    far[:, 1:], near[:, 0] = 2.0, 50.0
    assert float(frechet(near, reference)) > float(frechet(far, reference))
    left = goal.expand(9, 11) - torch.eye(11).double()[0] * 2
    assert float(frechet(left, reference)) == pytest.approx(float(frechet(near, reference)) / 10, rel=1e-6)


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
    a, b = torch.randn(5, 7).double(), torch.randn(9, 7).double()
    assert float(skl(a, plain(b))) == pytest.approx(float(skl(b, plain(a))))
    assert float(skl(a + 100, plain(b))) == pytest.approx(float(skl(a, plain(b))))
    p, q = a.mean(0).softmax(0), b.mean(0).softmax(0)
    assert float(skl(a, plain(b))) == pytest.approx(float(((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2))


def plain(features: torch.Tensor) -> Reference:
    """A reference set of many images in plain units."""
    return Reference(features, features.mean(0), features.std(0), torch.ones(features.shape[1]).double(), features.mean(0))


@pytest.mark.parametrize("name", registry.DISTANCES)
def test_every_distance_is_least_at_the_references_and_leads_there(name: str) -> None:
    """Zero on the same set; and descending it from afar brings a set closer, with finite gradients all the way."""
    distance = load(registry.DISTANCES, name)
    draw = torch.Generator().manual_seed(0)
    theirs = torch.randn(40, 6, generator=draw).double() * 0.5 + torch.linspace(-1, 2, 6)
    reference = plain(theirs)
    assert float(distance(theirs, reference, 1.0)) == pytest.approx(0, abs=1e-3)
    ours = torch.randn(30, 6, generator=draw).double().requires_grad_()
    optimiser = torch.optim.Adam([ours], lr=0.02)
    first = distance(ours, reference, 1.0).item()
    for _ in range(60):
        optimiser.zero_grad()
        value = distance(ours, reference, 1.0)
        value.backward()
        assert ours.grad is not None and ours.grad.isfinite().all()
        optimiser.step()
    assert first > 0.01 and value.item() < 0.7 * first
    assert distance(ours, plain(theirs[:1].repeat(2, 1)), 1.0).item() >= 0 or name == "cosine"  # one reference, given twice


def test_distances_by_hand() -> None:
    one = torch.ones(1).double()
    x, y = torch.tensor([[0.0], [2.0]]).double(), torch.tensor([[3.0], [3.0], [5.0], [5.0]]).double()
    reference = Reference(y, y.mean(0), y.std(0, correction=0), one, y.mean(0))
    # variances 2 (unbiased) and 1, means 1 and 4
    shift, ratio = 9.0, 2.001 / 1.001
    assert float(distances.gaussian_skl(x, reference)) == pytest.approx((ratio + 1 / ratio) / 4 - 0.5 + shift * (1 + 1 / ratio) / 4)
    assert float(distances.coral(x, reference)) == pytest.approx((2 - 4 / 3) ** 2 / 4)
    alone = Reference(y[:1], one, one, 2 * one, one)  # the source's variance 1 and that of x, 2, in units of 2
    assert float(distances.coral(x, alone)) == pytest.approx((2 / 4 - 1 / 4) ** 2 / 4)
    assert float(distances.gram(x, reference)) == pytest.approx((2 - 17) ** 2)
    assert float(distances.cosine(-x, reference)) == pytest.approx(2)
    assert float(distances.sliced_wasserstein(x, reference)) == pytest.approx(9, rel=1e-6)  # every quantile moves by 3
    median = 9.0  # squared distances 9, 9, 25, 25, 1, 1, 9, 9
    kernel = lambda d: sum(2.718281828459045 ** (-d / (2 * w * w * median)) for w in distances.BANDWIDTHS) / 3  # noqa: E731
    expected = (2 * kernel(0) + 2 * kernel(4)) / 4 + (8 * kernel(0) + 8 * kernel(4)) / 16 - 2 * (4 * kernel(9) + 2 * kernel(25) + 2 * kernel(1)) / 8
    assert float(distances.mmd(x, reference)) == pytest.approx(expected)


def test_steadied_features_keep_the_gradient_of_the_whole_set() -> None:
    """The mean over batch and queue has the gradient that the batch's own mean would have."""
    now, before = torch.randn(4, 3).double().requires_grad_(), torch.randn(12, 3).double()
    steadied([now], [before])[0].mean(0).sum().backward()
    assert torch.allclose(now.grad, torch.full((4, 3), 0.25).double())
    assert torch.equal(steadied([now], [before])[0].detach(), torch.cat([before, now]).detach())


class Plain(nn.Module):
    """An 'encoder' whose features are given: the whole and two regions of different size."""

    def forward(self, images: torch.Tensor, regions: torch.Tensor) -> list[torch.Tensor]:
        return [images, images[:, :1], images[:0]]


def test_objective_joins_the_whole_with_the_regions_that_both_sides_have() -> None:
    draw = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(9, 4, generator=draw), torch.randn(7, 4, generator=draw) + 1
    objective = Objective(Plain(), Align(region_share=0.25, prior_count=2.0))
    known = objective.describe(theirs, theirs)
    assert known[2] is None
    parts = [float(frechet(a, describe(b, 2.0))) for a, b in ((ours, theirs), (ours[:, :1], theirs[:, :1]))]
    assert float(objective([ours, ours[:, :1], ours[:0]], known)) == pytest.approx(0.75 * parts[0] + 0.25 * parts[1])


def test_probe_sees_a_collapse() -> None:
    probe = Probe(torch.zeros(8, 1, 2, 2), torch.zeros(8, 1, 2, 2), time_grid(2), repeats=4)
    spread = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    collapsed = spread.clone()
    collapsed[:4], collapsed[4:] = spread[0] + 0.01 * spread[:4], spread[4] + 0.01 * spread[4:]
    assert probe.diversity(collapsed) < 0.1 * probe.diversity(spread)
    x1, speed = probe.sample(lambda x, t, c: torch.full_like(x, 3.0))
    assert torch.allclose(x1, torch.full_like(x1, 3.0)) and speed == pytest.approx(3.0)


def test_gates_say_what_fails() -> None:
    fine = {"diversity_ratio": 0.9, "velocity_ratio": 1.0, "agreement_ratio": 0.95, "copy_ratio": 1.0}
    assert failures(fine, Gates()) == []
    assert failures(fine | {"diversity_ratio": 0.5, "velocity_ratio": 1.3}, Gates()) == ["diversity ratio 0.50 < 0.8", "velocity ratio 1.30 > 1.1"]


def test_closeness_falls_for_copies_and_not_for_a_new_look() -> None:
    rng = np.random.default_rng(0)
    blobs = np.kron(rng.integers(60, 200, (30, 8, 8, 3)), np.ones((1, 4, 4, 1))).astype(np.uint8)
    samples, aligning, held_out = blobs[:10], blobs[10:20], blobs[20:]
    base = closeness(samples, aligning, held_out)
    assert base == pytest.approx(1, abs=0.15)
    assert closeness(samples // 2 + 30, aligning, held_out) == pytest.approx(base, abs=0.1)
    copies = (0.8 * aligning + 0.2 * samples).astype(np.uint8)
    assert closeness(copies, aligning, held_out) < 0.6 * base
    assert closeness(copies, aligning, None) < 0.5 * closeness(samples, aligning, None)
    one = np.concatenate([samples[:9], aligning[:1]])
    assert closeness(one, aligning, held_out) < 0.9 * closeness(samples, aligning, held_out), "a single copy in ten pictures is seen"


def test_closeness_does_not_blame_more_references_for_being_more() -> None:
    """Images of a site that it was never shown are 1 in the mean over the ways to divide its references 7 : 3; the plain ratio is less."""
    rng = np.random.default_rng(1)
    site = np.kron(rng.integers(90, 160, (1, 8, 8, 3)) + rng.normal(0, 12, (40, 8, 8, 3)), np.ones((1, 4, 4, 1))).clip(0, 255).astype(np.uint8)
    unseen, references = site[:30], site[30:]
    found = [closeness(unseen, np.delete(references, held, 0), references[list(held)]) for held in itertools.combinations(range(10), 3)]
    assert np.log(found).mean() == pytest.approx(0, abs=1e-9)


def test_the_documented_examples_run() -> None:
    """docs/extending.md: a distance and an encoder of one's own."""
    first, second, *_ = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "extending.md").read_text(), re.DOTALL)
    space: dict[str, object] = {"Encoder": Encoder, "Material": Material, "Tensor": torch.Tensor}
    exec(first, space)  # noqa: S102 (our own documentation)
    exec(second, space)  # noqa: S102
    ours = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    space["energy"](ours, describe(torch.ones(5, 4), 10.0)).backward()
    assert ours.grad is not None and ours.grad.isfinite().all()
    assert space["build"](None).maps(torch.randn(2, 3, 8, 8))[0].shape == (2, 3, 8, 7)
