"""Segmenter architectures: alike in size, equal by seed, trained by one loop, with weights of a local folder or drawn."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from alignflow_core.checkpoint import load_network
from alignflow_core.config import Machine, Segment, SegmenterNetwork, Task, Training, build_project
from alignflow_core.errors import InputError
from alignflow_core.networks.registry import ARCHITECTURES, prefix
from alignflow_core.networks.segmenters import build_segmenter, load_segmenter, mean_dice, predict, rooted, save_segmenter
from alignflow_core.pairs import Pairs
from alignflow_core.runner import Context
from alignflow_core.segmenter_fit import COLUMNS, Diet, fit, fit_arms
from alignflow_core.stages import source_files

TASK, CPU = Task(), torch.device("cpu")
SMALL = SegmenterNetwork((8, 16))
TRANSFORMERS = tuple(name for name in ARCHITECTURES if name != "unet")
pytestmark = pytest.mark.filterwarnings("ignore:.*upsample.*")


def of(name: str, network: SegmenterNetwork = SMALL) -> SegmenterNetwork:
    return dataclasses.replace(network, architecture=name)


def count(network: SegmenterNetwork) -> int:
    return sum(each.numel() for each in build_segmenter(2, network, 0).parameters())


def test_the_documented_example_runs() -> None:
    """docs/extending.md: a segmenter of one's own."""
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "extending.md").read_text(), re.DOTALL)
    space: dict[str, Any] = {}
    exec(next(block for block in blocks if "SegmenterNetwork" in block), space)  # noqa: S102 (our own documentation)
    assert space["build"](2, SMALL)(torch.zeros(3, 3, 8, 8)).shape == (3, 2, 8, 8)


def discs(n: int, seed: int, size: int = 32) -> Pairs:
    """n images of a bright disc on a dark ground."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    centre, radius = rng.uniform(11, 21, (n, 2, 1, 1)), rng.uniform(5, 9, (n, 1, 1))
    masks = ((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 <= radius**2).astype(np.uint8)
    images = (60 + 110 * masks[..., None] + rng.normal(0, 12, (n, size, size, 3))).clip(0, 255).astype(np.uint8)
    ids = tuple(f"{seed}-{i}" for i in range(n))
    return Pairs(images, masks, ids, pd.DataFrame({"case_id": ids}))


def context(folder: Path) -> Context:
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    return Context(None, folder, work, lambda metrics, step: None, lambda done, total, note: None)


@pytest.mark.parametrize("channels", [(16, 32, 64, 128), (32, 64, 128, 256, 512)])
def test_architectures_have_about_as_many_parameters_as_the_unet(channels: tuple[int, ...]) -> None:
    unet = count(SegmenterNetwork(channels))
    found = {name: count(of(name, SegmenterNetwork(channels))) / unet for name in TRANSFORMERS}
    assert all(0.7 < ratio < 1.3 for ratio in found.values()), found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_have_the_size_of_the_images(name: str) -> None:
    model = build_segmenter(2, of(name, SegmenterNetwork()), 0).eval()
    with torch.no_grad():
        for side in (24, 32, 40, 256):
            assert model(torch.zeros(1, 3, side, side)).shape == (1, 2, side, side)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_seed_gives_the_same_weights(name: str) -> None:
    one, same, other = (build_segmenter(1, of(name), seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[key], same[key]) for key in one) and any(not torch.equal(one[key], other[key]) for key in one)
    before = torch.get_rng_state()
    build_segmenter(1, of(name), 3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_nothing_is_random_in_training(name: str) -> None:
    """A step depends on its number alone; else a resumed training would be another one."""
    model, x = build_segmenter(1, of(name), 0).train(), torch.randn(4, 3, 32, 32)
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_learns(name: str, tmp_path: Path) -> None:
    training = Training(steps=50, batch=8, lr=5e-3, warm_up=5, ema=0.8)
    weights, dice = fit(Diet(discs(40, 0)), discs(16, 1), TASK, of(name), training, Machine(device="cpu", threads=1), (0, "test", name, 0),
                        tmp_path / "state.safetensors", context(tmp_path), check_every=25)
    model = build_segmenter(1, of(name), 0)
    model.load_state_dict(weights)
    test = discs(16, 2)
    assert dice > 0.8 and mean_dice(predict(model, test.images, TASK, CPU), test.labels, TASK).mean() > 0.8


def test_fit_arms_keeps_the_folders_and_seeds_of_the_unet(tmp_path: Path) -> None:
    training = Training(steps=3, batch=4, warm_up=1, save_every=2)
    settings = Segment(architectures=("unet", "dpt"), seeds=2, network=SMALL, training=training, check_every=3)
    config = SimpleNamespace(seed=5, machine=Machine(device="cpu", threads=1), task=TASK, segment=settings)
    source, validation = discs(12, 0), discs(6, 1)
    numbers = fit_arms(config, {"a+b": Diet(source, validation)}, {}, validation, tmp_path / "out", context(tmp_path))
    table = pd.read_parquet(tmp_path / "out" / "segmenters.parquet")
    assert tuple(table.columns) == COLUMNS and set(numbers) == {"val_dice/a_plus_b", "dpt/val_dice/a_plus_b"}
    assert table["folder"].tolist() == ["a+b/seed0", "a+b/seed1", "dpt/a+b/seed0", "dpt/a+b/seed1"]
    assert table["parameters"].tolist() == [sum(p.numel() for p in build_segmenter(1, of(name), 0).parameters()) for name in table["segmenter"]]
    assert table["segmenter"].tolist() == ["unet", "unet", "dpt", "dpt"] and table["n_synthetic"].eq(6).all()
    weights, _ = fit(Diet(source, validation), validation, TASK, SMALL, training, config.machine, (5, "segment", "a+b", 1),
                     tmp_path / "one.safetensors", context(tmp_path), 3)
    stored, _ = load_network(tmp_path / "out" / "a+b" / "seed1")
    assert all(torch.equal(weights[key], stored[key]) for key in weights)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Networks for five classes as ``transformers`` writes them."""
    import transformers

    root = tmp_path_factory.mktemp("weights")
    made = {}
    for name, kind in (("segformer", "SegformerForSemanticSegmentation"), ("dpt", "DPTForSemanticSegmentation")):
        model = build_segmenter(5, of(name), 7).model
        assert type(model) is getattr(transformers, kind)
        model.save_pretrained(root / name)
        (root / name / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}))
        made[name] = root / name
    return made


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_pretrained_encoder_from_a_folder(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    root = folders[name].parent
    network = dataclasses.replace(of(name, SegmenterNetwork()), weights={name: name})  # relative to the project; wider than the folder's
    model = build_segmenter(2, rooted(network, root), 0)
    drawn = build_segmenter(5, of(name), 7).state_dict()
    found = model.state_dict()
    encoder = [key for key in drawn if key.startswith(f"model.{name}.")]
    assert encoder and all(torch.equal(drawn[key], found[key]) for key in encoder), "the folder decides the layout and the encoder"
    assert model.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    save_segmenter(tmp_path / "stored", found, 2, network, TASK, root)
    loaded = load_segmenter(tmp_path / "stored", CPU)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), model.eval()(x)), "needs the folder no more: this root has none"


def test_wrong_folders_say_where_why_and_what_to_do(folders: dict[str, Path], tmp_path: Path) -> None:
    def told(name: str, folder: Path) -> str:
        with pytest.raises(InputError) as caught:
            build_segmenter(1, dataclasses.replace(of(name), weights={name: str(folder)}), 0)
        return str(caught.value)

    assert "nowhere lacks config.json or model.safetensors; give a local folder" in told("dpt", tmp_path / "nowhere")
    assert "type 'segformer'; give one of type 'dpt'" in told("dpt", folders["segformer"])
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((folders["dpt"] / "config.json").read_text())
    (broken / "model.safetensors").write_bytes(b"nonsense")
    assert f"{broken} cannot be loaded" in told("dpt", broken)
    (broken / "model.safetensors").write_bytes((folders["segformer"] / "model.safetensors").read_bytes())
    assert "lacks weights of the encoder" in told("dpt", broken)


def test_without_the_package_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[encoders\]'"):
        build_segmenter(1, of("segformer"), 0)
    build_segmenter(1, of("unet"), 0)


@pytest.mark.parametrize(("segment", "told"), [
    ({"architectures": ["unet", "segfomer"]}, "did you mean 'segformer'"),
    ({"architectures": []}, "at least 1"),
    ({"architectures": ["unet", "unet"]}, "names one twice"),
    ({"network": {"weights": {"unet": "folder"}}}, "network.weights: unknown value 'unet'"),
])
def test_configuration_is_checked(segment: dict, told: str) -> None:
    raw = {"source": "a", "domains": {"a": {"dir": "a"}, "b": {"dir": "b"}}, "targets": {"b": {"domain": "b"}}}
    with pytest.raises(InputError, match=told):
        build_project(raw | {"segment": segment})


def test_trained_segmenters_depend_on_the_architectures_files() -> None:
    files = {f"networks/{architecture.build.partition(':')[0].rpartition('.')[2]}.py" for architecture in ARCHITECTURES.values()}
    assert files <= set(source_files("segment_source")) and files <= set(source_files("evaluate"))


def test_numbers_of_the_first_architecture_have_plain_names() -> None:
    assert [prefix(name, "unet") for name in ("unet", "dpt")] == ["", "dpt/"]
