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


class SamplingGroupNorm(nn.GroupNorm):
    """Group normalisation that, without gradient, returns [B, C, H, W] in the layout and precision that it was given; for compiled networks.

    torch's own changes the layout, so that each convolution begins with a copy. With gradient it is torch's own: the gradient of these sums was
    slower than those copies (docs/decisions/0017-one-gpu.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Statistics are of single precision."""
        if torch.is_grad_enabled():
            return super().forward(x)
        groups = x.unflatten(1, (self.num_groups, -1)).float()
        variance, mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0, keepdim=True)
        normal = ((groups - mean) * torch.rsqrt(variance + self.eps)).flatten(1, 2)
        return (normal * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def suit_gpu(model: nn.Module, compiled: bool) -> None:
    """Put such layers in place of torch's own, and fused attention in place of MONAI's; names and weights stay."""
    for parent in model.modules():
        if hasattr(parent, "use_flash_attention"):  # its matrices of all pairs of places take most of the memory at 32 px
            parent.use_flash_attention = True  # type: ignore[assignment]
        for name, child in parent.named_children():
            if isinstance(child, nn.Upsample) and child.mode == "nearest" and child.size is None and child.scale_factor in (2.0, (2.0, 2.0)):
                setattr(parent, name, Doubled())
            elif compiled and type(child) is nn.GroupNorm and child.affine:
                child.__class__ = SamplingGroupNorm
