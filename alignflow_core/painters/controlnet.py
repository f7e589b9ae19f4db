"""ControlNet (arXiv 2302.05543): a frozen unconditional painter, a trained copy of its encoder fed with the mask, zero convolutions between.

MONAI's ``ControlNet`` in pixel space: the hint is not shrunk. At step 0 every output of the copy is zero, so the painter is the base.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from alignflow_core.config import Network
from alignflow_core.networks.velocity_unet import SOURCE, VelocityUNet
from alignflow_core.painters.residual import ResidualBlock

HINT_CHANNELS = 16


class ControlNetPainter(VelocityUNet):
    """``unet``: the base; ``control``: the copy."""

    def __init__(self, channels: int, cond_channels: int, network: Network, hint: Callable[[int, int], nn.Module] | None = None) -> None:
        from monai.networks.nets import ControlNet

        super().__init__(channels, 0, network)
        self.cond_channels = cond_channels
        self.control: Any = ControlNet(
            spatial_dims=2, in_channels=channels, channels=network.channels, attention_levels=network.attention, num_res_blocks=network.n_res_blocks,
            num_head_channels=network.head_channels, norm_num_groups=network.norm_groups, num_class_embeds=2,
            conditioning_embedding_in_channels=cond_channels, conditioning_embedding_num_channels=(HINT_CHANNELS,))
        if hint is not None:
            self.control.controlnet_cond_embedding = hint(cond_channels, network.channels[0])  # type: ignore[assignment]

    def adopt_base(self, weights: dict[str, Tensor]) -> None:
        """Take the base's weights, freeze them and start the copy from them."""
        self.load_state_dict(weights, strict=False)
        self.unet.requires_grad_(False)
        self.control.load_state_dict(self.unet.state_dict(), strict=False)

    def adopt_target(self) -> None:
        """As in :class:`VelocityUNet`, for base and copy."""
        super().adopt_target()
        with torch.no_grad():
            self.control.class_embedding.weight[1] = self.control.class_embedding.weight[0]

    def domain_embeddings(self) -> tuple[nn.Module, ...]:
        """Those of base and copy."""
        return self.unet.class_embedding, self.control.class_embedding

    def residuals(self, x_t: Tensor, t: Tensor, hint: Tensor, domain: int = SOURCE) -> list[Tensor]:
        """What the copy adds to the base's skip connections and, last, to its middle."""
        labels = torch.full(t.shape, domain, device=t.device)
        down, middle = self.control(x_t, timesteps=t * 1000, controlnet_cond=hint.to(x_t), class_labels=labels)
        return [*down, middle]

    def controlled(self, x_t: Tensor, t: Tensor, residuals: list[Tensor], domain: int = SOURCE) -> Tensor:
        """The base with these residuals added, [B, C, H, W]."""
        found: Tensor = self.unet(x_t, **_inputs(t, residuals, domain))
        return found

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor, domain: int = SOURCE) -> Tensor:
        """Prediction [B, C, H, W]."""
        return self.controlled(x_t, t, self.residuals(x_t, t, cond, domain), domain)


def _inputs(t: Tensor, residuals: list[Tensor], domain: int) -> dict[str, Any]:
    """What MONAI's U-Net is given beside x_t."""
    return {"timesteps": t * 1000, "class_labels": torch.full(t.shape, domain, device=t.device),
            "down_block_additional_residuals": tuple(residuals[:-1]), "mid_block_additional_residual": residuals[-1]}


class DenseHint(nn.Module):
    """Dense hint input of Siamese-Diffusion (arXiv 2505.06068): residual blocks in place of a few plain convolutions, a zero convolution last.

    Theirs merges patches down to the latent's grid; in pixel space there is nothing to shrink.
    """

    WIDTHS = (16, 32)

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, self.WIDTHS[0], 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(a, b) for a, b in zip((self.WIDTHS[0], *self.WIDTHS), self.WIDTHS, strict=False))
        self.out = nn.Conv2d(self.WIDTHS[-1], out_channels, 3, padding=1)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hint: Tensor) -> Tensor:
        """[B, D, H, W] -> [B, out_channels, H, W]."""
        found = self.stem(hint)
        for block in self.blocks:
            found = block(found)
        zero: Tensor = self.out(found)
        return zero


class DenseControlNetPainter(ControlNetPainter):
    """ControlNet with a dense hint, which takes a mask or an image: their channels side by side, the absent ones zero."""

    def __init__(self, channels: int, cond_channels: int, network: Network) -> None:
        super().__init__(channels, cond_channels + channels, network, DenseHint)
        self.cond_channels, self.image_channels = cond_channels, channels

    def adopt_base(self, weights: dict[str, Tensor]) -> None:
        """As a ControlNet, but the base's decoder is trained further, as Siamese-Diffusion's public code does (``sd_locked = False``)."""
        super().adopt_base(weights)
        for part in (self.unet.up_blocks, self.unet.out):
            part.requires_grad_(True)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor, domain: int = SOURCE) -> Tensor:
        """Prediction from the mask alone, the way it samples."""
        return self.controlled(x_t, t, self.residuals(x_t, t, self.mask_hint(cond), domain), domain)

    def held(self, x_t: Tensor, t: Tensor, residuals: list[Tensor]) -> Tensor:
        """As ``controlled``, but the base's weights take no gradient."""
        weights = {name: value.detach() for name, value in self.unet.named_parameters()}
        found: Tensor = functional_call(self.unet, weights, (x_t,), _inputs(t, residuals, SOURCE))
        return found

    def mask_hint(self, cond: Tensor) -> Tensor:
        """The mask, [B, D, H, W] -> [B, D + C, H, W]."""
        return torch.cat([cond, cond.new_zeros(len(cond), self.image_channels, *cond.shape[2:])], dim=1)

    def image_hint(self, image: Tensor, cond: Tensor) -> Tensor:
        """The image itself, [B, C, H, W] -> [B, D + C, H, W]."""
        return torch.cat([torch.zeros_like(cond), image], dim=1)


def build(channels: int, cond_channels: int, network: Network) -> ControlNetPainter:
    """The paper's comparator on either process."""
    return ControlNetPainter(channels, cond_channels, network)


def build_dense(channels: int, cond_channels: int, network: Network) -> DenseControlNetPainter:
    """What the ``siamese`` objective trains."""
    return DenseControlNetPainter(channels, cond_channels, network)
