"""The copy audit: planted copies are found whatever was done to them, fresh images are not, and export stops at them."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from provenance import of_one_piece, replaced
from scipy.ndimage import affine_transform

from alignflow_core.config import ImageFlow, Network, Task
from alignflow_core.flow.ema import Ema
from alignflow_core.flow.loss import flow_matching_loss
from alignflow_core.flow.solver import euler, time_grid
from alignflow_core.masks import condition
from alignflow_core.metrics.copying import CopyCheck, copy_check
from alignflow_core.networks import velocity_unet
from alignflow_core.pairs import Pairs, to_bytes, to_unit, write_pairs
from alignflow_core.phantom import draw_pair
from alignflow_core.readers import resize_classes
from alignflow_core.seeding import generator
from pipelines.cli import main

SIZE = 48
STEPS_BY_HEART = 1000
TASK = Task(name="phantom", kind="refuge", classes=("disc", "cup"), nested=True)


def eyes(camera: str, letter: str, n: int, size: int = SIZE) -> np.ndarray:
    """Images as the data stage would make them of the built-in data."""
    drawn = (draw_pair(camera, f"{letter}{number:03d}", 96)[0] for number in range(n))
    return np.stack([np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS)) for image in drawn])


def moved(image: np.ndarray, degrees: float = 0.0, zoom: float = 1.0, shift: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    matrix, centre = np.array([[cos, sin], [-sin, cos]]) / zoom, (np.array(image.shape[:2]) - 1) / 2
    offset = centre - matrix @ (centre + shift)
    planes = [affine_transform(image[..., k].astype(float), matrix, offset, order=1, mode="reflect") for k in range(3)]
    return np.stack(planes, -1).clip(0, 255).astype(np.uint8)


def through_jpeg(image: np.ndarray) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=30)
    return np.asarray(Image.open(stream))


def noisy(image: np.ndarray) -> np.ndarray:
    return (image + np.random.default_rng(int(image.sum())).normal(0, 0.05 * 255, image.shape)).clip(0, 255).astype(np.uint8)


PLANTED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exact": lambda image: image,
    "noise of deviation .05": noisy,
    "gain and gamma": lambda image: (255 * ((image / 255) ** 1.4 * [0.8, 1.1, 0.9]).clip(0, 1)).astype(np.uint8),
    "flip": lambda image: image[:, ::-1],
    "quarter turn": lambda image: np.rot90(image),
    "shift": lambda image: moved(image, shift=(3, -3)),
    "half a cell": lambda image: moved(image, shift=(1, 1)),
    "JPEG of quality 30": through_jpeg,
    "zoom": lambda image: moved(image, zoom=1.1),
    "zoom out": lambda image: moved(image, zoom=0.93),
    "turn by ten degrees": lambda image: moved(image, degrees=10),
}


def audited(bank: np.ndarray, held_out: np.ndarray, fresh: np.ndarray, copied: np.ndarray) -> tuple[dict[str, float], CopyCheck]:
    """Share caught of each kind of planted copy, share of fresh images flagged."""
    planted = [np.stack([plant(image) for image in copied]) for plant in PLANTED.values()]
    check = copy_check(np.concatenate([fresh, *planted]), bank, held_out, np.arange(len(held_out)), 0.01)
    caught = check.flagged[len(fresh):].reshape(len(PLANTED), len(copied)).mean(1)
    return dict(zip(PLANTED, caught.tolist(), strict=True)) | {"fresh": float(check.flagged[:len(fresh)].mean())}, check


def test_planted_copies_of_references_are_caught() -> None:
    bank = eyes("amber", "r", 8)
    shares, check = audited(bank, eyes("amber", "t", 60), eyes("amber", "f", 50), bank)
    assert shares.pop("fresh") <= 0.02
    assert all(share == 1 for share in shares.values()), shares
    assert check.calibrated and check.false_flag_rate <= 0.02


def test_patients_on_both_sides_do_not_make_it_blind() -> None:
    bank, held_out = eyes("amber", "r", 8), eyes("amber", "t", 40)
    held_out[:3] = [noisy(image) for image in bank[:3]]
    check = copy_check(np.stack([through_jpeg(image) for image in bank]), bank, held_out, np.arange(40), 0.01)
    assert check.n_twice == 3 and check.n_calibration == 37
    assert check.flagged[3:].all(), "those that are held out too lie as near to the one as to the other"


@pytest.mark.nightly
@pytest.mark.parametrize(("camera", "letter", "n"), [("amber", "r", 10), ("dim", "r", 10), ("violet", "r", 10), ("standard", "s", 154)])
def test_planted_copies_of_every_camera(camera: str, letter: str, n: int) -> None:
    bank = eyes(camera, letter, n, 64)
    shares, _ = audited(bank, eyes(camera, "h", 80, 64), eyes(camera, "f", 200, 64), bank[:50])
    assert shares.pop("fresh") <= 0.02
    assert all(share >= 0.99 for share in shares.values()), shares


@pytest.mark.nightly
def test_samples_of_a_generator_that_has_learned_its_images_by_heart_are_caught() -> None:
    bank = eyes("standard", "s", 8, 32)
    drawn = [draw_pair("standard", f"s{number:03d}", 96)[1] for number in range(8)]
    masks = np.stack([resize_classes((mask < 192).astype(np.uint8) + (mask < 64), TASK, 32) for mask in drawn])
    images, cond = to_unit(bank), condition(masks, TASK, 9.0)
    network = Network((16, 32, 64), (False, False, False))
    model = velocity_unet.build(3, cond.shape[1], network, 0)
    optimiser, ema = torch.optim.AdamW(model.parameters(), lr=2e-3), Ema(model, 0.99)
    for step in range(STEPS_BY_HEART):
        optimiser.param_groups[0]["lr"] = 2e-3 * (0.02 + 0.49 * (1 + np.cos(np.pi * step / STEPS_BY_HEART)))
        loss = flow_matching_loss(model, images, cond, ImageFlow().times, generator(0, "heart", step))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        ema.update(model)
    model.load_state_dict(ema.shadow)
    with torch.no_grad():
        samples = to_bytes(euler(model.eval(), torch.randn(48, 3, 32, 32, generator=generator(1)), cond.repeat(6, 1, 1, 1), time_grid(12)))
    check = copy_check(samples, bank, eyes("standard", "h", 60, 32), np.arange(60), 0.01)
    assert check.flagged.mean() >= 0.9


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one target with 12 kept pairs and 2 refused ones; pairs 3 and 5 are planted copies of a reference and of a source image."""
    from pipelines.compose import write_params

    root = tmp_path_factory.mktemp("finished")
    layout = {"source": "standard", "domains": {"standard": {"dir": "s"}, "amber": {"dir": "a"}}, "targets": {"amber": {"domain": "amber"}}}
    write_params(root / "params.yaml", ["profile=smoke", "task=refuge", f"data.size={SIZE}"], layout)
    source, target, references = eyes("standard", "s", 60), eyes("amber", "t", 40), eyes("amber", "r", 5)
    for node, images, splits in (("data/standard", source, 30), ("data/amber", target, 8), ("references/amber", references, 5)):
        ids = [f"{node[:2]}{number:03d}" for number in range(len(images))]
        table = pd.DataFrame({"case_id": ids, "group": ids, "split": ["train"] * splits + ["test"] * (len(images) - splits)})
        folder = root / "artifacts" / node
        folder.mkdir(parents=True)
        write_pairs(folder, Pairs(images, None, tuple(ids), table))
    painted = eyes("amber", "p", 14)
    painted[3], painted[5] = through_jpeg(references[2]), source[7][::-1]
    ids = [f"pair{number:06d}" for number in range(14)]
    folders = [root / "artifacts" / stage / "amber" for stage in ("sample_aligned", "filter")]
    for folder in folders:
        folder.mkdir(parents=True)
    write_pairs(folders[0], Pairs(painted, np.zeros((14, SIZE, SIZE), np.uint8), tuple(ids), pd.DataFrame({"pair_id": ids, "seed": range(14)})))
    pd.DataFrame({"pair_id": ids, "kept": [True] * 12 + [False] * 2, "reason": [""] * 12 + ["implausible image"] * 2}).to_parquet(
        folders[1] / "manifest.parquet")
    of_one_piece(root)
    return root


def test_audit_of_a_run_names_the_copies(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(finished)]) == 1
    told = capsys.readouterr().out
    assert "amber: audited, 12 pairs" in told
    assert "pair000003: near copy of references re002" in told and "pair000005: near copy of source da007" in told
    assert main(["audit", str(finished), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["amber"]
    assert found["audited"] and {row["pair_id"] for row in found["flagged"]} == {"pair000003", "pair000005"}
    facts = found["banks"]["references"]
    assert (facts["images"], facts["calibration_images"], facts["calibrated"], facts["flagged"]) == (5, 32, True, 1)
    assert 0.5 < facts["threshold"] < 1 and facts["false_flag_rate_at_most"] == pytest.approx(1 / 33)


@pytest.mark.parametrize("stage", ["sample_aligned", "references"])
def test_a_run_that_was_changed_and_not_finished_is_not_audited(finished: Path, tmp_path: Path, stage: str,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    replaced(root, stage, "amber")
    assert main(["audit", str(root)]) == 2
    assert "filter/amber: judged other pairs, or pairs of other references" in capsys.readouterr().err


def test_export_stops_at_copies(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pairs"
    assert main(["export", str(finished), "--out", str(out)]) == 2
    told = capsys.readouterr().err
    assert "2 of 12 pairs" in told and "pair000003, pair000005" in told and "--on-copy replace" in told
    assert not out.exists()
    assert main(["export", str(finished), "--out", str(out), "--on-copy", "keep"]) == 2
    assert "--accept-copies" in capsys.readouterr().err and not out.exists()
    assert main(["export", str(finished), "--out", str(out), "--pairs", "3"]) == 0, "the first three are none"


def test_export_replaces_copies_and_the_folder_is_clean(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "pairs"
    assert main(["export", str(finished), "--out", str(out), "--on-copy", "replace", "--pairs", "8"]) == 0
    assert "left out as near copies of real images: pair000003, pair000005" in capsys.readouterr().out
    table = pd.read_csv(out / "amber" / "manifest.csv")
    assert table["pair_id"].tolist() == [f"pair{number:06d}" for number in (0, 1, 2, 4, 6, 7, 8, 9)]
    assert set(table["copy_audit"]) == {"no copy found"} and "warning" not in table
    facts = json.loads((out / "audit.json").read_text())["targets"]["amber"]
    assert (facts["written"], facts["left_out"], facts["filled_up"], facts["audited"]) == (8, ["pair000003", "pair000005"], 2, True)
    assert main(["audit", str(out), "--against", str(finished)]) == 0
    assert main(["audit", str(out / "amber"), "--against", str(finished)]) == 0
    monkeypatch.chdir(out / "amber")
    assert main(["audit", ".", "--against", str(finished)]) == 0
    Image.fromarray(eyes("amber", "r", 5)[1]).save(out / "amber" / "images" / "new.jpg")
    assert main(["audit", str(out), "--against", str(finished)]) == 1
    assert "new: near copy of references re001" in capsys.readouterr().out


def test_keep_says_so_in_the_folder(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pairs"
    assert main(["export", str(finished), "--out", str(out), "--on-copy", "keep", "--accept-copies"]) == 0
    assert "treat these pairs as patients' data" in capsys.readouterr().err
    table = pd.read_csv(out / "amber" / "manifest.csv").set_index("pair_id")
    assert table.loc["pair000003", "copy_audit"] == "near copy of references re002"
    assert table["warning"].str.contains("patients' data").all()
    assert "patients' data" in json.loads((out / "audit.json").read_text())["targets"]["amber"]["warning"]


def test_without_calibration_nothing_is_called_audited(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = shutil.copytree(finished, tmp_path / "run")
    file = root / "artifacts/data/amber/manifest.parquet"
    table = pd.read_parquet(file)
    table["split"] = ["train"] * 30 + ["test"] * 10
    table.to_parquet(file)
    kept = root / "artifacts/filter/amber/manifest.parquet"
    pd.read_parquet(kept).assign(kept=[True] * 3 + [False] * 11).to_parquet(kept)
    assert main(["audit", str(root)]) == 2
    told = capsys.readouterr().out
    assert "audited" not in told and "not calibrated" in told and "10 real images held out" in told
    assert main(["export", str(root), "--out", str(tmp_path / "pairs")]) == 2
    assert main(["export", str(root), "--out", str(tmp_path / "pairs"), "--on-copy", "replace"]) == 2
    assert "not calibrated" in capsys.readouterr().err
    assert main(["export", str(root), "--out", str(tmp_path / "pairs"), "--on-copy", "keep", "--accept-copies"]) == 0
    assert set(pd.read_csv(tmp_path / "pairs/amber/manifest.csv")["copy_audit"]) == {"not audited"}


@pytest.mark.parametrize(("arguments", "words"), [
    (["."], "has no params.yaml"), ([".", "--against", "RUN"], "<target>/images"), (["stranger", "--against", "RUN"], "'stranger' is no target"),
    (["broken/amber", "--against", "RUN"], "half.png"),
])
def test_bad_input(arguments: list[str], words: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, file in (("stranger", "a.png"), ("broken/amber", "half.png")):
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "images" / file).write_bytes(b"\x89PNG half")
    folder = tmp_path / "empty" if arguments[0] == "." else tmp_path / arguments[0]
    folder.mkdir(exist_ok=True)
    assert main(["audit", str(folder), *(str(finished) if word == "RUN" else word for word in arguments[1:])]) == 2
    assert words in capsys.readouterr().err
