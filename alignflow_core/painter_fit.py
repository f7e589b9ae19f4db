"""Training of a comparator's painter or its base: the rows, flips and noises of stage 1, whatever the process and the objective."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from alignflow_core.config import ImageFlow
from alignflow_core.devices import autocast, placed, prepare
from alignflow_core.flow.batch import training_batch
from alignflow_core.flow.train import train
from alignflow_core.masks import condition
from alignflow_core.networks import velocity_unet
from alignflow_core.painters.registry import OBJECTIVES, PROCESSES
from alignflow_core.pairs import read_pairs, to_tensor
from alignflow_core.registry import load
from alignflow_core.seeding import generator


def fit(network: velocity_unet.VelocityUNet, process_name: str, objective: str, steps: int, config: Any, inputs: dict[str, Path],
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
        draw = generator(config.seed, "image_flow", i)
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
