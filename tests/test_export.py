"""Export as nnU-Net v2 datasets: the layout that its documentation and its check of a dataset ask for."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from provenance import of_one_piece, replaced

from alignflow_core.config import Task
from alignflow_core.errors import InputError
from alignflow_core.pairs import Pairs, write_pairs
from alignflow_core.stages import artifact_dir
from pipelines.audit import Verdict
from pipelines.cli import main
from pipelines.nnunet import nnunet_description

KEPT = np.array([True, False, True, True])


def give(folder: Path, n: int, draw: int, **columns: object) -> Pairs:
    rng = np.random.default_rng(draw)
    folder.mkdir(parents=True)
    table = pd.DataFrame(columns)
    pairs = Pairs(rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8), rng.integers(0, 3, (n, 8, 8), dtype=np.uint8), tuple(table.iloc[:, 0]), table)
    write_pairs(folder, pairs)
    return pairs


def verdict(ids: list[str], copied: str | None) -> Verdict:
    """What an audit says that finds one copy, or none."""
    table = pd.DataFrame({"pair_id": ids, "bank": "references", "nearest": "ref", "ratio": 0.1, "flagged": [each == copied for each in ids]})
    return Verdict(tuple(ids), table, {}, [])


@pytest.fixture(autouse=True)
def audit(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """The audit itself has tests of its own; here ``copied`` names the pair that it flags."""
    found: dict[str, str | None] = {"copied": None}

    def audit_run(run: Path, target: str, chosen: np.ndarray) -> Verdict:
        return verdict([f"pair{i:06d}" for i in np.flatnonzero(chosen)], found["copied"])

    monkeypatch.setattr("pipelines.export.audit_run", audit_run)
    return found


@pytest.fixture
def run(smoke_root: Path) -> Path:
    """A finished run of two targets, as far as export reads it, whose raw files have a patient's name."""
    for number, target in enumerate(("amber", "violet")):
        ids = [f"pair{i:06d}" for i in range(4)]
        give(smoke_root / artifact_dir("sample_aligned", target), 4, number, pair_id=ids, mask_id=ids, seed=range(4))
        folder = smoke_root / artifact_dir("filter", target)
        folder.mkdir(parents=True)
        pd.DataFrame({"pair_id": ids, "kept": KEPT, "reason": np.where(KEPT, "", "copy"), "novelty": 1.0}).to_parquet(folder / "manifest.parquet")
    give(smoke_root / artifact_dir("data", "standard"), 5, 9, case_id=[f"case{i}" for i in range(5)], stem=[f"Doe_{i}" for i in range(5)],
         group=["Doe", "Doe", "Roe", "Roe", "Poe"], split=["train", "train", "train", "val", "test"])
    of_one_piece(smoke_root)
    return smoke_root


def read(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        assert not image.info and not image.getexif(), "pixels and nothing else"
        return np.array(image)


def cases(dataset: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Image and label of every case, after the rules: ``{case}_{four digits}{ending}`` and ``{case}{ending}``, all channels of all cases there."""
    description = json.loads((dataset / "dataset.json").read_text())
    assert {"channel_names", "labels", "numTraining", "file_ending"} <= set(description)
    assert re.fullmatch(r"Dataset\d{3}_\w+", dataset.name)
    ending = description["file_ending"]
    images = {file.name for file in (dataset / "imagesTr").iterdir()}
    found = {re.fullmatch(rf"(.+)_\d{{4}}{re.escape(ending)}", name).group(1) for name in images}  # type: ignore[union-attr]
    assert images == {f"{case}_0000{ending}" for case in found}, "an RGB image is one file"
    assert {file.name for file in (dataset / "labelsTr").iterdir()} == {f"{case}{ending}" for case in found}
    assert description["numTraining"] == len(found)
    pairs = {case: (read(dataset / "imagesTr" / f"{case}_0000{ending}"), read(dataset / "labelsTr" / f"{case}{ending}")) for case in found}
    values = {0} | {value for each in description["labels"].values() for value in (each if isinstance(each, list) else [each])}
    assert sorted(values) == list(range(max(values) + 1)), "labels are consecutive"
    for image, label in pairs.values():
        assert image.shape == (*label.shape, 3) == (*label.shape, len(description["channel_names"])) and set(np.unique(label)) <= values
    return pairs


def test_a_dataset_per_target_of_synthetic_pairs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "nnUNet_raw"
    assert main(["export", str(run), "--format", "nnunet", "--out", str(out)]) == 0
    assert {file.name for file in out.iterdir()} == {"Dataset501_amber", "Dataset502_violet", "audit.json"}
    assert "violet: 3 pairs" in capsys.readouterr().out
    found = cases(out / "Dataset501_amber")
    assert set(found) == {"synthetic_pair000000", "synthetic_pair000002", "synthetic_pair000003"}
    images, masks = (np.load(run / artifact_dir("sample_aligned", "amber") / f"{name}.npy") for name in ("images", "masks"))
    assert all(np.array_equal(found["synthetic_pair000002"][i], array[2]) for i, array in enumerate((images, masks)))
    assert main(["export", str(run), "--format", "nnunet", "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err and [file.name for file in tmp_path.iterdir() if "part" in file.name] == []


@pytest.mark.parametrize("form", ["folder", "nnunet"])
@pytest.mark.parametrize("stage", ["sample_aligned", "references"])
def test_pairs_that_the_filter_has_not_seen_so_do_not_leave(run: Path, tmp_path: Path, form: str, stage: str,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    """As a run leaves it that was stopped after new pairs were painted, or after its references were replaced: then copies of the old would pass."""
    replaced(run, stage, "violet")
    assert main(["export", str(run), "--format", form, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "filter/violet: judged other pairs" in told and "amber" not in told and not (tmp_path / "out").exists()


def test_near_copies_do_not_leave_as_nnunet_either(run: Path, tmp_path: Path, audit: dict[str, str | None],
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    audit["copied"], out = "pair000002", tmp_path / "raw"
    command = ["export", str(run), "--format", "nnunet", "--out", str(out)]
    assert main(command) == 2
    assert "pair000002" in capsys.readouterr().err and not out.exists()
    assert main([*command, "--on-copy", "replace"]) == 0
    assert set(cases(out / "Dataset501_amber")) == {"synthetic_pair000000", "synthetic_pair000003"}


def test_with_the_source_s_training_pairs(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "raw"
    assert main(["export", str(run), "--format", "nnunet", "--out", str(out), "--with-source", "--dataset-id", "27"]) == 0
    found = cases(out / "Dataset028_violet")
    assert {case for case in found if case.startswith("source_")} == {"source_case0", "source_case1", "source_case2"} and len(found) == 6
    manifest = pd.read_csv(out / "Dataset028_violet" / "manifest.csv")
    assert set(manifest["case"]) == set(found)
    assert manifest.loc[manifest["origin"] == "source", "group"].tolist() == [0, 0, 1], "one patient, one number"
    assert not [file for file in out.rglob("*") if file.is_file() and (b"Doe" in file.read_bytes() or "Doe" in file.name)]


def test_classes_inside_one_another_are_regions() -> None:
    nested = nnunet_description(Task(kind="refuge", classes=("disc", "cup"), nested=True), 3)
    assert nested["labels"] == {"background": 0, "disc": [1, 2], "cup": 2} and nested["regions_class_order"] == [1, 2]
    plain = nnunet_description(Task(kind="labels", classes=("a", "b"), values={0: 0, 1: 1, 2: 2}), 3)
    assert plain["labels"] == {"background": 0, "a": 1, "b": 2} and "regions_class_order" not in plain
    assert nnunet_description(Task(nested=True), 3)["labels"] == {"background": 0, "foreground": 1}
    names = tuple("zyx")
    nested = Task(kind="labels", classes=names, nested=True, values={i: i for i in range(4)})
    assert list(nnunet_description(nested, 3)["labels"]) == ["background", *names]


def test_what_nnunet_would_misread_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="'ignore'"):
        nnunet_description(Task(kind="labels", classes=("ignore",), values={0: 0, 1: 1}), 3)
    out = str(tmp_path / "raw")
    assert main(["export", str(run), "--format", "nnunet", "--out", out, "--dataset-id", "999"]) == 2
    assert "datasets 999 to 1000" in capsys.readouterr().err
    assert main(["export", str(run), "--out", out, "--with-source"]) == 2
    assert "add --format nnunet" in capsys.readouterr().err
    (run / artifact_dir("data", "standard") / "manifest.parquet").unlink()
    assert main(["export", str(run), "--format", "nnunet", "--out", out, "--with-source"]) == 2
    assert "not built yet" in capsys.readouterr().err and not Path(out).exists()
