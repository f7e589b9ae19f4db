"""CPU seconds of training until the held-out loss is what diffusers' UNet2DModel of as many parameters has after a fixed number of steps.

Painters learn the phantom at profile cpu's size and batch from the same batches, noise and times at a constant step size; losses are of the
averaged weights. Ours as that profile trains it (Muon); the peer by AdamW, as its own scripts do, at the step size that was best for us by AdamW.
A second row tells the network from the optimiser: both by AdamW. Only training counts, not the looks at the loss.
"""

import math
import time
from collections.abc import Iterator

from benchmarks.row import Row, Skipped, compare, missing

NUMBERS = (1,)
PEER_STEPS, MOST_STEPS = 300, 400
SIDE, IMAGES, HELD_OUT, BATCH, RATE, SEEDS, LOOK_EVERY = 64, 150, 32, 8, 2e-3, 2, 10
PEER = f"that of diffusers' UNet2DModel after {PEER_STEPS} steps of AdamW"
NAMES = {"muon": f"training until the held-out loss is {PEER}, ours by Muon", "adamw": "the same, ours by AdamW too"}


def rows() -> Iterator[Row | Skipped]:
    """Two rows; the repeats are seeds of weights, batches and noise."""
    why = missing("diffusers")
    if why:
        yield from (Skipped(name, why) for name in NAMES.values())
        return
    taken = [seconds_to_loss(seed) for seed in range(SEEDS)]
    for optimiser, name in NAMES.items():
        ours, theirs = [each[optimiser] for each in taken], [each["peer"] for each in taken]
        if not all(map(math.isfinite, ours)):
            yield Skipped(name, f"{MOST_STEPS} steps do not reach the loss: CPU seconds, ours {ours}, theirs {theirs}")
        else:
            yield compare(name, ours, theirs, "s", 0.5)


def seconds_to_loss(seed: int) -> dict[str, float]:
    """CPU seconds of the peer's training, and of ours by each optimiser to its loss, between two looks by interpolation; infinite if not reached."""
    import torch

    from alignflow_core.config import Network
    from alignflow_core.networks import velocity_unet
    from benchmarks.painter import Learner, diffusers_unet, phantom

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    models = {name: velocity_unet.build(3, 4, Network(), seed) for name in NAMES} | {"peer": diffusers_unet(Network(), SIDE)}
    ours, theirs = (sum(p.numel() for p in models[name].parameters()) for name in ("muon", "peer"))
    assert abs(ours - theirs) < 0.1 * theirs, (ours, theirs)
    pictures, held_out = phantom(0, IMAGES, SIDE), phantom(IMAGES, HELD_OUT, SIDE)
    learners = {name: Learner(model, pictures, BATCH, seed, optimiser="adamw" if name == "peer" else name, lr=RATE) for name, model in models.items()}
    spent = dict.fromkeys(models, 0.0)
    looks: dict[str, list[tuple[float, float]]] = {name: [] for name in models}  # CPU seconds, loss
    for i in range(MOST_STEPS):
        for name, learner in learners.items():  # in turn, so that a busy machine hits all alike
            if i >= PEER_STEPS and (name == "peer" or crossing(looks[name], looks["peer"][-1][1]) < math.inf):
                continue
            start = time.process_time()
            learner.step(i)
            spent[name] += time.process_time() - start
            if (i + 1) % LOOK_EVERY == 0:
                looks[name].append((spent[name], learner.held_out_loss(held_out)))
    goal = looks["peer"][-1][1]
    return {"peer": spent["peer"]} | {name: crossing(looks[name], goal) for name in NAMES}


def crossing(looks: list[tuple[float, float]], goal: float) -> float:
    """CPU seconds at which a loss first is ``goal`` or less, of looks (CPU seconds, loss); infinite where it never is."""
    for (before, higher), (after, loss) in zip([(0.0, math.inf), *looks], looks, strict=False):
        if loss <= goal:
            return after if higher == math.inf else before + (higher - goal) / (higher - loss) * (after - before)
    return math.inf
