"""Can one tell from a generator whether an image was given to it? An attack by the denoising loss, which is lower on what was learned by heart.

Every image is noised in the same few ways and the error of the predicted velocity taken (the loss-based attack of arXiv 2301.09956).
Three questions: source training images by stage 1, the same by the aligned model, and references that were aligned to by the
aligned model. The last takes the loss relative to that of stage 1, which has never seen them and says how hard an image is.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from alignflow_core.config import Task
from alignflow_core.flow.path import VelocityModel, sample_path
from alignflow_core.masks import condition
from alignflow_core.metrics.membership import Attack, attack
from alignflow_core.networks import velocity_unet
from alignflow_core.pairs import Pairs, to_unit
from alignflow_core.seeding import generator

TIMES = (0.3, 0.5, 0.7, 0.9)  # from noise (0) to data (1); one fixed noise each
MOST, BATCH = 64, 32  # images of a set; images at once


def membership(inputs: Mapping[str, Path], source: Pairs, references: Pairs, test: Pairs, task: Task, seed: int,
               device: torch.device) -> tuple[pd.DataFrame, dict[str, Attack]]:
    """Attack both generators.

    Args:
        inputs: folders of the checkpoints ``image_flow`` and ``align``.
        source, references, test: the source's pairs of every split, the references, the target's unseen images.

    Returns:
        One row an image and question (set, case_id, member, score), and what each attack reaches. A question without members or
        without others is left out.
    """
    (stage1, facts), (aligned, _) = velocity_unet.load(inputs["image_flow"]), velocity_unet.load(inputs["align"])
    models = [model.to(device).to(memory_format=torch.channels_last) for model in (stage1, aligned)]  # type: ignore[call-overload]
    train = (source.table["split"] == "train").to_numpy()
    known = {True: _some(source.select(train)), False: _some(source.select(~train))}
    tuned_to = (references.table["role"] == "align").to_numpy()  # the others only say when to stop
    given = {True: _some(references.select(tuned_to)), False: _some(test)}
    frames: dict[str, list[pd.DataFrame]] = {"source_stage1": [], "source_aligned": [], "references": []}
    for member, pairs in known.items():
        cond = condition(pairs.labels, task, facts["clip"])
        for name, model in zip(frames, models, strict=False):
            frames[name].append(_rows(name, pairs, member, -_losses(velocity_unet.in_domain(model, velocity_unet.SOURCE), pairs, cond, seed, device)))
    for member, pairs in given.items():
        cond = torch.zeros(len(pairs), facts["cond_channels"], *pairs.images.shape[1:3])  # references have no masks
        before, after = (_losses(velocity_unet.in_domain(model, domain), pairs, cond, seed, device)
                         for model, domain in zip(models, (velocity_unet.SOURCE, velocity_unet.TARGET), strict=True))
        frames["references"].append(_rows("references", pairs, member, before - after))
    table = pd.concat([frame for each in frames.values() for frame in each], ignore_index=True)
    attacks = {}
    for name in frames:
        part = table[table["set"] == name]
        members, others = (part.loc[part["member"] == side, "score"].to_numpy() for side in (True, False))
        if len(members) and len(others):
            attacks[name] = attack(members, others)
    return table, attacks


def numbers(attacks: Mapping[str, Attack]) -> dict[str, float]:
    """``membership_auc_<set>`` with its interval, ``membership_found_<set>`` and how many images were compared."""
    words = {"auc": "auc", "low": "low", "high": "high", "found": "found", "members": "n_members", "others": "n_others"}
    return {f"membership_{word}_{name}": float(getattr(found, field)) for name, found in attacks.items() for word, field in words.items()}


def _some(pairs: Pairs) -> Pairs:
    """At most :data:`MOST` evenly spaced pairs."""
    return pairs.select(np.unique(np.linspace(0, len(pairs) - 1, min(MOST, len(pairs))).round().astype(int))) if len(pairs) else pairs


def _rows(name: str, pairs: Pairs, member: bool, scores: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"set": name, "case_id": list(pairs.ids), "member": member, "score": scores})


@torch.no_grad()
def _losses(model: VelocityModel, pairs: Pairs, cond: Tensor, seed: int, device: torch.device) -> np.ndarray:
    """Logarithm of each image's squared velocity error, mean over pixels and times, [N]; the noise is the same for every image."""
    found = []
    for start in range(0, len(pairs), BATCH):
        x1, c = to_unit(pairs.images[start:start + BATCH]).to(device), cond[start:start + BATCH].to(device)
        errors = []
        for number, time in enumerate(TIMES):
            x0 = torch.randn(x1.shape[1:], generator=generator(seed, "membership", number)).to(device).expand_as(x1)
            point = sample_path(x0, x1, x1.new_full((len(x1),), time))
            errors.append((model(point.x_t, point.t, c).float() - point.velocity).square().mean((1, 2, 3)))
        found.append(torch.stack(errors).mean(0).log())
    return torch.cat(found).double().cpu().numpy() if found else np.empty(0)
