"""DPT: a plain vision transformer whose layers are reassembled to a pyramid and fused by convolutions (Ranftl et al. 2021, arXiv 2103.13413)."""

from pathlib import Path
from typing import Any

from torch import nn

from alignflow_core.config import SegmenterNetwork
from alignflow_core.networks.transformer import RegionLogits, configured, library, pretrained

PATCH, GRID = 8, 16  # pixels of a patch's side; patches of a side that positions are learnt for, other numbers are interpolated
DEPTH = 2  # transformer layers per level


def build(n_classes: int, network: SegmenterNetwork, layout: dict[str, Any] | None = None) -> nn.Module:
    """Square images [B, 3, H, H] -> [B, C, H, H], drawn anew or, with ``network.weights``, from a folder; ``layout`` is that of a stored network."""
    model_class = library("dpt").DPTForSemanticSegmentation
    if layout is None and "dpt" in network.weights:
        model, *statistics = pretrained("dpt", model_class, Path(network.weights["dpt"]), n_classes)
    else:
        model, statistics = model_class(configured("dpt", layout or _layout(network.channels), n_classes)), []
        _redraw(model)
    config: Any = model.config
    return RegionLogits(model, config.patch_size, *statistics)


def _layout(channels: tuple[int, ...]) -> dict[str, Any]:
    """One fusion level per level of the U-Net, narrower: about as many parameters as it has.

    Patches have 8 pixels where the paper's have 16, and levels twice the resolution in patches: working sizes are a tenth to a half of its 480 px.
    """
    n, width = len(channels), max(16, channels[-1] // 4)
    return {"hidden_size": width, "num_hidden_layers": DEPTH * n, "num_attention_heads": max(1, width // 16), "intermediate_size": 2 * width,
            "image_size": GRID * PATCH, "patch_size": PATCH, "backbone_out_indices": [DEPTH * (level + 1) - 1 for level in range(n)],
            "reassemble_factors": [2, *(0.5 ** level for level in range(n - 1))], "neck_hidden_sizes": [max(8, width // 2) for width in channels],
            "fusion_hidden_size": 3 * channels[0] // 2, "use_auxiliary_head": False}


def _redraw(model: nn.Module) -> None:
    """Torch's own first weights for the convolutions, noise for the positions.

    The library draws every weight with deviation 0.02 and sets positions to zero, which suits what is loaded over it: a narrow network
    drawn so passes next to nothing through its convolutions and learns late.
    """
    nn.init.trunc_normal_(model.dpt.embeddings.position_embeddings, std=0.02)  # type: ignore[union-attr,arg-type]
    for part in (model.neck, model.head):
        for module in part.modules():  # type: ignore[union-attr]
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                module.reset_parameters()
