"""Does what was painted give patients away? Copies of images that the painter was given, and whether one can tell which these were.

Reads no segmenter and nothing reads it but the report, so that it is measured beside the training of segmenters. Writes ``copying.parquet``
(every aligned image against the references and the source's training images) and ``membership.parquet`` (score of every image attacked).
"""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from alignflow_core import audit
from alignflow_core.devices import prepare
from alignflow_core.membership import membership
from alignflow_core.membership import numbers as membership_numbers
from alignflow_core.pairs import Pairs, read_pairs
from alignflow_core.runner import Context


def run(config: SimpleNamespace, inputs: Mapping[str, Path], out_dir: Path, context: Context) -> dict[str, float]:
    """Audit one target.

    Returns:
        For each bank (``references``, where there are images of them, and ``source``) ``copy_flagged_<bank>``, ``copy_flagged_kept_<bank>``,
        what the threshold is worth (``copy_calibration_<bank>``, ``copy_false_flag_rate_<bank>``, ``copy_chance_limit_<bank>``), over both
        ``copy_flagged_fraction``; and ``membership_<word>_<set>`` (:func:`alignflow_core.membership.numbers`). NaN are left out.
    """
    source, test, references = read_pairs(inputs["data:source"]), read_pairs(inputs["data:target"], "test"), read_pairs(inputs["references"])
    kept = pd.read_parquet(inputs["filter"] / "manifest.parquet")["kept"].to_numpy(bool)
    copies, found = _copies(read_pairs(inputs["sample_aligned"]), kept, audit.banks(source, references, test), config.evaluate.copy_quantile)
    copies.to_parquet(out_dir / "copying.parquet", index=False)
    context.progress(1, 2, "copies")
    seen, attacks = membership(inputs, source, references, test, config.task, config.seed, prepare(config.machine))
    seen.to_parquet(out_dir / "membership.parquet", index=False)
    context.progress(2, 2, "membership")
    return {name: value for name, value in (found | membership_numbers(attacks)).items() if np.isfinite(value)}


def _copies(aligned: Pairs, kept: np.ndarray, known: Mapping[str, audit.Bank], quantile: float) -> tuple[pd.DataFrame, dict[str, float]]:
    """Copy audit of all aligned images, those that were not kept too; not against references that are moments alone."""
    checks = audit.check(aligned.images, known, quantile)
    table = audit.table(aligned.ids, checks, known)
    table.insert(1, "kept", np.tile(kept, len(checks)))
    numbers: dict[str, float] = {}
    for name, found in checks.items():
        numbers |= {f"copy_flagged_{name}": float(found.flagged.mean()), f"copy_flagged_kept_{name}": _share(found.flagged[kept]),
                    f"copy_calibration_{name}": float(found.n_calibration), f"copy_false_flag_rate_{name}": found.false_flag_rate,
                    f"copy_chance_limit_{name}": found.chance(int(kept.sum()))}
    either = np.any([found.flagged for found in checks.values()], axis=0)
    return table, numbers | {"copy_flagged_fraction": _share(either[kept])}


def _share(flags: np.ndarray) -> float:
    """Share of true values; 0 of none."""
    return float(flags.mean()) if len(flags) else 0.0
