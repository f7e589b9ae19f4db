"""Keep the synthetic pairs that are plausible, novel and true to their mask (our choice; the paper keeps all).

* plausible: not an outlier, by the robust deviation of its reward features, among the pairs of its strength and start (of which one or two cannot be
  judged so);
* novel: not closer to a reference than real images are (``metrics/copying.py``); not asked where the references are moments alone;
* mask-true: a judge that never saw the pair finds its mask again. Two judges are trained, each on one half of the
  synthetic pairs, and judge the other half: they know the target's look but need no target label.

The judges also say how large the references' regions are; on request kept pairs are weighted towards that (``match_areas``).
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from alignflow_core.config import Filter, Segment, Task
from alignflow_core.devices import prepare
from alignflow_core.errors import StageError
from alignflow_core.masks import regions
from alignflow_core.metrics.copying import novelty_check
from alignflow_core.networks.segmenters import build_segmenter, mean_dice, predict, rooted
from alignflow_core.pairs import Pairs, read_pairs, to_unit
from alignflow_core.reward.encoders import Standardised
from alignflow_core.reward.statconv import StatConv
from alignflow_core.seeding import derive_seed
from alignflow_core.segmenter_fit import Diet, fit

LEAST_SPREAD = 0.1  # of the source's
BATCH = 64  # images encoded at once


def run(config: Any, inputs: dict[str, Path], out_dir: Path, context: Any) -> dict[str, float]:
    """Score every aligned pair and write ``manifest.parquet`` with ``kept`` and the first reason against."""
    settings: Filter = config.filter
    device = prepare(config.machine)  # before the first sum: its threads decide the last bit
    pairs, references = read_pairs(inputs["sample_aligned"]), read_pairs(inputs["references"])
    train = read_pairs(inputs["data:source"], "train")
    outlyingness = _outlyingness(pairs, train)
    draw = np.random.Generator(np.random.PCG64(derive_seed(config.seed, "filter", context.key, "novelty")))
    novelty, copied = (novelty_check(pairs.images, references.images, train.images, train.table["group"].to_numpy(), settings.copy_quantile, draw)
                       if len(references) else (np.full(len(pairs), np.nan), np.zeros(len(pairs), bool)))
    agreement, reference_areas = _cross_judged(config, pairs, references, device, context)
    reasons = np.select([copied, outlyingness > settings.outlier_limit, agreement < settings.agreement_ratio * np.median(agreement)],
                        ["near copy of a reference", "implausible image", "image does not follow its mask"], default="")
    table = pd.DataFrame({"pair_id": pairs.ids, "kept": reasons == "", "reason": reasons, "novelty": novelty,
                          "outlyingness": outlyingness, "agreement": agreement})
    areas = regions(pairs.labels, config.task).mean((2, 3))
    table["weight"] = np.where(table["kept"], area_weights(areas, reference_areas) if settings.match_areas else 1.0, 0.0)
    if not table["kept"].any():
        raise StageError(f"filter refused all {len(table)} pairs ({table['reason'].value_counts().to_dict()}); "
                           "loosen the filter section or align again")
    table.to_parquet(out_dir / "manifest.parquet", index=False)
    return {"kept_fraction": float(table["kept"].mean()), "mask_agreement": float(np.mean(agreement)),
            **(_area_ratios(areas, reference_areas, config.task) if len(references) else {}),
            **{f"refused_{name.replace(' ', '_')}": float((reasons == name).mean()) for name in
               ("near copy of a reference", "implausible image", "image does not follow its mask")}}


def _area_ratios(areas: np.ndarray, reference_areas: np.ndarray, task: Task) -> dict[str, float]:
    """Median region area of the references, as judged, over that of the set; not of a class that half of the set lacks."""
    return {f"area_ratio_{name}": float(theirs / own) for name, theirs, own in
            zip(task.classes, np.median(reference_areas, 0), np.median(areas, 0), strict=True) if own > 0}


def _outlyingness(pairs: Pairs, source: Pairs) -> np.ndarray:
    """Root mean square of robust z-scores of a pair's features among the pairs of its strength and start, over its median: 1 is typical, [N].

    Features are in deviations of the source. One that hardly varies among the pairs, as that of an empty corner, says little of any of them:
    its spread counts as ``LEAST_SPREAD`` at least.
    """
    with torch.no_grad():
        real = to_unit(source.images)
        encode = Standardised(StatConv(), real, real[:, :0])
        features = torch.cat([encode(part, part[:, :0])[0] for part in to_unit(pairs.images).split(BATCH)]).numpy()
    named = [name for name in ("strength", "start") if name in pairs.table]
    found = np.empty(len(pairs))
    for alike in pairs.table.groupby(named).indices.values() if named else [np.arange(len(pairs))]:
        centred = features[alike] - np.median(features[alike], axis=0)
        z = centred / np.maximum(1.4826 * np.median(np.abs(centred), axis=0), LEAST_SPREAD)
        size = np.sqrt(np.mean(np.clip(z, -20, 20) ** 2, axis=1))
        found[alike] = size / max(float(np.median(size)), 1e-9)
    return found


def area_weights(areas: np.ndarray, reference_areas: np.ndarray) -> np.ndarray:
    """How often to draw each pair so that region areas follow the references', [N], between a quarter and four times the mean.

    Ratio of two normal densities of the log areas, region by region. The references' mean is shrunk towards the set's by its
    sampling error (positive-part James-Stein), their deviation is taken from the set: few references do not tell it.

    Args:
        areas, reference_areas: shares of the image, [N, C] and [n, C]; empty regions are left out.
    """
    log_weight = np.zeros(len(areas))
    for own, theirs in zip(areas.T, reference_areas.T, strict=True):
        ours, known = np.log(own[own > 0]), np.log(theirs[theirs > 0])
        if len(known) < 2 or len(ours) < 2 or ours.std() < 1e-6:
            continue
        shift = (known.mean() - ours.mean()) / ours.std()
        shift *= max(0.0, 1 - 1 / (len(known) * max(shift**2, 1e-12)))
        place = (np.log(np.maximum(own, 1e-9)) - ours.mean()) / ours.std()
        log_weight += np.where(own > 0, shift * place - shift**2 / 2, 0.0)
    weight = np.exp(log_weight - log_weight.mean())
    return np.clip(weight / weight.mean(), 0.25, 4.0)


def _cross_judged(config: Any, pairs: Pairs, references: Pairs, device: torch.device, context: Any) -> tuple[np.ndarray, np.ndarray]:
    """Dice of each pair's mask against the judge trained on the other half, [N], and the judged region areas of the references, [n, C]."""
    settings: Filter = config.filter
    segment: Segment = config.segment  # of which network and training
    task: Task = config.task
    training = dataclasses.replace(segment.training, steps=settings.judge_steps)
    # Drawn, since origins of masks come in turn: each judge is to see both.
    half = np.random.Generator(np.random.PCG64(derive_seed(config.seed, "filter", "halves"))).permutation(len(pairs)) % 2 == 0
    agreement = np.empty(len(pairs))
    areas = []
    for number, trained_on in enumerate((half, ~half)):
        weights, _ = fit(Diet(pairs.select(trained_on)), None, task, segment.network, training, config.machine,
                         (config.seed, "filter", "judge", number), context.work_dir / f"judge{number}.safetensors", context)
        judge = build_segmenter(len(task.classes), rooted(segment.network, context.root), 0)
        judge.load_state_dict(weights)
        judged = pairs.select(~trained_on)
        agreement[~trained_on] = mean_dice(predict(judge.to(device), judged.images, task, device), judged.labels, task)
        areas.append(regions(predict(judge, references.images, task, device), task).mean((2, 3)))
    return agreement, np.mean(areas, axis=0)
