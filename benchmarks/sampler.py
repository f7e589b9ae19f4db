"""Network calls of the default sampler until its pictures are as far from real ones as those of dopri5 (1e-5), within 5 %.

The distance is FID in the product's own descriptor space, of pictures painted from held-out masks against the real pictures. The painter is
small and trained as profile cpu trains, for less long (phantom at 32 px); the noise is the same for both.
"""

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.row import Row, Skipped, compare, missing

NUMBERS = (4,)
SIDE, IMAGES, BATCH, STEPS, PAINTED, SEEDS = 32, 150, 8, 400, 48, 3
GRID = (2, 3, 4, 6, 8, 12, 16, 24, 32)  # steps
NAME = "network calls to come within 5 % of dopri5 in feature distance"


def rows() -> Iterator[Row | Skipped]:
    """One row; the repeats are draws of noise."""
    from alignflow_core.config import Sample

    why = missing("torchdiffeq")
    if why:
        yield Skipped(NAME, why)
        return
    calls = compared_calls(Sample().solver)
    yield compare(f"{NAME}, {Sample().solver}", *map(list, zip(*calls)), "calls", 0.25)


def compared_calls(name: str) -> list[tuple[float, float]]:
    """For each draw of noise: fewest calls from which on every finer grid is within 5 %, or dopri5's own if none; and its calls."""
    import torch
    from torchdiffeq import odeint

    from alignflow_core.config import Network
    from alignflow_core.flow.solver import SOLVERS, time_grid
    from alignflow_core.metrics.distribution import frechet
    from alignflow_core.metrics.features import FeatureSpace
    from alignflow_core.networks import velocity_unet
    from alignflow_core.pairs import to_bytes
    from benchmarks.painter import Learner, phantom

    torch.set_num_threads(1)
    pictures, held_out = phantom(0, IMAGES, SIDE), phantom(IMAGES, PAINTED, SIDE)
    learner = Learner(velocity_unet.build(3, 4, Network(), seed=0), pictures, BATCH, optimiser="muon", lr=2e-3)
    for i in range(STEPS):
        learner.step(i)
    learner.model.load_state_dict(learner.ema.shadow)
    space = FeatureSpace.fit(pictures.images)
    real = space(held_out.images)

    def measured(paint: Callable[[Any], Any]) -> tuple[float, int]:
        """Distance of the pictures and the calls that they took."""
        n_calls = 0

        def network(x: Any, t: Any, cond: Any) -> Any:
            nonlocal n_calls
            n_calls += 1
            return learner.model(x, t, cond)

        with torch.no_grad():
            return frechet(space(to_bytes(paint(network))), real), n_calls

    found = []
    for seed in range(SEEDS):
        x0 = torch.randn(held_out.x1.shape, generator=torch.Generator().manual_seed(seed))
        exact, peer = measured(lambda network, x0=x0: odeint(lambda t, x: network(x, t.expand(len(x)), held_out.cond), x0, torch.tensor([0.0, 1.0]),
                                                             rtol=1e-5, atol=1e-5, method="dopri5")[-1])
        fewest = float(peer)
        for n_steps in reversed(GRID):
            near, n_calls = measured(lambda network, x0=x0, n=n_steps: SOLVERS[name](network, x0, held_out.cond, time_grid(n)))
            if abs(near - exact) > 0.05 * exact:
                break
            fewest = float(n_calls)
        found.append((fewest, float(peer)))
    return found
