"""CPU seconds of training until a held-out flow-matching loss is reached, against diffusers' UNet2DModel of as many parameters.

Painters learn the phantom at profile cpu's size and batch from the same batches, noise and times, step by step in turn, until the averaged
weights have the loss. Ours as that profile trains it (Muon); the peer by AdamW, as its own scripts do, at the step size that was best for us by
AdamW. A second row tells the network from the optimiser: both by AdamW. Only training counts, not the looks at the loss.
"""

import math
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.row import Row, Skipped, compare, missing

NUMBERS = (1,)
LOSS = 0.1
SIDE, IMAGES, HELD_OUT, BATCH, RATE, SEEDS, MOST_STEPS, LOOK_EVERY = 64, 150, 32, 8, 2e-3, 2, 400, 10
PEER = "diffusers' UNet2DModel by AdamW"
NAMES = {"muon": f"training until the held-out loss is {LOSS:g}, ours by Muon, against {PEER}", "adamw": f"the same, ours by AdamW, against {PEER}"}


def rows() -> Iterator[Row | Skipped]:
    """Two rows; the repeats are seeds of weights, batches and noise."""
    why = missing("diffusers")
    if why:
        yield from (Skipped(name, why) for name in NAMES.values())
        return
    taken = [seconds_to_loss(seed) for seed in range(SEEDS)]
    for optimiser, name in NAMES.items():
        ours, theirs = [each[optimiser] for each in taken], [each["peer"] for each in taken]
        if not all(map(math.isfinite, ours + theirs)):
            yield Skipped(name, f"{MOST_STEPS} steps do not reach the loss: CPU seconds, ours {ours}, theirs {theirs}")
        else:
            yield compare(name, ours, theirs, "s", 0.5)


def seconds_to_loss(seed: int) -> dict[str, float]:
    """CPU seconds of training by our optimisers and of the peer's, between two looks by interpolation; infinite where the loss was not reached."""
    import torch

    from alignflow_core.config import Network
    from alignflow_core.networks import velocity_unet
    from benchmarks.painter import Learner, phantom

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    models = {name: velocity_unet.build(3, 4, Network(), seed) for name in NAMES} | {"peer": _peer()}
    ours, theirs = (sum(p.numel() for p in models[name].parameters()) for name in ("muon", "peer"))
    assert abs(ours - theirs) < 0.1 * theirs, (ours, theirs)
    pictures, held_out = phantom(0, IMAGES, SIDE), phantom(IMAGES, HELD_OUT, SIDE)
    learners = {name: Learner(model, pictures, BATCH, seed, optimiser="adamw" if name == "peer" else name, lr=RATE) for name, model in models.items()}
    spent, last, reached = dict.fromkeys(models, 0.0), dict.fromkeys(models, (0.0, math.inf)), dict.fromkeys(models, math.inf)
    for i in range(MOST_STEPS):
        for name, learner in learners.items():
            if reached[name] < math.inf:
                continue
            start = time.process_time()
            learner.step(i)
            spent[name] += time.process_time() - start
            if (i + 1) % LOOK_EVERY == 0:
                loss, (before, higher) = learner.held_out_loss(held_out), last[name]
                if loss <= LOSS:
                    part = (higher - LOSS) / (higher - loss) if higher < math.inf else 1.0
                    reached[name] = before + part * (spent[name] - before)
                last[name] = spent[name], loss
    return reached


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
