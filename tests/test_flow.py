"""Path, loss, couplings, solvers, guidance: known answers."""

import math

import pytest
import torch

from alignflow_core.config import Times
from alignflow_core.flow.coupling import couple
from alignflow_core.flow.ema import Ema
from alignflow_core.flow.guidance import guided
from alignflow_core.flow.loss import flow_matching_loss
from alignflow_core.flow.path import sample_path, sample_times
from alignflow_core.flow.solver import SOLVERS, time_grid
from alignflow_core.seeding import derive_seed, generator


def test_path_runs_from_noise_to_data() -> None:
    x0, x1 = torch.randn(2, 4, 3, 5, 5).double()
    at = lambda t: sample_path(x0, x1, torch.full((4,), t).double())  # noqa: E731
    assert torch.equal(at(0.0).x_t, x0) and torch.equal(at(1.0).x_t, x1)
    assert torch.allclose((at(0.7).x_t - at(0.3).x_t) / 0.4, at(0.5).velocity)


def test_times_follow_their_law() -> None:
    t = sample_times(40_000, Times(uniform_share=0.0), generator(1))
    logit = torch.logit(t)
    assert abs(float(logit.mean())) < 0.02 and abs(float(logit.std()) - 1) < 0.02
    uniform = sample_times(40_000, Times(uniform_share=1.0), generator(1))
    assert abs(float(uniform.var()) - 1 / 12) < 0.002
    assert float(sample_times(1000, Times(shift=3.0), generator(1)).mean()) < float(t.mean())


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_solver_has_its_order_of_convergence(name: str, order: int) -> None:
    """dx/dt = x cos(4t) has x(1) = x(0) exp(sin(4) / 4)."""
    x0 = torch.ones(1, 1, 1, 1).double()
    exact = math.exp(math.sin(4) / 4)

    def error(n: int) -> float:
        solved = SOLVERS[name](lambda x, t, c: x * torch.cos(4 * t).view(-1, 1, 1, 1), x0, x0, time_grid(n).double())
        return abs(float(solved) - exact)

    assert math.log2(error(64) / error(128)) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("name", SOLVERS)
def test_solver_is_exact_on_a_constant_field(name: str) -> None:
    x0 = torch.randn(3, 2, 4, 4)
    solved = SOLVERS[name](lambda x, t, c: torch.full_like(x, 2.0), x0, x0, time_grid(5).square())
    assert torch.allclose(solved, x0 + 2, atol=1e-6)


def test_loss_is_zero_for_the_true_velocity_and_known_for_zero() -> None:
    x1 = torch.full((64, 1, 8, 8), 3.0)

    def oracle(x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return (x1 - x_t) / (1 - t.view(-1, 1, 1, 1)).clamp_min(1e-6)  # all mass at one image: v = (x1 - x_t) / (1 - t)

    assert float(flow_matching_loss(oracle, x1, x1, Times(), generator(0))) < 1e-4
    nothing = flow_matching_loss(lambda x, t, c: torch.zeros_like(x), x1, x1, Times(), generator(0))
    assert float(nothing) == pytest.approx(9 + 1, rel=0.05)  # E (x1 - x0)^2


def test_condition_dropout_blanks_rows() -> None:
    seen = []
    flow_matching_loss(lambda x, t, c: seen.append(c) or x, torch.ones(1000, 1, 2, 2), torch.ones(1000, 1, 2, 2), Times(), generator(3),
                       condition_dropout=0.25)
    assert float(seen[0].mean()) == pytest.approx(0.75, abs=0.04)


def test_optimal_coupling_undoes_a_permutation() -> None:
    x1 = torch.randn(16, 1, 4, 4)
    shuffled = (x1 + 0.01 * torch.randn(x1.shape))[torch.randperm(16)]
    assert (couple("minibatch_ot", shuffled, x1) - x1).abs().max() < 0.1
    assert couple("independent", shuffled, x1) is shuffled


def test_guidance_extrapolates_from_the_null_condition() -> None:
    model = lambda x, t, c: c.mean((1, 2, 3), keepdim=True) * torch.ones_like(x)  # noqa: E731
    x, cond = torch.zeros(2, 1, 2, 2), torch.ones(2, 3, 2, 2)
    assert torch.equal(guided(model, 1.0)(x, torch.zeros(2), cond), torch.ones(2, 1, 2, 2))
    assert torch.equal(guided(model, 1.5)(x, torch.zeros(2), cond), torch.full((2, 1, 2, 2), 1.5))


def test_ema_converges_to_constant_weights() -> None:
    model = torch.nn.Linear(2, 2)
    ema = Ema(model, 0.9)
    with torch.no_grad():
        model.weight.fill_(5.0)
    for _ in range(100):
        ema.update(model)
    assert torch.allclose(ema.shadow["weight"], torch.full((2, 2), 5.0), atol=1e-3)


def test_seeds_depend_on_every_name() -> None:
    assert len({derive_seed(0, "pair", 1), derive_seed(0, "pair", 2), derive_seed(1, "pair", 1), derive_seed(0, "mask", 1)}) == 4
    assert derive_seed(0, "pair", 1) == derive_seed(0, "pair", 1) < 2**63
