"""T2I-Adapter (arXiv 2302.08453): a frozen unconditional painter and a small side encoder whose features are added to the encoder's.

One feature map a level, added at the end of the level before it is halved (section 3.2), so that it reaches both the deeper levels
and the skip connection. Their pixel-unshuffle to the latent's grid has no counterpart in pixel space.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from alignflow_core.config import Network
from alignflow_core.networks.velocity_unet import SOURCE, VelocityUNet
from alignflow_core.painters.residual import ResidualBlock

BLOCKS = 2  # residual blocks a level, as in the paper


class T2IAdapterPainter(VelocityUNet):
    """``unet``: the base; ``adapter``: the side encoder."""

    def __init__(self, channels: int, cond_channels: int, network: Network) -> None:
        super().__init__(channels, 0, network)
        self.cond_channels = cond_channels
        self.adapter = Adapter(cond_channels, network.channels)

    def adopt_base(self, weights: dict[str, Tensor]) -> None:
        """Take the base's weights and freeze them."""
        self.load_state_dict(weights, strict=False)
        self.unet.requires_grad_(False)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor, domain: int = SOURCE) -> Tensor:
        """Prediction [B, C, H, W]."""
        with self._adding(self.adapter(cond.to(x_t))):
            found: Tensor = self.unet(x_t, timesteps=t * 1000, class_labels=torch.full(t.shape, domain, device=t.device))
        return found

    @contextlib.contextmanager
    def _adding(self, features: list[Tensor]) -> Iterator[None]:
        """Add a feature map to the output of the last block of each level of the base's encoder."""
        last = [(level.attentions if hasattr(level, "attentions") else level.resnets)[-1] for level in self.unet.down_blocks]
        hooks = [module.register_forward_hook(lambda _, __, out, f=f: out + f) for module, f in zip(last, features, strict=True)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class Adapter(nn.Module):
    """Condition [B, D, H, W] -> one feature map a level, each half the size of the one before."""

    def __init__(self, cond_channels: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(cond_channels, channels[0], 3, padding=1)
        self.levels = nn.ModuleList(nn.Sequential(*(ResidualBlock(a if i == 0 else b, b) for i in range(BLOCKS)))
                                    for a, b in zip((channels[0], *channels), channels, strict=False))

    def forward(self, cond: Tensor) -> list[Tensor]:
        """Feature maps from the finest to the coarsest."""
        found, x = [], self.stem(cond)
        for number, level in enumerate(self.levels):
            x = level(nn.functional.avg_pool2d(x, 2) if number else x)
            found.append(x)
        return found


def build(channels: int, cond_channels: int, network: Network) -> T2IAdapterPainter:
    """The paper's comparator."""
    return T2IAdapterPainter(channels, cond_channels, network)
