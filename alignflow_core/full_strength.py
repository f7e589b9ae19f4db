"""Which aligned pairs show the aligned painter itself: those painted at strength 1 (``sample.strengths``) from noise (``sample.starts``)."""

import numpy as np
import pandas as pd


def at_full_strength(manifest: pd.DataFrame) -> np.ndarray:
    """Rows painted at strength 1 from noise, bool [N].

    Where no row is at strength 1, or none from noise, that is not asked for: what is said is then of the whole mixture, as the report says too.
    """
    rows = np.ones(len(manifest), bool)
    for column, value in (("start", 0.0), ("strength", 1.0)):
        wanted = rows & np.array(manifest[column] == value, bool) if column in manifest else rows
        rows = wanted if wanted.any() else rows
    return rows
