"""Painters to compare with, trained on the source on the terms of stage 1: same trunk, same batch, same number of images seen.

One that adds to a frozen unconditional painter has spent ``comparator_base.share`` of the steps on that base (``comparator_base.py``).
"""

from pathlib import Path
from typing import Any

from alignflow_core.checkpoint import load_network
from alignflow_core.config import ImageFlow
from alignflow_core.masks import condition
from alignflow_core.networks import velocity_unet
from alignflow_core.painter_fit import fit
from alignflow_core.pairs import read_pairs
from alignflow_core.seeding import derive_seed


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
    numbers, weights = fit(network, chosen.process, chosen.objective, settings.training.steps - base_steps, config, inputs, context)
    velocity_unet.save(out_dir, weights, 3, cond_channels, settings.network, chosen.conditioner, domain=velocity_unet.SOURCE, clip=settings.clip,
                       process=chosen.process, objective=chosen.objective, n_steps=chosen.n_steps)
    return numbers | {"n_images": float(settings.training.steps * settings.training.batch)}
