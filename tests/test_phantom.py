"""The built-in data: the same bytes everywhere, and a shift that hurts."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from alignflow_core import phantom
from alignflow_core.artifact import tree_hash
from alignflow_core.config import Machine, Segment, Task, Training
from alignflow_core.pairs import Pairs
from alignflow_core.readers import resize_classes

REFUGE = Task("refuge", "refuge", ("disc", "cup"), nested=True)

PAIRS = {  # SHA-256 of image and mask file of the first eye at 96 px
    "standard": "fd9d45ae12a881960e42ebc8a59aa9648b703617f73543059587577c1117792b",
    "amber": "c7268f48611548845b8ee23db2626aa3a1ca85c6eb56c7d90940495afe022ae9",
    "dim": "691ca0a90003bcf94765c7792192a68de163a097958d81ac4752b4a2e5509ec1",
    "violet": "3aec6c8632fca746dd4c4503604bf314cc335bc44075018bc7ab88cd31462399",
}
SMALL_TREE = "69dee65f78d952481605365be1cecf0c7b45f470374f42aed5618bc72dca3fcf"


@pytest.mark.parametrize("camera", PAIRS)
def test_files_are_the_recorded_bytes(camera: str) -> None:
    image, mask = phantom.draw_pair(camera, "t000", 96)
    assert hashlib.sha256(phantom.encode_png(image) + phantom.encode_png(mask)).hexdigest() == PAIRS[camera]


def test_folder_is_the_recorded_tree_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("N_SOURCE", "N_TARGET", "N_REFERENCES"):
        monkeypatch.setattr(phantom, name, 3)
    phantom.write_phantom(tmp_path, size=32)
    assert tree_hash(tmp_path) == SMALL_TREE
    phantom.write_phantom(tmp_path, size=32)
    assert tree_hash(tmp_path) == SMALL_TREE


def test_layout_and_fresh_references(phantom_root: Path) -> None:
    places = ["source/standard"] + [f"{kind}/{camera}" for kind in ("target", "references") for camera in phantom.TARGETS]
    seen: set[str] = set()
    for place in places:
        images, masks = (sorted((phantom_root / "data" / place / part).iterdir()) for part in ("images", "masks"))
        assert images and [i.name for i in images] == [m.name for m in masks]
        hashes = {hashlib.sha256(file.read_bytes()).hexdigest() for file in images}
        assert len(hashes) == len(images) and not hashes & seen
        seen |= hashes


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (200, 200, 3)])
def test_png_encoder_round_trip(shape: tuple[int, ...], tmp_path: Path) -> None:
    pixels = (np.arange(np.prod(shape)) * 7 % 256).astype(np.uint8).reshape(shape)
    file = tmp_path / "a.png"
    file.write_bytes(phantom.encode_png(pixels))
    with Image.open(file) as image:
        assert np.array_equal(np.asarray(image), pixels)


def test_cup_lies_in_disc_and_both_are_seen() -> None:
    for number in range(12):
        image, mask = phantom.draw_pair("standard", f"s{number:03d}", 64)
        assert set(np.unique(mask)) == {phantom.CUP, phantom.RIM, phantom.BACKGROUND}
        cup = mask == phantom.CUP
        touching = np.zeros_like(cup)
        for axis in (0, 1):
            for step in (1, -1):
                touching |= np.roll(cup, step, axis)
        assert not (touching & (mask == phantom.BACKGROUND)).any()
        brightness = [image[mask == value].mean() for value in (phantom.BACKGROUND, phantom.RIM, phantom.CUP)]
        assert brightness == sorted(brightness)


def test_uniform_and_normal_draws() -> None:
    unit, normal = phantom.Draws("a").unit(20_000), phantom.Draws("b").normal(20_000)
    assert unit.min() >= 0 and unit.max() < 1 and abs(unit.mean() - 0.5) < 0.01
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03


def _pairs(camera: str, letter: str, numbers: range, size: int = 64) -> Pairs:
    drawn = [phantom.draw_pair(camera, f"{letter}{n:03d}", 96) for n in numbers]
    images = np.stack([np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS)) for image, _ in drawn])
    masks = np.stack([resize_classes((mask < 192).astype(np.uint8) + (mask < 64), REFUGE, size) for _, mask in drawn])
    ids = tuple(map(str, numbers))
    return Pairs(images, masks, ids, pd.DataFrame({"case_id": ids}))


@pytest.mark.nightly
def test_source_segmenter_falls_on_every_target_and_a_target_segmenter_does_not(tmp_path: Path) -> None:
    import torch

    from alignflow_core.networks.segmenters import build_segmenter, mean_dice, predict
    from alignflow_core.runner import Context
    from alignflow_core.segmenter_fit import Diet, fit

    segment, training = Segment(), Training(steps=400, batch=16, lr=2e-3, warm_up=40, ema=0.98)  # profile cpu
    context = Context(None, tmp_path, tmp_path, lambda metrics, step: None, lambda done, total, note: None)

    def trained(camera: str, train: Pairs, val: Pairs) -> torch.nn.Module:
        weights, _ = fit(Diet(train), val, REFUGE, segment.network, training, Machine(device="cpu", threads=1), (0, "segment", camera),
                         tmp_path / camera, context)
        model = build_segmenter(2, segment.network, 0)
        model.load_state_dict(weights)
        return model

    def dice(model: torch.nn.Module, test: Pairs) -> float:
        return float(mean_dice(predict(model, test.images, REFUGE, torch.device("cpu")), test.labels, REFUGE).mean())

    source = trained("standard", _pairs("standard", "s", range(154)), _pairs("standard", "s", range(154, 187)))
    at_home = dice(source, _pairs("standard", "s", range(187, 220)))
    assert at_home > 0.9
    for camera in phantom.TARGETS:
        test = _pairs(camera, "t", range(80, 160))
        assert dice(source, test) < at_home - 0.15
        native = trained(camera, _pairs(camera, "t", range(64)), _pairs(camera, "t", range(64, 80)))
        assert dice(native, test) > at_home - 0.05
