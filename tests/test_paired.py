"""Paired measures: equal to torchmetrics, and known answers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter
from torch import nn

from alignflow_core.errors import InputError
from alignflow_core.metrics.paired import BETAS, ms_ssim, n_scales, paired, psnr, ssim
from alignflow_core.metrics.perceptual import BACKBONES, lpips, lpips_standin, weight_shapes


def pictures(n: int, height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Smooth random pictures and noisy, shifted versions of them."""
    rng = np.random.default_rng(seed)
    base = gaussian_filter(rng.normal(size=(n, height, width, 3)), (0, 3, 3, 0)) * 500 + 120
    other = np.roll(base, 1, axis=2) * rng.uniform(0.7, 1.1, (n, 1, 1, 3)) + rng.normal(0, 12, base.shape)
    return base.clip(0, 255).astype(np.uint8), other.clip(0, 255).astype(np.uint8)


def tensors(*images: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(each).permute(0, 3, 1, 2).double() for each in images]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (37, 90), (180, 177)])
def test_psnr_and_ssim_equal_torchmetrics(height: int, width: int) -> None:
    peer = pytest.importorskip("torchmetrics.functional.image")
    a, b = pictures(3, height, width)
    x, y = tensors(a, b)
    theirs = peer.peak_signal_noise_ratio(x, y, data_range=255.0, reduction="none", dim=(1, 2, 3)).numpy()
    np.testing.assert_allclose(psnr(a, b), theirs, atol=1e-5)
    theirs = peer.structural_similarity_index_measure(x, y, data_range=255.0, reduction="none").numpy()
    np.testing.assert_allclose(ssim(a, b), theirs, atol=1e-5)


@pytest.mark.parametrize(("side", "scales"), [(176, 5), (191, 5), (100, 4), (64, 3), (40, 2), (16, 1)])
def test_ms_ssim_equals_torchmetrics_with_the_betas_of_its_scales(side: int, scales: int) -> None:
    peer = pytest.importorskip("torchmetrics.functional.image")
    a, b = pictures(2, side, side + 3, seed=side)
    assert n_scales(a) == scales
    betas = tuple(BETAS) if scales == 5 else tuple(BETAS[:scales] / BETAS[:scales].sum())
    theirs = peer.multiscale_structural_similarity_index_measure(*tensors(a, b), data_range=255.0, reduction="none", betas=betas).numpy()
    np.testing.assert_allclose(ms_ssim(a, b), theirs, atol=1e-5)


def test_known_answers() -> None:
    flat = np.full((1, 32, 32, 3), 100, np.uint8)
    assert psnr(flat, flat + 10)[0] == pytest.approx(20 * np.log10(25.5))
    c1 = (0.01 * 255) ** 2  # without texture only the luminance term is left
    expected = (2 * 100 * 110 + c1) / (100 ** 2 + 110 ** 2 + c1)
    assert ssim(flat, flat + 10)[0] == pytest.approx(expected)
    assert ms_ssim(flat, flat + 10)[0] == pytest.approx(expected ** (BETAS[1] / BETAS[:2].sum()))
    a, _ = pictures(2, 48, 48)
    same = paired(a, a)
    assert np.isposinf(same["psnr"]).all() and same["lpips_standin"].tolist() == [0, 0]
    np.testing.assert_allclose([same["ssim"], same["ms_ssim"]], 1)


def test_contrast_that_is_reversed_counts_as_nothing_in_ms_ssim() -> None:
    a, _ = pictures(1, 64, 64)
    assert ssim(a, 255 - a)[0] < 0 and ms_ssim(a, 255 - a)[0] == 0


def test_too_small_images_give_nan_and_other_arrays_are_refused() -> None:
    a, b = pictures(2, 10, 40)
    assert np.isnan([ssim(a, b), ms_ssim(a, b)]).all() and np.isfinite(psnr(a, b)).all()
    assert {name: values.shape for name, values in paired(a[:0], b[:0]).items()} == dict.fromkeys(("psnr", "ssim", "ms_ssim", "lpips_standin"), (0,))
    for wrong in (b[:1], b.astype(float), b[..., :1]):
        with pytest.raises(ValueError, match="uint8"):
            paired(a, wrong)


def test_the_standin_grows_with_damage_and_sees_each_pair_alone() -> None:
    a, b = pictures(20, 64, 64)
    blurred = [np.stack([gaussian_filter(each, (s, s, 0)) for each in a]) for s in (0.7, 1.5, 3)]
    found = np.array([lpips_standin(each, a) for each in (a, *blurred)])
    assert (np.diff(found, axis=0) > 0).all() and (found < 4).all()
    tinted = np.stack([a[..., 0], a[..., 1], a[..., 2] // 2], axis=-1)
    assert (lpips_standin(tinted, a) > 0.005).all()
    np.testing.assert_allclose(lpips_standin(a, b), lpips_standin(b, a))
    np.testing.assert_allclose(lpips_standin(a[3:4], b[3:4])[0], lpips_standin(a, b)[3], rtol=1e-5)


def feature_stack(backbone: str) -> nn.Sequential:
    """Layers in torchvision's order and numbering, with random weights."""
    layers: list[nn.Module] = []
    for layer in BACKBONES[backbone]:
        if layer.pool:
            layers.append(nn.MaxPool2d(layer.pool, 2))
        assert len(layers) == layer.index
        out, before, side, _ = layer.shape
        layers += [nn.Conv2d(before, out, side, layer.stride, layer.padding), nn.ReLU()]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_lpips_equals_torchmetrics_with_its_own_linear_weights(backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = pytest.importorskip("torchmetrics.functional.image.lpips")
    torch.manual_seed(3)
    stack = feature_stack(backbone)
    monkeypatch.setattr(peer, "_get_tv_model_features", lambda net, pretrained=False: stack)
    network = peer._LPIPS(net=backbone, pretrained=True, pnet_rand=True)
    weights = {f"features.{name}": tensor for name, tensor in stack.state_dict().items()}
    weights |= {f"lin{i}.weight": getattr(network, f"lin{i}").model[-1].weight.data for i in range(5)}
    save_file(weights, tmp_path / "lpips.safetensors")
    a, b = pictures(3, 64, 70)
    theirs = network(*[each.float() / 127.5 - 1 for each in tensors(a, b)]).flatten().numpy()
    found = paired(a, b, tmp_path / "lpips.safetensors")["lpips"]
    assert (theirs > 1e-4).all()
    np.testing.assert_allclose(found, theirs, rtol=1e-4)
    np.testing.assert_allclose(lpips(a, a, tmp_path / "lpips.safetensors"), 0)


def test_layers_are_torchvisions() -> None:
    assert [layer.index for layer in BACKBONES["alex"]] == [0, 3, 6, 8, 10]
    assert [layer.index for layer in BACKBONES["vgg"] if layer.tap] == [2, 7, 14, 21, 28]
    assert len(weight_shapes("alex")) == 15 and weight_shapes("vgg")["features.28.weight"] == (512, 512, 3, 3)


def test_weights_that_are_none_are_refused_with_a_remedy(tmp_path: Path) -> None:
    a, b = pictures(1, 40, 40)
    file = tmp_path / "weights.safetensors"
    with pytest.raises(InputError, match=r"docs/metrics\.md"):
        lpips(a, b, file)
    file.write_bytes(b"\x80\x04pickle")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        lpips(a, b, file)
    shapes = weight_shapes("alex")
    save_file({name: torch.zeros(shape) for name, shape in shapes.items() if name != "lin3.weight"}, file)
    with pytest.raises(InputError, match=r"lacks 1 tensors of LPIPS, the first lin3\.weight \[1, 256, 1, 1\]"):
        lpips(a, b, file)
    with pytest.raises(InputError, match="32 pixels"):
        lpips(a[:, :20], b[:, :20], file)
