"""Synthesis: noise -> mask, mask -> image, one seed per pair, so that pair i is the same in any batch or after any restart."""

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import binary_fill_holes, label
from torch import Tensor
from torch.nn import functional

from alignflow_core.artifact import read_json, write_whole
from alignflow_core.config import Sample, Task
from alignflow_core.devices import Replayed, autocast, placed, prepare
from alignflow_core.errors import StageError
from alignflow_core.flow.guidance import guided
from alignflow_core.flow.path import VelocityModel, sample_path
from alignflow_core.flow.solver import SOLVERS, time_grid
from alignflow_core.masks import condition, from_regions, region_dice, regions
from alignflow_core.networks import velocity_unet
from alignflow_core.painters.registry import PROCESSES
from alignflow_core.pairs import Pairs, read_array, read_pairs, to_bytes, to_unit, write_pairs
from alignflow_core.registry import load
from alignflow_core.seeding import derive_seed, generator

MAX_CANDIDATES = 20  # per wanted mask, before a mask flow is called untrained


def run_masks(config: Any, inputs: dict[str, Path], out_dir: Path, context: Any) -> dict[str, float]:
    """Draw the masks that all targets share: real training masks, flow masks, or both in turn.

    Flow masks are decoded at 0, cleaned, and refused when implausible (a class area outside the training
    quantiles, a missing class that training masks always have) or a near copy of a training mask.
    """
    settings: Sample = config.sample
    task: Task = config.task
    source = read_pairs(inputs["data:source"], "train")
    real = np.asarray(source.labels)
    n_flow = {"real": 0, "flow": settings.n_pairs, "mixed": settings.n_pairs // 2}[settings.mask_source]
    drawn, seeds, tried = _draw_masks(config, inputs["mask_flow"], real, n_flow, context)
    order = np.random.Generator(np.random.PCG64(derive_seed(config.seed, "sample_masks", "real")))
    rows = np.concatenate([order.permutation(len(real)) for _ in range(-(-settings.n_pairs // len(real)))])[:settings.n_pairs - n_flow]
    masks = np.concatenate([real[rows], drawn]) if n_flow else real[rows]
    # Interleave, so that any prefix of the set holds both kinds.
    turn = np.argsort(np.concatenate([np.arange(len(rows)) / max(1, len(rows)), np.arange(n_flow) / max(1, n_flow)]), kind="stable")
    table = pd.DataFrame({"mask_id": [f"mask{i:06d}" for i in range(len(masks))],
                          "seed": np.array([*rows, *seeds], dtype=np.int64)[turn],
                          "origin": np.array(["real"] * len(rows) + ["flow"] * n_flow)[turn]})
    np.save(out_dir / "masks.npy", masks[turn])
    table.to_parquet(out_dir / "manifest.parquet", index=False)
    return {"n_masks": len(masks), "n_flow": n_flow, "accepted_fraction": n_flow / tried if tried else 1.0,
            **{f"area_{name}": float(share) for name, share in zip(task.classes, regions(masks, task).mean((0, 2, 3)), strict=True)}}


def run_stage1(config: Any, inputs: dict[str, Path], out_dir: Path, context: Any) -> dict[str, float]:
    """Paint the synthetic masks with the stage-1 model."""
    return _paint(config, inputs["image_flow"], inputs["sample_masks"], out_dir, context)


def run_comparator(config: Any, inputs: dict[str, Path], out_dir: Path, context: Any) -> dict[str, float]:
    """Paint the synthetic masks with a comparator by its own sampler, from the same noise as stage 1."""
    return _paint(config, inputs["comparator"], inputs["sample_masks"], out_dir, context)


def run_paired(config: Any, inputs: dict[str, Path], out_dir: Path, context: Any) -> dict[str, float]:
    """Paint masks of the target's held-out pairs with every painter, for image-by-image measures and pictures side by side.

    A variant's other painters are those of its base and are left out.
    Nothing is ever trained on these. Row i of ``<painter>.npy`` stands for row i of ``manifest.parquet``, whose ``case_id`` names the real pair.
    """
    settings: Sample = config.sample
    held_out = read_pairs(inputs["data:target"], "test")
    if held_out.masks is None:  # of a domain without labels: nothing to paint
        held_out = held_out.select(np.zeros(len(held_out), bool))
    chosen = np.unique(np.linspace(0, len(held_out) - 1, min(settings.n_paired, len(held_out))).round().astype(int))
    pairs = held_out.select(chosen)
    others = {"stage1": "image_flow"} | {name.partition(":")[2]: name for name in inputs if name.startswith("comparator:")}
    painters = ({} if config.variant_of else others) | {"aligned": "align"} if len(pairs) else {}
    device = prepare(config.machine)
    for done, (painter, name) in enumerate(painters.items(), start=1):
        model, facts = velocity_unet.load(inputs[name])
        velocity = Replayed(velocity_unet.in_domain(placed(model, config.machine, device), facts["domain"]))
        parts = []
        for start in range(0, len(pairs), settings.batch):
            parts.append(_painted(velocity, facts, pairs.labels[start:start + settings.batch],
                                  ("paired", range(start, min(start + settings.batch, len(pairs)))), config, device))
        np.save(out_dir / f"{painter}.npy", np.concatenate(parts))
        context.progress(done, len(painters), painter)
    pd.DataFrame({"case_id": pairs.ids}).to_parquet(out_dir / "manifest.parquet", index=False)
    return {"n_pairs": float(len(pairs)), "painters": float(len(painters))}


def _dealt(values: Sequence[float], seed: int, purpose: str, n: int) -> np.ndarray:
    """One of the values for every pair, drawn by its number, [n]."""
    return np.array([values[derive_seed(seed, purpose, i) % len(values)] for i in range(n)], dtype=float)


def _painted(model: VelocityModel, facts: dict[str, Any], masks: np.ndarray, seeds: tuple[str, Sequence[int]], config: Any,
             device: torch.device, seen: tuple[float, np.ndarray] | None = None) -> np.ndarray:
    """Images uint8 [n, H, W, 3] of class numbers [n, H, W]; image i from noise seeded by ``(seed, seeds[0], seeds[1][i])``.

    ``seen`` is a time and images uint8 [n, H, W, 3] of these masks: painted from these, noised to that time, on.
    """
    masks = np.asarray(masks)
    cond = condition(masks, config.task, facts["clip"]).to(device)
    noise = torch.stack([torch.randn(3, *masks.shape[1:], generator=generator(config.seed, seeds[0], number)) for number in seeds[1]])
    begin = 0.0
    if seen:
        begin, images = seen
        noise = sample_path(noise, to_unit(images), torch.full((len(noise),), begin)).x_t
    with autocast(config.machine, device), torch.no_grad():
        return to_bytes(_drawn(model, noise.to(device), cond, facts, config.sample, begin))


def _drawn(model: VelocityModel, noise: Tensor, cond: Tensor, facts: dict[str, Any], settings: Sample, begin: float = 0.0) -> Tensor:
    """A flow, ours or a comparator's, by the solver of ``sample`` from time ``begin`` on; another process by its own sampler."""
    if facts.get("process", "flow") == "flow":
        return _solve(model, noise, cond, settings, begin)
    images: Tensor = load(PROCESSES, facts["process"])().sample(guided(model, settings.guidance_scale), noise, cond, facts["n_steps"])
    return images


def _steps(settings: Sample, begin: float) -> int:
    """Solver steps from time ``begin`` on, about as long as those from noise."""
    return math.ceil(settings.n_steps * (1 - begin) - 1e-9)  # 10 (1 - .7) is a little above 3


def _nfe(facts: dict[str, Any], settings: Sample, begin: float = 0.0) -> int:
    """Evaluations of the network for one image; guidance takes two where one would do."""
    own = facts["n_steps"] if facts.get("process", "flow") != "flow" else _steps(settings, begin) * (1 if settings.solver == "euler" else 2)
    return int(own) * (1 if settings.guidance_scale == 1 else 2)


def run_aligned(config: Any, inputs: dict[str, Path], out_dir: Path, context: Any) -> dict[str, float]:
    """Paint the synthetic masks with the target's aligned model, from the same noise as stage 1.

    Pairs are painted by ``stage 1 + strength (aligned - stage 1)``, each with one of ``sample.strengths``, and those of real masks from one of
    ``sample.starts`` on.
    """
    source = read_pairs(inputs["data:source"], "train") if any(config.sample.starts) else None
    return _paint(config, inputs["align"], inputs["sample_masks"], out_dir, context, inputs["image_flow"], source)


def _paint(config: Any, checkpoint_dir: Path, masks_dir: Path, out_dir: Path, context: Any, base_dir: Path | None = None,
           source: Pairs | None = None) -> dict[str, float]:
    """Image i from noise seeded by (seed, "pair", i); finished chunks survive an interruption.

    Strengths need the base, starts the source's training pairs; without them all are painted at strength 1 from noise.
    """
    settings: Sample = config.sample
    device = prepare(config.machine)
    model, facts = velocity_unet.load(checkpoint_dir)
    weights = {1.0: model.state_dict()} if base_dir is None else _between(base_dir, model, settings.strengths)
    velocity = Replayed(velocity_unet.in_domain(placed(model, config.machine, device), facts["domain"]))
    masks = read_array(masks_dir / "masks.npy")
    table = pd.read_parquet(masks_dir / "manifest.parquet")
    strengths = _dealt(settings.strengths, config.seed, "strength", len(masks)) if base_dir else np.ones(len(masks))
    starts = np.where(table["origin"] == "real", _dealt(settings.starts, config.seed, "start", len(masks)), 0.0) if source else np.zeros(len(masks))
    images, done = np.empty((*masks.shape, 3), np.uint8), 0
    for number, (strength, begin, rows) in enumerate(_chunks(strengths, starts, settings.batch)):
        part = context.work_dir / f"chunk{number:08d}.npy"
        if not part.exists():
            model.load_state_dict(weights[strength])
            seen = (begin, source.images[table["seed"].to_numpy()[rows]]) if source and begin else None  # a real mask's number is its row
            chunk = io.BytesIO()
            np.save(chunk, _painted(velocity, facts, masks[rows], ("pair", rows.tolist()), config, device, seen))
            write_whole(part, chunk.getvalue())
        images[rows] = read_array(part)
        done += len(rows)
        context.progress(done, len(masks), "images")
    table.insert(0, "pair_id", [f"pair{i:06d}" for i in range(len(masks))])
    table["seed"] = [derive_seed(config.seed, "pair", i) for i in range(len(masks))]
    if base_dir is not None:
        table["strength"], table["start"] = strengths, starts
    table["checkpoint"] = read_json(checkpoint_dir / "config.json")["weights_sha256"]
    write_pairs(out_dir, Pairs(images, np.asarray(masks), tuple(table["pair_id"]), table))
    calls = np.array([_nfe(facts, settings, begin) for begin in starts.tolist()])
    return {"n_images": len(images), "nfe": float(calls.mean()), "started_fraction": float((starts > 0).mean()),
            "saturated_fraction": float(((images == 0) | (images == 255)).mean())}


def _chunks(strengths: np.ndarray, starts: np.ndarray, batch: int) -> Iterator[tuple[float, float, np.ndarray]]:
    """Strength, start and row numbers of what is painted at once: full batches but for the last of each strength and start."""
    for strength, begin in sorted(set(zip(strengths.tolist(), starts.tolist(), strict=True))):
        rows = np.flatnonzero((strengths == strength) & (starts == begin))
        for first in range(0, len(rows), batch):
            yield strength, begin, rows[first:first + batch]


def _between(base_dir: Path, model: torch.nn.Module, strengths: Sequence[float]) -> dict[float, dict[str, Tensor]]:
    """Weights on the line from the base (0) through the model's (1), by strength."""
    aligned = {name: value.clone() for name, value in model.state_dict().items()}
    if set(strengths) == {1.0}:
        return {1.0: aligned}
    base, _ = velocity_unet.load(base_dir)
    base.adopt_target()
    start = base.state_dict()
    return {strength: {name: start[name].lerp(value, strength) for name, value in aligned.items()} for strength in strengths}


@torch.no_grad()
def _solve(model: VelocityModel, noise: Tensor, cond: Tensor, settings: Sample, begin: float = 0.0) -> Tensor:
    times = begin + (1 - begin) * time_grid(_steps(settings, begin))
    scale = settings.guidance_scale if cond.shape[1] else 1.0  # an empty condition cannot be guided by
    return SOLVERS[settings.solver](guided(model, scale), noise, cond, times)


def _draw_masks(config: Any, checkpoint_dir: Path, real: np.ndarray, wanted: int, context: Any) -> tuple[np.ndarray, list[int], int]:
    """``wanted`` accepted masks, the number each was drawn with, and how many were looked at for them."""
    settings: Sample = config.sample
    task: Task = config.task
    kept: list[np.ndarray] = []
    numbers: list[int] = []
    if not wanted:
        return np.empty((0, *real.shape[1:]), np.uint8), numbers, 0
    device = prepare(config.machine)
    model, facts = velocity_unet.load(checkpoint_dir)
    velocity = Replayed(velocity_unet.in_domain(placed(model, config.machine, device), velocity_unet.SOURCE))
    shape = (facts["channels"], facts["size"], facts["size"])
    known = regions(real, task)
    areas = known.mean((2, 3))
    low, high = np.quantile(areas, [settings.area_quantile, 1 - settings.area_quantile], axis=0)
    tried = 0
    while len(kept) < wanted:
        if tried >= MAX_CANDIDATES * wanted:
            raise StageError(f"only {len(kept)} of {tried} drawn masks are plausible; train mask_flow longer (mask_flow.training.steps)")
        batch = range(tried, tried + settings.batch)
        noise = torch.stack([torch.randn(shape, generator=generator(config.seed, "mask", i)) for i in batch]).to(device)
        maps = _solve(velocity, noise, noise.new_zeros(len(noise), 0, *shape[1:]), settings)
        maps = functional.interpolate(maps, size=real.shape[1:], mode="bilinear", align_corners=False)
        for number, mask in zip(batch, from_regions(maps.cpu().numpy(), task), strict=True):
            mask = clean(mask, task)
            area = regions(mask[None], task).mean((2, 3))[0]
            if len(kept) < wanted and (area >= low).all() and (area <= high).all() and _nearest_dice(mask, known, task) <= settings.copy_dice:
                kept.append(mask)
                numbers.append(number)
        tried += settings.batch
        context.progress(len(kept), wanted, "masks")
    return np.stack(kept), numbers, numbers[-1] + 1


def clean(mask: np.ndarray, task: Task) -> np.ndarray:
    """Per region fill holes and drop specks below a tenth of the largest component, uint8 [H, W] -> the same.

    Where classes are not nested, what another class fills is no hole: an organ around a tumour, or a muscle around its ventricle, keeps it.
    """
    channels = regions(mask[None], task)[0]
    tidy = np.zeros_like(channels)
    for c, region in enumerate(channels):
        parts, n = label(binary_fill_holes(region))
        sizes = np.bincount(parts.ravel(), minlength=n + 1)[1:]
        for part in np.flatnonzero(sizes >= 0.1 * sizes.max(initial=1)) + 1:
            tidy[c] |= parts == part
    if not task.nested:
        tidy &= channels | ~(channels & tidy).any(0)
    return from_regions(tidy[None].astype(np.float32), task)[0]


def _nearest_dice(mask: np.ndarray, known: np.ndarray, task: Task) -> float:
    """Largest foreground-region Dice (mean over the classes of either) with regions [N, C, H, W] of training masks; an empty mask copies none."""
    return float(region_dice(regions(mask[None], task), known).max()) if mask.any() else 0.0
