"""One line of a benchmark's result, and how times are taken: CPU seconds, ours and the peer's in turn."""

import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """``ratio`` is always ours / peer, of the medians; ``spread`` is the lowest and highest ratio of the ``n`` repeats.

    Where the bar is absolute (a number of seconds, say), the peer is that number and the bar 1.
    """

    name: str
    ours: float
    peer: float
    unit: str
    ratio: float
    bar: float
    ok: bool
    n: int
    spread: tuple[float, float]
    at_least: bool = False  # the ratio shall reach the bar instead of staying below it
    points: tuple[dict[str, float], ...] = ()  # of a curve: what was measured at each size

    def record(self) -> dict[str, Any]:
        """What a result file holds."""
        return {key: value for key, value in asdict(self).items() if key != "at_least" and (key != "points" or value)}


@dataclass(frozen=True)
class Skipped:
    """A row that could not be measured, and why."""

    name: str
    why: str


def compare(name: str, ours: Sequence[float], peer: Sequence[float] | float, unit: str, bar: float, at_least: bool = False) -> Row:
    """Row of repeats measured in turn (the i-th of ours beside the i-th of the peer), or against a fixed number."""
    peers = [peer] * len(ours) if isinstance(peer, int | float) else list(peer)
    ratios = [a / b for a, b in zip(ours, peers, strict=True)]
    middle, against = statistics.median(ours), statistics.median(peers)
    ratio = middle / against
    return Row(name, _short(middle), _short(against), unit, _short(ratio), bar, ratio >= bar if at_least else ratio <= bar, len(ratios),
               (_short(min(ratios)), _short(max(ratios))), at_least)


def in_turn(repeats: int, *acts: Callable[[], Any], calls: int = 1) -> list[list[float]]:
    """CPU seconds of one call of each act; the acts take turns, so that a busy machine hits all alike. The first round warms up."""
    taken: list[list[float]] = [[] for _ in acts]
    for turn in range(repeats + 1):
        for act, seconds in zip(acts, taken):
            start = time.process_time()
            for _ in range(calls):
                act()
            if turn:
                seconds.append((time.process_time() - start) / calls)
    return taken


def missing(*peers: str) -> str:
    """Why rows that need these modules cannot be measured; empty where all are there."""
    absent = []
    for peer in peers:
        try:
            importlib.import_module(peer)
        except ImportError:
            absent.append(peer)
    return f"needs {', '.join(absent)}: pip install -e '.[bench]' (make bench does)" if absent else ""


def _short(value: float) -> float:
    """Four digits: more would be noise."""
    return float(f"{value:.4g}")
