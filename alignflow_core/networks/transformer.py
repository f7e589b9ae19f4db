"""Segmentation networks of the package ``transformers`` as region segmenters, drawn or from a local folder. Needs the extra ``encoders``."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from alignflow_core.artifact import read_json
from alignflow_core.errors import InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Drawn from torch's global generator, they would make a step depend on those before it: a resumed training would be another one.
RANDOM = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob", "semantic_classifier_dropout", "drop_path_rate")


class RegionLogits(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> logits [B, C, H, W].

    Args:
        model: of ``transformers``; its output has ``logits`` [B, C, h, w], which are enlarged bilinearly.
        step: the sides that it sees are multiples of it; other images are enlarged to the next one first.
        mean, std: of the images it was trained on, scaled to [0, 1]; those of a network that is trained anew leave them in [-1, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, step: int, mean: tuple[float, ...] = (0.5,) * 3, std: tuple[float, ...] = (0.5,) * 3) -> None:
        super().__init__()
        self.model, self.step = model, step
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every region."""
        size = list(images.shape[2:])
        seen = [-(-side // self.step) * self.step for side in size]
        x = ((images + 1) / 2 - self.mean) / self.std
        if seen != size:
            x = nn.functional.interpolate(x, size=seen, mode="bilinear", align_corners=False)
        return nn.functional.interpolate(self.model(x).logits, size=size, mode="bilinear", align_corners=False)


def library(kind: str) -> Any:
    """The package, or an :class:`InputError` that says how to get it."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import transformers
    except ImportError as error:
        raise InputError(f"segmenter {kind}: needs the package transformers; install the extra 'encoders' (pip install -e '.[encoders]') or leave "
                         f"{kind} out of segment.architectures") from error
    return transformers


def configured(kind: str, layout: dict[str, Any], n_classes: int) -> Any:
    """Configuration of ``transformers`` from plain data, with one output per region and nothing random in training."""
    config = library(kind).AutoConfig.for_model(kind, **{name: value for name, value in layout.items() if name != "model_type"})
    config.num_labels = n_classes
    for name in RANDOM:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


def read_layout(kind: str, folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder of weights, as plain data.

    Raises:
        InputError: a file is missing, or it is of another kind of network.
    """
    if not all((folder / file).is_file() for file in ("config.json", "model.safetensors")):
        raise InputError(f"network.weights.{kind}: {folder} lacks config.json or model.safetensors; give a local folder as transformers' "
                         "save_pretrained writes it")
    layout: dict[str, Any] = read_json(folder / "config.json")
    if layout.get("model_type") != kind:
        raise InputError(f"network.weights.{kind}: {folder} holds a network of type '{layout.get('model_type')}'; give one of type '{kind}' "
                         "or name the folder under its own architecture")
    return layout


def pretrained(kind: str, model_class: Any, folder: Path, n_classes: int) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """Network whose encoder is the folder's, with mean and deviation of its input; what the folder lacks or has in another shape, as heads for
    other classes, is drawn.

    Raises:
        InputError: missing, unreadable or foreign weights.
    """
    config = configured(kind, read_layout(kind, folder), n_classes)
    try:
        model, found = model_class.from_pretrained(str(folder), config=config, use_safetensors=True, local_files_only=True,
                                                   ignore_mismatched_sizes=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"network.weights.{kind}: {folder} cannot be loaded ({' '.join(str(error).split())[:300]}); mend the folder") from error
    lacking = [name for name in found["missing_keys"] if name.startswith(f"{model.base_model_prefix}.")]
    if lacking:
        raise InputError(f"network.weights.{kind}: {folder} lacks weights of the encoder ({len(lacking)}, such as {lacking[0]}); "
                         "give a folder whose model.safetensors fits its config.json")
    file = folder / "preprocessor_config.json"
    statistics = read_json(file) if file.is_file() else {}
    return model, tuple(statistics.get("image_mean", IMAGENET_MEAN)), tuple(statistics.get("image_std", IMAGENET_STD))
