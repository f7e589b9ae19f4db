"""The velocity model: MONAI's diffusion U-Net, the condition concatenated to the input.

Our choice (the paper names no backbone): one U-Net trained jointly with its condition. A ControlNet
on a small pixel-space base may never start to obey the mask. A two-row domain embedding joins the time
embedding: row 0 is the source, row 1 starts as its copy and is what stage 2 samples with. So the denoising
loss on source pairs holds the shared weights without pulling the target's colours back to the source's.
"""

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from alignflow_core.checkpoint import rebuilt, save_network
from alignflow_core.config import Network
from alignflow_core.flow.path import VelocityModel
from alignflow_core.painters.registry import CONDITIONERS
from alignflow_core.registry import load as load_registered

if TYPE_CHECKING:  # the conditioner of whoever names none: so that they depend on its file (``stages.source_files`` follows imports)
    from alignflow_core.painters import concat  # noqa: F401

SOURCE, TARGET = 0, 1


class VelocityUNet(nn.Module):
    """v(x_t, t, cond) for x_t [B, C, H, W], t [B] in [0, 1], cond [B, D, H, W] (D may be 0), painting the source domain."""

    def __init__(self, channels: int, cond_channels: int, network: Network) -> None:
        from monai.networks.nets import DiffusionModelUNet

        super().__init__()
        self.cond_channels = cond_channels
        self.unet: Any = DiffusionModelUNet(
            spatial_dims=2, in_channels=channels + cond_channels, out_channels=channels, channels=network.channels,
            attention_levels=network.attention, num_res_blocks=network.n_res_blocks, num_head_channels=network.head_channels,
            norm_num_groups=network.norm_groups, num_class_embeds=2)
        nn.init.zeros_(self.unet.class_embedding.weight)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor, domain: int = SOURCE) -> Tensor:
        """Velocity [B, C, H, W] in a domain. Sinusoidal embedding wants times of order 1000."""
        if self.cond_channels:
            x_t = torch.cat([x_t, cond.to(x_t)], dim=1)
        velocity: Tensor = self.unet(x_t, timesteps=t * 1000, class_labels=torch.full(t.shape, domain, device=t.device))
        return velocity.to(t.dtype)  # sums along a path are of single precision

    @torch.no_grad()
    def adopt_target(self) -> None:
        """Start the target's embedding as a copy of the source's: the aligned model begins as stage 1."""
        self.unet.class_embedding.weight[TARGET] = self.unet.class_embedding.weight[SOURCE]

    def domain_embeddings(self) -> tuple[nn.Module, ...]:
        """What tells the source from the target."""
        return (self.unet.class_embedding,)


def in_domain(model: nn.Module, domain: int) -> VelocityModel:
    """The velocity model of one domain, with the plain signature that solvers and rewards call."""
    return functools.partial(model, domain=domain)


def build(channels: int, cond_channels: int, network: Network, seed: int, conditioner: str = "concat") -> VelocityUNet:
    """A freshly initialised network of a registered conditioner; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found: VelocityUNet = load_registered(CONDITIONERS, conditioner)(channels, cond_channels, network)
        return found


def save(folder: Path, weights: dict[str, Tensor], channels: int, cond_channels: int, network: Network, conditioner: str = "concat",
         **facts: Any) -> None:
    """Write weights, shape and further facts that a reader needs (clip, task …)."""
    save_network(folder, weights, {"channels": channels, "cond_channels": cond_channels, "network": dataclasses.asdict(network),
                                   "conditioner": conditioner, **facts})


def load(folder: Path) -> tuple[VelocityUNet, dict[str, Any]]:
    """The network of a checkpoint folder, in evaluation mode, and its config."""
    def described(config: dict[str, Any]) -> VelocityUNet:
        shape: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in config["network"].items()}
        return build(config["channels"], config["cond_channels"], Network(**shape), 0, config["conditioner"])

    model, config = rebuilt(folder, described)
    return cast(VelocityUNet, model), config
