"""What a solver adds to one network call, on a network that costs nothing, against torchdiffeq and Meta's flow_matching.

The latter is under CC BY-NC: no extra brings it, and it is measured only where you have installed it yourself.
"""

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.row import Row, Skipped, compare, in_turn, missing

NUMBERS = (3,)
STEPS, CALLS, REPEATS = 100, 5, 15
LIMIT = 20.0  # µs
NAME = "solver, Euler, µs a network call"


def rows() -> Iterator[Row | Skipped]:
    """Ours beside a fixed limit, then beside each peer."""
    import torch

    from alignflow_core.flow.solver import euler, time_grid

    torch.set_num_threads(1)
    class Trivial(torch.nn.Module):
        """Called as networks are, with one time per image and a condition."""

        def forward(self, x: Any, t: Any, cond: Any) -> Any:
            return cond

    network, times = Trivial(), time_grid(STEPS)
    x0, cond = torch.randn(4, 3, 16, 16), torch.ones(4, 3, 16, 16)

    def ours() -> Any:
        return euler(network, x0, cond, times)

    yield compare(f"{NAME}, against {LIMIT:g} µs", _microseconds(ours)[0], LIMIT, "µs", 1.0)
    for peer, build in (("torchdiffeq", _torchdiffeq), ("flow_matching", _meta)):
        name = f"{NAME}, against {peer}"
        why = missing(peer)
        if why and peer == "flow_matching":
            why = "needs flow_matching: its licence is CC BY-NC and no extra brings it; pip install flow-matching where that licence allows"
        if why:
            yield Skipped(name, why)
            continue
        theirs = build(network, x0, cond, times)
        torch.testing.assert_close(theirs(), ours())
        yield compare(name, *_microseconds(ours, theirs), "µs", 0.25)


def _microseconds(*acts: Callable[[], Any]) -> list[list[float]]:
    import torch

    with torch.no_grad():
        return [[seconds / STEPS * 1e6 for seconds in taken] for taken in in_turn(REPEATS, *acts, calls=CALLS)]


def _meta(network: Any, x0: Any, cond: Any, times: Any) -> Callable[[], Any]:
    from flow_matching.solver import ODESolver
    from flow_matching.utils import ModelWrapper

    class Wrapped(ModelWrapper):
        def forward(self, x: Any, t: Any, **extras: Any) -> Any:
            return self.model(x, t.expand(len(x)), **extras)

    solver = ODESolver(velocity_model=Wrapped(network))
    return lambda: solver.sample(x_init=x0, step_size=1 / STEPS, method="euler", time_grid=times[[0, -1]], cond=cond)


def _torchdiffeq(network: Any, x0: Any, cond: Any, times: Any) -> Callable[[], Any]:
    from torchdiffeq import odeint

    return lambda: odeint(lambda t, x: network(x, t.expand(len(x)), cond), x0, times, method="euler")[-1]
