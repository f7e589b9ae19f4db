"""FID, KID, precision and recall, and HD95 against torchmetrics, prdc and MONAI, each with equal values."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.row import Row, Skipped, compare, in_turn, missing

NUMBERS = (8,)
N, D = 500, 2048  # the descriptors of Inception are of this length
MASKS, SIDE = 64, 128
REPEATS = 3


def rows() -> Iterator[Row | Skipped]:
    """One row a metric; a value that differs from the peer's ends the benchmark."""
    import torch

    torch.set_num_threads(1)
    for name, modules, build, bar in (
            (f"FID, n = {N}, D = {D}, against torchmetrics", ("torchmetrics",), fid, 1 / 20),
            (f"KID, n = {N}, D = {D}, against torchmetrics' 100 subsets", ("torchmetrics",), lambda: kid(100), 1 / 15),
            (f"KID, n = {N}, D = {D}, against torchmetrics' one subset", ("torchmetrics",), lambda: kid(1), 1.0),
            (f"precision, recall, density, coverage, n = {N}, against prdc", ("prdc",), neighbourhoods, 1 / 1.5),
            (f"HD95, {MASKS} masks of {SIDE}², against MONAI", ("monai",), hd95, 1 / 4)):
        why = missing(*modules)
        if why:
            yield Skipped(name, why)
            continue
        ours, theirs = build()
        np.testing.assert_allclose(ours(), theirs(), rtol=1e-4, atol=1e-6)
        yield compare(name, *in_turn(REPEATS, ours, theirs), "s", round(bar, 4))


Both = tuple[Callable[[], Any], Callable[[], Any]]


def _features() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    return draw.normal(size=(N, D)), draw.normal(0.1, 1.1, size=(N, D))


def _extractor() -> Any:
    """Passes features on, as torchmetrics wants an extractor to look."""
    import torch

    extractor = torch.nn.Identity()
    extractor.num_features = D
    return extractor


def _fed(metric: Any, fake: np.ndarray, real: np.ndarray) -> Any:
    import torch

    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(fake), real=False)
    return metric.compute()


def fid() -> Both:
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    from alignflow_core.metrics.distribution import frechet

    fake, real = _features()
    return (lambda: frechet(fake, real),
            lambda: float(_fed(FrechetInceptionDistance(feature=_extractor(), normalize=True).set_dtype(torch.float64), fake, real)))


def kid(subsets: int) -> Both:
    """The peer averages over subsets drawn without replacement; subsets of all images make its value ours."""
    from torchmetrics.image.kid import KernelInceptionDistance

    from alignflow_core.metrics.distribution import kernel_distance

    fake, real = _features()
    return (lambda: kernel_distance(fake, real),
            lambda: float(_fed(KernelInceptionDistance(feature=_extractor(), normalize=True, subsets=subsets, subset_size=N), fake, real)[0]))


def neighbourhoods() -> Both:
    from prdc import compute_prdc

    from alignflow_core.metrics.distribution import neighbourhoods as measure

    fake, real = _features()
    names = ("precision", "recall", "density", "coverage")

    def theirs() -> list[float]:
        found = compute_prdc(real_features=real, fake_features=fake, nearest_k=5)
        return [found[name] for name in names]

    def ours() -> list[float]:
        found = measure(real, fake)
        return [found[name] for name in names]

    return ours, theirs


def hd95() -> Both:
    import torch
    from monai.metrics import compute_hausdorff_distance
    from scipy.ndimage import gaussian_filter

    from alignflow_core.metrics.overlap import hausdorff95

    draw = np.random.default_rng(0)
    a, b = ([gaussian_filter(draw.normal(size=(SIDE, SIDE)), 8) > 0.01 for _ in range(MASKS)] for _ in range(2))
    ours = [np.stack(x) for x in (a, b)]
    theirs = [torch.from_numpy(x)[:, None] for x in ours]
    return (lambda: [hausdorff95(x, y) for x, y in zip(*ours)],
            lambda: compute_hausdorff_distance(*theirs, include_background=True, percentile=95)[:, 0].tolist())
