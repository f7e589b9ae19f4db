"""How the reward's gradient reaches the weights through the sampler.

One signature: ``scheme(velocity_model, x0, cond, times, reward, k, generator, weight)`` adds the gradient of
``-weight * reward`` to the parameters and returns the reward and the sample.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alignflow_core.flow.path import VelocityModel

Reward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rewarded:
    """The reward of a sample and the sample x1 [B, C, H, W], both without gradient."""

    reward: float
    x1: Tensor


def sparse(velocity_model: VelocityModel, x0: Tensor, cond: Tensor, times: Tensor, reward: Reward, k: int,
           generator: torch.Generator, weight: float) -> Rewarded:
    """Roll out Euler without gradient, then re-evaluate k random steps on their cached, detached inputs.

    ``x1 = cached x1 + (N/k) * sum dt * (v_theta(x_i) - v_i)``: the value is exactly the cached sample, the gradient an
    unbiased estimate of the detached-input gradient (compare FlowBP-Sparse arXiv 2606.11075, LeapAlign arXiv 2604.15311).
    Since x1 is linear in the velocities, each chosen step is one vector-Jacobian product with dr/dx1, done one after the
    other: memory is one network call whatever N and k are.
    """
    n = len(times) - 1
    steps = (times[1:] - times[:-1]).tolist()
    inputs, x1 = _roll_out(velocity_model, x0, cond, times)
    value = reward(x1)
    (gradient,) = torch.autograd.grad(value, x1)
    for i in torch.randperm(n, generator=generator)[:k].tolist():
        velocity = velocity_model(inputs[i], x1.new_full((len(x1),), float(times[i])), cond)
        (-weight * n / k * steps[i] * (velocity * gradient).sum()).backward()
    return Rewarded(value.item(), x1.detach())


def sparse_each(velocity_model: VelocityModel, x0: Tensor, cond: Tensor, times: Tensor, rewards: Callable[[Tensor], list[Tensor]], k: int,
                generator: torch.Generator, parameters: list[nn.Parameter]) -> Iterator[tuple[Tensor, ...]]:
    """The gradient that ``sparse`` has of ``-reward``, of each of several rewards of one batch; yielded one by one, one tensor per parameter.

    The roll-out and the k network calls are shared, so a reward costs k backward passes; memory is k network calls.
    """
    n = len(times) - 1
    steps = (times[1:] - times[:-1]).tolist()
    inputs, x1 = _roll_out(velocity_model, x0, cond, times)
    directions = [torch.autograd.grad(value, x1, retain_graph=True)[0] for value in rewards(x1)]
    chosen = torch.randperm(n, generator=generator)[:k].tolist()
    velocities = [steps[i] * velocity_model(inputs[i], x1.new_full((len(x1),), float(times[i])), cond) for i in chosen]
    for direction in directions:
        pull = -n / k * torch.stack([(velocity * direction).sum() for velocity in velocities]).sum()
        yield torch.autograd.grad(pull, parameters, retain_graph=True)


def _roll_out(velocity_model: VelocityModel, x0: Tensor, cond: Tensor, times: Tensor) -> tuple[list[Tensor], Tensor]:
    """Euler without gradient: the network's input at every step, and x1 as a leaf that takes a gradient."""
    inputs, x = [], x0
    with torch.no_grad():
        for t, dt in zip(times.tolist(), (times[1:] - times[:-1]).tolist()):
            inputs.append(x)
            x = torch.add(x, velocity_model(x, x.new_full((len(x),), t), cond), alpha=dt)
    return inputs, x.detach().requires_grad_()


def last_k(velocity_model: VelocityModel, x0: Tensor, cond: Tensor, times: Tensor, reward: Reward, k: int,
           generator: torch.Generator, weight: float) -> Rewarded:
    """Plain back-propagation through the last k Euler steps (DRaFT-K, arXiv 2309.17400)."""
    n = len(times) - 1
    x = x0
    for i in range(n):
        with torch.set_grad_enabled(i >= n - k):
            x = x + float(times[i + 1] - times[i]) * velocity_model(x, x.new_full((len(x),), float(times[i])), cond)
    value = reward(x)
    (-weight * value).backward()
    return Rewarded(value.item(), x.detach())


def random_k(velocity_model: VelocityModel, x0: Tensor, cond: Tensor, times: Tensor, reward: Reward, k: int,
             generator: torch.Generator, weight: float) -> Rewarded:
    """AlignProp (arXiv 2310.03739), truncated at random as in its public code (github.com/mihirp1998/AlignProp, ``truncated_backprop_rand``).

    Step i of N keeps the gradient of its network call with probability (i + 1) / (N + 1), drawn for every step; that of the path itself
    is never cut. The last step always keeps it (theirs with 50 of 51), so that there is a gradient. Calls with gradient are recomputed
    on the way back; ``k`` plays no part.
    """
    n = len(times) - 1
    cuts = torch.randint(n + 1, (n,), generator=generator).tolist()
    x = x0
    for i, cut in enumerate(cuts):
        t = x.new_full((len(x),), float(times[i]))
        if i < cut and i < n - 1:
            with torch.no_grad():
                velocity = velocity_model(x, t, cond)
        else:
            velocity = checkpoint(velocity_model, x, t, cond, use_reentrant=False)
        x = x + float(times[i + 1] - times[i]) * velocity
    value = reward(x)
    (-weight * value).backward()
    return Rewarded(value.item(), x.detach())


def one_step(velocity_model: VelocityModel, x0: Tensor, cond: Tensor, times: Tensor, reward: Reward, k: int,
             generator: torch.Generator, weight: float) -> Rewarded:
    """ReFL (arXiv 2304.05977): roll out without gradient to a late time, estimate x1 there by one network call, reward the estimate.

    The time is drawn from the last half of the steps, as ReFL draws it from the last part of denoising; ``k`` plays no part.
    """
    n = len(times) - 1
    stop = int(torch.randint(n // 2, n, (1,), generator=generator))
    x = x0
    with torch.no_grad():
        for i in range(stop):
            x = x + float(times[i + 1] - times[i]) * velocity_model(x, x.new_full((len(x),), float(times[i])), cond)
    t = float(times[stop])
    x1 = x + (1 - t) * velocity_model(x, x.new_full((len(x),), t), cond)
    value = reward(x1)
    (-weight * value).backward()
    return Rewarded(value.item(), x1.detach())


def full(velocity_model: VelocityModel, x0: Tensor, cond: Tensor, times: Tensor, reward: Reward, k: int,
         generator: torch.Generator, weight: float) -> Rewarded:
    """Exact back-propagation through all Euler steps, each network call recomputed on the way back; ``k`` plays no part.

    Memory is one network call and N images; time one forward pass more than ``last_k`` with k = N.
    """
    x = x0
    for i in range(len(times) - 1):
        t = x.new_full((len(x),), float(times[i]))
        x = x + float(times[i + 1] - times[i]) * checkpoint(velocity_model, x, t, cond, use_reentrant=False)
    value = reward(x)
    (-weight * value).backward()
    return Rewarded(value.item(), x.detach())


SCHEMES: dict[str, Callable[..., Rewarded]] = {"sparse": sparse, "last_k": last_k, "random_k": random_k, "one_step": one_step, "full": full}
