"""Downstream: one segmenter per architecture, arm and seed, every one with the same number of optimiser steps.

| arm | training images |
|---|---|
| source | real source pairs |
| source+colour | the same, strong colour augmentation |
| stage1, aligned, aligned+filtered | real source pairs and synthetic pairs, ``synthetic_share`` of each batch |
| stage1+colour, aligned+filtered+colour | the same, strong colour augmentation of all |
| reinhard, fourier | real source pairs and the same recoloured after the references |
| a comparator's name, its name with ``+colour`` | real source pairs and the pairs it painted, without and with strong colour augmentation |
| references-labelled | real source pairs and the references with their labels |
| oracle | the target's own labelled training split |

Models are chosen on **source** validation, the oracle on the target's: nobody else may look at target labels.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from alignflow_core.colour_transfer import fourier, reinhard
from alignflow_core.config import COLOUR, SHARED_ARMS, TARGET_ARMS, Segment
from alignflow_core.pairs import Pairs, read_pairs
from alignflow_core.seeding import derive_seed
from alignflow_core.segmenter_fit import Diet, fit_arms


def run_source(config: Any, inputs: dict[str, Path], out_dir: Path, context: Any) -> dict[str, float]:
    """Train the arms that see no target."""
    settings: Segment = config.segment
    source = read_pairs(inputs["data:source"], "train")
    diets = {"source": lambda: Diet(source), "source+colour": lambda: Diet(source, colour=settings.colour_strength),
             "stage1": lambda: Diet(source, read_pairs(inputs["sample_stage1"]), settings.synthetic_share),
             "stage1+colour": lambda: Diet(source, read_pairs(inputs["sample_stage1"]), settings.synthetic_share, settings.colour_strength)}
    chosen = [arm for arm in SHARED_ARMS if arm in settings.arms]
    return fit_arms(config, {arm: diets[arm]() for arm in chosen}, {}, read_pairs(inputs["data:source"], "val"), out_dir, context)


def run_comparator(config: Any, inputs: dict[str, Path], out_dir: Path, context: Any) -> dict[str, float]:
    """Train the arms of a comparator, on the terms of ``stage1``; that with augmentation where any such arm is asked for."""
    settings: Segment = config.segment
    source, painted = read_pairs(inputs["data:source"], "train"), read_pairs(inputs["sample_comparator"])
    name = str(context.key)
    diets = {name: Diet(source, painted, settings.synthetic_share)}
    if any(arm.endswith(COLOUR) for arm in settings.arms):
        diets[name + COLOUR] = Diet(source, painted, settings.synthetic_share, settings.colour_strength)
    return fit_arms(config, diets, {}, read_pairs(inputs["data:source"], "val"), out_dir, context)


def run_target(config: Any, inputs: dict[str, Path], out_dir: Path, context: Any) -> dict[str, float]:
    """Train the arms that use the target's references, and the oracle."""
    settings: Segment = config.segment
    source = read_pairs(inputs["data:source"], "train")
    references = read_pairs(inputs["references"])
    aligned = read_pairs(inputs["sample_aligned"])
    verdict = pd.read_parquet(inputs["filter"] / "manifest.parquet")
    kept = verdict["kept"].to_numpy()
    weights = None if verdict.loc[kept, "weight"].nunique() == 1 else verdict.loc[kept, "weight"].to_numpy()
    share = settings.synthetic_share if config.synthetic_share is None else config.synthetic_share
    wanted = settings.arms if config.arms is None else config.arms

    def recoloured(method: str) -> Pairs:
        draw = np.random.Generator(np.random.PCG64(derive_seed(config.seed, "segment", method, context.key)))
        partner = references.images[draw.integers(len(references), size=len(source))]
        images = reinhard(source.images, partner) if method == "reinhard" else fourier(source.images, partner, settings.fourier_beta)
        return Pairs(images, source.masks, source.ids, source.table)

    diets = {"reinhard": lambda: Diet(source, recoloured("reinhard"), share), "fourier": lambda: Diet(source, recoloured("fourier"), share),
             "aligned": lambda: Diet(source, aligned, share), "aligned+filtered": lambda: Diet(source, aligned.select(kept), share, weights=weights),
             "aligned+filtered+colour": lambda: Diet(source, aligned.select(kept), share, settings.colour_strength, weights),
             "references-labelled": lambda: Diet(source, references, share), "oracle": lambda: Diet(read_pairs(inputs["data:target"], "train"))}
    # Without labels of its own a reference set has no labelled arm, without images (moments alone) no recoloured ones; the tables lack these.
    absent = {"references-labelled"} if references.masks is None else set()
    absent |= {"reinhard", "fourier", "references-labelled"} if not len(references) else set()
    chosen = [arm for arm in TARGET_ARMS if arm in wanted and arm not in absent]
    return fit_arms(config, {arm: diets[arm]() for arm in chosen}, {"oracle": read_pairs(inputs["data:target"], "val")},
                    read_pairs(inputs["data:source"], "val"), out_dir, context)
