"""What is known of a reference set of few images: the :class:`Reference` that every distance is measured to."""

from dataclasses import dataclass

from torch import Tensor, ones_like


@dataclass(frozen=True)
class Moments:
    """What a set of standardised features leaves behind when the images stay where they are.

    Attributes:
        count: images, at least 1.
        mean: [D].
        variance: [D], unbiased; 1, the source's, of a single image.
    """

    count: int
    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class Reference:
    """Features of the reference set and their moments, all standardised by source statistics.

    ``scale`` is the deviation of source and references pooled. In units of the source alone, a feature that
    hardly varies there and moves far would drown all others.

    Attributes:
        features: [n, D]; [0, D] where only moments are known, which is enough for the distances of ``reward.registry.FROM_MOMENTS``.
        mean, std: [D], shrunk towards the source's.
        scale: [D].
        sample_mean: [D], not shrunk.
    """

    features: Tensor
    mean: Tensor
    std: Tensor
    scale: Tensor
    sample_mean: Tensor


def moments(features: Tensor) -> Moments:
    """Moments of features [n, D], n >= 1."""
    mean = features.mean(0)
    return Moments(len(features), mean, features.var(0) if len(features) > 1 else ones_like(mean))


def describe(features: Tensor, prior_count: float) -> Reference:
    """Features [n, D] with their moments, shrunk as :func:`shrunk` does."""
    return shrunk(moments(features), features, prior_count)


def shrunk(known: Moments, features: Tensor, prior_count: float) -> Reference:
    """Moments of few references, shrunk towards the source's (mean 0, deviation 1 in standardised features).

    Our choice. Variances: ``(n var + prior_count) / (n + prior_count)``. Means: per feature by the positive-part
    James-Stein factor ``1 - (var / n) / mean^2``: a shift well above its sampling error is kept whole, one
    within it is left at the source's value. A constant factor n/(n + 10) would halve every real shift at n = 10.
    """
    n = known.count
    variance = (n * known.variance + prior_count) / (n + prior_count)
    keep = (1 - variance / n / known.mean.square().clamp_min(1e-12)).clamp_min(0)
    mean = keep * known.mean
    return Reference(features, mean, variance.sqrt(), ((1 + variance) / 2 + mean.square() / 4).sqrt(), known.mean)
