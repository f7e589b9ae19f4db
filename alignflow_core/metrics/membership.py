"""How well a score tells members of a set from others: the area under its ROC curve and what it finds without false alarms."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm, rankdata


@dataclass(frozen=True)
class Attack:
    """What an attack by one score reaches.

    Attributes:
        auc: probability that a member scores above a non-member; .5 is guessing.
        low, high: its 95 % interval.
        found: share of members that score above all but 1 % of the non-members (above all of them where there are fewer than 100).
        n_members, n_others: images compared.
    """

    auc: float
    low: float
    high: float
    found: float
    n_members: int
    n_others: int


def attack(members: np.ndarray, others: np.ndarray, level: float = 0.95, false_alarms: float = 0.01) -> Attack:
    """Scores of members [M] and of non-members [N], higher speaks for membership; both hold at least one."""
    m, n = len(members), len(others)
    ranks = rankdata(np.concatenate([members, others]))
    auc = float((ranks[:m].sum() - m * (m + 1) / 2) / (m * n))
    allowed = int(false_alarms * n)
    bar = np.sort(others)[n - 1 - allowed]
    low, high = auc_interval(auc, m, n, level)
    return Attack(auc, low, high, float((members > bar).mean()), m, n)


def auc_interval(auc: float, m: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Score interval of an area under the ROC curve (Newcombe 2006, method 5): holds for few images and at 0 and 1 too."""
    z, more = float(norm.ppf((1 + level) / 2)), (m + n) / 2 - 1

    def excess(true: float) -> float:
        variance = true * (1 - true) * (1 + more * (1 - true) / (2 - true) + more * true / (1 + true)) / (m * n)
        return (auc - true) ** 2 - z * z * variance

    inside = min(max(auc, 1e-9), 1 - 1e-9)  # at the ends the variance is 0 and the end itself a solution
    low = brentq(excess, 0.0, inside) if auc > 1e-9 else 0.0
    high = brentq(excess, inside, 1.0) if auc < 1 - 1e-9 else 1.0
    return float(low), float(high)
