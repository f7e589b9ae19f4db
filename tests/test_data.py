"""Data in: every format read right, nesting kept, groups whole, references apart from the test set."""

import contextlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from alignflow_core import runner
from alignflow_core.artifact import read_json, tree_hash
from alignflow_core.config import Task
from alignflow_core.data import case_id, check_folder, split_groups
from alignflow_core.errors import InputError
from alignflow_core.pairs import read_array, read_pairs
from alignflow_core.readers import ReadError, read_image, read_mask, resize_classes
from alignflow_core.runner import run_stage

BINARY = Task()
REFUGE = Task("refuge", "refuge", ("disc", "cup"), nested=True)
LABELS = Task("labels", "labels", ("liver", "tumour"), values={0: 0, 7: 1, 300: 2})
COLOURS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [200, 200, 200]]], np.uint8).repeat(24, 0).repeat(16, 1)  # 48 high, 32 wide


def save(image: Image.Image, file: Path, **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **options)
    return file


@pytest.mark.parametrize(("name", "mode", "tolerance"), [
    ("a.png", "RGB", 0), ("a.png", "RGBA", 0), ("a.png", "P", 0), ("a.tif", "RGB", 0), ("a.tiff", "CMYK", 2), ("a.bmp", "RGB", 0),
    ("a.gif", "P", 0), ("a.jpg", "RGB", 4), ("a.jpeg", "CMYK", 4)])
def test_colour_formats(name: str, mode: str, tolerance: int, tmp_path: Path) -> None:
    image = Image.fromarray(COLOURS)
    image = image.quantize(8) if mode == "P" else image.convert(mode)
    picture = read_image(save(image, tmp_path / name), tmp_path)
    assert picture.pixels.shape == (48, 32, 3) and (picture.width, picture.height) == (32, 48)
    inner = np.ix_([8, 40], [6, 26])  # away from the borders that JPEG smears
    assert np.abs(picture.pixels[inner].astype(int) - COLOURS[inner]).max() <= tolerance


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_grey_is_scaled(name: str, tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    assert read_image(save(Image.fromarray(values), tmp_path / name), tmp_path).pixels[0, :, 0].tolist() == [0, 1, 128, 255]


def test_one_bit_grey_and_transparency(tmp_path: Path) -> None:
    one_bit = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert read_image(save(one_bit, tmp_path / "a.png"), tmp_path).pixels[0, :, 1].tolist() == [0, 255]
    clear = Image.fromarray(np.array([[[9, 9, 9, 255], [90, 90, 90, 0]]], np.uint8))
    assert read_image(save(clear, tmp_path / "b.png"), tmp_path).pixels[0, :, 0].tolist() == [9, 0]


def test_exif_orientation_turns_image_and_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise
    picture = read_image(save(Image.fromarray(COLOURS), tmp_path / "a.png", exif=exif), tmp_path)
    assert (picture.width, picture.height) == (48, 32)
    assert np.array_equal(picture.pixels, np.rot90(COLOURS, -1))
    large = Image.fromarray(COLOURS.repeat(20, 0).repeat(20, 1))
    picture = read_image(save(large, tmp_path / "a.jpg", exif=exif, quality=95), tmp_path, size=16)  # decoded at reduced scale
    assert (picture.width, picture.height) == (960, 640) and picture.pixels.shape == (16, 16, 3)
    assert np.abs(picture.pixels[3, 3].astype(int) - COLOURS[-1, 0]).max() < 12


def test_binary_masks_of_any_mode(tmp_path: Path) -> None:
    grey = np.array([[0, 127, 128, 255]], np.uint8)
    coloured = np.array([[[0, 0, 0], [255, 0, 0], [0, 255, 0], [255, 255, 255]]], np.uint8)  # luminance 0, 76, 150, 255
    wide = (grey.astype(np.uint16) * 257)
    for number, image in enumerate((Image.fromarray(grey), Image.merge("RGB", [Image.fromarray(grey)] * 3), Image.fromarray(wide),
                                    Image.fromarray(coloured), Image.fromarray(grey.astype(np.uint16)))):
        file = save(image, tmp_path / f"{number}.png")
        assert read_mask(file, tmp_path, BINARY).pixels.tolist() == [[0, 0, 1, 1]], image.mode


def test_refuge_masks_by_midpoints(tmp_path: Path) -> None:
    file = save(Image.fromarray(np.array([[0, 63, 64, 128, 191, 192, 255]], np.uint8)), tmp_path / "a.png")
    assert read_mask(file, tmp_path, REFUGE).pixels.tolist() == [[2, 2, 1, 1, 1, 0, 0]]


def test_label_masks_by_value_palette_and_wide(tmp_path: Path) -> None:
    wide = save(Image.fromarray(np.array([[0, 7, 300]], np.uint16)), tmp_path / "wide.png")
    assert read_mask(wide, tmp_path, LABELS).pixels.tolist() == [[0, 1, 2]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0] * 7 + [200, 10, 10])
    palette.putpixel((1, 0), 7)
    assert read_mask(save(palette, tmp_path / "palette.png"), tmp_path, LABELS).pixels.tolist() == [[0, 1]]
    with pytest.raises(ReadError, match="unknown label values 5, 9; known: 0, 7, 300"):
        read_mask(save(Image.fromarray(np.array([[0, 9, 5]], np.uint8)), tmp_path / "bad.png"), tmp_path, LABELS)


def test_resizing_keeps_nesting_and_area() -> None:
    y, x = np.mgrid[-1:1:300j, -1:1:200j]
    radius = np.hypot(x, y)
    classes = (radius < 0.7).astype(np.uint8) + (radius < 0.35)
    small = resize_classes(classes, REFUGE, 40)
    assert small.shape == (40, 40)
    for k in (1, 2):
        assert (small >= k).mean() == pytest.approx((classes >= k).mean(), rel=0.03)
    flat = Task("labels", "labels", ("a", "b"), values={0: 0, 1: 1, 2: 2})
    assert resize_classes(np.array([[1, 2], [2, 2]], np.uint8), flat, 1).tolist() == [[2]]


def test_splits_never_cut_a_group_and_hit_the_shares() -> None:
    groups = [f"p{i // 5}" for i in range(200)] + ["large"] * 40
    chosen = split_groups(groups, (0.7, 0.15, 0.15), 0, "here")
    counts = {s: sum(chosen[g] == s for g in groups) for s in ("train", "val", "test")}
    assert counts == {"train": 170, "val": 35, "test": 35}
    assert chosen == split_groups(groups[::-1], (0.7, 0.15, 0.15), 0, "here")
    assert chosen != split_groups(groups, (0.7, 0.15, 0.15), 1, "here")
    assert sorted(split_groups(["a", "b", "b", "b", "c"], (0.9, 0.05, 0.05), 0, "here").values()) == ["test", "train", "val"]
    assert set(split_groups(["a", "b"], (0.5, 0.0, 0.5), 0, "here").values()) == {"train", "test"}
    with pytest.raises(InputError, match="needs at least 3"):
        split_groups(["a", "b", "b"], (0.4, 0.1, 0.5), 0, "here")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Two domains of twelve distinct pairs; ``there`` has four patients of three images."""
    for domain, base in (("here", 0), ("there", 100)):
        for n in range(12):
            pixels = np.full((20, 30, 3), base + 5 * n, np.uint8)
            mask = np.zeros((20, 30), np.uint8)
            mask[4:16, 6:6 + n + 5] = 255
            save(Image.fromarray(pixels), tmp_path / domain / "images" / f"c{n:02d}.png")
            save(Image.fromarray(mask), tmp_path / domain / "masks" / f"c{n:02d}.bmp")
    (tmp_path / "there" / "groups.csv").write_text("stem,patient\n" + "".join(f"c{n:02d},p{n // 3}\n" for n in range(12)))
    set_references(tmp_path, {"count": 3})
    return tmp_path


def set_references(root: Path, references: dict[str, Any]) -> None:
    (root / "params.yaml").write_text(yaml.safe_dump({
        "source": "here", "domains": {"here": {"dir": "here"}, "there": {"dir": "there"}}, "data": {"size": 24},
        "targets": {"there": {"domain": "there", "references": references}}}))


def test_stage_data(project: Path) -> None:
    assert run_stage(project, "data", "there", quiet=True) and not run_stage(project, "data", "there", quiet=True)
    pairs = read_pairs(project / "artifacts/data/there")
    assert pairs.images.shape == (12, 24, 24, 3) and pairs.images.dtype == np.uint8 and pairs.labels.shape == (12, 24, 24)
    assert list(pairs.table.columns) == ["case_id", "domain", "group", "split", "image_sha256", "mask_sha256", "width", "height"]
    assert pairs.table.groupby("group")["split"].nunique().max() == 1
    assert set(pairs.table["split"]) == {"train", "val", "test"} and pairs.table["group"].nunique() == 4
    assert pairs.table["case_id"].tolist() == [case_id("there", f"c{n:02d}") for n in range(12)], "in the order of the names"
    assert pairs.images[:, 8, 8, 0].tolist() == [100 + 5 * n for n in range(12)]
    assert (pairs.table["width"] == 30).all() and pairs.table["case_id"].is_unique
    before = tree_hash(project / "artifacts/data/there")
    assert run_stage(project, "data", "there", force=True, quiet=True) and tree_hash(project / "artifacts/data/there") == before


def test_equal_images_share_a_group_and_a_split(project: Path) -> None:
    for n in (5, 6, 7):
        (project / "here/images" / f"c{n:02d}.png").write_bytes((project / "here/images/c01.png").read_bytes())
    run_stage(project, "data", "here", quiet=True)
    table = read_pairs(project / "artifacts/data/here").table.set_index("case_id")
    assert table.loc[[case_id("here", f"c{n:02d}") for n in (1, 5, 6, 7)], "group"].nunique() == 1
    assert table.groupby("image_sha256")["split"].nunique().max() == 1


def test_drawn_references_come_from_the_training_split_and_nest(project: Path) -> None:
    for domain in ("here", "there"):
        run_stage(project, "data", domain, quiet=True)
    run_stage(project, "references", "there", quiet=True)
    domain, drawn = read_pairs(project / "artifacts/data/there"), read_pairs(project / "artifacts/references/there")
    assert list(drawn.table.columns) == ["case_id", "domain", "group", "role", "labelled", "image_sha256", "width", "height"]
    train = domain.select((domain.table["split"] == "train").to_numpy())
    for image, mask, case in zip(drawn.images, drawn.labels, drawn.ids, strict=True):
        row = train.ids.index(case)
        assert np.array_equal(image, train.images[row]) and np.array_equal(mask, train.labels[row])
    assert drawn.table["group"].nunique() == 1 and (drawn.table["role"] == "align").all() and drawn.table["labelled"].all()
    set_references(project, {"count": 2})
    run_stage(project, "references", "there", quiet=True)
    fewer = pd.read_parquet(project / "artifacts/references/there/manifest.parquet")
    assert fewer["case_id"].tolist() == list(drawn.ids[:2]) and (fewer["role"] == "align").all()


def test_references_from_a_folder_without_labels(project: Path) -> None:
    for n in range(4):
        save(Image.fromarray(np.full((8, 8, 3), 7 * n, np.uint8)), project / "refs" / f"new{n}.png")
    set_references(project, {"dir": "refs"})
    for domain in ("here", "there"):
        run_stage(project, "data", domain, quiet=True)
    run_stage(project, "references", "there", quiet=True)
    references = read_pairs(project / "artifacts/references/there")
    assert len(references) == 4 and references.masks is None and not references.table["labelled"].any()
    assert references.table["role"].tolist() == ["align"] * 3 + ["held_out"]
    with pytest.raises(InputError, match="no masks"):
        references.labels  # noqa: B018


def test_references_of_a_patient_have_one_role(project: Path) -> None:
    for n in range(4):
        save(Image.fromarray(np.full((8, 8, 3), 7 * n, np.uint8)), project / "refs" / f"new{n}.png")
    (project / "refs" / "groups.csv").write_text("stem,patient\nnew0,a\nnew1,b\nnew2,a\nnew3,b\n")
    set_references(project, {"dir": "refs"})
    for stage, key in (("data", "here"), ("data", "there"), ("references", "there")):
        run_stage(project, stage, key, quiet=True)
    table = read_pairs(project / "artifacts/references/there").table
    assert sorted(table["role"]) == ["align"] * 2 + ["held_out"] * 2 and table.groupby("group")["role"].nunique().tolist() == [1, 1]
    (project / "refs" / "groups.csv").write_text("stem,patient\nnew0,a\nnew1,a\nnew2,a\nnew3,a\n")
    run_stage(project, "references", "there", quiet=True)
    assert (read_pairs(project / "artifacts/references/there").table["role"] == "align").all()


def test_arrays_that_are_none(tmp_path: Path) -> None:
    """An array of objects is a pickle, which would run what it holds."""
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "text.npy").write_text("no array")
    for name in ("objects", "text", "gone"):
        with pytest.raises(InputError, match=rf"{name}\.npy: not a readable array"):
            read_array(tmp_path / f"{name}.npy")


def test_phantom_folders_pass_the_check(phantom_root: Path) -> None:
    listing = check_folder(phantom_root / "data/source/standard", REFUGE)
    assert len(listing.cases) == 28 and listing.labelled and not listing.empty_masks
    assert check_folder(phantom_root / "data/references/amber", REFUGE, labelled=False).labelled


def test_seconds_count_what_was_done_before_an_interruption(smoke_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours in the tables are those of all attempts, of which the second only continued."""
    started = runner.call

    def interrupted(*arguments: Any) -> dict[str, float]:
        time.sleep(0.4)
        raise KeyboardInterrupt

    for stop in (interrupted, interrupted, started):
        monkeypatch.setattr(runner, "call", stop)
        with contextlib.suppress(KeyboardInterrupt):
            run_stage(smoke_root, "data", "amber", quiet=True)
    assert read_json(smoke_root / "artifacts/data/amber.json")["seconds"] >= 0.8
