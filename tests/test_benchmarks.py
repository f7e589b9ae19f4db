"""The benchmarks' entry point: every row has a module, results are valid, absent peers are named. No times are judged here."""

import json
from pathlib import Path

import pytest

from benchmarks import solver
from benchmarks.__main__ import main, subjects
from benchmarks.row import compare, missing

KEYS = ["name", "ours", "peer", "unit", "ratio", "bar", "ok", "n", "spread"]


def test_every_row_has_a_module(capsys):
    numbers = {number for module in subjects().values() for number in module.NUMBERS}
    assert numbers >= set(range(1, 13))
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in subjects())


@pytest.mark.parametrize("absent", [True, False])
def test_a_cheap_row_and_its_absent_peers(absent: bool, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(solver, "REPEATS", 2)
    monkeypatch.setattr(solver, "CALLS", 1)
    if absent:
        monkeypatch.setattr(solver, "missing", lambda *peers: missing("no_such_peer"))
    assert main(["--only", "solver", "--json", str(tmp_path / "rows.json")]) == 0
    rows, printed = json.loads((tmp_path / "rows.json").read_text()), capsys.readouterr().out
    assert all(list(row) == KEYS and row["n"] == 2 and row["spread"][0] <= row["ratio"] <= row["spread"][1] for row in rows)
    assert len(rows) + printed.count("skipped: needs") == 3
    if absent:
        assert len(rows) == 1
        assert "against torchdiffeq" in printed and "skipped: needs no_such_peer: pip install -e '.[bench]'" in printed


def test_ratio_bar_and_spread():
    row = compare("x", [1.0, 2.0, 9.0], [4.0, 4.0, 3.0], "s", 0.5)
    assert (row.ours, row.peer, row.ratio, row.ok, row.n, row.spread) == (2.0, 4.0, 0.5, True, 3, (0.25, 3.0))
    assert not compare("x", [1.0], 4, "s", 0.5, at_least=True).ok
