"""MONAI's residual U-Net (Kerfoot et al. 2018, after Ronneberger et al., arXiv 1505.04597)."""

from typing import Any

from torch import nn

from alignflow_core.config import SegmenterNetwork


def build(n_classes: int, network: SegmenterNetwork, layout: dict[str, Any] | None = None) -> nn.Module:
    """[B, 3, H, W] -> [B, C, H, W]; sides must be multiples of 2 to the power of the levels after the first."""
    from monai.networks.nets import UNet

    return UNet(spatial_dims=2, in_channels=3, out_channels=n_classes, channels=network.channels,
                strides=(2,) * (len(network.channels) - 1), num_res_units=1, norm=network.norm)
