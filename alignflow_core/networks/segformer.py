"""SegFormer: a hierarchical transformer with a decoder of linear layers (Xie et al. 2021, arXiv 2105.15203), from ``transformers``."""

from pathlib import Path
from typing import Any

from torch import nn

from alignflow_core.config import SegmenterNetwork
from alignflow_core.networks.transformer import RegionLogits, configured, library, pretrained


def build(n_classes: int, network: SegmenterNetwork, layout: dict[str, Any] | None = None) -> nn.Module:
    """[B, 3, H, W] -> [B, C, H, W], drawn anew or, with ``network.weights``, from a folder; ``layout`` is that of a stored network."""
    model_class = library("segformer").SegformerForSemanticSegmentation
    if layout is None and "segformer" in network.weights:
        model, *statistics = pretrained("segformer", model_class, Path(network.weights["segformer"]), n_classes)
    else:
        model, statistics = model_class(configured("segformer", layout or _layout(network.channels), n_classes)), []
    config: Any = model.config
    return RegionLogits(model, config.strides[0] * config.sr_ratios[0], *statistics)


def _layout(channels: tuple[int, ...]) -> dict[str, Any]:
    """One stage per level of the U-Net, of two layers at half its width: about as many parameters as it has.

    The first stage halves the image where the paper's quarters it: working sizes are a tenth to a half of the paper's 512 px.
    """
    widths = [max(8, width // 2) for width in channels]
    n = len(widths)
    return {"num_encoder_blocks": n, "hidden_sizes": widths, "depths": [2] * n, "mlp_ratios": [4] * n,
            "num_attention_heads": [max(1, width // 16) for width in widths], "patch_sizes": [7] + [3] * (n - 1), "strides": [2] * n,
            "sr_ratios": [max(1, 8 >> stage) for stage in range(n)], "decoder_hidden_size": widths[-1]}
