"""Low-rank adapters (LoRA, arXiv 2106.09685): alignment of large networks with few weights to train and to keep the moments of."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """``W -> W + B A``, with B zero at the start: the adapted network begins as the base."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        self.a = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight, of the shape of the base's."""
        return weight + (self.b @ self.a).view_as(weight)


def adapt(model: nn.Module, rank: int, seed: int, free: tuple[nn.Module, ...] = ()) -> None:
    """Freeze the model and give every convolution and linear layer that is wider than ``rank`` an adapter; ``free`` modules stay trainable."""
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in list(model.modules()):
            if isinstance(module, nn.Conv2d | nn.Linear) and min(module.weight.shape[0], module.weight[0].numel()) > rank:
                parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank).to(module.weight.device))
    for module in free:
        module.requires_grad_(True)


def merge(model: nn.Module) -> None:
    """Write the adapters into the weights, so that the network is a plain one again."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
