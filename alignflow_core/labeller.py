"""The segmenter that labels references for region-aware alignment: it has seen the source alone, under strong colour augmentation.

Our choice: what hardly looks at colours finds the regions of another camera's images best. Stage 2 uses its confident pixels
only, and retrains it on aligned pairs between rounds.
"""

from pathlib import Path
from typing import Any

from alignflow_core.config import Labeller
from alignflow_core.networks.segmenters import save_segmenter
from alignflow_core.pairs import read_pairs
from alignflow_core.segmenter_fit import Diet, fit


def run(config: Any, inputs: dict[str, Path], out_dir: Path, context: Any) -> dict[str, float]:
    """Train the segmenter on the source's training split, choose its weights on the validation split, write it."""
    settings: Labeller = config.labeller
    source = read_pairs(inputs["data:source"], "train")
    weights, dice = fit(Diet(source, colour=settings.colour_strength), read_pairs(inputs["data:source"], "val"), config.task, settings.network,
                        settings.training, config.machine, (config.seed, "labeller", "source"), context.work_dir / "state.safetensors", context,
                        check_every=settings.check_every)
    save_segmenter(out_dir, weights, len(config.task.classes), settings.network, config.task, context.root, val_dice=dice)
    return {"val_dice": dice}
