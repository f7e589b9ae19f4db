"""Downstream segmenters: images in, one output channel per class region; architectures are those of ``networks/registry.py``."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alignflow_core.checkpoint import rebuilt, save_network
from alignflow_core.config import SegmenterNetwork, Task
from alignflow_core.flow.train import Step
from alignflow_core.masks import from_regions, region_dice, regions
from alignflow_core.networks.registry import ARCHITECTURES
from alignflow_core.networks.transformer import read_layout
from alignflow_core.pairs import to_unit
from alignflow_core.registry import load
from alignflow_core.seeding import normal

Batch = tuple[np.ndarray, np.ndarray]


def build_segmenter(n_classes: int, network: SegmenterNetwork, seed: int, layout: dict[str, Any] | None = None) -> nn.Module:
    """Network of ``network.architecture``, [B, 3, H, W] in [-1, 1] -> region logits [B, C, H, W]; the same seed gives the same weights.

    Args:
        layout: what ``config.json`` of its pretrained weights said, for a stored segmenter: the weights' folder is then not needed.
    """
    builder = load({name: architecture.build for name, architecture in ARCHITECTURES.items()}, network.architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = builder(n_classes, network, layout)
        return model


def rooted(network: SegmenterNetwork, root: Path) -> SegmenterNetwork:
    """The same with folders of weights taken from the project's root."""
    return dataclasses.replace(network, weights={name: str(root / folder) for name, folder in network.weights.items()})


def segmentation_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy plus soft Dice per region: logits and truth [B, C, H, W], truth 0 or 1."""
    probability = logits.sigmoid()
    overlap, total = (probability * truth).sum((0, 2, 3)), (probability + truth).sum((0, 2, 3))
    dice = 1 - (2 * overlap + 1) / (total + 1)
    return nn.functional.binary_cross_entropy_with_logits(logits, truth) + dice.mean()


def augment(images: Tensor, truth: Tensor, rng: torch.Generator, colour: float = 0.0) -> tuple[Tensor, Tensor]:
    """Flips, quarter turns, zoom and shift of whole batches' rows; optional strong colour jitter.

    Args:
        images: [B, 3, H, W] in [-1, 1]; truth: [B, C, H, W] in 0/1.
        rng: CPU generator.
        colour: strength of random gain, offset, gamma, channel mixing and blur-free noise; 0 is off.
    """
    n = len(images)
    theta = torch.zeros(n, 2, 3)
    scale = 1 + 0.15 * (2 * torch.rand(n, generator=rng) - 1)
    flip = torch.randint(0, 2, (n,), generator=rng) * 2 - 1
    angle = torch.randint(0, 4, (n,), generator=rng) * (torch.pi / 2) + 0.25 * (2 * torch.rand(n, generator=rng) - 1)
    theta[:, 0, 0], theta[:, 0, 1] = scale * angle.cos() * flip, -scale * angle.sin()
    theta[:, 1, 0], theta[:, 1, 1] = scale * angle.sin() * flip, scale * angle.cos()
    theta[:, :, 2] = 0.08 * (2 * torch.rand(n, 2, generator=rng) - 1)
    grid = nn.functional.affine_grid(theta.to(images), list(images.shape), align_corners=False)
    images = nn.functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    truth = nn.functional.grid_sample(truth, grid, mode="nearest", padding_mode="reflection", align_corners=False)
    if colour:
        images = jitter_colour(images, rng, colour)
    return images, truth


def jitter_colour(images: Tensor, rng: torch.Generator, strength: float) -> Tensor:
    """Random gain and offset per channel, gamma, channel mixing and noise, [B, 3, H, W] in [-1, 1]."""
    n = len(images)

    def draw(*shape: int) -> Tensor:
        return (2 * torch.rand(n, *shape, generator=rng) - 1).to(images)

    unit = (images + 1) / 2
    unit = unit.clamp_min(1e-4) ** torch.exp2(draw(1, 1, 1) * strength * 2)
    mixing = torch.eye(3, device=images.device) + draw(3, 3) * strength * 0.5
    unit = torch.einsum("bij,bjhw->bihw", mixing, unit) * (1 + draw(3, 1, 1) * strength) + draw(3, 1, 1) * strength * 0.5
    noise = normal(images.shape, rng, images.device) * (draw(1, 1, 1).abs() * strength * 0.1)
    return ((unit + noise).clamp(0, 1) * 2) - 1


def training_step(model: nn.Module, task: Task, batch: Callable[[int], Batch], rng: Callable[[int], torch.Generator],
                  device: torch.device, colour: float = 0.0) -> Step:
    """A ``step(i)`` for ``flow.train.train``: batch i, augmented, forward and backward."""
    def step(i: int) -> dict[str, Tensor]:
        images, masks = batch(i)
        truth = torch.from_numpy(regions(masks, task)).to(device).float()
        x, y = augment(to_unit(images).to(device), truth, rng(i), colour)
        loss = segmentation_loss(model(x).float(), y)
        loss.backward()
        return {"loss": loss.detach()}

    return step


@torch.no_grad()
def predict(model: nn.Module, images: np.ndarray, task: Task, device: torch.device, batch: int = 64) -> np.ndarray:
    """Segment uint8 [N, H, W, 3]: probability above .5 per region, class numbers uint8 [N, H, W]."""
    model.eval()
    found = [from_regions(model(to_unit(images[i:i + batch]).to(device)).float().cpu().numpy(), task) for i in range(0, len(images), batch)]
    return np.concatenate(found) if found else np.empty(images.shape[:3], np.uint8)


def mean_dice(predicted: np.ndarray, truth: np.ndarray, task: Task) -> np.ndarray:
    """Dice per image, averaged over the class regions that either has, [N]; 1 where neither has any."""
    return region_dice(regions(predicted, task), regions(truth, task))


def save_segmenter(folder: Path, weights: dict[str, Tensor], n_classes: int, network: SegmenterNetwork, task: Task, root: Path | None = None,
                   **facts: Any) -> None:
    """Write a segmenter with what is needed to use it elsewhere; ``root`` is where folders of pretrained weights are relative to."""
    kind = network.architecture
    if kind in network.weights:
        facts["layout"] = read_layout(kind, (root or Path()) / network.weights[kind])
    save_network(folder, weights, {"n_classes": n_classes, "network": dataclasses.asdict(network), "task": dataclasses.asdict(task), **facts})


def stored_network(config: dict[str, Any]) -> SegmenterNetwork:
    """The architecture that a checkpoint's ``config.json`` names."""
    return SegmenterNetwork(**{**config["network"], "channels": tuple(config["network"]["channels"])})


def load_segmenter(folder: Path, device: torch.device) -> nn.Module:
    """The segmenter of a checkpoint folder, on its device, in evaluation mode."""
    model, _ = rebuilt(folder, lambda config: build_segmenter(config["n_classes"], stored_network(config), seed=0, layout=config.get("layout")))
    return model.to(device)
