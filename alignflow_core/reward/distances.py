"""Distances between generated features and a reference set; the reward is the negative distance.

Plain functions of one signature, ``distance(features, reference, temperature)``: features [N, D] with gradient, N >= 2, and a
:class:`Reference` of n images, both standardised by source statistics; all but ``frechet`` measure in its ``scale``. Lower is
better, 0 where the set is what the distance can tell of the references. N and n may differ. Only ``skl`` uses the temperature.
Those of ``registry.FROM_MOMENTS`` do not touch ``reference.features``: they work where the reference set is a file of moments.

| distance | sees | few references |
|---|---|---|
| ``frechet`` | means and deviations, shrunk towards the source's | made for them |
| ``gaussian_skl`` | the same, relative: a set too narrow costs more than one too wide | made for them |
| ``skl`` | the softmax of the mean: no common offset, no spread (the paper's) | the mean is noisy |
| ``coral`` | covariances alone, no mean | noisy |
| ``gram`` | second moments: mean and covariance in one | noisy |
| ``cosine`` | the direction of the mean, not its length | the mean is noisy |
| ``mmd``, ``sliced_wasserstein`` | the whole distribution | copy them; sensible from some 20 on |
"""

import torch
from torch import Tensor

from alignflow_core.reward.moments import Reference

N_PROJECTIONS = 128
BANDWIDTHS = (0.5, 1.0, 2.0)  # times the median distance


def frechet(features: Tensor, reference: Reference, temperature: float = 1.0) -> Tensor:
    """Squared 2-Wasserstein distance of diagonal Gaussians, compressed feature by feature: the mean of log(1 + d^2 / s^2).

    s^2 is the mean variance of source and references. Plain squares would let the few features that move fifty deviations between
    cameras drown all others; dividing by the shift would forgive what is left of a large one (docs/decisions/0002).
    """
    std = (features.var(0) + 1e-6).sqrt()
    squared = (features.mean(0) - reference.mean).square() + (std - reference.std).square()
    return torch.log1p(2 * squared / (1 + reference.std.square())).mean()


def gaussian_skl(features: Tensor, reference: Reference, temperature: float = 1.0) -> Tensor:
    """Symmetric Kullback-Leibler divergence of diagonal Gaussians, averaged over features.

    ``((var_p + d^2) / var_q + (var_q + d^2) / var_p) / 4 - 1/2`` with d the difference of means; as a mean this far apart has no
    bound, d is measured in ``scale`` and the variances in the reference's own.
    """
    ratio = (features.var(0) + 1e-3) / (reference.std.square() + 1e-3)
    shift = ((features.mean(0) - reference.mean) / reference.scale).square()
    return ((ratio + 1 / ratio) / 4 - 0.5 + shift * (1 + 1 / ratio) / 4).mean()


def skl(features: Tensor, reference: Reference, temperature: float = 1.0) -> Tensor:
    """Symmetric Kullback-Leibler divergence of the softmax of the mean features: the reward of arXiv 2604.02868.

    Read literally it cannot see an offset common to all features (softmax(f + c) = softmax(f)); standardising the
    features softens this. The deviation of the set plays no part.
    """
    p = torch.log_softmax(features.mean(0) / reference.scale / temperature, 0)
    q = torch.log_softmax(reference.sample_mean / reference.scale / temperature, 0)
    return ((p.exp() - q.exp()) * (p - q)).sum() / 2


def coral(features: Tensor, reference: Reference, temperature: float = 1.0) -> Tensor:
    """Squared Frobenius distance of covariances over 4 D^2 (arXiv 1607.01719, eq. 1); of a single reference: the source's identity."""
    theirs = _covariance(reference.features / reference.scale) if len(reference.features) > 1 else reference.scale.square().reciprocal().diag()
    apart = _covariance(features / reference.scale) - theirs
    return apart.square().sum() / (4 * len(apart) ** 2)


def gram(features: Tensor, reference: Reference, temperature: float = 1.0) -> Tensor:
    """Mean squared difference of the uncentred second-moment matrices [D, D] (compare the Gram matrices of arXiv 1508.06576)."""
    x, y = features / reference.scale, reference.features / reference.scale
    return (x.T @ x / len(x) - y.T @ y / len(y)).square().mean()


def cosine(features: Tensor, reference: Reference, temperature: float = 1.0) -> Tensor:
    """1 - cosine of the two mean features."""
    return 1 - torch.cosine_similarity(features.mean(0) / reference.scale, reference.sample_mean / reference.scale, dim=0)


def mmd(features: Tensor, reference: Reference, temperature: float = 1.0) -> Tensor:
    """Squared maximum mean discrepancy (Gretton et al. 2012), the biased estimate, Gaussian kernels at three widths.

    The widths are multiples of the median distance between the two sets, taken without gradient.
    """
    x, y = features / reference.scale, reference.features / reference.scale
    xy = _squared_distances(x, y)
    median = xy.detach().median().clamp_min(1e-12)

    def kernel(squared: Tensor) -> Tensor:
        return torch.stack([torch.exp(-squared / (2 * width**2 * median)).mean() for width in BANDWIDTHS]).mean()

    return kernel(_squared_distances(x, x)) + kernel(_squared_distances(y, y)) - 2 * kernel(xy)


def sliced_wasserstein(features: Tensor, reference: Reference, temperature: float = 1.0) -> Tensor:
    """Mean squared difference of quantiles along fixed random directions (Bonneel et al. 2015)."""
    x, y = features / reference.scale, reference.features / reference.scale
    directions = torch.randn(x.shape[1], N_PROJECTIONS, generator=torch.Generator().manual_seed(0)).to(x)
    directions = directions / directions.norm(dim=0)
    levels = (torch.arange(max(len(x), len(y))).to(x) + 0.5) / max(len(x), len(y))
    return (_quantiles(x @ directions, levels) - _quantiles(y @ directions, levels)).square().mean()


def _covariance(x: Tensor) -> Tensor:
    """Covariance [D, D] of rows [N, D], N >= 2."""
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """[N, D], [M, D] -> mean squared difference over features, [N, M]; its gradient is finite at 0, unlike a distance's."""
    return (x[:, None] - y[None]).square().mean(-1)


def _quantiles(values: Tensor, levels: Tensor) -> Tensor:
    """Quantiles [L, P] of columns [N, P]: the step function inverse to the empirical distribution, so that N may differ."""
    rows = (levels * len(values)).long().clamp_max(len(values) - 1)
    return values.sort(0).values[rows]
