"""Couplings: the joint law of noise and data in a batch."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def couple(name: str, x0: Tensor, x1: Tensor) -> Tensor:
    """Reorder the noise x0 [B, C, H, W] to go with the data x1.

    ``independent`` leaves it; ``minibatch_ot`` solves the assignment of least squared distance in
    the batch (arXiv 2302.00482).
    """
    if name == "independent":
        return x0
    cost = torch.cdist(x1.flatten(1).double(), x0.flatten(1).double()).square()
    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return x0[torch.as_tensor(columns, device=x0.device)]
