"""CPU seconds of training until a held-out flow-matching loss is reached, against diffusers' UNet2DModel of as many parameters.

Both painters learn the phantom at 32 px from the same batches, noise and times with the same optimiser, step by step in turn, until the
averaged weights have the loss. Only training counts, not the looks at the loss. The budget is small: about a minute of CPU
time a seed, early in a training.
"""

import math
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.row import Row, Skipped, compare, missing

NUMBERS = (1,)
LOSS = 0.15
SIDE, IMAGES, HELD_OUT, BATCH, SEEDS, MOST_STEPS, LOOK_EVERY = 32, 150, 32, 8, 2, 400, 10
NAME = f"training until the held-out loss is {LOSS:g}, against diffusers' UNet2DModel"


def rows() -> Iterator[Row | Skipped]:
    """One row; the repeats are seeds of weights, batches and noise."""
    why = missing("diffusers")
    if why:
        yield Skipped(NAME, why)
        return
    taken = [seconds_to_loss(seed) for seed in range(SEEDS)]
    if not all(map(math.isfinite, (value for pair in taken for value in pair))):
        yield Skipped(NAME, f"{MOST_STEPS} steps do not reach the loss: CPU seconds (ours, theirs) {taken}")
        return
    yield compare(NAME, *map(list, zip(*taken)), "s", 0.5)


def seconds_to_loss(seed: int) -> tuple[float, float]:
    """CPU seconds of our training and of the peer's, between two looks by interpolation; infinite where the loss was not reached."""
    import torch

    from alignflow_core.config import Network
    from alignflow_core.networks import velocity_unet
    from benchmarks.painter import Learner, phantom

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    models = (velocity_unet.build(3, 4, Network(), seed), _peer())
    ours, theirs = (sum(p.numel() for p in model.parameters()) for model in models)
    assert abs(ours - theirs) < 0.1 * theirs, (ours, theirs)
    pictures, held_out = phantom(0, IMAGES, SIDE), phantom(IMAGES, HELD_OUT, SIDE)
    learners = [Learner(model, pictures, BATCH, seed) for model in models]
    spent, last, reached = [0.0, 0.0], [(0.0, math.inf)] * 2, [math.inf] * 2
    for i in range(MOST_STEPS):
        if max(reached) < math.inf:
            break
        for who, learner in enumerate(learners):
            if reached[who] < math.inf:
                continue
            start = time.process_time()
            learner.step(i)
            spent[who] += time.process_time() - start
            if (i + 1) % LOOK_EVERY == 0:
                loss, (before, higher) = learner.held_out_loss(held_out), last[who]
                if loss <= LOSS:
                    part = (higher - LOSS) / (higher - loss) if higher < math.inf else 1.0
                    reached[who] = before + part * (spent[who] - before)
                last[who] = spent[who], loss
    return reached[0], reached[1]


def _peer() -> Any:
    """UNet2DModel shaped like ours: same channels, levels, blocks, attention and groups."""
    import torch
    from diffusers import UNet2DModel

    from alignflow_core.config import Network

    network = Network()
    blocks = [("Attn" if attends else "") for attends in network.attention]

    class Peer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = UNet2DModel(
                sample_size=SIDE, in_channels=7, out_channels=3, layers_per_block=network.n_res_blocks, block_out_channels=network.channels,
                norm_num_groups=network.norm_groups, attention_head_dim=network.head_channels,
                down_block_types=[f"{kind}DownBlock2D" for kind in blocks], up_block_types=[f"{kind}UpBlock2D" for kind in reversed(blocks)])

        def forward(self, x_t: Any, t: Any, cond: Any) -> Any:
            return self.unet(torch.cat([x_t, cond], 1), t * 1000).sample

    return Peer()
