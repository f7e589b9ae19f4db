"""Muon: orthogonal steps, which weights it takes, and the training loop that resumes it."""

from pathlib import Path

import pytest
import torch
from torch import nn

from alignflow_core.checkpoint import load_tensors
from alignflow_core.config import Training
from alignflow_core.errors import InputError
from alignflow_core.flow.muon import COEFFICIENTS, TURNS, Muon, is_matrix, orthogonal
from alignflow_core.flow.train import train


@pytest.mark.parametrize("shape", [(16, 16), (8, 72), (72, 8)])
def test_steps_are_orthogonal_and_lean_the_gradients_way(shape: tuple[int, int]) -> None:
    """Singular values of the result lie about 1 whatever the gradient's size; its singular vectors are the gradient's."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonal(1e3 * gradient)
    assert torch.allclose(found, orthogonal(gradient), atol=1e-4)
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.4 and float(values.max()) < 1.3
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    assert nn.functional.cosine_similarity(found.flatten(), (left @ right).flatten(), dim=0) > 0.97


@pytest.mark.parametrize("shape", [(24, 24), (8, 72), (72, 8)])
@pytest.mark.parametrize("least", [1e-1, 1e-4, 1e-8])
def test_turns_multiplied_out_are_the_turns_one_by_one(shape: tuple[int, int], least: float) -> None:
    """Newton-Schulz as it is written in the source, in double precision; singular values down to ``least`` of the largest."""
    left, _, right = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64), full_matrices=False)
    gradient = left * torch.logspace(0, float(torch.tensor(least).log10()), min(shape), dtype=torch.float64) @ right
    x = gradient / gradient.norm()
    a, b, c = COEFFICIENTS
    for _ in range(TURNS):
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    assert torch.allclose(orthogonal(gradient), x, atol=1e-10)
    assert torch.allclose(orthogonal(gradient.float()).double(), x, atol=1e-3)


def test_first_step_by_hand_and_weights_without_gradient() -> None:
    """From rest the Nesterov direction is the gradient's; decay is of the weight; a tall matrix steps by the root of its sides' ratio."""
    start, gradient = torch.randn(2, 32, 8, generator=torch.Generator().manual_seed(1))
    weight, idle = nn.Parameter(start.clone()), nn.Parameter(torch.ones(8, 8))
    weight.grad = gradient
    Muon([weight, idle], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(weight, start * 0.95 - 0.1 * 2 * orthogonal(gradient), atol=1e-5)
    assert bool((idle == 1).all())


def test_only_broad_matrices_are_taken() -> None:
    taken = [nn.Linear(16, 8).weight, nn.Conv2d(16, 32, 3).weight, nn.Conv2d(1, 16, 3).weight]
    left = [nn.Conv2d(32, 3, 3).weight, nn.Embedding(2, 64).weight, nn.GroupNorm(8, 32).weight, nn.Linear(16, 8).bias]
    assert all(map(is_matrix, taken)) and not any(map(is_matrix, left))


def test_training_learns_and_resumes_byte_equal(tmp_path: Path) -> None:
    """A teacher is learnt; interrupted after 13 steps, the run ends in the same bytes."""
    draw = torch.Generator().manual_seed(0)
    x, teacher = torch.randn(64, 16, generator=draw), torch.randn(16, 8, generator=draw)
    training = Training(optimiser="muon", steps=60, lr=5e-3, warm_up=3, ema=0.5, save_every=5, weight_decay=0.0)
    losses: list[float] = []

    def run(name: str, stop_at: int | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)).to(memory_format=torch.channels_last)

        def step(i: int) -> dict[str, float]:
            if i == stop_at:
                raise RuntimeError("power cut")
            loss = (model(x) - x @ teacher / 4).square().mean()
            loss.backward()
            losses.append(loss.item())
            return {"loss": loss.item()}

        return train(model, step, training, tmp_path / name, lambda *_: None, lambda *_: None).shadow

    whole = run("whole.safetensors")
    assert losses[-1] < 0.2 * losses[0]
    with pytest.raises(RuntimeError):
        run("cut.safetensors", 13)
    state = load_tensors(next(tmp_path.glob("cut*.safetensors")))
    assert {name.split("/")[-1] for name in state if name.startswith("optimiser1:")} == {"momentum"}
    resumed = run("cut.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    with pytest.raises(InputError, match=r"training\.optimiser"):
        Training(optimiser="sgd")
