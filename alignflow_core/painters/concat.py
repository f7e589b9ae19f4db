"""Our own conditioner: the mask's channels beside the image's, one network trained jointly (``networks/velocity_unet.py``)."""

from alignflow_core.config import Network
from alignflow_core.networks.velocity_unet import VelocityUNet


def build(channels: int, cond_channels: int, network: Network) -> VelocityUNet:
    """With ``cond_channels = 0`` an unconditional painter: the frozen base of others."""
    return VelocityUNet(channels, cond_channels, network)
