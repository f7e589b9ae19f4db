"""Differential privacy of the references: the gradient of each, the noised sum, the accountant and what is refused."""

import itertools
import math
import sys
from statistics import NormalDist

import pytest
import torch
from torch import nn

from alignflow_core.config import Align, Privacy
from alignflow_core.errors import InputError
from alignflow_core.flow.solver import time_grid
from alignflow_core.reward.gradient import sparse, sparse_each
from alignflow_core.reward.private import PrivateSum
from alignflow_core.seeding import generator

BUDGET = {"privacy": Privacy(epsilon=8.0), "recolour": False}


@pytest.fixture(scope="module", autouse=True)
def _opacus() -> None:
    pytest.importorskip("opacus", reason="the extra 'dp' is not installed")


def test_each_gradient_is_that_of_the_reward_alone() -> None:
    torch.manual_seed(0)
    net = nn.Conv2d(2, 1, 3, padding=1).double()
    x0, cond = torch.randn(2, 5, 1, 6, 6).double()
    times = time_grid(6).double()

    def velocity(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return torch.tanh(net(torch.cat([x, c * t.view(-1, 1, 1, 1)], 1)))

    goals = (0.3, -1.0, 2.0)
    parameters = list(net.parameters())
    together = list(sparse_each(velocity, x0, cond, times, lambda x1: [-(x1 - g).square().mean() for g in goals], 2, generator(0), parameters))
    for goal, found in zip(goals, together, strict=True):
        net.zero_grad()
        sparse(velocity, x0, cond, times, lambda x1, g=goal: -(x1 - g).square().mean(), 2, generator(0), 1.0)  # type: ignore[misc]
        for parameter, gradient in zip(net.parameters(), found, strict=True):
            assert torch.allclose(parameter.grad, gradient)


def added(gradients: list[torch.Tensor], norm: float = 0.5, noise: float | None = None, salt: str = "a", step: int = 0) -> torch.Tensor:
    """What one parameter's gradient of ones becomes."""
    parameter = nn.Parameter(torch.zeros_like(gradients[0]))
    parameter.grad = torch.ones_like(parameter)
    private = PrivateSum(Privacy(epsilon=8.0), 100, salt)
    if noise is not None:
        private.noise_multiplier = noise
    private.add([parameter], iter([(g,) for g in gradients]), len(gradients), norm, step)
    return parameter.grad - 1


def test_every_reference_pulls_equally_and_none_more() -> None:
    """Without noise: the mean of unit vectors times the norm, whatever the gradients' own lengths; the denoising gradient stays."""
    gradients = list(torch.randn(3, 50)), [1e-8, 1.0, 1e8]
    scaled = [g * s for g, s in zip(*gradients, strict=True)]
    expected = torch.stack([0.5 * g / g.norm() for g in gradients[0]]).mean(0)
    assert torch.allclose(added(scaled, noise=0.0), expected, atol=1e-6)
    other = added([*scaled[:2], 1e9 * torch.randn(50)], noise=0.0)
    assert float((other - added(scaled, noise=0.0)).norm()) <= 2 * 0.5 / 3 + 1e-6, "one reference may move the mean by its share alone"


def test_noise_has_the_accountants_size_and_is_never_used_twice() -> None:
    many = list(torch.randn(4, 40_000))
    private = PrivateSum(Privacy(epsilon=8.0), 100, "a")
    found = added(many) - added(many, noise=0.0)
    assert float(found.std()) == pytest.approx(private.noise_multiplier * 0.5 / 4, rel=0.03)
    assert torch.equal(added(many), added(many)), "a resumed run repeats its noise"
    for other in (added(many, salt="b"), added(many, step=1)):  # of another run, of another step
        assert abs(float(torch.corrcoef(torch.stack([found, other - added(many, noise=0.0)]))[0, 1])) < 0.03


def test_noise_cannot_be_repeated_without_the_site_key(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    many = [torch.ones(2_000)]
    here = added(many)
    monkeypatch.setenv("ALIGNFLOW_SITE_KEY_FILE", str(tmp_path / "other.key"))
    assert not torch.allclose(here, added(many), atol=1e-3)


def test_noise_depends_on_every_digit_of_its_keyed_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a CPU's generator of torch the lower 32 bits of a seed are all that counts."""
    drawn = []
    for place in range(0, 64, 7):
        monkeypatch.setattr("alignflow_core.reward.private.pseudonym", lambda kind, name, length, at=place: ("0" * at + "1" + "0" * 63)[:length])
        drawn.append(added([torch.ones(200)]))
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in itertools.combinations(drawn, 2))


@pytest.mark.parametrize(("epsilon", "steps"), [(1.0, 20), (8.0, 120), (50.0, 1000)])
def test_the_budget_is_kept_by_the_exact_curve_of_the_gaussian_mechanism(epsilon: float, steps: int) -> None:
    """T sums of sensitivity 1 with noise sigma are one Gaussian mechanism of mu = sqrt(T) / sigma (arXiv 1805.06530, theorem 8)."""
    spent = PrivateSum(Privacy(epsilon=epsilon, delta=1e-3), steps, "a").spent(7)
    assert 0.97 * epsilon - 0.02 < spent["epsilon"] <= epsilon and spent["n_records"] == 7
    mu, phi = math.sqrt(steps) / spent["noise_multiplier"], NormalDist().cdf
    exact = phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu)
    assert 1e-5 < exact <= 1e-3, "the accountant must be an upper bound, and not a useless one"


@pytest.mark.parametrize(("changed", "named"), [
    ({"recolour": True}, "align.recolour"), ({"denoise": "references"}, "align.denoise"), ({"gradient": "full"}, "align.gradient"),
    ({"encoder": "ssl"}, "align.encoder"), ({"reward": "mmd"}, "align.reward"), ({"rho": 0.0}, "align.rho"),
])
def test_settings_that_would_leak_are_refused(changed: dict[str, object], named: str) -> None:
    Align(**BUDGET)
    with pytest.raises(InputError, match=named):
        Align(**(BUDGET | changed))


def test_impossible_budgets_are_refused() -> None:
    for bad in ({"epsilon": 0.0}, {"epsilon": -1.0}, {"epsilon": 1.0, "delta": 1.0}):
        with pytest.raises(InputError, match=r"align\.privacy"):
            Privacy(**bad)
    with pytest.raises(InputError, match="cannot be kept"):
        PrivateSum(Privacy(epsilon=1e-7, delta=1e-9), 100, "a")


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants.utils", None)
    with pytest.raises(InputError, match=r"\.\[dp\]"):
        PrivateSum(Privacy(epsilon=8.0), 100, "a")
