"""Variants of a target, axis by axis."""

import dataclasses
from pathlib import Path

import pandas as pd
import pytest

from alignflow_core import figures
from alignflow_core.ablations import by_axis, changes, counted, in_words
from alignflow_core.artifact import write_json
from alignflow_core.config import Align, References, Target

BASE = Target("dim", References(count=10), Align(rho=0.3))
ARM = "aligned"


def varied(**changed: object) -> Target:
    return dataclasses.replace(BASE, variant_of="dim", arms=(ARM,), **changed)  # type: ignore[arg-type]


TARGETS = {
    "dim": BASE,
    "dim-20": varied(references=References(count=20)),
    "dim-skl": varied(align=Align(reward="skl", temperature=2.0)),
    "dim-1": varied(references=References(count=1)),
    "dim-seed1": varied(references=References(seed=1)),
    "dim-seed2": varied(references=References(seed=2)),
    "dim-skl-1": varied(references=References(count=1), align=Align(reward="skl")),
    "dim-gone": varied(references=References(count=5)),
    "other": Target("other"),
}


def compared(*names: str) -> pd.DataFrame:
    return pd.DataFrame([{"target": name, "arm": ARM, "baseline": "stage1", "mean": 0.5, "difference": n / 100, "diff_ci_low": n / 100 - 0.01,
                          "diff_ci_high": n / 100 + 0.01} for n, name in enumerate(names)])


def test_variants_are_grouped_by_what_they_vary_and_numbers_are_in_order() -> None:
    against, axes = by_axis(TARGETS, "dim", compared(*(name for name in TARGETS if name != "dim-gone")), (ARM,))
    assert against == "stage1"
    assert {axis.name: [row["name"] for row in axis.rows] for axis in axes} == {
        "references.count": ["dim-1", "dim", "dim-20"], "align.reward": ["dim", "dim-skl"],
        "references.seed": ["dim", "dim-seed1", "dim-seed2"], "references.count, align.reward": ["dim", "dim-skl-1"]}
    assert [axis.values for axis in axes] == [[1, 10, 20], None, None, None], "a seed is no quantity"
    assert [row["changed"] for row in axes[0].rows] == ["references.count 10 → 1", "as set up", "references.count 10 → 20"]
    assert axes[1].rows[1]["changed"] == "align.reward frechet → skl, align.temperature 1.0 → 2.0"


@pytest.mark.parametrize("names", [(), ("dim",), ("dim-1", "dim-20"), ("other",)])
def test_without_the_target_or_its_variants_there_is_no_axis(names: tuple[str, ...]) -> None:
    assert by_axis(TARGETS, "dim", compared(*names) if names else compared("other")[:0], (ARM,))[1] == []


def test_what_is_no_setting_of_the_method_is_no_change() -> None:
    assert changes(BASE, varied()) == {} and in_words({}) == "as set up"


def test_given_references_are_as_many_as_there_are(tmp_path: Path) -> None:
    write_json(tmp_path / "metrics.json", {"n_references": 7.0})
    given = dataclasses.replace(BASE, references=References(count=10, dir="refs"))
    targets = TARGETS | {"dim": counted(given, tmp_path), "dim-7": varied(references=References(count=7))}
    _, axes = by_axis(targets, "dim", compared("dim", "dim-1", "dim-7", "dim-20"), (ARM,))
    assert [(axis.name, axis.values) for axis in axes] == [("references.count", [1, 7, 20]), ("references", None)]
    assert axes[1].rows[1]["changed"] == "references as given → drawn" and counted(BASE, tmp_path) == BASE


def test_an_axis_of_numbers_is_a_curve_and_another_a_row_for_each() -> None:
    _, axes = by_axis(TARGETS, "dim", compared(*(name for name in TARGETS if name != "dim-gone")), (ARM,))
    curve, rows = (figures.ablation(axis, "dim", "stage1") for axis in axes[:2])
    assert curve.startswith("data:image/svg") and rows.startswith("data:image/svg") and curve != rows
