"""Stage 2's cost: memory and CPU time of one reward step at profile cpu's network, N = 16 steps.

Memory is the growth of the resident set above the built model, each in a process of its own; time is CPU time with one thread, interleaved.
"""

import multiprocessing
import resource
from collections.abc import Iterator
from typing import Any

from benchmarks.row import Row, Skipped, compare, in_turn

NUMBERS = (5, 6)
BATCH, SIDE, N_STEPS, REPEATS = 8, 64, 16, 3


def rows() -> Iterator[Row | Skipped]:
    """Our own scheme beside itself, beside back-propagation of the last step and beside sampling alone."""
    few, every, last = ([peak_memory(scheme, k) for _ in range(REPEATS)] for scheme, k in (("sparse", 2), ("sparse", N_STEPS), ("last_k", 1)))
    yield compare(f"stage-2 peak memory, K = {N_STEPS} against K = 2", every, few, "MB", 1.1)
    yield compare(f"stage-2 peak memory, K = 2 against back-propagating the last step, batch {BATCH}", few, last, "MB", 1.5)
    parts = setting()
    step_seconds, sampling_seconds = in_turn(REPEATS, lambda: step("sparse", 4, parts), lambda: sampling(parts))
    yield compare(f"stage-2 step, N = {N_STEPS}, K = 4, against sampling alone", step_seconds, sampling_seconds, "s", 1.8)


def setting() -> tuple[Any, ...]:
    """Default network of profile cpu, a batch, and a reward on means."""
    import torch

    from alignflow_core.config import Network
    from alignflow_core.flow.solver import time_grid
    from alignflow_core.networks import velocity_unet

    torch.set_num_threads(1)
    model = velocity_unet.in_domain(velocity_unet.build(3, 4, Network(), seed=0), velocity_unet.TARGET)
    draw = torch.Generator().manual_seed(0)
    x0, cond = (torch.randn(BATCH, c, SIDE, SIDE, generator=draw) for c in (3, 4))
    return model, x0, cond, time_grid(N_STEPS), lambda x1: -(x1.mean((2, 3)) - 0.5).square().mean()


def step(scheme: str, k: int, parts: tuple[Any, ...]) -> None:
    """One reward gradient."""
    import torch

    from alignflow_core.reward.gradient import SCHEMES

    model, x0, cond, times, reward = parts
    model.func.zero_grad(set_to_none=True)
    SCHEMES[scheme](model, x0, cond, times, reward, k, torch.Generator().manual_seed(0), 1.0)


def sampling(parts: tuple[Any, ...]) -> None:
    """The roll-out alone."""
    import torch

    from alignflow_core.flow.solver import euler

    model, x0, cond, times, _ = parts
    with torch.no_grad():
        euler(model, x0, cond, times)


def _peak(scheme: str, k: int, answer: Any) -> None:
    parts = setting()
    sampling(parts)  # buffers that any use of the network allocates
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(scheme, k, parts)
    answer.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def peak_memory(scheme: str, k: int) -> float:
    """MB that one step needs on top of the model and of sampling."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_peak, args=(scheme, k, there))
    process.start()
    grown = here.recv()
    process.join()
    return float(grown) / 1024
