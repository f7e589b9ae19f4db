"""Which references are aligned to and which are held out: one rule for the stage and for the kit that a hospital runs."""

from collections.abc import Sequence

from alignflow_core.seeding import derive_seed

ROLES = ("align", "held_out")


def in_drawn_order(stems: Sequence[str], seed: int) -> list[int]:
    """Rows of the images in an order drawn by the seed and their file stems alone."""
    return sorted(range(len(stems)), key=lambda i: derive_seed(seed, "references", stems[i]))


def roles(n: int, held_out_fraction: float) -> list[str]:
    """The role of each of n references in that order: the last ``held_out_fraction`` are held out, none of fewer than three."""
    n_held_out = max(1, round(held_out_fraction * n)) if n >= 3 and held_out_fraction > 0 else 0
    return ["align"] * (n - n_held_out) + ["held_out"] * n_held_out
