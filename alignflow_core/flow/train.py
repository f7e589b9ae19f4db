"""The one training loop: AdamW or Muon, warm-up and cosine, clipping, EMA, exact resume, a stop on NaN.

On several processes (``distributed.py``) all of them run it in step, and only the first writes.
"""

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from alignflow_core import distributed
from alignflow_core.checkpoint import pack_optimiser, prefixed, section, unpack_optimiser, unwrap
from alignflow_core.config import Training
from alignflow_core.errors import StageError
from alignflow_core.flow.ema import Ema
from alignflow_core.flow.muon import Muon, is_matrix
from alignflow_core.state import ensure_space, load_state, save_state

MUON_RATE = 10.0  # a step of Muon has a size of its own, some ten times that of AdamW
SAVES = 12  # three saves at once, each of weights, their average and two moments

Log = Callable[[dict[str, float], int], None]
Step = Callable[[int], Mapping[str, float | Tensor]]
Progress = Callable[[int, int, str], None]


def train(model: nn.Module, step: Step, training: Training, state_file: Path, log: Log, progress: Progress,
          on_step: Callable[[int, Ema], bool] | None = None, extra: dict[str, Tensor] | None = None) -> Ema:
    """Train until ``training.steps`` and return the averaged weights.

    Args:
        step: ``step(i)`` leaves the gradients of step i in the parameters and returns numbers to log, as scalars or floats.
            It must depend on i alone (see ``seeding.py``): then a resumed run is the uninterrupted one, byte for byte.
        state_file: of the resumable state (``state.py``); read if there, written every ``save_every`` steps and on interruption.
        on_step: called after each step with the number of steps done; true ends the training.
        extra: further tensors that belong to the state; its entries are replaced when a state is restored.

    Raises:
        StageError: loss or gradient is not finite, or the disk is full; the last good state stays on disk.
        InputError: too little space on the disk to begin.
    """
    ensure_space(state_file.parent, SAVES * sum(p.numel() * p.element_size() for p in model.parameters()))
    optimisers = build_optimisers(model, training)
    ema, extra = Ema(unwrap(model), training.ema), {} if extra is None else extra
    done, ended = _restore(state_file, model, optimisers, ema, extra)
    pending: list[Mapping[str, float | Tensor]] = []  # of the last steps: a GPU has work while the processor queues more
    note = ""
    if distributed.largest(done) != done:
        raise StageError(f"{state_file}: read by some processes only; all need the same project folder")
    with _held_signals() as caught:
        while done < training.steps and not ended:
            for optimiser in optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = optimiser.defaults["lr"] * schedule(done, training)
            model.zero_grad(set_to_none=True)
            found = dict(step(done))
            found["gradient norm"] = nn.utils.clip_grad_norm_(model.parameters(), training.clip)
            for optimiser in optimisers:
                optimiser.step()
            ema.update(unwrap(model))
            pending.append(found)
            done += 1
            due = done % training.log_every == 0 or done == training.steps
            if due or done == 1:
                numbers, norm = _asked(pending, done, state_file)
                note = " ".join(f"{k}={v:.4g}" for k, v in numbers.items())
                if due:
                    log({**numbers, "gradient_norm": norm}, done)
            ended = (on_step is not None and on_step(done, ema)) or done == training.steps
            progress(done, training.steps, note)
            stop = distributed.largest(caught[0] if caught else 0)
            if ended or stop or done % training.save_every == 0:
                if pending:
                    _asked(pending, done, state_file)
                if distributed.leads():
                    _save(state_file, (done, ended), model, optimisers, ema, extra)
            if stop:
                raise KeyboardInterrupt if stop == signal.SIGINT else SystemExit(128 + stop)
    return ema


def _asked(pending: list[Mapping[str, float | Tensor]], done: int, state_file: Path) -> tuple[dict[str, float], float]:
    """Numbers and gradient norm of step ``done``, the last one pending, after a look at all of them; none is pending then.

    Raises:
        StageError: one of them is not finite.
    """
    for behind, found in zip(reversed(range(len(pending))), pending, strict=True):
        numbers = {name: float(value) for name, value in found.items()}
        norm = numbers.pop("gradient norm")
        numbers = distributed.mean(numbers)
        bad = [name for name, value in {**numbers, "gradient norm": norm}.items() if not math.isfinite(value)]
        if bad:
            raise StageError(f"step {done - behind - 1}: {', '.join(bad)} not finite; lower the learning rate or check the data. "
                             f"The last good state is kept in {state_file.name}")
    pending.clear()
    return numbers, norm


def build_optimisers(model: nn.Module, training: Training) -> list[torch.optim.Optimizer]:
    """AdamW of all weights, or of those that Muon leaves to it."""
    matrices = [p for p in model.parameters() if is_matrix(p)] if training.optimiser == "muon" else []
    chosen = {id(p) for p in matrices}
    adamw = torch.optim.AdamW([p for p in model.parameters() if id(p) not in chosen], lr=training.lr, betas=(0.9, training.beta2),
                              weight_decay=training.weight_decay, fused=True)
    return [adamw, Muon(matrices, MUON_RATE * training.lr, weight_decay=training.weight_decay)] if matrices else [adamw]


def schedule(done: int, training: Training) -> float:
    """Share of the learning rate: linear warm-up, then cosine to 2 %."""
    warm = min(training.warm_up, max(1, training.steps // 4))
    if done < warm:
        return (done + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (done - warm) / max(1, training.steps - warm)))


@contextlib.contextmanager
def _held_signals() -> Iterator[list[int]]:
    """Hold SIGINT and SIGTERM until a step is whole, so that no half-made step is ever saved."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.signal(number, lambda n, _: caught.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _save(file: Path, done: tuple[int, bool], model: nn.Module, optimisers: list[torch.optim.Optimizer], ema: Ema,
          extra: dict[str, Tensor]) -> None:
    moments = {name: value for n, each in enumerate(optimisers) for name, value in prefixed(f"optimiser{n}", pack_optimiser(each)).items()}
    save_state(file, done[0], {"done": torch.tensor([*done, ema.updates]), **prefixed("model", unwrap(model).state_dict()),
                               **moments, **prefixed("ema", ema.shadow), **prefixed("extra", extra)})


def _restore(file: Path, model: nn.Module, optimisers: list[torch.optim.Optimizer], ema: Ema, extra: dict[str, Tensor]) -> tuple[int, bool]:
    """Put a saved state back; returns the steps done and whether training had ended; (0, False) without a state."""
    state = load_state(file)
    if not state:
        return 0, False
    unwrap(model).load_state_dict(section("model", state))
    for n, each in enumerate(optimisers):
        unpack_optimiser(each, section(f"optimiser{n}", state))
    for name, value in section("ema", state).items():
        ema.shadow[name].copy_(value)
    for name, value in section("extra", state).items():
        extra[name] = value.to(extra[name].device)
    done, ended, ema.updates = state["done"].tolist()
    return done, bool(ended)
