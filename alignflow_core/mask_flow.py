"""Train p(mask): a flow over signed distance maps of the source's masks (arXiv 2604.02868: masks from a second flow)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from alignflow_core.config import MaskFlow, Task
from alignflow_core.devices import autocast, prepare, ready
from alignflow_core.distributed import own_rows
from alignflow_core.flow.loss import flow_matching_loss
from alignflow_core.flow.train import train
from alignflow_core.masks import signed_distance
from alignflow_core.networks import velocity_unet
from alignflow_core.pairs import read_pairs
from alignflow_core.seeding import derive_seed, generator


def run(config: Any, inputs: dict[str, Path], out_dir: Path, context: Any) -> dict[str, float]:
    """Train on signed distance maps [N, classes, size, size], nested classes as nested channels.

    Distance maps are smooth, so a coarse grid (``mask_flow.size``) holds them; masks are decoded at the working size.
    """
    settings: MaskFlow = config.mask_flow
    task: Task = config.task
    device = prepare(config.machine)
    maps = signed_distance(read_pairs(inputs["data:source"], "train").labels, task, settings.clip)
    if settings.size < maps.shape[-1]:
        maps = functional.interpolate(maps, size=(settings.size, settings.size), mode="area")
    maps = maps.to(device)
    channels = maps.shape[1]
    network = velocity_unet.build(channels, 0, settings.network, derive_seed(config.seed, "mask_flow", "weights"))
    model = ready(network, config.machine, device)
    own = own_rows(settings.training.batch)
    empty = torch.zeros(settings.training.batch, 0, *maps.shape[2:], device=device)

    def step(i: int) -> dict[str, Tensor]:
        draw = generator(config.seed, "mask_flow", i)
        x1 = maps[torch.randint(len(maps), (settings.training.batch,), generator=draw).to(device)]
        flipped = (torch.rand(len(x1), generator=draw) < 0.5).view(-1, 1, 1, 1).to(device)
        x1 = torch.where(flipped, x1.flip(3), x1)
        with autocast(config.machine, device):
            loss = flow_matching_loss(model, x1, empty, settings.times, draw, rows=own)
        loss.backward()
        return {"loss": loss.detach()}

    ema = train(model, step, settings.training, context.work_dir / "state.safetensors", context.log, context.progress)
    velocity_unet.save(out_dir, ema.shadow, channels, 0, settings.network, domain=velocity_unet.SOURCE, clip=settings.clip, size=maps.shape[-1])
    return {"n_masks": settings.training.steps * settings.training.batch, "parameters": sum(p.numel() for p in network.parameters())}
