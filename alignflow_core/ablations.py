"""A target and its variants, axis by axis: what each changes, and what came of it."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from alignflow_core.artifact import read_json
from alignflow_core.metrics.comparison import beside_variants

NOT_VARIED = ("references.dir", "references.file", "arms", "variant_of")  # where things lie, and what a variant is by definition
BROUGHT = {"align.reward": ("align.prior_count", "align.temperature"), "align.encoder": ("align.encoder_weights",)}  # what a choice has with it
NAMES = ("references.seed",)  # numbers without an order
FEWEST_POINTS = 3  # of a curve
OWN_ARMS = ("aligned+filtered", "aligned+filtered+colour", "aligned")  # the first that was asked for stands for the method


@dataclass(frozen=True)
class Axis:
    """One thing that was varied.

    Attributes:
        name: the key, or the keys of a grid.
        rows: of the target as set up, then of its variants, as :func:`beside_variants` has them, with ``changed`` in words.
        values: the key's value in each row where these are numbers in an order, else ``None``.
    """

    name: str
    rows: list[dict[str, Any]]
    values: list[float] | None


def by_axis(targets: Mapping[str, Any], base: str, table: pd.DataFrame, arms: Sequence[str] = OWN_ARMS) -> tuple[str | None, list[Axis]]:
    """The variants of a target, grouped by what they vary; no axis without variants that were compared.

    Args:
        targets: settings of all targets (``config.Target``).
        base: the target.
        table: what ``compare`` found of one metric and one segmenter.
        arms: the first of them that a target has stands for it.

    Returns:
        The arm that all are compared with, and the axes in order of appearance.
    """
    variants = [name for name, target in targets.items() if target.variant_of == base]
    against, rows = beside_variants(table, [base, *variants], arms)
    if not rows or rows[0]["name"] != base:
        return against, []
    changed = {row["name"]: changes(targets[base], targets[row["name"]]) for row in rows}
    axes: dict[str, list[dict[str, Any]]] = {}
    for row in rows[1:]:
        axes.setdefault(_axis(changed[row["name"]]), [rows[0]]).append(row)
    found = []
    for name, own in axes.items():
        spoken = [row | {"changed": in_words(changed[row["name"]])} for row in own]
        found.append(Axis(name, *_in_order(spoken, name, [changed[row["name"]] for row in own])))
    return against, found


def counted(target: Any, references: Path) -> Any:
    """A target whose references were given, not drawn, with the number in their artifact: the setting ``count`` says nothing of them."""
    if not _given(target):
        return target
    n_references = read_json(references / "metrics.json").get("n_references", target.references.count)
    return dataclasses.replace(target, references=dataclasses.replace(target.references, count=int(n_references)))


def _given(target: Any) -> bool:
    return target.references.dir is not None or target.references.file is not None


def changes(base: Any, variant: Any) -> dict[str, tuple[Any, Any]]:
    """Key -> its value in the base and in the variant, where they differ."""
    one, other = dict(_flat(dataclasses.asdict(base))), dict(_flat(dataclasses.asdict(variant)))
    found = {key: (one.get(key), value) for key, value in other.items() if one.get(key) != value and key not in NOT_VARIED}
    if _given(base) and not _given(variant) and "references.count" not in found:  # as many, and other images
        return {"references": ("as given", "drawn")} | found
    return found


def in_words(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """``align.rho 0.3 → 1``."""
    return ", ".join(f"{key} {before} → {after}" for key, (before, after) in changed.items()) or "as set up"


def _axis(changed: Mapping[str, Any]) -> str:
    """The key that was varied: of a choice not what comes with it."""
    aside = {key for choice in BROUGHT if choice in changed for key in BROUGHT[choice]}
    return ", ".join(key for key in changed if key not in aside) or "nothing"


def _in_order(rows: list[dict[str, Any]], name: str, changed: list[Mapping[str, tuple[Any, Any]]]) -> tuple[list[dict[str, Any]], list[float] | None]:
    """The rows and the key's values, by value where that is a number; as they are, and ``None``, where it is not."""
    if name in NAMES or len(rows) < FEWEST_POINTS or any(name not in each for each in changed[1:]):
        return rows, None
    values = [changed[1][name][0], *(each[name][1] for each in changed[1:])]
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        return rows, None
    order = sorted(range(len(rows)), key=lambda i: values[i])
    return [rows[i] for i in order], [float(values[i]) for i in order]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, each in value.items():
        yield from _flat(each, f"{prefix}{key}.") if isinstance(each, dict) else [(f"{prefix}{key}", each)]
