"""Encoders: standardised features of wholes and regions, every registered encoder on real images, weights from a local folder."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alignflow_core.config import Network, SegmenterNetwork, Task
from alignflow_core.errors import InputError
from alignflow_core.networks import velocity_unet
from alignflow_core.networks.segmenters import build_segmenter
from alignflow_core.reward import pretrained, regions, registry, self_supervised
from alignflow_core.reward.encoders import Material, Standardised, _on_grid, build, pool
from alignflow_core.reward.statconv import StatConv

NETWORK = Network(channels=(8, 16), attention=(False, False), head_channels=8)


def pictures(n: int, seed: int) -> torch.Tensor:
    """Smooth random colours of varying contrast, [n, 3, 32, 32]."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=draw) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=32, mode="bilinear") * torch.linspace(0.3, 1, n).view(-1, 1, 1, 1)


def save_vit(folder: Path) -> Path:
    """A small DINOv2 with random weights, as ``save_pretrained`` writes it."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)).save_pretrained(folder)
    return folder


def test_published_weights_of_radimagenet(tmp_path: Path) -> None:
    """docs/extending.md: the conversion, of random weights named as the published ones are."""
    from monai.networks.nets import resnet50

    torch.manual_seed(0)
    theirs = resnet50(spatial_dims=2, n_input_channels=3, feed_forward=False, shortcut_type="B", bias_downsample=False, conv1_t_stride=2).eval()
    for norm in (module for module in theirs.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 2)
    places = {"conv1": 0, "bn1": 1} | {f"layer{i}": 3 + i for i in range(1, 5)}
    named = {f"backbone.{places[name.partition('.')[0]]}.{name.partition('.')[2]}": value for name, value in theirs.state_dict().items()}
    torch.save(named, tmp_path / "ResNet50.pt")
    *_, block = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "extending.md").read_text(), re.DOTALL)
    space: dict[str, Any] = {}
    exec(block, space)  # noqa: S102 (our own documentation)
    space["convert"](str(tmp_path / "ResNet50.pt"), str(tmp_path / "radimagenet"))
    encoder = pretrained.load(tmp_path / "radimagenet")
    images = pictures(2, 3)
    pooled = encoder.maps(images)[-1].mean((2, 3))
    expected = theirs(torch.nn.functional.interpolate(images, size=224, mode="bilinear"))
    assert pooled.shape == (2, 2048) and torch.allclose(pooled, expected, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    root = tmp_path_factory.mktemp("material")
    model = velocity_unet.build(3, 2, NETWORK, seed=0)
    velocity_unet.save(root / "stage1", model.state_dict(), 3, 2, NETWORK)
    return Material(pictures(40, 1), pictures(6, 2), root / "stage1", save_vit(root / "vit"), 0, root)


@pytest.mark.parametrize("name", registry.ENCODERS)
def test_every_encoder_is_standardised_frozen_and_differentiable(name: str, material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_supervised, "TRAINING", dataclasses.replace(self_supervised.TRAINING, steps=3, batch=8))
    monkeypatch.setattr(pretrained, "SIDE", 56)
    encoder = build(name, material)
    labels = (torch.arange(32).view(1, 1, 32) < 16).long().expand(40, 32, 32)
    standardised = Standardised(encoder, material.source, regions.from_labels(labels, 1))
    whole, left, right = standardised(material.source, regions.from_labels(labels, 1))
    for features in (whole, left, right):
        assert features.shape[0] == 40 and features.mean(0).abs().max() < 0.02
        assert features.std(0).median() == pytest.approx(1, abs=0.02)
    assert not any(p.requires_grad for p in encoder.parameters())
    again = Standardised(build(name, material), material.source, regions.from_labels(labels, 1))
    assert torch.allclose(again(material.source[:2], regions.from_labels(labels[:2], 1))[0], whole[:2], atol=1e-4)
    flat = torch.zeros(2, 3, 32, 32, requires_grad=True)
    sum(f.sum() for f in standardised(flat, regions.from_labels(labels[:2], 1))).backward()
    assert flat.grad is not None and flat.grad.isfinite().all() and flat.grad.abs().sum() > 0


def test_a_region_is_described_by_its_own_pixels_alone() -> None:
    """What happens outside a region hardly moves its features, and an absent region is left out."""
    images = torch.nn.functional.interpolate(pictures(12, 3), size=96, mode="bilinear")
    labels = torch.zeros(12, 96, 96).long()
    labels[:, 24:72, 24:72] = 1
    labels[5] = 0
    encoder = Standardised(StatConv(), images, regions.from_labels(labels, 1))
    membership = regions.from_labels(labels, 1)
    _, outside, inside = encoder(images, membership)
    assert len(outside) == 12 and len(inside) == 11
    changed = torch.where(membership[:, 1:] > 0, images, -images)
    _, outside2, inside2 = encoder(changed, membership)
    moved, moved2 = (inside2 - inside).abs().mean(), (outside2 - outside).abs().mean()
    assert moved < 0.3 * moved2, "only filters that reach over the border may see the outside"


def test_a_black_frame_does_not_count() -> None:
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    labels = torch.zeros(6, 32, 32, dtype=torch.long)
    labels[:, 10:22, 10:22] = 1
    encoder = Standardised(StatConv(), images, regions.from_labels(labels, 1))
    framed = images.clone()
    framed[..., :8], framed[:, :, :8] = -1, -1
    plain, dark = encoder(images, regions.from_labels(labels, 1)), encoder(framed, regions.from_labels(labels, 1))
    colours = slice(51, 57)  # after the layout: mean and deviation of the channels
    assert (plain[0][:, colours] - dark[0][:, colours]).abs().max() < 6  # a frame that counted would move these by tens
    assert (plain[1][:, :6] - dark[1][:, :6]).abs().max() < 6, "the background without its frame looks as before"


def test_pooling_by_hand() -> None:
    x = torch.tensor([[[[1.0, 3.0], [5.0, 100.0]]]])
    weights = torch.tensor([[[1.0, 1.0], [2.0, 0.0]]])
    mean, deviation = pool(x, weights)[0].tolist()
    assert mean == pytest.approx(3.5) and deviation == pytest.approx(((6.25 + 0.25 + 2 * 2.25) / 4) ** 0.5, abs=1e-4)


@pytest.mark.parametrize("cell", [8, 16, 32])
def test_a_small_region_in_large_cells_is_not_described_as_nothing(cell: int) -> None:
    region = torch.zeros(1, 256, 256)
    region[:, 100:103, 100:103] = 1  # the smallest that is described
    grid = torch.full((1, 1, 256 // cell, 256 // cell), 7.0)
    mean, deviation = pool(grid, _on_grid(region, grid))[0].tolist()
    assert mean == pytest.approx(7.0, rel=1e-5) and deviation < 0.01


def test_regions_of_labels_by_hand_and_without_wide_numbers() -> None:
    widths: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.numel() >= labels.numel():
                widths.append(made.element_size())
            return made

    labels = torch.tensor([[[0, 1], [2, 0]], [[2, 2], [2, 2]]], dtype=torch.uint8)
    with Watch():
        membership = regions.from_labels(labels, 2)
    assert max(widths) == 4 and membership.dtype == torch.float32
    assert membership.tolist() == torch.nn.functional.one_hot(labels.long(), 3).permute(0, 3, 1, 2).float().tolist()


def test_pseudo_regions_are_the_confident_pixels() -> None:
    inside = torch.tensor([0.95, 0.9, 0.5, 0.1]).view(1, 1, 2, 2)
    cup = torch.tensor([0.9, 0.02, 0.5, 0.9]).view(1, 1, 2, 2)
    nested = regions.class_probabilities(torch.cat([inside, cup], 1), Task(kind="refuge", classes=("disc", "cup"), nested=True))
    assert torch.allclose(nested.sum(1), torch.ones(1, 2, 2))
    assert (nested >= 0.8).long()[0].flatten(1).T.tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 0], [1, 0, 0]]
    flat = regions.class_probabilities(inside, Task())
    assert torch.allclose(flat[0, 1].flatten(), inside.flatten())
    model = build_segmenter(1, SegmenterNetwork((4, 8)), seed=0).eval()
    images = pictures(3, 4)
    membership = regions.from_segmenter(model, images, Task(), 0.5)
    assert torch.equal(membership.sum(1), torch.ones(3, 32, 32)), "at one half every pixel of a binary task is confident"
    mirrored = regions.from_segmenter(model, images.flip(3), Task(), 0.5)
    assert (mirrored.flip(3) == membership).float().mean() > 0.999, "averaged over flips"


def test_nt_xent_by_hand() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    expected = -np.log(np.e / (np.e + 2))  # partner has similarity 1, the two others 0
    assert float(self_supervised.nt_xent(a, a, 1.0)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["clip", "resnet", "swin"])
def test_pretrained_networks_of_other_shapes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel, ResNetConfig, ResNetModel, SwinConfig, SwinModel

    torch.manual_seed(0)
    if kind == "clip":
        CLIPVisionModel(CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=64,
                                         patch_size=16)).save_pretrained(tmp_path)
        (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}')
    elif kind == "swin":
        SwinModel(SwinConfig(image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 4],
                             window_size=4)).save_pretrained(tmp_path)
    else:
        ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")).save_pretrained(tmp_path)
    monkeypatch.setattr(pretrained, "SIDE", 64)
    encoder = pretrained.load(tmp_path).eval()
    assert encoder.mean.flatten().tolist() == pytest.approx([0.5] * 3 if kind == "clip" else pretrained.IMAGENET_MEAN)
    maps = encoder.maps(pictures(2, 1))
    assert [m.shape[0] for m in maps] == [2, 2] and all(m.ndim == 4 for m in maps)


@pytest.mark.parametrize("kind", ["clip", "vit", "siglip"])
def test_a_network_that_learnt_every_position_is_shown_images_of_its_own_size(kind: str, tmp_path: Path) -> None:
    import transformers

    model = getattr(transformers, {"clip": "CLIPVisionModel", "vit": "ViTModel", "siglip": "SiglipVisionModel"}[kind])
    model(model.config_class(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=70,
                             patch_size=16)).save_pretrained(tmp_path)
    assert [m.shape for m in pretrained.load(tmp_path).maps(pictures(2, 1))] == [(2, 32, 4, 4)] * 2


def test_missing_weights_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lacks config.json or model.safetensors"):
        pretrained.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match="cannot be loaded"):
        pretrained.load(tmp_path)
    save_vit(tmp_path / "vit")
    (tmp_path / "vit" / "model.safetensors").write_bytes((tmp_path / "vit" / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(InputError, match=r"vit cannot be loaded .*; mend the folder"):
        pretrained.load(tmp_path / "vit")


def test_without_a_network_the_hub_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="give a local folder"):
        pretrained.load("hub:facebook/dinov2-small")
