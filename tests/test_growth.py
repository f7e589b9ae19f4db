"""What the growth and schedule benchmarks compute with, and that a long manifest is read in bounded memory."""

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from alignflow_core import evaluate
from alignflow_core.config import build_project
from alignflow_core.folders import Case, _merge_copies
from alignflow_core.pairs import read_pairs
from alignflow_core.runner import stage_params
from alignflow_core.stages import STAGES
from benchmarks.fit import exponent
from benchmarks.schedule import AXES, Work, alone, makespan, project, read_costs, together

SIZES = (100, 1000, 10_000, 100_000)


@pytest.mark.parametrize(("power", "constant"), [(1.0, 0.0), (1.0, 1e6), (2.0, 5.0), (0.5, 3.0)])
def test_exponent_of_known_curves(power: float, constant: float) -> None:
    assert exponent(SIZES, [constant + 3 * n**power for n in SIZES]) == pytest.approx(power, abs=1e-6)


def test_exponent_of_what_does_not_grow_and_of_bad_sizes() -> None:
    assert exponent(SIZES, [2.0, 2.0, 2.0, 2.0]) == 0
    with pytest.raises(ValueError, match="one ratio"):
        exponent((1, 2, 3), [1, 2, 3])
    with pytest.raises(ValueError, match="three or more"):
        exponent((1, 2), [1, 2])


# a -> b (long) and a -> c, d; all but e on a GPU, e after everything
DIAMOND = Work({"a": 1, "b": 10, "c": 4, "d": 5, "e": 2}, {"a": set(), "b": {"a"}, "c": {"a"}, "d": {"a"}, "e": {"b", "c", "d"}}, {"e"})


def test_makespan_of_a_known_graph() -> None:
    assert max(DIAMOND.critical().values()) == 13
    assert DIAMOND.busy == 20
    assert [makespan(DIAMOND, gpus) for gpus in (1, 2, 3)] == [22, 13, 13]  # on two: b beside d and c


def test_makespan_respects_both_bounds() -> None:
    draw = np.random.Generator(np.random.PCG64(0))
    seconds = {i: float(draw.integers(1, 20)) for i in range(60)}
    work = Work(seconds, {i: {int(j) for j in draw.integers(0, i, 2)} if i > 3 else set() for i in seconds})
    for gpus in (1, 2, 5, 60):
        bound = max(work.busy / gpus, max(work.critical().values()))
        assert bound <= makespan(work, gpus) + 1e-9 <= work.busy / gpus + max(work.critical().values()) + 1e-6  # Graham 1969
    assert makespan(work, 1) == pytest.approx(work.busy)


def test_shared_stages_are_built_once_and_variants_train_fewer_arms() -> None:
    found = project(2)
    assert len(found.targets) == 2 * 20 and len([axis for text in AXES for axis in text.split(",")]) == 19
    work = together(found, read_costs())
    assert set(work.seconds) == set(work.needs)
    for stage, share in (("segment_baselines", 0), ("segment_aligned", 1), ("segment_filtered", 1 / 2)):
        assert work.seconds[f"{stage}@h1-mmd"] == pytest.approx(work.seconds[f"{stage}@h1"] * share)
    apart = alone(work)
    n_shared = sum(1 for node in work.seconds if "@" not in str(node) and node not in ("compare", "report")) + 1  # the source's splits
    assert len(apart.seconds) == 40 * (n_shared + 1 + sum(stage.scope == "target" for stage in STAGES.values()))  # and a hospital's splits each
    assert apart.busy > work.busy


def test_a_manifest_is_read_in_bounded_memory(tmp_path: Path) -> None:
    n = 10_000
    pd.DataFrame({"case_id": [f"{i:016x}" for i in range(n)], "split": ["train", "test"] * (n // 2)}).to_parquet(tmp_path / "manifest.parquet")
    np.lib.format.open_memmap(tmp_path / "images.npy", "w+", np.uint8, (n, 1, 1, 3)).flush()
    read_pairs(tmp_path, "train")  # whatever the first reading loads
    tracemalloc.start()
    read = read_pairs(tmp_path, "train")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(read) == n // 2
    assert peak / n < 400  # bytes a row


def test_params_of_one_stage_are_those_of_the_whole_project() -> None:
    found = build_project({"source": "a", "domains": {"a": {"dir": "a"}, "b": {"dir": "b"}}, "targets": {"t": {"domain": "b"}}})
    plain = dataclasses.asdict(found)
    assert stage_params(found, STAGES["report"], None) == {"task": plain["task"], "report": plain["report"], "targets": plain["targets"]}
    assert stage_params(found, STAGES["data"], "b")["domains.b"] == plain["domains"]["b"]


def test_a_long_chain_of_copies_is_one_group() -> None:
    n = 3000  # patient i has image i, patient i + 1 has it too
    cases = [Case(f"{i}-{k}", "", "", f"{i:06d}", 8, 8, str(i + k), "", False) for i in range(n) for k in (0, 1)]
    assert {case.group for case in _merge_copies(cases)} == {"000000"}


@pytest.mark.parametrize(("n", "expected"), [(0, 0), (1, 1), (1024, 1024), (5000, 1024)])
def test_distances_take_at_most_so_many_of_a_set(n: int, expected: int) -> None:
    rows = evaluate._evenly(n, evaluate.MOST)
    assert len(rows) == expected and (n > expected or rows.tolist() == list(range(n)))
