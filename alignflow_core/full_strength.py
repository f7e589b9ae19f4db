"""Which aligned pairs show the aligned painter itself: those painted at strength 1 (``sample.strengths``)."""

import numpy as np
import pandas as pd


def at_full_strength(manifest: pd.DataFrame) -> np.ndarray:
    """Rows painted at strength 1, bool [N]; all rows where none was: what is said of them is then of the whole mixture, as the report says too."""
    rows = np.array(manifest["strength"] == 1, bool) if "strength" in manifest else np.ones(len(manifest), bool)
    return rows if rows.any() else ~rows
