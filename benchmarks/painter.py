"""Small painters of the phantom, trained as stage 1 trains: its batches, loss, optimiser, clipping and averaged weights. No rows of its own."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Pictures:
    """Images uint8 [N, H, W, 3] and as x1 [N, 3, H, W], their conditions [N, 4, H, W]."""

    images: np.ndarray
    x1: Any
    cond: Any


def phantom(first: int, n: int, size: int) -> Pictures:
    """The source camera's eyes number ``first`` to ``first + n - 1``."""
    from alignflow_core.config import ImageFlow, Task
    from alignflow_core.masks import condition
    from alignflow_core.pairs import to_unit
    from alignflow_core.phantom import SOURCE, draw_pair

    pairs = [draw_pair(SOURCE, f"s{number:03d}", size) for number in range(first, first + n)]
    images, masks = (np.stack(each) for each in zip(*pairs))
    labels = (masks < 192).astype(np.uint8) + (masks < 64).astype(np.uint8)  # as readers.py reads the task
    task = Task(name="phantom", kind="refuge", classes=("disc", "cup"), nested=True)
    return Pictures(images, to_unit(images), condition(labels, task, ImageFlow().clip))


class Learner:
    """A velocity model in training. Step i draws the same batch, noise and times for every model."""

    def __init__(self, model: Any, pictures: Pictures, batch: int, seed: int = 0, warm_up: int = 20, **training: Any) -> None:
        """``training``: settings of :class:`~alignflow_core.config.Training` other than its defaults."""
        from alignflow_core.config import ImageFlow, Training
        from alignflow_core.flow.ema import Ema
        from alignflow_core.flow.train import build_optimisers
        from alignflow_core.pairs import to_tensor

        self.pixels = to_tensor(pictures.images)
        self.model, self.pictures, self.batch, self.seed, self.warm_up = model, pictures, batch, seed, warm_up
        self.settings = ImageFlow(training=Training(**training))
        self.optimisers = build_optimisers(model, self.settings.training)
        self.ema = Ema(model, 0.95)  # of a short training

    def step(self, i: int) -> None:
        import torch

        from alignflow_core.flow.batch import training_batch
        from alignflow_core.flow.loss import flow_matching_loss
        from alignflow_core.seeding import generator

        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = optimiser.defaults["lr"] * min(1.0, (i + 1) / self.warm_up)
        draw = generator(self.seed, "benchmark", i)
        x1, cond = training_batch(self.pixels, self.pictures.cond, self.batch, True, draw)
        self.model.zero_grad(set_to_none=True)
        flow_matching_loss(self.model, x1, cond, self.settings.times, draw, condition_dropout=self.settings.condition_dropout).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.training.clip)
        for optimiser in self.optimisers:
            optimiser.step()
        self.ema.update(self.model)

    def held_out_loss(self, pictures: Pictures, draws: int = 4) -> float:
        """Flow matching loss of the averaged weights at fixed noise and times."""
        import torch
        from torch.func import functional_call

        from alignflow_core.flow.loss import flow_matching_loss
        from alignflow_core.seeding import generator

        def averaged(*inputs: Any) -> Any:
            return functional_call(self.model, self.ema.shadow, inputs)

        with torch.no_grad():
            return float(np.mean([float(flow_matching_loss(averaged, pictures.x1, pictures.cond, self.settings.times, generator("held out", number)))
                                  for number in range(draws)]))


def diffusers_unet(network: Any, size: int) -> Any:
    """diffusers' UNet2DModel shaped like our painter of a 4-channel condition: same channels, levels, blocks, attention and groups."""
    import torch
    from diffusers import UNet2DModel

    blocks = [("Attn" if attends else "") for attends in network.attention]

    class Peer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = UNet2DModel(
                sample_size=size, in_channels=7, out_channels=3, layers_per_block=network.n_res_blocks, block_out_channels=network.channels,
                norm_num_groups=network.norm_groups, attention_head_dim=network.head_channels,
                down_block_types=[f"{kind}DownBlock2D" for kind in blocks], up_block_types=[f"{kind}UpBlock2D" for kind in reversed(blocks)])

        def forward(self, x_t: Any, t: Any, cond: Any) -> Any:
            return self.unet(torch.cat([x_t, cond], 1), t * 1000).sample

    return Peer()
