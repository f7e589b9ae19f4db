"""Comparators: a fact of each one's source, equal terms, and all of them through the pipeline."""

import dataclasses
import math
import shutil
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from alignflow_core import sample
from alignflow_core.artifact import read_json
from alignflow_core.checkpoint import load_network
from alignflow_core.config import Comparator, ImageFlow, Network, Sample, Times
from alignflow_core.errors import InputError
from alignflow_core.flow.loss import flow_matching_loss
from alignflow_core.flow.solver import time_grid
from alignflow_core.networks import velocity_unet
from alignflow_core.painters import denoise, siamese
from alignflow_core.painters.diffusion import STEPS, Diffusion, step_of, time_of
from alignflow_core.painters.flow import Flow
from alignflow_core.painters.registry import CONDITIONERS, ON_A_FROZEN_BASE, PROCESSES
from alignflow_core.registry import load
from alignflow_core.reward.gradient import one_step
from pipelines import dvcfile
from pipelines.compose import compose, write_params
from pipelines.definitions import build_definitions
from pipelines.local import run_all

NETWORK = Network(channels=(8, 16), attention=(False, True), head_channels=8)
COND = 3
DECODER = ("unet.up_blocks.", "unet.out.")


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t, cond."""
    g = draw()
    return torch.randn(n, 3, 16, 16, generator=g), torch.rand(n, generator=g), torch.randn(n, COND, 16, 16, generator=g)


def on_a_base(conditioner: str) -> tuple[velocity_unet.VelocityUNet, nn.Module]:
    """A base and a painter that has adopted it."""
    base = velocity_unet.build(3, 0, NETWORK, seed=1)
    for parameter in base.parameters():  # MONAI zeroes the last layer: a base that predicts nothing would prove nothing
        nn.init.normal_(parameter, std=0.1, generator=draw(3)) if not parameter.any() else None
    painter = velocity_unet.build(3, COND, NETWORK, seed=2, conditioner=conditioner)
    painter.adopt_base(base.state_dict())  # type: ignore[operator]
    return base, painter


@pytest.mark.parametrize("conditioner", CONDITIONERS)
def test_every_conditioner_listens_to_its_mask_and_tells_domains_apart(conditioner: str) -> None:
    model = velocity_unet.build(3, COND, NETWORK, seed=0, conditioner=conditioner)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1, generator=draw(1))
    x_t, t, cond = batch()
    found = model(x_t, t, cond)
    assert found.shape == x_t.shape
    assert not torch.allclose(found, model(x_t, t, torch.zeros_like(cond)))
    assert not torch.allclose(found, model(x_t, t, cond, domain=velocity_unet.TARGET))
    model.adopt_target()
    torch.testing.assert_close(found, model(x_t, t, cond, domain=velocity_unet.TARGET), rtol=0, atol=0)


@pytest.mark.parametrize("conditioner", ["controlnet", "dense_controlnet"])
def test_a_controlnet_is_its_base_at_step_0_and_starts_from_its_weights(conditioner: str) -> None:
    """arXiv 2302.05543, section 3.1: zero convolutions add nothing before the first step."""
    base, painter = on_a_base(conditioner)
    x_t, t, cond = batch()
    torch.testing.assert_close(painter(x_t, t, cond), base(x_t, t, cond[:, :0]), rtol=0, atol=0)
    for name, value in base.unet.down_blocks.state_dict().items():
        assert torch.equal(painter.control.down_blocks.state_dict()[name], value)


def trained(painter: nn.Module, steps: int = 3) -> nn.Module:
    optimiser = torch.optim.AdamW(painter.parameters(), lr=1e-2)
    for i in range(steps):
        optimiser.zero_grad(set_to_none=True)
        x_t, _, cond = batch(4)
        denoise.loss(painter, Diffusion(), x_t.tanh(), cond, ImageFlow(), draw(i), 0.0).backward()
        optimiser.step()
    return painter


@pytest.mark.parametrize("conditioner", ON_A_FROZEN_BASE)
def test_a_frozen_base_stays_byte_equal_and_the_addition_learns(conditioner: str) -> None:
    """arXiv 2302.08453: T2I-Adapter leaves the base as it is; so does a ControlNet."""
    base, painter = on_a_base(conditioner)
    before = {name: value.clone() for name, value in painter.state_dict().items()}
    after = trained(painter).state_dict()
    for name, value in base.state_dict().items():
        learns = conditioner == "dense_controlnet" and name.startswith(DECODER)  # Siamese-Diffusion's public code: sd_locked = False
        assert learns or value.numpy().tobytes() == after[name].numpy().tobytes()
    assert any(not torch.equal(value, after[name]) for name, value in base.state_dict().items()) == (conditioner == "dense_controlnet")
    own = [name for name in before if name not in base.state_dict()]
    assert any(not torch.equal(before[name], after[name]) for name in own)


def test_adapter_features_enter_each_level_of_the_encoder() -> None:
    """A feature map added at the last block of a level reaches the level's skip connection and the next level."""
    base, painter = on_a_base("t2i_adapter")
    x_t, t, cond = batch()
    seen: dict[str, list[Tensor]] = {"base": [], "painter": []}
    for name, model in (("base", base), ("painter", painter)):
        for block in model.unet.down_blocks:  # type: ignore[union-attr]
            block.register_forward_hook(lambda _, __, out, n=name: seen[n].append(out[1][0]))
    base(x_t, t, cond[:, :0])
    painter(x_t, t, cond)
    torch.testing.assert_close(seen["painter"][0], seen["base"][0] + painter.adapter(cond)[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(seen["painter"][1], seen["base"][1] + painter.adapter(cond)[1]), "the next level has seen the first one's feature"


class Branches:
    """A stand-in whose two branches are two tensors of their own."""

    def __init__(self, by_mask: Tensor, by_image: Tensor) -> None:
        self.outputs = [by_mask, by_image]

    def mask_hint(self, cond: Tensor) -> Tensor:
        return cond

    def image_hint(self, image: Tensor, cond: Tensor) -> Tensor:
        return image

    def residuals(self, x_t: Tensor, t: Tensor, hint: Tensor) -> list[Tensor]:
        return [x_t]

    def controlled(self, x_t: Tensor, t: Tensor, residuals: list[Tensor]) -> Tensor:
        return self.outputs.pop(0)

    held = controlled


def test_siamese_noise_consistency_pulls_the_mask_branch_alone() -> None:
    """arXiv 2505.06068: the gradient of |e_m - sg(e_i)|^2 is zero in the image branch, which feels its own error only."""
    x1, _, cond = batch()
    by_mask, by_image = (torch.randn(x1.shape, generator=draw(s)).requires_grad_() for s in (5, 6))
    siamese.loss(Branches(by_mask, by_image), Diffusion(), x1, cond, ImageFlow(), draw(7), done=0.0).backward()  # type: ignore[arg-type]
    noise = torch.randn(x1.shape, generator=draw(7))
    torch.testing.assert_close(by_image.grad, 2 * (by_image - noise).detach() / x1.numel())
    torch.testing.assert_close(by_mask.grad, (2 * (by_mask - noise) + 2 * (by_mask - by_image)).detach() / x1.numel())


def test_siamese_image_branch_gets_the_masks_residuals_without_gradient_and_the_image_by_the_step() -> None:
    _, painter = on_a_base("dense_controlnet")
    for parameter in painter.control.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1, generator=draw(1))
    x_t, t, cond = batch()
    early = siamese.branches(painter, x_t, t, x_t, cond, done=0.0)
    torch.testing.assert_close(early[0], early[1], rtol=0, atol=0)
    late = siamese.branches(painter, x_t, t, x_t, cond, done=1.0)
    assert not torch.allclose(late[0], late[1])
    gradients = torch.autograd.grad(early[1].sum(), [*painter.control.parameters()], allow_unused=True)
    decoder = [p for name, p in painter.named_parameters() if name.startswith(DECODER)]
    assert all(g is not None for g in torch.autograd.grad(late[0].sum(), decoder, retain_graph=True))
    by_image = torch.autograd.grad(late[1].sum(), decoder, retain_graph=True, allow_unused=True)
    assert all(g is None for g in by_image), "the decoder is the mask branch's"
    assert all(g is None or not g.any() for g in gradients), "with weight 0 nothing but the mask's residuals is left, and they carry no gradient"


def test_siamese_without_its_condition_is_trained_as_guidance_asks() -> None:
    _, painter = on_a_base("dense_controlnet")
    for parameter in painter.control.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1, generator=draw(1))
    x1, _, cond = batch()
    always, never = (dataclasses.replace(ImageFlow(), condition_dropout=dropout) for dropout in (1.0, 0.0))
    dropped, told, empty = (siamese.loss(painter, Diffusion(), x1, c, settings, draw(7), done=0.0)
                            for c, settings in ((cond, always), (cond, never), (torch.zeros_like(cond), never)))
    assert torch.equal(dropped, empty) and not torch.equal(told, empty)


def test_siamese_learns_on_clean_estimates_after_a_third() -> None:
    _, painter = on_a_base("dense_controlnet")
    x_t, _, cond = batch(8)
    losses = [siamese.loss(painter, Diffusion(), x_t.tanh(), cond, ImageFlow(), draw(1), done).item() for done in (0.32, 0.34)]
    assert losses[1] > losses[0]


def test_ddim_is_deterministic_and_steps_like_monai() -> None:
    """MONAI's scheduler goes from step s to s - T / n: ours is asked for the same two steps (arXiv 2010.02502, eq. 12)."""
    from monai.networks.schedulers import DDIMScheduler

    ours, theirs, n = Diffusion(), DDIMScheduler(num_train_timesteps=STEPS), 20
    theirs.set_timesteps(n)
    torch.testing.assert_close(ours.alphas, theirs.alphas_cumprod, rtol=1e-5, atol=1e-7)
    x, noise = (torch.randn(2, 3, 8, 8, generator=draw(s)) for s in (0, 1))
    for now in (999, 500, 120, 30):
        after = now - STEPS // n
        found = ours.ddim_step(x, noise, now, after if after >= 0 else None)
        torch.testing.assert_close(found, theirs.step(noise, now, x)[0], rtol=1e-5, atol=1e-5)
    model = velocity_unet.build(3, COND, NETWORK, seed=0)
    cond = batch()[2]
    start = torch.randn(2, 3, 16, 16, generator=draw(2))
    runs = [ours.sample(model, start, cond, 5) for _ in range(2)]
    assert torch.equal(*runs)


def test_ddim_lands_on_the_data_of_a_perfect_model() -> None:
    """A network that knows the data predicts the noise exactly; then every step count ends on the data."""
    data, process = torch.rand(1, 3, 4, 4, generator=draw()) * 2 - 1, Diffusion()

    def perfect(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        kept = process.alphas[step_of(t)].view(-1, 1, 1, 1)
        return (x - kept.sqrt() * data) / (1 - kept).sqrt()

    for n in (2, 7):
        torch.testing.assert_close(process.sample(perfect, torch.randn(1, 3, 4, 4, generator=draw(1)), data, n), data, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_inverts_its_own_noising(name: str) -> None:
    process = load(PROCESSES, name)()
    x1, x0 = (torch.randn(6, 3, 4, 4, generator=draw(s)) for s in (0, 1))
    t = process.times(6, Times(), draw(2))
    assert ((t >= 0) & (t <= 1)).all()
    point = process.noised(x1, x0, t)
    torch.testing.assert_close(process.clean(point, point.target), x1, rtol=1e-3, atol=1e-3)


def test_steps_and_times_are_each_others_inverse() -> None:
    steps = torch.arange(STEPS)
    assert torch.equal(step_of(time_of(steps)), steps)


def test_the_plain_objective_on_a_flow_is_the_loss_of_stage_1() -> None:
    model, settings = velocity_unet.build(3, COND, NETWORK, seed=0), ImageFlow()
    x1, _, cond = batch(4)
    ours = flow_matching_loss(model, x1, cond, settings.times, draw(3), condition_dropout=settings.condition_dropout)
    assert torch.equal(ours, denoise.loss(model, Flow(), x1, cond, settings, draw(3), 0.0))


@pytest.mark.parametrize("coupling", ["independent", "minibatch_ot"])
def test_coupling_is_that_of_stage_1_for_flows_alone(coupling: str) -> None:
    model, settings = velocity_unet.build(3, COND, NETWORK, seed=0), ImageFlow(coupling=coupling)
    x1, _, cond = batch(6)
    ours = flow_matching_loss(model, x1, cond, settings.times, draw(3), coupling, settings.condition_dropout)
    assert torch.equal(ours, denoise.loss(model, Flow(), x1, cond, settings, draw(3), 0.0))
    alone = denoise.loss(model, Diffusion(), x1, cond, ImageFlow(), draw(3), 0.0)
    assert torch.equal(alone, denoise.loss(model, Diffusion(), x1, cond, settings, draw(3), 0.0))


def test_flows_are_drawn_as_sample_says_and_guidance_reaches_every_painter() -> None:
    """A comparator that is a flow differs from stage 1 in its network alone; calls are counted as they are made."""
    calls = []

    def model(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        calls.append(len(x))
        return 0.1 * x + cond.mean((1, 2, 3), keepdim=True)

    noise, cond = torch.randn(2, 3, 8, 8, generator=draw()), torch.ones(2, COND, 8, 8)
    drawn = {}
    for name, facts in (("stage 1", {}), ("flow", {"process": "flow", "n_steps": 25}), ("diffusion", {"process": "diffusion", "n_steps": 7})):
        for scale in (1.0, 2.0):
            settings = Sample(solver="heun", n_steps=5, guidance_scale=scale)
            calls.clear()
            drawn[name, scale] = sample._drawn(model, noise, cond, facts, settings)
            assert sum(calls) == sample._nfe(facts, settings) * len(noise)
    for scale in (1.0, 2.0):
        assert torch.equal(drawn["flow", scale], drawn["stage 1", scale])
    assert not torch.equal(drawn["diffusion", 1.0], drawn["diffusion", 2.0])


def test_one_step_reward_is_that_of_a_late_estimate() -> None:
    """ReFL: the gradient runs through one call; with a constant field its value is exact and d reward / d field = 1 - t."""
    field = torch.full((1, 1, 2, 2), 0.5, requires_grad=True)
    x0, times = torch.zeros(1, 1, 2, 2), time_grid(8)
    done = one_step(lambda x, t, c: field.expand_as(x), x0, x0, times, lambda x: x.sum(), 1, draw(1), weight=1.0)
    stop = int(torch.randint(4, 8, (1,), generator=draw(1)))
    assert math.isclose(done.reward, 4 * 0.5, rel_tol=1e-6)
    torch.testing.assert_close(field.grad, torch.full((1, 1, 2, 2), -(1 - float(times[stop]))))


def test_the_documented_example_is_a_conditioner(monkeypatch: pytest.MonkeyPatch) -> None:
    """``docs/comparators.md``: one file and one line."""
    text = (Path(__file__).parents[1] / "docs" / "comparators.md").read_text(encoding="utf-8")
    module = types.ModuleType("alignflow_core.painters.mean_bias")
    code = compile(text.partition("```python\n")[2].partition("```")[0], "docs/comparators.md", "exec")
    types.FunctionType(code, module.__dict__)()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(CONDITIONERS, "mean_bias", "painters.mean_bias:build")
    model = velocity_unet.build(3, COND, NETWORK, seed=0, conditioner="mean_bias")
    nn.init.normal_(model.unet.out[2].conv.weight, std=0.1, generator=draw(1))
    x_t, t, cond = batch()
    assert not torch.allclose(model(x_t, t, cond), model(x_t, t, torch.zeros_like(cond)))
    assert Comparator(process="flow", conditioner="mean_bias").base is None


@pytest.mark.parametrize(("section", "words"), [
    ({"process": "gan"}, "process"), ({"conditioner": "film"}, "conditioner"), ({"objective": "siamese"}, "go together"), ({"n_steps": 1}, "n_steps"),
])
def test_wrong_axes_are_named(section: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Comparator(**section)  # type: ignore[arg-type]


OVERRIDES = ["profile=smoke", "comparators=paper", "comparators.spade-flow.process=flow", "comparators.spade-flow.conditioner=spade",
             "targets.violet=null", "targets.amber-refl={domain: amber, references: {dir: data/references/amber}, variant_of: amber, "
             "arms: [aligned], align: {gradient: one_step, denoise: none, adapter: lora, lora_rank: 2}}",
             "targets.amber-controlnet={domain: amber, references: {dir: data/references/amber}, variant_of: amber, arms: [aligned], "
             "painter: controlnet-flow}",
             "targets.amber-unlabelled={domain: amber, references: {dir: data/references/amber}, variant_of: amber, arms: [aligned], "
             "align: {rho: 0, denoise: references}}"]


def test_an_arm_of_a_comparator_with_colour_may_be_the_only_baseline() -> None:
    assert compose([*OVERRIDES, "evaluate.baselines=[t2i-adapter+colour]"])["evaluate"]["baselines"] == ["t2i-adapter+colour"]


def test_stage_two_refuses_a_painter_that_is_no_flow() -> None:
    with pytest.raises(InputError, match="stage 2 rolls out a flow"):
        compose([*OVERRIDES, "targets.amber.painter=siamese-diffusion"])


def every_comparator_is_an_arm_and_a_set_of_images(built: Path) -> None:
    names = {"t2i-adapter", "controlnet-diffusion", "controlnet-flow", "siamese-diffusion", "spade-flow"}
    values = pd.read_parquet(built / "artifacts/evaluate/amber/metrics.parquet")
    assert names | {f"{name}+colour" for name in names} <= set(values["arm"])
    comparison = pd.read_parquet(built / "artifacts/compare/comparison.parquet")
    assert names <= set(comparison["arm"])
    assert comparison["mean"].notna().all()
    distances = pd.read_parquet(built / "artifacts/evaluate/amber/distances.parquet")
    assert names <= set(distances["set"])
    likeness = pd.read_parquet(built / "artifacts/evaluate/amber/paired.parquet")
    assert set(likeness["set"]) == names | {"stage1", "aligned"}
    assert {"psnr", "ssim", "ms_ssim", "lpips_standin"} == set(likeness["metric"])
    page = (built / "artifacts/report/index.html").read_text()
    assert all(name in page for name in names)


def equal_terms(built: Path) -> None:
    """Same trunk (10 %), same images seen, bases built once for all that freeze them, and left as they were."""
    ours = read_json(built / "artifacts/image_flow/metrics.json")
    for folder in (built / "artifacts/comparator").iterdir():
        if folder.is_dir():
            numbers = read_json(folder / "metrics.json")
            assert numbers["n_images"] == ours["n_images"]
            trunk = numbers["trunk_parameters"] if folder.name != "spade-flow" else ours["parameters"]
            assert abs(trunk / ours["parameters"] - 1) <= 0.1
    assert {path.name for path in (built / "artifacts/comparator_base").iterdir() if path.is_dir()} == {"diffusion", "flow"}
    base, _ = load_network(built / "artifacts/comparator_base/diffusion")
    for name in ("t2i-adapter", "controlnet-diffusion", "siamese-diffusion"):
        weights, config = load_network(built / f"artifacts/comparator/{name}")
        assert config["process"] == "diffusion"
        learnt = DECODER if name == "siamese-diffusion" else ()
        assert all(torch.equal(weights[key], value) for key, value in base.items() if not key.startswith(learnt))


def stage_two_on_a_comparator_starts_from_its_painter(built: Path) -> None:
    aligned, config = load_network(built / "artifacts/align/amber-controlnet")
    assert config["conditioner"] == "controlnet"
    start, _ = load_network(built / "artifacts/comparator/controlnet-flow")
    assert aligned.keys() == start.keys()
    images = np.load(built / "artifacts/sample_aligned/amber-controlnet/images.npy")
    assert images.std() > 0
    assert read_json(built / "artifacts/align/amber-unlabelled/metrics.json")["reward_weight"] == 0


def graphs_of_dvc_and_dagster_hold_the_comparators(built: Path) -> None:
    text = dvcfile.render(dvcfile.load_project(built / "params.yaml"), built)
    assert "stage comparator --comparator ${key}" in text and "stage comparator_base --base ${key}" in text
    definitions = build_definitions(built)
    assert {"build_base", "build_comparator"} <= {job.name for job in definitions.jobs or []}
    keys = SimpleNamespace(**{spec.key.to_user_string(): spec for spec in definitions.resolve_all_asset_specs()})
    assert keys.comparator_checkpoint.partitions_def.get_partition_keys()[0] == "t2i-adapter"


def test_every_comparator_and_rival_through_the_pipeline(phantom_root: Path, tmp_path: Path) -> None:
    """Built once, looked at from all sides."""
    root = tmp_path / "project"
    shutil.copytree(phantom_root / "data", root / "data")
    write_params(root / "params.yaml", OVERRIDES)
    run_all(root, quiet=True)
    every_comparator_is_an_arm_and_a_set_of_images(root)
    equal_terms(root)
    stage_two_on_a_comparator_starts_from_its_painter(root)
    graphs_of_dvc_and_dagster_hold_the_comparators(root)
