"""Runs of several seeds as one table."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipelines.cli import main
from pipelines.compose import write_params

ARMS = {"source": 0.5, "stage1": 0.6, "fourier": 0.7, "aligned": 0.8, "oracle": 0.9}


def finished(root: Path, seed: int, shift: float, cases: int = 30, segmenters: tuple[str, ...] = ("unet",), repeats: int = 2) -> Path:
    """A run whose arms have known means; ``shift`` is what this seed adds to every value."""
    write_params(root / "params.yaml", ["profile=smoke", f"seed={seed}"])
    rng = np.random.default_rng(0)
    ease = rng.normal(0, 0.02, cases)
    rows = [(target, arm, seed, name, k, f"case{i}", f"case{i}", "disc", metric, (mean + ease[i] + shift) / (1 + number))
            for number, name in enumerate(segmenters) for target in ("amber", "violet") for arm, mean in ARMS.items()
            for k in range(repeats) for i in range(cases) for metric in ("dice", "iou", "hd95")]
    table = pd.DataFrame(rows, columns=["target", "arm", "generator_seed", "segmenter", "segmenter_seed", "case_id", "group", "class", "metric",
                                        "value"])
    for target, part in table.groupby("target"):
        folder = root / "artifacts" / "evaluate" / str(target)
        folder.mkdir(parents=True)
        part.to_parquet(folder / "metrics.parquet", index=False)
    return root


def test_means_differences_and_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [finished(tmp_path / str(seed), seed, shift) for seed, shift in enumerate((-0.03, 0.0, 0.03))]
    assert main(["pool", *map(str, runs), "--baseline", "fourier"]) == 0
    told = capsys.readouterr().out
    assert "**amber**: 30 test units, 3 generator × 2 segmenter seeds" in told and "**violet**" in told
    row = next(line for line in told.splitlines() if line.startswith("| aligned "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert float(cells[1].split()[0]) == pytest.approx(0.8, abs=0.01)
    assert float(cells[2]) == pytest.approx(np.std([-0.03, -0.03, 0, 0, 0.03, 0.03], ddof=1), abs=1e-3)
    assert [cell.split()[0] for cell in cells[5:8]] == ["+0.300", "+0.200", "+0.100"] and cells[8] == "75 %"


def test_a_table_per_segmenter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [finished(tmp_path / str(seed), seed, 0.0, segmenters=("unet", "dpt")) for seed in (0, 1)]
    assert main(["pool", *map(str, runs)]) == 0
    told = capsys.readouterr().out
    assert [line.split("**")[1] for line in told.splitlines() if line.startswith("**")] == [
        "amber, unet", "amber, dpt", "violet, unet", "violet, dpt"]
    means = [float(line.split("|")[2].split()[0]) for line in told.splitlines() if line.startswith("| aligned ")]
    assert means[1] == pytest.approx(means[0] / 2, abs=1e-3)


def test_one_network_has_no_deviation_and_no_oracle_no_gap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(tmp_path / "run", 0, 0.0, repeats=1)
    for file in (run / "artifacts" / "evaluate").rglob("metrics.parquet"):
        values = pd.read_parquet(file)
        values[values["arm"] != "oracle"].to_parquet(file, index=False)
    assert main(["pool", str(run)]) == 0
    told = capsys.readouterr().out
    assert "nan" not in told and "gap closed" not in told
    header, _, *rows = [line.split("|") for line in told.splitlines() if line.startswith("|")][:5]
    assert {len(row) for row in rows} == {len(header)} and {row[3].strip() for row in rows} == {"–"}


def test_what_cannot_be_pooled_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, twin = finished(tmp_path / "a", 0, 0.0), finished(tmp_path / "b", 0, 0.0)
    assert main(["pool", str(one), str(twin), "--baseline", "fourrier"]) == 2
    told = capsys.readouterr().err
    assert "has seed 0, as" in told and "did you mean 'fourier'" in told
    unlike = finished(tmp_path / "d", 2, 0.0)
    write_params(unlike / "params.yaml", ["profile=smoke", "seed=2", "machine.threads=2", "image_flow.training.steps=7"])
    assert main(["pool", str(one), str(unlike)]) == 2
    assert f"{unlike}: differs from {one} in image_flow.training.steps; pool runs" in capsys.readouterr().err
    other = finished(tmp_path / "c", 1, 0.0, cases=29)
    assert main(["pool", str(one), str(other)]) == 2
    assert "tested on other images" in capsys.readouterr().err
    (other / "artifacts" / "evaluate" / "amber" / "metrics.parquet").unlink()
    assert main(["pool", str(one), str(other)]) == 2
    assert "amber is not evaluated yet" in capsys.readouterr().err
