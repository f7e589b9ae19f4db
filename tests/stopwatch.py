"""Times that a promise bounds, taken so that a stall of a shared machine does not break them."""

import time
from collections.abc import Callable
from typing import TypeVar

Answer = TypeVar("Answer")


def timed(call: Callable[[], Answer], limit: float, tries: int = 3) -> tuple[Answer, float]:
    """What ``call`` answered and the seconds it took; more than ``limit`` is measured anew: a stall does not come back, a slowness of ours does."""
    seconds = float("inf")
    for _ in range(tries):
        started = time.monotonic()
        answer = call()
        seconds = min(seconds, time.monotonic() - started)
        if seconds <= limit:
            break
    return answer, seconds
