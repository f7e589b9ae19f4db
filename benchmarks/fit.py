"""How a cost grows: the power of its size, whatever it costs before the first image."""

from collections.abc import Sequence

import numpy as np


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The p of ``cost = a + b size^p``, by least squares on the logarithms of the increments; 0 where the cost does not grow.

    At sizes of a constant ratio r the increments are ``b size^p (r^p - 1)``: the constant part a falls away exactly, and their slope is p.

    Raises:
        ValueError: fewer than three sizes, or ratios that differ.
    """
    ratios = np.diff(np.log(sizes))
    if len(ratios) < 2 or np.ptp(ratios) > 1e-6:
        raise ValueError(f"exponent wants three or more sizes of one ratio, not {sizes}")
    increments = np.diff(costs)
    grown = increments > 0
    if grown.sum() < 2:
        return 0.0
    return float(np.polyfit(np.log(sizes[:-1])[grown], np.log(increments[grown]), 1)[0])
