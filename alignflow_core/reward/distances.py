"""Distances between generated and reference features; the reward is the negative distance.

Plain functions of one signature, ``distance(features, reference, temperature)``: features [N, D] with gradient,
the reference set as a :class:`Reference`, both standardised by source statistics. Lower is better.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Distance = Callable[[Tensor, "Reference", float], Tensor]


@dataclass(frozen=True)
class Reference:
    """What is known of the reference set: features [n, D], its mean and deviation [D] shrunk towards the source's, and a scale.

    ``scale`` [D] is the deviation of source and references pooled. In units of the source alone, a feature that
    hardly varies there and moves far would drown all others.
    """

    features: Tensor
    mean: Tensor
    std: Tensor
    scale: Tensor


def describe(features: Tensor, prior_count: float) -> Reference:
    """Moments of few references, shrunk towards the source's (mean 0, deviation 1 in standardised features).

    Our choice. Variances: ``(n var + prior_count) / (n + prior_count)``. Means: per feature by the positive-part
    James-Stein factor ``1 - (var / n) / mean^2``: a shift well above its sampling error is kept whole, one
    within it is left at the source's value. A constant factor n/(n + 10) would halve every real shift at n = 10.
    """
    n = len(features)
    mean = features.mean(0)
    variance = features.var(0) if n > 1 else torch.ones_like(mean)
    variance = (n * variance + prior_count) / (n + prior_count)
    keep = (1 - variance / n / mean.square().clamp_min(1e-12)).clamp_min(0)
    mean = keep * mean
    return Reference(features, mean, variance.sqrt(), ((1 + variance) / 2 + mean.square() / 4).sqrt())


def frechet(features: Tensor, reference: Reference, temperature: float = 1.0) -> Tensor:
    """Squared 2-Wasserstein distance of diagonal Gaussians in units of ``scale``, averaged over features."""
    std = (features.var(0) + 1e-6).sqrt()
    return (((features.mean(0) - reference.mean).square() + (std - reference.std).square()) / reference.scale.square()).mean()


def skl(features: Tensor, reference: Reference, temperature: float = 1.0) -> Tensor:
    """Symmetric Kullback-Leibler divergence of the softmax of the mean features: the reward of arXiv 2604.02868.

    Read literally it cannot see an offset common to all features (softmax(f + c) = softmax(f)); standardising the
    features softens this. The deviation of the set plays no part.
    """
    p = torch.log_softmax(features.mean(0) / reference.scale / temperature, 0)
    q = torch.log_softmax(reference.features.mean(0) / reference.scale / temperature, 0)
    return ((p.exp() - q.exp()) * (p - q)).sum() / 2


DISTANCES: dict[str, Distance] = {"frechet": frechet, "skl": skl}
