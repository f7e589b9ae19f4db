"""What a GPU is given: layers of the same values, equal shapes together, its turn on the card. Tests that need a card are skipped without one."""

import copy
import dataclasses
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from alignflow_core import runner
from alignflow_core.alignment_steps import rewarded_steps, rewardless_steps
from alignflow_core.config import Machine, Network, Training, build_project
from alignflow_core.devices import Replayed, autocast, placed, prepare
from alignflow_core.errors import InputError
from alignflow_core.flow.muon import orthogonal
from alignflow_core.flow.train import train
from alignflow_core.networks import velocity_unet
from alignflow_core.networks.on_gpu import ChannelGroupNorm, Doubled, suit_gpu
from alignflow_core.seeding import generator, normal
from alignflow_core.stages import STAGES
from benchmarks import gpu
from pipelines.compose import compose

NETWORK = Network(channels=(8, 16), attention=(False, True), norm_groups=4, head_channels=8)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def painter() -> velocity_unet.VelocityUNet:
    """A small network whose last layers are not zero."""
    model = velocity_unet.build(3, 1, NETWORK, seed=0)
    with torch.no_grad():
        for n, p in enumerate(model.parameters()):
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(n)))
    return model


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, 16, 16, generator=draw), torch.rand(batch, generator=draw), torch.randn(batch, 1, 16, 16, generator=draw)


def test_doubling_is_nearest_neighbour_upsampling() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    ours, theirs = Doubled()(x), nn.Upsample(scale_factor=2, mode="nearest")(x)
    assert torch.equal(ours, theirs) and ours.is_contiguous(memory_format=torch.channels_last)
    weight = torch.randn_like(ours)
    mine, its = (torch.autograd.grad((found * weight).sum(), x)[0] for found in (ours, theirs))
    assert torch.allclose(mine, its, atol=1e-12)
    assert torch.autograd.gradcheck(Doubled(), (x.detach()[:1, :1].requires_grad_(),))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_a_network_suited_to_a_gpu_is_the_same_network(compiled: bool, gradient: bool) -> None:
    plain = painter().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    suited = copy.deepcopy(plain)
    suit_gpu(suited, compiled)
    assert sum(isinstance(each, Doubled) for each in suited.modules()) == len(NETWORK.channels) - 1
    assert not any(isinstance(each, nn.Upsample) for each in suited.modules())
    assert all(each.use_flash_attention for each in suited.modules() if hasattr(each, "use_flash_attention"))
    assert list(suited.state_dict()) == list(plain.state_dict())
    assert any(isinstance(each, ChannelGroupNorm) for each in suited.modules()) is compiled
    with torch.set_grad_enabled(gradient):
        ours, theirs = suited(*inputs()), plain(*inputs())
        assert torch.allclose(ours, theirs, atol=1e-5)
    if gradient:
        for result in (ours, theirs):
            result.square().sum().backward()
        for mine, its in zip(suited.parameters(), plain.parameters(), strict=True):
            assert mine.grad is not None and its.grad is not None and torch.allclose(mine.grad, its.grad, rtol=1e-3, atol=1e-4)


def test_equal_shapes_step_together_as_they_do_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    for shape in ((5, 12, 40), (3, 40, 12)):
        matrices = torch.randn(shape, generator=draw) * torch.logspace(-3, 3, shape[0])[:, None, None]
        assert torch.allclose(orthogonal(matrices), torch.stack([orthogonal(each) for each in matrices]), atol=1e-4)


def test_a_replayed_model_on_a_cpu_is_the_model() -> None:
    model = velocity_unet.in_domain(painter(), velocity_unet.SOURCE)
    assert torch.equal(Replayed(model)(*inputs()), model(*inputs()))


def test_noise_follows_the_generator() -> None:
    first, again = (normal((2, 3), generator("a"), torch.device("cpu")) for _ in range(2))
    assert torch.equal(first, again) and torch.equal(first, torch.randn(2, 3, generator=generator("a")))


def test_a_card_takes_as_many_stages_as_it_is_shared_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(runner, "ACCELERATORS", (tmp_path,))
    monkeypatch.setenv("ALIGNFLOW_GPU_LOCK", str(tmp_path / "card.lock"))
    project = build_project(compose(["profile=smoke"]))
    turns = {share: threading.Event() for share in ("1", "2")}
    for share, waits in (("2", False), ("1", True)):
        monkeypatch.setenv("ALIGNFLOW_GPU_SHARE", share)

        def second(share: str = share) -> None:
            with runner.accelerator(STAGES["align"], project, "second", quiet=False):
                turns[share].set()

        with runner.accelerator(STAGES["align"], project, "first", quiet=True):
            other = threading.Thread(target=second)
            other.start()
            assert turns[share].wait(0.5) is not waits
        other.join()
        assert turns[share].is_set() and ("second: waiting for the accelerator" in capsys.readouterr().err) is waits
    monkeypatch.setenv("ALIGNFLOW_GPU_SHARE", "all")
    with pytest.raises(InputError, match="ALIGNFLOW_GPU_SHARE=all: not a number of stages"), runner.accelerator(STAGES["align"], project, "x", True):
        pass


def test_without_a_card_its_rows_are_skipped_and_counted_work_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        assert [row.why for row in gpu.rows()] == ["no GPU here"] * 5  # type: ignore[union-attr]
    project = gpu.profile("smoke")
    settings = project.image_flow
    with FlopCounterMode(display=False) as counter:
        velocity_unet.build(3, 4, settings.network, 0)(torch.zeros(2, 3, 32, 32), torch.zeros(2), torch.zeros(2, 4, 32, 32)).sum().backward()
    pair = dataclasses.replace(settings, training=dataclasses.replace(settings.training, batch=2))
    assert gpu.step_flops(pair, 32) == counter.get_total_flops()
    monkeypatch.setattr(gpu, "timed", lambda act: 0.01 if act() else 0.0)
    times = {"step": 0.1, "call": 0.03, "compiling": 1.0}
    base = gpu.stage_two(project, **times)
    settings = next(iter(project.targets.values())).align
    slower = gpu.stage_two(project, **(times | {"step": 0.2}))
    steps = rewardless_steps(settings) + rewarded_steps(settings) * (1 + settings.k)
    assert slower - base == pytest.approx(0.1 * steps)


@needs_gpu
def test_a_recording_reads_the_weights_anew() -> None:
    machine = Machine(precision="bf16")
    device = prepare(machine)
    model = placed(painter(), machine, device)
    plain = velocity_unet.in_domain(model, velocity_unet.SOURCE)
    replayed = Replayed(plain)
    there = tuple(each.to(device) for each in inputs())
    with torch.no_grad(), autocast(machine, device):
        assert torch.allclose(replayed(*there), plain(*there), atol=2e-2)
        for p in model.parameters():
            p.mul_(1.5)
    with torch.no_grad(), autocast(machine, device):
        assert torch.allclose(replayed(*there), plain(*there), atol=5e-2)


@needs_gpu
@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_training_on_a_gpu_is_the_same_twice(optimiser: str, tmp_path: Path) -> None:
    machine = Machine(precision="bf16")
    device = prepare(machine)
    found = []
    for run in range(2):
        model = placed(painter(), machine, device)
        there = tuple(each.to(device) for each in inputs(8))

        def step(i: int, model: nn.Module = model, there: tuple[torch.Tensor, ...] = there) -> dict[str, torch.Tensor]:
            with autocast(machine, device):
                loss = (model(*there) - normal(there[0].shape, generator(i), device)).square().mean()
            loss.backward()
            return {"loss": loss.detach()}

        ema = train(model, step, Training(optimiser=optimiser, steps=20, batch=8), tmp_path / f"{run}.safetensors", lambda *_: None, lambda *_: None)
        found.append(ema.shadow)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
