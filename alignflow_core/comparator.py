"""Painters to compare with, trained on the source on the terms of stage 1: same trunk, same batch, same number of images seen.

One that adds to a frozen unconditional painter spends ``comparator_base.share`` of the steps on that base, which all of its process share.
"""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from alignflow_core.checkpoint import load_network
from alignflow_core.config import ImageFlow
from alignflow_core.devices import autocast, placed, prepare
from alignflow_core.flow.batch import training_batch
from alignflow_core.flow.train import train
from alignflow_core.masks import condition
from alignflow_core.networks import velocity_unet
from alignflow_core.painters.registry import OBJECTIVES, PROCESSES
from alignflow_core.pairs import read_pairs, to_tensor
from alignflow_core.registry import load
from alignflow_core.seeding import derive_seed, generator


def run_base(config: Any, inputs: dict[str, Path], out_dir: Path, context: Any) -> dict[str, float]:
    """Train the unconditional painter of the process ``context.key``."""
    settings: ImageFlow = config.image_flow
    steps = round(settings.training.steps * config.comparator_base.share)
    network = velocity_unet.build(3, 0, settings.network, derive_seed(config.seed, "comparator_base", "weights"))
    numbers, weights = _fit(network, str(context.key), "denoise", steps, config, inputs, context)
    velocity_unet.save(out_dir, weights, 3, 0, settings.network, domain=velocity_unet.SOURCE, process=context.key)
    return numbers


def run(config: Any, inputs: dict[str, Path], out_dir: Path, context: Any) -> dict[str, float]:
    """Train the comparator ``context.key``; its checkpoint holds base and addition together."""
    settings: ImageFlow = config.image_flow
    chosen = config.comparator
    cond_channels = condition(read_pairs(inputs["data:source"], "train").labels[:1], config.task, settings.clip).shape[1]
    network: Any = velocity_unet.build(3, cond_channels, settings.network, derive_seed(config.seed, "comparator", "weights"), chosen.conditioner)
    base_steps = 0
    if chosen.base is not None:
        base, _ = load_network(inputs["comparator_base"])
        network.adopt_base(base)
        base_steps = round(settings.training.steps * config.comparator_base.share)
    numbers, weights = _fit(network, chosen.process, chosen.objective, settings.training.steps - base_steps, config, inputs, context)
    velocity_unet.save(out_dir, weights, 3, cond_channels, settings.network, chosen.conditioner, domain=velocity_unet.SOURCE, clip=settings.clip,
                       process=chosen.process, objective=chosen.objective, n_steps=chosen.n_steps)
    return numbers | {"n_images": float(settings.training.steps * settings.training.batch)}


def _fit(network: velocity_unet.VelocityUNet, process_name: str, objective: str, steps: int, config: Any, inputs: dict[str, Path],
         context: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Train on the source's training split; returns numbers and averaged weights."""
    settings: ImageFlow = config.image_flow
    device = prepare(config.machine)
    pairs = read_pairs(inputs["data:source"], "train")
    images, cond = to_tensor(pairs.images).to(device), condition(pairs.labels, config.task, settings.clip).to(device)
    model = placed(network, config.machine, device)
    process, loss_of = load(PROCESSES, process_name)(), load(OBJECTIVES, objective)
    training = dataclasses.replace(settings.training, steps=steps)

    def step(i: int) -> dict[str, Tensor]:
        draw = generator(config.seed, "image_flow", i)  # the rows, flips and noises of stage 1
        x1, c = training_batch(images, cond, training.batch, settings.flip, draw)
        with autocast(config.machine, device):
            loss = loss_of(model, process, x1, c, settings, draw, i / steps)
        loss.backward()
        return {"loss": loss.detach()}

    ema = train(model, step, training, context.work_dir / "state.safetensors", context.log, context.progress)
    parameters = [p.numel() for p in network.parameters()]
    trained = [p.numel() for p in network.parameters() if p.requires_grad]
    trunk = [p.numel() for p in network.unet.parameters()]
    return {"parameters": float(sum(parameters)), "trained_parameters": float(sum(trained)), "trunk_parameters": float(sum(trunk)),
            "steps": float(steps)}, ema.shadow
