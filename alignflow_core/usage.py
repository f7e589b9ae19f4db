"""What a stage takes from the machine while it runs: a few samples for its provenance, which lies beside the artifact and not in it.

Equal artifacts so keep equal hashes, however busy the machine was.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil

Sample = dict[str, float]


@contextlib.contextmanager
def sampled(interval: float = 1.0, limit: int = 120) -> Iterator[list[Sample]]:
    """Sample this process from a thread until the block ends; a block shorter than ``interval`` seconds leaves no sample.

    Args:
        interval: seconds between samples; doubled whenever ``limit`` is reached, while neighbours are merged (means of shares, peaks of memory).

    Yields:
        the growing list: ``seconds`` since the start, ``cpu_percent`` (100 is one core), ``memory_mb``, and, once the stage computes on a GPU,
        ``gpu_memory_mb`` and, where ``nvidia-ml-py`` is installed, ``gpu_percent``.
    """
    samples: list[Sample] = []
    stop = threading.Event()
    thread = threading.Thread(target=_sample, args=(samples, stop, interval, limit), name="usage", daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def _sample(samples: list[Sample], stop: threading.Event, interval: float, limit: int) -> None:
    process, started = psutil.Process(), time.monotonic()
    process.cpu_percent()  # the first call only starts the count
    while not stop.wait(interval):
        samples.append({"seconds": round(time.monotonic() - started, 1), "cpu_percent": process.cpu_percent(),
                        "memory_mb": round(process.memory_info().rss / 2 ** 20, 1), **_gpu()})
        if len(samples) >= limit:
            samples[:] = [_merged(a, b) for a, b in zip(samples[::2], samples[1::2], strict=False)]
            interval *= 2


def _merged(a: Sample, b: Sample) -> Sample:
    """One sample for two neighbours, at the time of the second."""
    return {name: round((a.get(name, value) + value) / 2, 1) if name.endswith("percent") else max(a.get(name, value), value)
            for name, value in b.items()}


def _gpu() -> Sample:
    """Of the stage's own GPU; nothing before the stage has loaded torch and put something there."""
    cuda: Any = sys.modules.get("torch.cuda")
    if not getattr(cuda, "is_initialized", bool)():  # the stage may be importing it at this moment
        return {}
    found = {"gpu_memory_mb": round(cuda.memory_reserved() / 2 ** 20, 1)}
    with contextlib.suppress(ModuleNotFoundError):  # torch asks nvidia-ml-py
        found["gpu_percent"] = float(cuda.utilization())
    return found
