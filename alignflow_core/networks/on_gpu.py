"""Layers of a network in the form that a GPU wants: the same values and weights, and gradients that do not vary."""

import torch
from torch import Tensor, nn


class Doubled(nn.Module):
    """Nearest-neighbour upsampling by two, [B, C, H, W] -> [B, C, 2H, 2W], in channels-last layout.

    Its gradient is a sum over each four places. That of torch's own is a sorted scatter where algorithms are to be deterministic: 94 of 300 ms of a
    training step (docs/performance.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Copies along two axes of length two that become part of height and width."""
        batch, channels, height, width = x.shape
        rows = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(batch, height, 2, width, 2, channels)
        return rows.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


class ChannelGroupNorm(nn.GroupNorm):
    """Group normalisation that returns [B, C, H, W] in the layout and precision that it was given; for compiled networks.

    torch's own changes the layout, so that each convolution begins with a copy. Here an image is gone over twice in each direction: for the two
    moments of every channel, which then make up those of the groups, and for one product and one sum (docs/decisions/0017-one-gpu.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Statistics are of single precision."""
        wide, grouped = x.float(), (x.shape[0], self.num_groups, -1)
        mean, square = (moment.reshape(grouped).mean(2, keepdim=True) for moment in (wide.mean((2, 3)), wide.square().mean((2, 3))))
        variance = (square - mean.square()).clamp(min=0.0)
        scale = self.weight.reshape(1, *grouped[1:]) * torch.rsqrt(variance + self.eps)
        shift = self.bias.reshape(1, *grouped[1:]) - mean * scale
        return (wide * scale.reshape(x.shape[0], -1, 1, 1) + shift.reshape(x.shape[0], -1, 1, 1)).to(x.dtype)


def suit_gpu(model: nn.Module, compiled: bool) -> None:
    """Put such layers in place of torch's own, and fused attention in place of MONAI's; names and weights stay."""
    for parent in model.modules():
        if hasattr(parent, "use_flash_attention"):  # its matrices of all pairs of places take most of the memory at 32 px
            parent.use_flash_attention = True  # type: ignore[assignment]
        for name, child in parent.named_children():
            if isinstance(child, nn.Upsample) and child.mode == "nearest" and child.size is None and child.scale_factor in (2.0, (2.0, 2.0)):
                setattr(parent, name, Doubled())
            elif compiled and type(child) is nn.GroupNorm and child.affine:
                child.__class__ = ChannelGroupNorm
