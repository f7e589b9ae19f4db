"""Which references are aligned to and which are held out: one rule for the stage and for the kit that a hospital runs."""

from collections import Counter
from collections.abc import Sequence

from alignflow_core.seeding import derive_seed

ROLES = ("align", "held_out")


def in_drawn_order(stems: Sequence[str], seed: int) -> list[int]:
    """Rows of the images in an order drawn by the seed and their file stems alone."""
    return sorted(range(len(stems)), key=lambda i: derive_seed(seed, "references", stems[i]))


def roles(groups: Sequence[str], held_out_fraction: float) -> list[str]:
    """The role of each reference in that order, by its patient or sequence: who is held out is not aligned to (our choice).

    From the end, each group is held out that brings the number nearer to ``held_out_fraction``; where all are too large for that the
    smallest is, and one is always left to align to. None is held out of a single group or of fewer than three references.
    """
    n, sizes = len(groups), Counter(groups)  # in the order of their first references
    if n < 3 or len(sizes) < 2 or held_out_fraction == 0:
        return ["align"] * n
    wanted, taken = max(1, round(held_out_fraction * n)), 0
    held_out = set[str]()
    for group in reversed(sizes):
        more = taken + sizes[group]
        if more < n and abs(more - wanted) < abs(taken - wanted):
            taken = more
            held_out.add(group)
    held_out = held_out or {min(reversed(sizes), key=lambda group: sizes[group])}
    return ["held_out" if group in held_out else "align" for group in groups]
