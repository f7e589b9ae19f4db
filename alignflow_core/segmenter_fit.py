"""Fit segmenters: the same steps for every one, the model chosen on a validation set."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from alignflow_core.checkpoint import section
from alignflow_core.config import Machine, Segment, SegmenterNetwork, Task, Training
from alignflow_core.devices import prepare
from alignflow_core.flow.ema import Ema
from alignflow_core.flow.train import train
from alignflow_core.networks.registry import ARCHITECTURES, UNET, arm_folder, prefix
from alignflow_core.networks.segmenters import build_segmenter, mean_dice, predict, rooted, save_segmenter, training_step
from alignflow_core.pairs import Pairs
from alignflow_core.seeding import derive_seed, generator

COLUMNS = ("segmenter", "arm", "segmenter_seed", "folder", "val_dice", "steps", "n_real", "n_synthetic", "parameters")


@dataclass(frozen=True)
class Diet:
    """What a segmenter is fed: ``main`` pairs, and ``added`` pairs that make up ``share`` of each batch; ``colour`` jitter strength.

    ``weights`` [len(added)]: how often each added pair is drawn; ``None`` for all alike.
    """

    main: Pairs
    added: Pairs | None = None
    share: float = 0.5
    colour: float = 0.0
    weights: np.ndarray | None = None


def fit(diet: Diet, validation: Pairs | None, task: Task, network: SegmenterNetwork, training: Training, machine: Machine,
        names: tuple[object, ...], state_file: Path, context: Any, check_every: int = 50,
        start: dict[str, Tensor] | None = None) -> tuple[dict[str, Tensor], float]:
    """Train a segmenter; returns the averaged weights of the best validation Dice, and that Dice.

    Args:
        network: what is trained; pretrained weights are tuned at a smaller rate than ``training.lr`` (``networks/registry.py``).
        validation: looked at every ``check_every`` steps; ``None`` or no pair takes the last weights (Dice is then NaN).
        names: seed path of this run, for instance ``(seed, "segment", arm, 0)``.
        state_file: resumable state.
        start: weights to start from; ``None`` draws them.
    """
    device = prepare(machine)
    validation = validation if validation is not None and len(validation) else None
    network = rooted(network, context.root)
    if network.architecture in network.weights:
        training = dataclasses.replace(training, lr=training.lr * (ARCHITECTURES[network.architecture].tuning or 1.0))
    model = build_segmenter(len(task.classes), network, derive_seed(*names, "weights")).to(device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # an eighth faster on a CPU
    averaged = build_segmenter(len(task.classes), network, 0).to(device)
    if start is not None:
        model.load_state_dict(start)
    n_added = round(diet.share * training.batch) if diet.added is not None else 0

    def batch(i: int) -> tuple[np.ndarray, np.ndarray]:
        draw = np.random.Generator(np.random.PCG64(derive_seed(*names, "rows", i)))
        rows = draw.integers(len(diet.main), size=training.batch - n_added)
        images, masks = diet.main.images[rows], diet.main.labels[rows]
        if diet.added is None:
            return images, masks
        if diet.weights is None:
            rows = draw.integers(len(diet.added), size=n_added)
        else:
            rows = draw.choice(len(diet.added), size=n_added, p=diet.weights / diet.weights.sum())
        return np.concatenate([images, diet.added.images[rows]]), np.concatenate([masks, diet.added.labels[rows]])

    state = {"best_dice": torch.tensor([-1.0])} | {f"best:{name}": value.clone() for name, value in model.state_dict().items()}

    def on_step(done: int, ema: Ema) -> bool:
        if validation is None or (done % check_every and done != training.steps):
            return False
        averaged.load_state_dict(ema.shadow)
        dice = float(mean_dice(predict(averaged, validation.images, task, device), validation.labels, task).mean())
        if dice >= float(state["best_dice"]):
            state["best_dice"] = torch.tensor([dice])
            state.update({f"best:{name}": value.clone() for name, value in ema.shadow.items()})
        return False

    model.train()
    step = training_step(model, task, batch, lambda i: generator(*names, "augment", i), device, diet.colour)
    label = "/".join(map(str, names[2:]))
    ema = train(model, step, training, state_file, lambda m, i: context.log({f"{label}/{k}": v for k, v in m.items()}, i),
                lambda done, total, note: context.progress(done, total, f"{label} {note}"), on_step, state)
    if validation is None:
        return ema.shadow, float("nan")
    return section("best", state), float(state["best_dice"])


def fit_arms(config: Any, diets: Mapping[str, Diet], own_validation: Mapping[str, Pairs], validation: Pairs, out_dir: Path,
             context: Any) -> dict[str, float]:
    """Fit every (architecture, arm, seed), resuming after the last finished one; writes a folder for each and ``segmenters.parquet``.

    Args:
        config: ``seed``, ``machine``, ``task`` and ``segment``, of which ``architectures``, ``seeds``, ``network`` and ``training`` are used.
        diets: arm -> what its segmenters are fed.
        own_validation: arm -> pairs that its weights are chosen on, in place of ``validation``.

    Returns:
        Mean validation Dice of the arms that have validation pairs, ``val_dice/<arm>`` of the first architecture and
        ``<architecture>/val_dice/<arm>`` of others.
    """
    settings: Segment = config.segment
    task: Task = config.task
    rows = []
    for architecture in settings.architectures:
        network = dataclasses.replace(settings.network, architecture=architecture)
        model = build_segmenter(len(task.classes), rooted(network, context.root), 0)
        parameters = sum(each.numel() for each in model.parameters())
        for arm, diet in diets.items():
            for seed in range(settings.seeds):
                # Seeds leave out the target's name: arms of two targets start from equal weights.
                path = (arm, seed) if architecture == UNET else (architecture, arm, seed)
                folder = f"{arm_folder(architecture, arm)}/seed{seed}"
                weights, dice = fit(diet, own_validation.get(arm, validation), task, network, settings.training, config.machine,
                                    (config.seed, "segment", *path), context.work_dir / f"{'.'.join(map(str, path))}.safetensors", context,
                                    settings.check_every)
                save_segmenter(out_dir / folder, weights, len(task.classes), network, task, context.root, arm=arm, val_dice=dice)
                rows.append((architecture, arm, seed, folder, dice, settings.training.steps, len(diet.main),
                             0 if diet.added is None else len(diet.added), parameters))
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table.to_parquet(out_dir / "segmenters.parquet", index=False)
    means = table.groupby(["segmenter", "arm"], sort=False)["val_dice"].mean().reset_index()
    return {f"{prefix(row['segmenter'], settings.architectures[0])}val_dice/{row['arm'].replace('+', '_plus_')}": float(row["val_dice"])
            for row in means.to_dict("records") if np.isfinite(row["val_dice"])}
