"""Forward and backward pass of the default network of profile cpu, as a share of this core's matrix-product rate."""

from collections.abc import Iterator

from benchmarks.row import Row, Skipped, compare, in_turn

NUMBERS = (2,)
BATCH, SIDE, REPEATS = 16, 64, 7
GEMM = 1024  # side of the square matrices


def rows() -> Iterator[Row | Skipped]:
    """GFLOP/s of the network beside those of a matrix product."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from alignflow_core.config import Network
    from alignflow_core.networks import velocity_unet

    torch.set_num_threads(1)
    model = velocity_unet.build(3, 4, Network(), seed=0)
    x, t, cond = torch.randn(BATCH, 3, SIDE, SIDE), torch.rand(BATCH), torch.randn(BATCH, 4, SIDE, SIDE)
    a, b = torch.randn(GEMM, GEMM), torch.randn(GEMM, GEMM)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(x, t, cond).square().mean().backward()

    with FlopCounterMode(display=False) as counter:
        step()
    ours, peer = in_turn(REPEATS, step, lambda: [a @ b for _ in range(20)])
    yield compare("forward + backward, share of the GEMM rate", [counter.get_total_flops() / s / 1e9 for s in ours],
                  [20 * 2 * GEMM**3 / s / 1e9 for s in peer], "GFLOP/s", 0.7, at_least=True)
