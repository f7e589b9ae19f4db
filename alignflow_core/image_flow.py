"""Stage 1: train p(image | mask) on the source domain (arXiv 2604.02868, stage 1: denoising loss only)."""

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignflow_core.config import ImageFlow, Machine, Task
from alignflow_core.devices import autocast, prepare, ready
from alignflow_core.distributed import own_rows
from alignflow_core.flow.batch import training_batch
from alignflow_core.flow.loss import flow_matching_loss
from alignflow_core.flow.train import Step, train
from alignflow_core.masks import condition
from alignflow_core.networks import velocity_unet
from alignflow_core.pairs import read_pairs, to_tensor, to_unit
from alignflow_core.seeding import derive_seed, generator


def training_step(model: nn.Module, images: Tensor, cond: Tensor, settings: ImageFlow, machine: Machine,
                  seed: int) -> Step:
    """A ``step(i)`` for ``flow.train.train``: batch i of images uint8 [N, 3, H, W] and their conditions [N, D, H, W], forward and backward."""
    own = own_rows(settings.training.batch)

    def step(i: int) -> dict[str, Tensor]:
        draw = generator(seed, "image_flow", i)
        x1, c = training_batch(images, cond, settings.training.batch, settings.flip, draw)
        with autocast(machine, images.device):
            loss = flow_matching_loss(model, x1, c, settings.times, draw, settings.coupling, settings.condition_dropout, own)
        loss.backward()
        return {"loss": loss.detach()}

    return step


def run(config: Any, inputs: dict[str, Path], out_dir: Path, context: Any) -> dict[str, float]:
    """Train the painter on the source's training split and write its averaged weights.

    Also records the denoising loss on the validation split at fixed noise and times.
    """
    settings: ImageFlow = config.image_flow
    task: Task = config.task
    device = prepare(config.machine)
    pairs = read_pairs(inputs["data:source"], "train")
    images, cond = to_tensor(pairs.images).to(device), condition(pairs.labels, task, settings.clip).to(device)
    network = velocity_unet.build(3, cond.shape[1], settings.network, derive_seed(config.seed, "image_flow", "weights"))
    model = ready(network, config.machine, device)
    step = training_step(model, images, cond, settings, config.machine, config.seed)
    ema = train(model, step, settings.training, context.work_dir / "state.safetensors", context.log, context.progress)
    velocity_unet.save(out_dir, ema.shadow, 3, cond.shape[1], settings.network, domain=velocity_unet.SOURCE, clip=settings.clip)

    trained, _ = velocity_unet.load(out_dir)
    held_out = read_pairs(inputs["data:source"], "val")
    images, cond = to_unit(held_out.images).to(device), condition(held_out.labels, task, settings.clip).to(device)
    return {"validation_loss": _validation_loss(trained.to(device), images, cond, settings, config.seed),
            "n_images": settings.training.steps * settings.training.batch, "parameters": sum(p.numel() for p in network.parameters())}


@torch.no_grad()
def _validation_loss(model: nn.Module, images: Tensor, cond: Tensor, settings: ImageFlow, seed: int, repeats: int = 4) -> float:
    """Mean denoising loss of images [N, 3, H, W] and conditions [N, D, H, W] at fixed noise and times, a training batch at once."""
    total, batch = 0.0, settings.training.batch
    for i, first in itertools.product(range(repeats), range(0, len(images), batch)):
        x1, c = images[first:first + batch], cond[first:first + batch]
        loss = flow_matching_loss(model, x1, c, settings.times, generator(seed, "image_flow", "validation", i, first))
        total += float(loss) * len(x1)
    return total / (repeats * len(images))
