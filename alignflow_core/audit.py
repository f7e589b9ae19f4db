"""The copy audit: synthetic images of one target against everything of patients that their generator has seen.

The generator has seen two banks, the source's training images and the target's references. Each has real images of its own kind
that it never saw, and these say how near is too near (``metrics/copying.py``).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from alignflow_core.metrics.copying import LEAST_HELD_OUT, CopyCheck, copy_check
from alignflow_core.pairs import Pairs


@dataclass(frozen=True)
class Bank:
    """Images that the generator has seen, and images of the same kind that it has not."""

    seen: Pairs
    held_out: Pairs


def banks(source: Pairs, references: Pairs, test: Pairs) -> dict[str, Bank]:
    """References, where there are images of them, against the target's test images, the source's training images against its other splits."""
    train = (source.table["split"] == "train").to_numpy()
    shown = {"references": Bank(references, test)} if len(references) else {}
    return shown | {"source": Bank(source.select(train), source.select(~train))}


def check(images: np.ndarray, known: Mapping[str, Bank], quantile: float) -> dict[str, CopyCheck]:
    """Images uint8 [N, H, W, 3] against every bank; ``quantile`` as in :func:`copy_check`."""
    return {name: copy_check(images, bank.seen.images, bank.held_out.images, bank.held_out.table["group"].astype(str).to_numpy(), quantile)
            for name, bank in known.items()}


def table(ids: tuple[str, ...], checks: Mapping[str, CopyCheck], known: Mapping[str, Bank]) -> pd.DataFrame:
    """One row a pair and bank: pair_id, bank, nearest (a case id), distance, ratio, threshold, flagged."""
    return pd.concat([pd.DataFrame({
        "pair_id": list(ids), "bank": name, "nearest": np.array(known[name].seen.ids, dtype=object)[found.nearest],
        "distance": found.distance, "ratio": found.ratio, "threshold": found.threshold, "flagged": found.flagged,
    }) for name, found in checks.items()], ignore_index=True)


def uncalibrated(checks: Mapping[str, CopyCheck]) -> list[str]:
    """Why a bank's threshold means nothing, a line each; empty where the audit may be called one."""
    return [f"{name}: {found.n_calibration or 'too few'} real images held out to read a threshold off, {LEAST_HELD_OUT} needed"
            for name, found in checks.items() if not found.calibrated]
