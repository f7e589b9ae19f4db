"""The training loop: exact resume, interruption, stop on NaN."""

import os
import signal
from pathlib import Path

import pytest
import torch

from alignflow_core.config import Training
from alignflow_core.errors import StageError
from alignflow_core.flow.train import train
from alignflow_core.seeding import generator
from alignflow_core.state import load_state

TRAINING = Training(steps=12, batch=4, lr=0.01, warm_up=3, save_every=5, log_every=1)


def fresh(folder: Path, act=lambda i: None):
    """A small regression whose batch is a function of the step; ``act(i)`` runs inside step i."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Tanh(), torch.nn.Conv2d(4, 1, 1))
    model = model.to(memory_format=torch.channels_last)  # as the real networks: moments must come back in this layout

    def step(i: int) -> dict[str, float]:
        x = torch.randn(TRAINING.batch, 3, 3, 3, generator=generator("batch", i))
        loss = (model(x) - x.sum((1, 2, 3), keepdim=True)).square().mean()
        loss.backward()
        act(i)
        return {"loss": loss.item()}

    losses: dict[int, float] = {}
    extra = {"note": torch.zeros(1)}

    def on_step(done: int, ema: object) -> bool:
        extra["note"] = torch.full((done,), float(done))
        return False

    return lambda: (train(model, step, TRAINING, folder / "state.safetensors", lambda m, i: losses.__setitem__(i, m["loss"]),
                          lambda *_: None, on_step, extra), losses)


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_state(folder / "state.safetensors")


@pytest.mark.parametrize("stop", range(TRAINING.steps))
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_anywhere_and_resumed_is_byte_equal(tmp_path: Path, stop: int, number: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    fresh(whole)()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fresh(parts, lambda i: os.kill(os.getpid(), number) if i == stop else None)()
    fresh(parts)()
    expected, found = final(whole), final(parts)
    assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)


def test_not_a_number_stops_before_it_is_saved_and_keeps_the_last_state(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)

    def step(i: int) -> dict[str, float]:
        loss = model(torch.ones(1, 1)).sum() * (float("nan") if i == 7 else 1.0)
        loss.backward()
        return {"loss": loss.item()}

    with pytest.raises(StageError, match="step 7"):
        train(model, step, TRAINING, tmp_path / "s.safetensors", lambda *_: None, lambda *_: None)
    assert load_state(tmp_path / "s.safetensors")["done"][0] == 5
    assert all(value.isfinite().all() for name, value in load_state(tmp_path / "s.safetensors").items() if name.startswith("model:"))
