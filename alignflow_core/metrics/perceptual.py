"""Perceptual distance of image pairs: LPIPS from local weights, and a stand-in that needs none and is never called LPIPS.

LPIPS (Zhang et al. 2018, arXiv 1801.03924) compares unit-normalised activations of a classification network, channel by channel
with learned weights. The weights are published, but neither in a package nor in a format that cannot run code; ``docs/metrics.md``
says how to make one safetensors file of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from alignflow_core.errors import InputError
from alignflow_core.pairs import to_unit

CHUNK = 16  # images at a time
LEAST_SIDE = 32  # below it AlexNet's second pooling has too little left
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # LPIPS' own normalisation of images in [-1, 1]


@dataclass(frozen=True)
class Convolution:
    """A rectified convolution of torchvision's feature stack.

    Attributes:
        index: its number there, as in ``features.<index>.weight``.
        shape: of its weight.
        pool: side of the maximum pooling before it, by 2; 0 for none.
        tap: LPIPS compares its output.
    """

    index: int
    shape: tuple[int, int, int, int]
    stride: int = 1
    padding: int = 1
    pool: int = 0
    tap: bool = True


def _vgg16() -> tuple[Convolution, ...]:
    """Blocks of 3 x 3 convolutions, each block after a pooling and tapped at its end."""
    layers, index, before = [], 0, 3
    for block, (width, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        for i in range(depth):
            layers.append(Convolution(index, (width, before, 3, 3), pool=2 if block and i == 0 else 0, tap=i == depth - 1))
            index, before = index + 2, width
        index += 1
    return tuple(layers)


BACKBONES: dict[str, tuple[Convolution, ...]] = {
    "alex": (Convolution(0, (64, 3, 11, 11), stride=4, padding=2), Convolution(3, (192, 64, 5, 5), padding=2, pool=3),
             Convolution(6, (384, 192, 3, 3), pool=3), Convolution(8, (256, 384, 3, 3)), Convolution(10, (256, 256, 3, 3))),
    "vgg": _vgg16(),
}


def weight_shapes(backbone: str) -> dict[str, tuple[int, ...]]:
    """Every tensor that a weights file of this backbone must have."""
    layers = BACKBONES[backbone]
    shapes: dict[str, tuple[int, ...]] = {f"features.{layer.index}.weight": layer.shape for layer in layers}
    shapes |= {f"features.{layer.index}.bias": layer.shape[:1] for layer in layers}
    return shapes | {f"lin{i}.weight": (1, layer.shape[0], 1, 1) for i, layer in enumerate(layer for layer in layers if layer.tap)}


def lpips(fake: np.ndarray, real: np.ndarray, weights: Path) -> np.ndarray:
    """LPIPS of N pairs, float64 [N], averaged over the image.

    Args:
        fake, real: uint8 [N, H, W, 3], at least 32 pixels a side. Not resized: values compare at one image size only.
        weights: safetensors file with the tensors of :func:`weight_shapes`, of AlexNet or VGG16.

    Raises:
        InputError: no such file, other tensors, or images too small.
    """
    if min(fake.shape[1:3]) < LEAST_SIDE:
        raise InputError(f"LPIPS needs images of {LEAST_SIDE} pixels a side, these have {min(fake.shape[1:3])}; use lpips_standin")
    tensors = load_weights(weights)
    layers = next(layers for layers in BACKBONES.values() if tensors["features.0.weight"].shape == layers[0].shape)
    importance = [tensors[f"lin{i}.weight"].view(-1, 1, 1) for i in range(sum(layer.tap for layer in layers))]
    shift, scale = (torch.tensor(x).view(1, 3, 1, 1) for x in (SHIFT, SCALE))

    def distance(a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(activations((a - shift) / scale, tensors, layers), activations((b - shift) / scale, tensors, layers), strict=True)
        return sum((((_unit(x) - _unit(y)).square() * weight).sum(1).mean((1, 2)) for (x, y), weight in zip(pairs, importance, strict=True)),
                   torch.zeros(len(a)))

    return _in_chunks(distance, fake, real)


def load_weights(file: Path) -> dict[str, Tensor]:
    """Tensors of a weights file, checked against AlexNet's and VGG16's names and shapes."""
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: not a readable safetensors file ({error}); docs/metrics.md says how to make one") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if not any(weight_shapes(backbone).items() <= shapes.items() for backbone in BACKBONES):
        wanted = min((weight_shapes(backbone).items() - shapes.items() for backbone in BACKBONES), key=len)
        name, shape = min(wanted)
        raise InputError(f"{file}: lacks {len(wanted)} tensors of LPIPS, the first {name} {list(shape)}; docs/metrics.md says how to make the file")
    return tensors


def activations(x: Tensor, tensors: dict[str, Tensor], layers: tuple[Convolution, ...]) -> list[Tensor]:
    """Tapped activations [B, C, H', W'] of normalised images [B, 3, H, W]."""
    found = []
    for layer in layers:
        if layer.pool:
            x = functional.max_pool2d(x, layer.pool, 2)
        weight, bias = tensors[f"features.{layer.index}.weight"], tensors[f"features.{layer.index}.bias"]
        x = functional.relu(functional.conv2d(x, weight, bias, layer.stride, layer.padding))
        if layer.tap:
            found.append(x)
    return found


def _unit(x: Tensor) -> Tensor:
    """Channels scaled to length 1 at every place."""
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


def _in_chunks(distance: Callable[[Tensor, Tensor], Tensor], fake: np.ndarray, real: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        parts = [distance(to_unit(fake[i:i + CHUNK]), to_unit(real[i:i + CHUNK])) for i in range(0, len(fake), CHUNK)]
    return torch.cat(parts).double().numpy() if parts else np.empty(0)


STANDIN_SCALES, STANDIN_WIDTH, STANDIN_SIDE, STANDIN_SEED = 4, 32, 5, 180103924
FLAT = 0.1  # added to the length of every feature vector, so that faint noise on black is not blown up to full contrast


def lpips_standin(fake: np.ndarray, real: np.ndarray) -> np.ndarray:
    """A distance built like LPIPS on fixed random filters instead of a trained network, float64 [N]. Not LPIPS: no value compares with it.

    At four scales (each half the one before) an image in [-1, 1] passes 32 orthonormal random 5 x 5 filters and a rectifier;
    responses are compared as unit vectors, squared differences averaged over places and scales. Its filters are not those of
    the reward encoder ``statconv``, but of the same kind: no judge of alignment.

    Args:
        fake, real: uint8 [N, H, W, 3]; scales smaller than a filter are left out.
    """
    filters = _random_filters()

    def distance(a: Tensor, b: Tensor) -> Tensor:
        found: list[Tensor] = []
        while len(found) < STANDIN_SCALES and min(a.shape[2:]) >= STANDIN_SIDE:
            x, y = (_softly_unit(functional.relu(functional.conv2d(each, filters))) for each in (a, b))
            found.append((x - y).square().sum(1).mean((1, 2)))
            a, b = functional.avg_pool2d(a, 2), functional.avg_pool2d(b, 2)
        return torch.stack(found).mean(0) if found else torch.full((len(a),), torch.nan)

    return _in_chunks(distance, fake, real)


def _random_filters() -> Tensor:
    """Orthonormal rows, [32, 3, 5, 5]; drawn by numpy, whose stream is the same on every platform."""
    drawn = np.random.Generator(np.random.PCG64(STANDIN_SEED)).normal(size=(3 * STANDIN_SIDE ** 2, STANDIN_WIDTH))
    columns = np.linalg.qr(drawn)[0]
    columns = columns * np.sign(columns[0])  # the sign is the library's choice
    return torch.from_numpy(columns.T.astype(np.float32).reshape(STANDIN_WIDTH, 3, STANDIN_SIDE, STANDIN_SIDE))


def _softly_unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + FLAT)
