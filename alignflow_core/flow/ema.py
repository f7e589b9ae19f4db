"""Exponential moving average of weights."""

import torch
from torch import nn


class Ema:
    """Keeps ``shadow = decay * shadow + (1 - decay) * weights``, with a warm-up so that early steps count less.

    The decay at update n is min(decay, (1 + n) / (10 + n)).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Blend the model's present weights in."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        values = model.state_dict()
        floating = [name for name, value in values.items() if value.is_floating_point()]
        # One kernel for all weights on a GPU, as torch.optim.swa_utils has it.
        torch._foreach_lerp_([self.shadow[name] for name in floating], [values[name] for name in floating], 1 - decay)
        for name in values.keys() - set(floating):
            self.shadow[name].copy_(values[name])
