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
Arms that read the same are one stage: a change of stage 2 trains no baseline anew, one of the filter not the arm ``aligned``.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from alignflow_core.colour_transfer import fourier, reinhard
from alignflow_core.config import COLOUR, Segment
from alignflow_core.pairs import Pairs, read_pairs
from alignflow_core.seeding import derive_seed
from alignflow_core.segmenter_fit import Diet, fit_arms

AT_ONCE = 64  # images recoloured together, in double precision
Diets = Mapping[str, Callable[[], Diet]]


def run_source(config: Any, inputs: dict[str, Path], out_dir: Path, context: Any) -> dict[str, float]:
    """Train the arms of real source pairs alone."""
    source = read_pairs(inputs["data:source"], "train")
    colour = config.segment.colour_strength
    return _fit(config, {"source": lambda: Diet(source), "source+colour": lambda: Diet(source, colour=colour)}, inputs, out_dir, context)


def run_stage1(config: Any, inputs: dict[str, Path], out_dir: Path, context: Any) -> dict[str, float]:
    """Train the arms of stage 1's pairs."""
    settings: Segment = config.segment
    source, painted = read_pairs(inputs["data:source"], "train"), read_pairs(inputs["sample_stage1"])
    diets = {"stage1": lambda: Diet(source, painted, settings.synthetic_share),
             "stage1+colour": lambda: Diet(source, painted, settings.synthetic_share, settings.colour_strength)}
    return _fit(config, diets, inputs, out_dir, context)


def run_comparator(config: Any, inputs: dict[str, Path], out_dir: Path, context: Any) -> dict[str, float]:
    """Train the arms of a comparator, on the terms of ``stage1``; that with augmentation where any such arm is asked for."""
    settings: Segment = config.segment
    source, painted = read_pairs(inputs["data:source"], "train"), read_pairs(inputs["sample_comparator"])
    name = str(context.key)
    diets = {name: Diet(source, painted, settings.synthetic_share)}
    if any(arm.endswith(COLOUR) for arm in settings.arms):
        diets[name + COLOUR] = Diet(source, painted, settings.synthetic_share, settings.colour_strength)
    return fit_arms(config, diets, {}, read_pairs(inputs["data:source"], "val"), out_dir, context)


def run_baselines(config: Any, inputs: dict[str, Path], out_dir: Path, context: Any) -> dict[str, float]:
    """Train the arms that use the target and no painter: source pairs recoloured, the references' labels, the oracle."""
    settings: Segment = config.segment
    source, references = read_pairs(inputs["data:source"], "train"), read_pairs(inputs["references"])
    share = _share(config)

    def recoloured(method: str) -> Pairs:
        draw = np.random.Generator(np.random.PCG64(derive_seed(config.seed, "segment", method, context.key)))
        partner = references.images[draw.integers(len(references), size=len(source))]
        parts = [reinhard(own, other) if method == "reinhard" else fourier(own, other, settings.fourier_beta)
                 for own, other in ((source.images[i:i + AT_ONCE], partner[i:i + AT_ONCE]) for i in range(0, len(source), AT_ONCE))]
        return Pairs(np.concatenate(parts), source.masks, source.ids, source.table)

    diets = {"reinhard": lambda: Diet(source, recoloured("reinhard"), share), "fourier": lambda: Diet(source, recoloured("fourier"), share),
             "references-labelled": lambda: Diet(source, references, share), "oracle": lambda: Diet(read_pairs(inputs["data:target"], "train"))}
    # Without labels of its own a reference set has no labelled arm, without images (moments alone) no recoloured ones; the tables lack these.
    absent = {"references-labelled"} if references.masks is None else set()
    absent |= {"reinhard", "fourier", "references-labelled"} if not len(references) else set()
    own = read_pairs(inputs["data:target"], "train")
    absent |= {"oracle"} if own.masks is None or not len(own) else set()  # no labels, or data.target_split keeps all for testing
    return _fit(config, diets, inputs, out_dir, context, absent, {"oracle": read_pairs(inputs["data:target"], "val")})


def run_aligned(config: Any, inputs: dict[str, Path], out_dir: Path, context: Any) -> dict[str, float]:
    """Train the arm of all aligned pairs."""
    source, aligned = read_pairs(inputs["data:source"], "train"), read_pairs(inputs["sample_aligned"])
    return _fit(config, {"aligned": lambda: Diet(source, aligned, _share(config))}, inputs, out_dir, context)


def run_filtered(config: Any, inputs: dict[str, Path], out_dir: Path, context: Any) -> dict[str, float]:
    """Train the arms of the aligned pairs that the filter kept."""
    source, share = read_pairs(inputs["data:source"], "train"), _share(config)
    verdict = pd.read_parquet(inputs["filter"] / "manifest.parquet")
    kept = verdict["kept"].to_numpy()
    aligned = read_pairs(inputs["sample_aligned"]).select(kept)
    weights = None if verdict.loc[kept, "weight"].nunique() == 1 else verdict.loc[kept, "weight"].to_numpy()
    diets = {"aligned+filtered": lambda: Diet(source, aligned, share, weights=weights),
             "aligned+filtered+colour": lambda: Diet(source, aligned, share, config.segment.colour_strength, weights)}
    return _fit(config, diets, inputs, out_dir, context)


def _share(config: Any) -> float:
    """Of each batch, the target's own or everyone's."""
    share: float = config.segment.synthetic_share if config.synthetic_share is None else config.synthetic_share
    return share


def _fit(config: Any, diets: Diets, inputs: dict[str, Path], out_dir: Path, context: Any,
         absent: Collection[str] = (), own_validation: Mapping[str, Pairs] | None = None) -> dict[str, float]:
    """Train those of a stage's arms that the run asks for, or its target, and that can be trained."""
    own = getattr(config, "arms", None)  # of a target
    wanted = config.segment.arms if own is None else own
    chosen = [arm for arm in diets if arm in wanted and arm not in absent]
    return fit_arms(config, {arm: diets[arm]() for arm in chosen}, own_validation or {}, read_pairs(inputs["data:source"], "val"), out_dir, context)
