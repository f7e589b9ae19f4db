"""Spatially-adaptive normalisation (SPADE, arXiv 1903.07291) in the decoder, by MONAI's ``SPADEDiffusionModelUNet``."""

from typing import Any

import torch
from torch import Tensor, nn

from alignflow_core.config import Network
from alignflow_core.networks.velocity_unet import SOURCE, VelocityUNet

INTERMEDIATE = 32  # channels between mask and modulation; MONAI's default of 128 would double the network


class Spade(VelocityUNet):
    """The trunk with normalisations of its up path modulated by the condition."""

    def __init__(self, channels: int, cond_channels: int, network: Network) -> None:
        from monai.networks.nets import SPADEDiffusionModelUNet

        nn.Module.__init__(self)
        self.cond_channels = cond_channels
        self.unet: Any = SPADEDiffusionModelUNet(
            spatial_dims=2, in_channels=channels, out_channels=channels, label_nc=cond_channels, channels=network.channels,
            attention_levels=network.attention, num_res_blocks=network.n_res_blocks, num_head_channels=network.head_channels,
            norm_num_groups=network.norm_groups, num_class_embeds=2, spade_intermediate_channels=INTERMEDIATE)
        nn.init.zeros_(self.unet.class_embedding.weight)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor, domain: int = SOURCE) -> Tensor:
        """Prediction [B, C, H, W]."""
        found: Tensor = self.unet(x_t, timesteps=t * 1000, seg=cond.to(x_t), class_labels=torch.full(t.shape, domain, device=t.device))
        return found


def build(channels: int, cond_channels: int, network: Network) -> Spade:
    """Trained as a whole, like ``concat``."""
    return Spade(channels, cond_channels, network)
