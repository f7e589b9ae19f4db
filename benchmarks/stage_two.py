"""Stage 2's cost: memory and time of one reward step, as ratios measured side by side.

    python benchmarks/stage_two.py [--json FILE]

| ratio | bar |
|---|---|
| peak memory, sparse K = N against K = 2 | <= 1.1 |
| peak memory, sparse K = 2 against plain back-propagation of the last step, batch 8 | <= 1.5 |
| CPU time of a step, N = 16, K = 4, against sampling alone | <= 1.8 |

Memory is the growth of the resident set above the built model, each in a process of its own; time is CPU time with one thread, interleaved.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

BATCH, SIDE, N_STEPS = 8, 64, 16
BARS = {"memory_k_n_over_k_2": 1.1, "memory_k_2_over_last_step": 1.5, "step_over_sampling": 1.8}


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


def times(repeats: int) -> dict[str, float]:
    """Median CPU seconds of sampling and of a step with K = 4, interleaved."""
    parts = setting()
    taken: dict[str, list[float]] = {"sampling": [], "step": []}
    for turn in range(repeats + 1):
        for name, act in (("sampling", lambda: sampling(parts)), ("step", lambda: step("sparse", 4, parts))):
            start = time.process_time()
            act()
            if turn:  # the first round warms up
                taken[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> int:
    """Measure, print, and fail where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    memory = {name: statistics.median(peak_memory(*name) for _ in range(3)) for name in (("sparse", 2), ("sparse", N_STEPS), ("last_k", 1))}
    seconds = times(options.repeats)
    found = {"memory_k_n_over_k_2": memory["sparse", N_STEPS] / memory["sparse", 2],
             "memory_k_2_over_last_step": memory["sparse", 2] / memory["last_k", 1], "step_over_sampling": seconds["step"] / seconds["sampling"]}
    for (scheme, k), megabytes in memory.items():
        print(f"{scheme:8s} K = {k:2d}: {megabytes:7.0f} MB")
    print(f"sampling {seconds['sampling']:.2f} s, step with K = 4 {seconds['step']:.2f} s of one core")
    for name, value in found.items():
        print(f"{name:28s} {value:5.2f}  (bar {BARS[name]}) {'' if value <= BARS[name] else 'MISSED'}")
    if options.json:
        options.json.write_text(json.dumps({"ratios": found, "bars": BARS, "seconds": seconds}, indent=1) + "\n", encoding="utf-8")
    return int(any(value > BARS[name] for name, value in found.items()))


if __name__ == "__main__":
    sys.exit(main())
