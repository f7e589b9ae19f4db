"""The stage-1 flow's own frozen features as a reward encoder: it knows the anatomy and needs no weights of others (our choice)."""

from typing import Any

from torch import Tensor

from alignflow_core.networks import velocity_unet
from alignflow_core.reward.encoders import Encoder, Material

TIME = 0.9  # near the data end of the path: most of the image is there, and the network has been trained at such times


class FlowFeatures(Encoder):
    """Maps of every level of the U-Net's way down, without a condition: what the image shows, not what the mask says.

    The image stands at time .9 without its noise (the mean of x_t given the image), so that features are deterministic.
    """

    def __init__(self, model: velocity_unet.VelocityUNet) -> None:
        super().__init__()
        self.model = model

    def maps(self, images: Tensor) -> list[Tensor]:
        """See :class:`Encoder`."""
        found: list[Tensor] = []

        def keep(module: Any, arguments: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        hooks = [block.register_forward_hook(keep) for block in (*self.model.unet.down_blocks, self.model.unet.middle_block)]
        try:
            nothing = images.new_zeros(len(images), self.model.cond_channels, *images.shape[2:])
            self.model(TIME * images, images.new_full((len(images),), TIME), nothing)
        finally:
            for hook in hooks:
                hook.remove()
        return found


def build(material: Material) -> FlowFeatures:
    """The encoder of a stage-1 checkpoint, a copy of its own that alignment does not change."""
    model, _ = velocity_unet.load(material.stage1)
    return FlowFeatures(model)


