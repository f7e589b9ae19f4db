"""Pretrained encoders in the ``transformers`` format: DINOv2, CLIP, RadImageNet or any other, from a folder or on request from the hub.

``align.encoder_weights`` is a folder with ``config.json`` and ``model.safetensors``, or ``hub:OWNER/NAME[@REVISION]``.
Only safetensors are read: neither pickle nor TorchScript, which can run code. Needs the extra ``encoders``.
"""

import inspect
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional

from alignflow_core.errors import InputError
from alignflow_core.reward.encoders import Encoder, Material

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 224  # the size at which such encoders are mostly trained; those that know no other than theirs are shown that


class Pretrained(Encoder):
    """Maps: the middle and the last hidden state, tokens laid out as images; class and register tokens are left out.

    Args:
        model: vision model of ``transformers`` that returns hidden states [B, C, H, W] or [B, T, C].
        patch: side of a patch in pixels; 0 for convolutional models.
        side: of the images that it is shown.
        mean, std: of its input channels, for images in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: torch.nn.Module, patch: int, side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model, self.patch, self.side = model, patch, side
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def maps(self, images: Tensor) -> list[Tensor]:
        """See :class:`Encoder`."""
        states = self._hidden(images)
        return [self._as_map(states[i]) for i in (len(states) // 2, -1)]

    def _hidden(self, images: Tensor) -> tuple[Tensor, ...]:
        x = functional.interpolate((images + 1) / 2, size=(self.side, self.side), mode="bilinear", align_corners=False, antialias=False)
        states: tuple[Tensor, ...] = self.model((x - self.mean) / self.std, output_hidden_states=True).hidden_states
        return states

    def _as_map(self, state: Tensor) -> Tensor:
        if state.ndim == 4:
            return state
        side = min(self.side // self.patch, math.isqrt(state.shape[1]))  # class and register tokens come first; Swin's later maps are smaller
        return state[:, -side * side:].transpose(1, 2).unflatten(2, (side, side))


def build(material: Material) -> Pretrained:
    """The encoder that ``align.encoder_weights`` names."""
    return load(material.weights)


def load(weights: str | Path | None) -> Pretrained:
    """Read a vision model and the statistics of its input.

    Raises:
        InputError: package, folder, weights or network missing; each with its remedy.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import transformers
        from transformers.utils import cached_file
    except ImportError as error:
        raise InputError("align.encoder pretrained: needs the package transformers; install the extra 'encoders' (pip install -e '.[encoders]') "
                         "or choose the encoder statconv, flow or ssl") from error
    name, from_hub = str(weights).removeprefix("hub:"), str(weights).startswith("hub:")
    name, _, revision = name.partition("@") if from_hub else (name, "", "")
    if not from_hub and not all((Path(name) / file).is_file() for file in ("config.json", "model.safetensors")):
        raise InputError(f"align.encoder_weights: {name} lacks config.json or model.safetensors; give a folder as "
                         "transformers' save_pretrained writes it, or hub:OWNER/NAME where the network may be used")
    options: dict[str, Any] = {"local_files_only": not from_hub} | ({"revision": revision} if revision else {})
    try:
        model = transformers.AutoModel.from_pretrained(name, use_safetensors=True, **options)
        statistics = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"align.encoder_weights: {name} cannot be loaded ({reason}); "
                         "mend the folder, or without a network give a local folder instead of hub:") from error
    model = getattr(model, "vision_model", model)  # of CLIP only the half that sees
    found = json.loads(Path(statistics).read_text(encoding="utf-8")) if statistics else {}
    patch = getattr(model.config, "patch_size", 0)
    mean, std = (tuple(found.get(name, usual)) for name, usual in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)))
    return Pretrained(model, patch, _side(model, patch), mean, std)


def _side(model: torch.nn.Module, patch: int) -> int:
    """Side of the images that a vision model is shown: its own where it learnt a position for each patch, else :data:`SIDE` in whole patches.

    Such models of ``transformers`` take ``interpolate_pos_encoding``; Swin does too, and has absolute positions only on request.
    """
    config: Any = model.config
    own = getattr(config, "image_size", None)
    fixed = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters and getattr(config, "use_absolute_embeddings", True)
    return own if fixed and isinstance(own, int) else SIDE - SIDE % patch if patch else SIDE
