"""Profile gpu on one GPU: training beside the card's bf16 matrix products and beside diffusers' loop, sampling, stage 2. Wall time.

Ours is the training loop that stage 1 runs (noise, loss, clipping, AdamW, averaged weights, the look for values that are not finite); diffusers'
is that of its example ``train_unconditional.py`` under bf16 autocast with ``--use_ema``, its data on the device too: same levels, channels, blocks,
attention and batch. The two take turns, a block of steps each.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.row import Row, Skipped, compare, missing

NUMBERS = (13, 14, 15)
WARM, BLOCK, BLOCKS = 6, 8, 5  # steps
GEMM, IMAGES, CALLS = 8192, 128, 6
COMPILATIONS = 4  # of stage 2: with and without gradient, of one batch size and then of any
STAGE_TWO_BAR = 600.0  # seconds
RATE = "training at profile gpu, share of the card's bf16 matrix-product rate"
AGAINST = "the same, images a second against diffusers' loop at equal network"
SAMPLER = "sampling at profile gpu, compiled and replayed, against the plain network"
SMALL = "sampling at profile cpu's network, replayed, against the plain network"
STAGE_TWO = "stage 2 for one target at profile gpu, summed from its parts"


def rows() -> Iterator[Row | Skipped]:
    """Five rows; all are skipped where there is no GPU."""
    import torch

    why = "" if torch.cuda.is_available() else "no GPU here"
    if why:
        yield from (Skipped(name, why) for name in (RATE, AGAINST, SAMPLER, SMALL, STAGE_TWO))
        return
    project = profile("gpu")
    rate = matrix_rate()
    without = missing("diffusers")
    done = Training(project, not without).run()
    flops = step_flops(project.image_flow, project.data.size)
    print(f"{torch.cuda.get_device_name()}: {flops / 1e12:.1f} TFLOP a step, compiled and warm in {done.warm_up:.0f} s, "
          f"at most {done.memory / 2**30:.1f} GB", flush=True)
    yield compare(RATE, [flops / s / 1e12 for s in done.ours], [rate / 1e12] * len(done.ours), "TFLOP/s", 0.4, at_least=True)
    batch = project.image_flow.training.batch
    yield Skipped(AGAINST, without) if without else compare(AGAINST, [batch / s for s in done.ours], [batch / s for s in done.theirs], "images/s",
                                                            1.3, at_least=True)
    torch.cuda.empty_cache()
    for name, which in ((SMALL, profile("cpu")), (SAMPLER, project)):
        fast, plain = sampling(which)
        yield compare(name, [which.sample.batch / s for s in fast], [which.sample.batch / s for s in plain], "images/s", 1.0, at_least=True)
    call = statistics.median(fast) / CALLS * project.image_flow.training.batch / project.sample.batch
    yield compare(STAGE_TWO, [stage_two(project, statistics.median(done.ours), call, done.warm_up)], STAGE_TWO_BAR, "s", 1.0)


def profile(name: str, *overrides: str) -> Any:
    """The phantom's project at a profile."""
    from alignflow_core.config import build_project
    from pipelines.compose import compose

    return build_project(compose([f"profile={name}", *overrides]))


def timed(act: Callable[[], Any]) -> float:
    """Seconds until the device has done what ``act`` asked for."""
    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    act()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_rate() -> float:
    """FLOP/s of a bf16 matrix product of random numbers."""
    import torch

    a, b = (torch.randn(GEMM, GEMM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 10 * 2 * GEMM**3 / statistics.median(timed(lambda: [a @ b for _ in range(10)]) for _ in range(7))


def step_flops(settings: Any, size: int) -> int:
    """Products and sums of forward and backward pass of one batch, as torch counts them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from alignflow_core.networks.velocity_unet import VelocityUNet

    with torch.device("meta"):
        model = VelocityUNet(3, 4, settings.network)
        inputs = torch.empty(1, 3, size, size), torch.empty(1), torch.empty(1, 4, size, size)
    with FlopCounterMode(display=False) as counter:
        model(*inputs).square().mean().backward()
    return int(counter.get_total_flops()) * int(settings.training.batch)


class _EnoughError(Exception):
    """Ends a training without saving it."""


class Training:
    """Our training loop, with diffusers' run between its blocks; on noise, for the cost does not depend on the picture."""

    def __init__(self, project: Any, beside_peer: bool) -> None:
        import torch

        from alignflow_core.devices import prepare, ready
        from alignflow_core.image_flow import training_step
        from alignflow_core.networks import velocity_unet

        self.settings, size = project.image_flow, project.data.size
        device = prepare(project.machine)
        draw = torch.Generator().manual_seed(0)
        images = torch.randint(256, (IMAGES, 3, size, size), generator=draw, dtype=torch.uint8).to(device)
        cond = torch.randn(IMAGES, 4, size, size, generator=draw).to(device)
        self.model = ready(velocity_unet.build(3, 4, self.settings.network, 0), project.machine, device)
        self.step = training_step(self.model, images, cond, self.settings, project.machine, 0)
        self.peer = diffusers_loop(self.settings, images.float() / 127.5 - 1, cond) if beside_peer else None
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.warm_up = self.memory = 0.0

    def run(self) -> "Training":
        """Warm up, then time the blocks; seconds of a step."""
        import torch

        from alignflow_core.flow.train import train

        begun = time.perf_counter()

        def on_step(done: int, ema: Any) -> bool:
            nonlocal begun
            if done < WARM or (done - WARM) % BLOCK:
                return False
            torch.cuda.synchronize()
            if done == WARM:
                self.warm_up, self.memory = time.perf_counter() - begun, torch.cuda.max_memory_allocated()
                if self.peer:
                    for _ in range(3):
                        self.peer()
            else:
                self.ours.append((time.perf_counter() - begun) / BLOCK)
                if self.peer:
                    peer = self.peer
                    self.theirs.append(timed(lambda: [peer() for _ in range(BLOCK)]) / BLOCK)
                if len(self.ours) == BLOCKS:
                    raise _EnoughError
            torch.cuda.synchronize()
            begun = time.perf_counter()
            return False

        with tempfile.TemporaryDirectory() as folder:
            try:
                train(self.model, self.step, self.settings.training, Path(folder) / "state.safetensors", lambda *_: None, lambda *_: None, on_step)
            except _EnoughError:
                return self
        raise ValueError("the profile has fewer steps than are to be timed")


def diffusers_loop(settings: Any, images: Any, cond: Any) -> Callable[[], None]:
    """One step of the peer's training."""
    import torch
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    from benchmarks.painter import diffusers_unet

    device = images.device
    model = diffusers_unet(settings.network, images.shape[-1]).to(device)
    ours = sum(p.numel() for p in _meta(settings).parameters())
    assert abs(sum(p.numel() for p in model.parameters()) - ours) < 0.1 * ours
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.training.lr, betas=(0.95, 0.999), weight_decay=1e-6)
    averaged, noising = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True), DDPMScheduler(num_train_timesteps=1000)

    def step() -> None:
        rows = torch.randint(len(images), (settings.training.batch,), device=device)
        clean, noise = images[rows], torch.randn_like(images[rows])
        times = torch.randint(1000, (len(rows),), device=device)
        noised = noising.add_noise(clean, noise, times)
        with torch.autocast(device.type, torch.bfloat16):
            loss = torch.nn.functional.mse_loss(model(noised, times / 1000, cond[rows]).float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        averaged.step(model.parameters())
        loss.item()  # its progress bar shows it

    return step


def _meta(settings: Any) -> Any:
    import torch

    from alignflow_core.networks.velocity_unet import VelocityUNet

    with torch.device("meta"):
        return VelocityUNet(3, 4, settings.network)


def sampling(project: Any) -> list[list[float]]:
    """Seconds of a batch by a few network calls: as stage ``sample`` paints, and by the plain network under the same precision."""
    import torch

    from alignflow_core.devices import Replayed, autocast, placed, prepare
    from alignflow_core.flow.solver import euler, time_grid
    from alignflow_core.networks import velocity_unet

    device, size, batch = prepare(project.machine), project.data.size, project.sample.batch
    plain = velocity_unet.build(3, 4, project.image_flow.network, 0).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fast = Replayed(velocity_unet.in_domain(placed(velocity_unet.build(3, 4, project.image_flow.network, 0), project.machine, device), 0))
    noise, cond = (torch.randn(batch, n, size, size, device=device) for n in (3, 4))

    def paint(model: Any) -> None:
        with torch.no_grad(), autocast(project.machine, device):
            euler(model, noise, cond, time_grid(CALLS))

    taken: list[list[float]] = [[], []]
    for turn in range(4):
        for model, seconds in zip((fast, velocity_unet.in_domain(plain, 0)), taken):
            found = timed(lambda model=model: paint(model))  # type: ignore[misc]
            if turn:
                seconds.append(found)
    return taken


def stage_two(project: Any, step: float, call: float, compiling: float) -> float:
    """Seconds of stage 2 for one target from those of a training step, of a network call without gradient on as many images, and of a compilation.

    Left out: the reward's encoder, the gates' ratios, reading and writing.
    """
    from alignflow_core.alignment_steps import rewarded_steps, rewardless_steps

    settings = next(iter(project.targets.values())).align
    rewarded, looks = rewarded_steps(settings), settings.rounds + rewarded_steps(settings) / settings.check_every
    probe = settings.check_samples / settings.training.batch * settings.n_steps * call
    painted = settings.relabel_pairs / settings.training.batch * settings.n_steps * call
    relabelled = (settings.rounds - 1) * (painted + settings.relabel.steps * segmenter_step(project))
    return float(COMPILATIONS * compiling + (rewardless_steps(settings) + rewarded) * step + rewarded * (settings.n_steps * call + settings.k * step)
                 + looks * probe + relabelled)


def segmenter_step(project: Any) -> float:
    """Seconds of a training step of the labeller, median of twenty."""
    import numpy as np
    import torch

    from alignflow_core.devices import prepare
    from alignflow_core.networks.segmenters import build_segmenter, training_step

    device, size = prepare(project.machine), project.data.size
    model = build_segmenter(len(project.task.classes), project.labeller.network, 0).to(device)
    images = np.random.default_rng(0).integers(256, size=(project.labeller.training.batch, size, size, 3), dtype=np.uint8)
    masks = np.zeros(images.shape[:3], np.uint8)
    step = training_step(model, project.task, lambda i: (images, masks), lambda i: torch.Generator().manual_seed(i), device)
    return statistics.median([timed(lambda i=i: step(i)) for i in range(25)][5:])  # type: ignore[misc]
