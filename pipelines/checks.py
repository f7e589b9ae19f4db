"""Asset checks: what must hold for an artifact to be trusted, read from its files after every build."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import dagster as dg

from alignflow_core.artifact import read_json
from alignflow_core.config import load_project
from alignflow_core.stages import artifact_dir

LEAST_KEPT = 0.2


@dataclass(frozen=True)
class Check:
    """A named question to the artifact of ``(root, key)``; a failed ``blocking`` one stops what is downstream."""

    name: str
    description: str
    function: Callable[[Path, str | None], dg.AssetCheckResult]
    blocking: bool = False


def finite_losses(stage: str) -> Check:
    """Check of a trained network's curves."""
    def function(root: Path, key: str | None) -> dg.AssetCheckResult:
        import numpy as np
        import pandas as pd

        curves = pd.read_parquet(root / artifact_dir(stage, key) / "curves.parquet")
        wrong = curves[~np.isfinite(curves["value"])]
        return dg.AssetCheckResult(passed=len(curves) > 0 and wrong.empty, metadata={
            "points": len(curves), "not_finite": len(wrong), "first_step": int(wrong["step"].min()) if len(wrong) else None})

    return Check("finite_losses", "Every logged point of training is a finite number, and there are some.", function)


def references_disjoint(root: Path, key: str | None) -> dg.AssetCheckResult:
    """No reference shares a patient or a file's content with the target's test set."""
    import pandas as pd

    domain = load_project(root / "params.yaml").targets[str(key)].domain
    references = pd.read_parquet(root / artifact_dir("references", key) / "manifest.parquet")
    splits = pd.read_parquet(root / artifact_dir("data", domain) / "manifest.parquet")
    test = splits[splits["split"] == "test"]
    groups = references["group"].isin(test["group"])
    hashes = references["image_sha256"].isin(test["image_sha256"])
    return dg.AssetCheckResult(passed=not hashes.any() and not groups.any(), metadata={
        "references": len(references), "test_images": len(test), "same_content": int(hashes.sum()), "same_group": int(groups.sum())})


def kept_fraction(root: Path, key: str | None) -> dg.AssetCheckResult:
    """Filtering leaves enough to train on."""
    kept = read_json(root / artifact_dir("filter", key) / "metrics.json")["kept_fraction"]
    return dg.AssetCheckResult(passed=kept >= LEAST_KEPT, severity=dg.AssetCheckSeverity.WARN, metadata={"kept": kept, "least": LEAST_KEPT})


def no_copies(root: Path, key: str | None) -> dg.AssetCheckResult:
    """Not more kept pairs look copied than as many unseen real images would by chance."""
    import pandas as pd

    folder = root / artifact_dir("evaluate", key)
    numbers, table = read_json(folder / "metrics.json"), pd.read_parquet(folder / "copying.parquet")
    flagged = table[table["kept"]].groupby("bank")["flagged"].sum()
    limits = {str(bank): numbers.get(f"copy_chance_limit_{bank}", math.nan) for bank in flagged.index}  # absent where too few real images calibrate
    above = [bank for bank, limit in limits.items() if flagged[bank] > limit]
    metadata = {f"flagged_{bank}": int(count) for bank, count in flagged.items()}
    metadata |= {f"limit_{bank}": limit for bank, limit in limits.items() if math.isfinite(limit)}
    return dg.AssetCheckResult(passed=not above, severity=dg.AssetCheckSeverity.WARN, metadata=metadata)


def scores_in_range(root: Path, key: str | None) -> dg.AssetCheckResult:
    """Every mean Dice is a number between 0 and 1."""
    dice = {name: value for name, value in read_json(root / artifact_dir("evaluate", key) / "metrics.json").items() if name.startswith("dice_")}
    passed = bool(dice) and all(math.isfinite(value) and 0 <= value <= 1 for value in dice.values())
    return dg.AssetCheckResult(passed=passed, metadata=dict(dice))


CHECKS: dict[str, tuple[Check, ...]] = {
    "references": (Check("references_disjoint", str(references_disjoint.__doc__), references_disjoint, blocking=True),),
    "mask_flow": (finite_losses("mask_flow"),),
    "image_flow": (finite_losses("image_flow"),),
    "align": (finite_losses("align"),),
    "filter": (Check("kept_fraction", str(kept_fraction.__doc__), kept_fraction),),
    "evaluate": (Check("scores_in_range", str(scores_in_range.__doc__), scores_in_range), Check("no_copies", str(no_copies.__doc__), no_copies)),
}
