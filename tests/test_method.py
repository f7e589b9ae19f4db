"""The two stages, synthesis, filtering and downstream training as real, tiny components on 24 px discs."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from alignflow_core import align, alignment, alignment_private, alignment_steps, filtering, image_flow, labeller, mask_flow, sample, segment
from alignflow_core.artifact import read_json
from alignflow_core.checkpoint import load_tensors
from alignflow_core.config import (
    ARMS,
    STAGE_ARMS,
    Align,
    Filter,
    Gates,
    ImageFlow,
    Labeller,
    Machine,
    MaskFlow,
    Network,
    Privacy,
    Sample,
    Segment,
    SegmenterNetwork,
    Task,
    Training,
)
from alignflow_core.flow.loss import flow_matching_loss
from alignflow_core.masks import condition, regions
from alignflow_core.networks import velocity_unet
from alignflow_core.networks.segmenters import load_segmenter, predict
from alignflow_core.pairs import Pairs, read_pairs, to_unit, write_pairs
from alignflow_core.reward.gates import RATIOS
from alignflow_core.reward.statconv import StatConv
from alignflow_core.runner import Context
from alignflow_core.seeding import generator
from alignflow_core.segmenter_fit import Diet, fit

SIZE = 24
NETWORK = Network(channels=(8, 16), attention=(False, False), head_channels=8, n_res_blocks=1)
CONFIG = SimpleNamespace(
    seed=0, arms=None, synthetic_share=None, machine=Machine(device="cpu", threads=1), task=Task(),
    mask_flow=MaskFlow(network=NETWORK, training=Training(steps=80, batch=16, lr=3e-3, warm_up=5, ema=0.9), clip=4.0, size=SIZE),
    image_flow=ImageFlow(network=NETWORK, training=Training(steps=80, batch=16, lr=3e-3, warm_up=5, ema=0.9), clip=4.0),
    labeller=Labeller(network=SegmenterNetwork((4, 8)), check_every=10, training=Training(steps=60, batch=8, lr=5e-3, warm_up=5, ema=0.8)),
    align=Align(n_steps=4, k=2, queue=16, check_every=5, check_samples=8, relabel_pairs=12, gates=Gates(velocity=1.5, agreement=0.2),
                relabel=Training(steps=10, batch=8, lr=2e-3, warm_up=2, ema=0.8),
                training=Training(steps=40, batch=8, lr=4e-3, warm_up=2, ema=0.8, save_every=7, log_every=1)),
    sample=Sample(n_pairs=12, batch=4, n_steps=4, area_quantile=0.0, copy_dice=1.0), filter=Filter(judge_steps=8),
    segment=Segment(arms=("source", "stage1", "aligned", "oracle"), seeds=1, network=SegmenterNetwork((4, 8)), check_every=10,
                    training=Training(steps=40, batch=8, lr=5e-3, warm_up=5, ema=0.8)))


def discs(n: int, colour: tuple[int, int, int], seed: int) -> Pairs:
    """n images of a bright disc on a coloured ground."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    centre, radius = rng.uniform(9, 15, (n, 2, 1, 1)), rng.uniform(4, 7, (n, 1, 1))
    masks = ((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 <= radius**2).astype(np.uint8)
    images = np.array(colour) + rng.normal(0, 12, (n, 1, 1, 3)) + 90 * masks[..., None] + rng.normal(0, 16, (n, SIZE, SIZE, 3))
    table = pd.DataFrame({"case_id": [f"{seed}-{i}" for i in range(n)], "group": [f"{seed}-{i}" for i in range(n)],
                          "split": np.array(["train", "val", "test"])[np.minimum(np.arange(n) * 4 // n, 3).clip(1) - 1],
                          "role": np.where(np.arange(n) < n - 3, "align", "held_out")})
    return Pairs(images.clip(0, 255).astype(np.uint8), masks, tuple(table["case_id"]), table)


def context(folder: Path, key: str | None = None) -> Context:
    folder.mkdir(parents=True, exist_ok=True)
    return Context(key, folder, folder, lambda metrics, step: None, lambda done, total, note: None)


def build(function: Any, config: SimpleNamespace, inputs: dict[str, Path], out: Path) -> dict[str, float]:
    out.mkdir(parents=True)
    return function(config, inputs, out, context(out.with_name(out.name + ".work"), "clinic"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Artifact folders of one whole tiny run, by the names under which stages ask for them."""
    root = tmp_path_factory.mktemp("method")
    made = {"data:source": root / "source", "data:target": root / "target", "references": root / "references"}
    theirs = (50, 60, 130)
    for name, pairs in (("source", discs(48, (120, 60, 40), 1)), ("target", discs(48, theirs, 2)), ("references", discs(10, theirs, 3))):
        (root / name).mkdir()
        write_pairs(root / name, pairs)
    for name, function in (("mask_flow", mask_flow.run), ("image_flow", image_flow.run), ("sample_masks", sample.run_masks),
                           ("sample_stage1", sample.run_stage1), ("labeller", labeller.run), ("align", align.run),
                           ("sample_aligned", sample.run_aligned),
                           ("filter", filtering.run), ("segment_source", segment.run_source), ("segment_stage1", segment.run_stage1),
                           ("segment_baselines", segment.run_baselines), ("segment_aligned", segment.run_aligned),
                           ("segment_filtered", segment.run_filtered)):
        build(function, CONFIG, made, root / name)
        made[name] = root / name
    return made


@pytest.mark.parametrize("stage", STAGE_ARMS)
def test_every_stage_trains_its_arms(built: dict[str, Path], stage: str) -> None:
    trained = pd.read_parquet(built[stage] / "segmenters.parquet")["arm"].drop_duplicates()
    assert tuple(trained) == tuple(arm for arm in STAGE_ARMS[stage] if arm in CONFIG.segment.arms)
    assert sorted(arm for arms in STAGE_ARMS.values() for arm in arms) == sorted(ARMS)


def test_flow_masks_are_plausible_and_their_origin_is_recorded(built: dict[str, Path]) -> None:
    table = pd.read_parquet(built["sample_masks"] / "manifest.parquet")
    masks = np.load(built["sample_masks"] / "masks.npy")
    assert table["origin"].value_counts().to_dict() == {"real": 6, "flow": 6}
    area = regions(masks, CONFIG.task).mean((1, 2, 3))
    known = regions(np.asarray(read_pairs(built["data:source"], "train").labels), CONFIG.task).mean((1, 2, 3))
    assert area.min() >= known.min() and area.max() <= known.max()


def test_pair_is_the_same_in_any_batch_and_after_an_interruption(built: dict[str, Path], tmp_path: Path) -> None:
    expected = np.load(built["sample_stage1"] / "images.npy")
    config = SimpleNamespace(**{**vars(CONFIG), "sample": dataclasses.replace(CONFIG.sample, batch=5)})
    build(sample.run_stage1, config, built, tmp_path / "other_batch")
    assert np.abs(np.load(tmp_path / "other_batch" / "images.npy").astype(int) - expected).max() <= 1  # kernels may differ in the last bit

    def stop(done: int, total: int, note: str) -> None:
        raise KeyboardInterrupt

    work = context(tmp_path / "work")
    (tmp_path / "resumed").mkdir()
    with pytest.raises(KeyboardInterrupt):
        sample.run_stage1(CONFIG, built, tmp_path / "resumed", dataclasses.replace(work, progress=stop))
    assert len(list((tmp_path / "work").glob("chunk*.npy"))) == 1
    sample.run_stage1(CONFIG, built, tmp_path / "resumed", work)
    assert (np.load(tmp_path / "resumed" / "images.npy") == expected).all()


def test_every_pair_has_one_of_the_strengths(built: dict[str, Path], tmp_path: Path) -> None:
    config = SimpleNamespace(**{**vars(CONFIG), "sample": dataclasses.replace(CONFIG.sample, strengths=(0.0, 1.0, 0.5))})
    build(sample.run_aligned, config, built, tmp_path / "mixed")
    taken = pd.read_parquet(tmp_path / "mixed/manifest.parquet")["strength"].to_numpy()
    assert set(taken) == {0.0, 0.5, 1.0}
    mixed, unaligned, aligned = (np.load(folder / "images.npy").astype(int) for folder in (tmp_path / "mixed", built["sample_stage1"],
                                                                                          built["sample_aligned"]))
    for strength, images in ((0.0, unaligned), (1.0, aligned)):  # kernels may differ in the last bit
        assert np.abs(mixed - images)[taken == strength].max() <= 1 < np.abs(mixed - images)[taken != strength].max()


def test_pairs_of_real_masks_start_from_their_own_images(built: dict[str, Path], tmp_path: Path) -> None:
    config = SimpleNamespace(**{**vars(CONFIG), "sample": dataclasses.replace(CONFIG.sample, solver="euler", n_steps=10, starts=(0.9,))})
    numbers = build(sample.run_aligned, config, built, tmp_path / "started")
    started, plain = read_pairs(tmp_path / "started"), read_pairs(built["sample_aligned"])
    drawn = pd.read_parquet(built["sample_masks"] / "manifest.parquet")
    real = (drawn["origin"] == "real").to_numpy()
    assert started.table["start"].tolist() == np.where(real, 0.9, 0.0).tolist() and set(plain.table["start"]) == {0.0}
    assert numbers["started_fraction"] == 0.5 and numbers["nfe"] == (1 + 10) / 2
    own = read_pairs(built["data:source"], "train").select(drawn["seed"].to_numpy()[real])
    assert (own.labels == started.labels[real]).all()
    apart = np.abs(started.images[real].astype(int) - own.images).mean((1, 2, 3))
    others = np.abs(started.images[real].astype(int) - np.roll(own.images, 1, axis=0)).mean((1, 2, 3))
    assert (apart < 0.5 * others).all()
    config.sample = dataclasses.replace(config.sample, starts=(0.0,))
    build(sample.run_aligned, config, built, tmp_path / "plain")
    assert (started.images[~real] == np.load(tmp_path / "plain/images.npy")[~real]).all(), "pairs of drawn masks are painted as ever"
    config.sample = dataclasses.replace(config.sample, starts=(0.0, 0.5))
    build(sample.run_aligned, config, built, tmp_path / "both")
    assert set(pd.read_parquet(tmp_path / "both/manifest.parquet").loc[real, "start"]) == {0.0, 0.5}


def test_from_a_time_on_the_solver_goes_the_rest_of_the_way() -> None:
    x, calls = torch.zeros(2, 3, 4, 4), []

    def velocity(x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        calls.append(float(t[0]))
        return torch.ones_like(x_t)

    painted = sample._solve(velocity, x, x[:, :0], dataclasses.replace(CONFIG.sample, solver="euler", n_steps=8, guidance_scale=2.0), 0.5)
    assert torch.allclose(painted, torch.full_like(x, 0.5)) and calls == [0.5, 0.625, 0.75, 0.875], "once: nothing to be guided by"


def test_alignment_moves_the_samples_towards_the_references(built: dict[str, Path]) -> None:
    stage1, aligned = (np.load(built[name] / "images.npy").mean((0, 1, 2)) for name in ("sample_stage1", "sample_aligned"))
    target = read_pairs(built["references"]).images.mean((0, 1, 2))
    assert np.abs(aligned - target).sum() < 0.92 * np.abs(stage1 - target).sum()
    gates = pd.read_parquet(built["align"] / "gates.parquet")
    last = gates[gates["round"] == 1]
    assert last["held_out_reward"].max() == gates.loc[gates["best"], "held_out_reward"].item() > gates["held_out_reward"].iloc[0]
    assert gates.loc[0, ["step", *RATIOS]].tolist() == [0, 1, 1, 1, 1]


def test_stage2_starts_as_stage1(built: dict[str, Path]) -> None:
    model, _ = velocity_unet.load(built["image_flow"])
    model.adopt_target()
    x, t, cond = torch.randn(2, 3, SIZE, SIZE), torch.rand(2), torch.randn(2, 2, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(model(x, t, cond), velocity_unet.in_domain(model, velocity_unet.TARGET)(x, t, cond))


@pytest.mark.parametrize(("changed", "before"), [({}, 6), ({"recolour": False}, 0), ({"denoise": "references"}, 0)])
def test_the_reward_comes_after_the_recoloured_pairs(built: dict[str, Path], tmp_path: Path, changed: dict[str, Any], before: int) -> None:
    short = dataclasses.replace(CONFIG.align.training, steps=4, log_every=1)
    settings = dataclasses.replace(CONFIG.align, training=short, check_every=2, check_samples=4, recolour_steps=6, **changed)
    seen: dict[int, dict[str, float]] = {}
    (tmp_path / "out").mkdir()
    align.run(SimpleNamespace(**{**vars(CONFIG), "align": settings}), built, tmp_path / "out",
              dataclasses.replace(context(tmp_path / "work", "clinic"), log=lambda metrics, step: seen.setdefault(step, {}).update(metrics)))
    steps = {step for step, metrics in seen.items() if "loss" in metrics}
    assert steps == set(range(1, before + (5 if before else 6))), "a step more with the reward in the time of six without"
    gates = pd.read_parquet(tmp_path / "out" / "gates.parquet")
    assert gates["step"].tolist() == ([0, 5, 5, 6, 7, 9, 10] if before else [0, 2, 2, 4, 5])  # two rounds
    rewarded = {step for step in steps if "batch_reward" in seen[step]}
    assert rewarded == ({7, 8, 9, 10} if before else steps), "the steps that the reward takes part in"
    assert {step for step in seen if "held_out_reward" in seen[step]} == set(gates["step"]), "looks are told apart from them"


@pytest.mark.parametrize(("rewards", "copies", "best"), [
    ([-2.0, -0.5], [1, 1], 1), ([-2.0, -0.5, -0.9], [1, 1, 1], 2), ([-2.0, -0.5, -0.9, -0.8], [1, 1, 1, 1], 3),
    ([-2.0, -0.5, -0.7, -0.8], [1, 1, 1, 1], 2),
    ([-0.4, -0.5, -0.9], [1, 1, 1], 0), ([-2.0, -0.5, -0.9], [1, 1, 0.5], 1), ([-2.0, -0.5], [1, 0.5], 0)])
def test_of_the_looks_before_the_reward_only_the_last_that_kept_the_gates_counts(rewards: list[float], copies: list[float], best: int) -> None:
    looks = torch.tensor([[10 * row, 0, reward, 0, 1, 1, 1, copy] for row, (reward, copy) in enumerate(zip(rewards, copies, strict=True))])
    aligning = SimpleNamespace(settings=dataclasses.replace(CONFIG.align, recolour_steps=20))
    aligning._kept = lambda seen: alignment.Alignment._kept(aligning, seen)  # type: ignore[arg-type]
    assert alignment.Alignment._best(aligning, looks) == best  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_reward_and_gates_see_pictures_under_the_guidance_that_pairs_are_painted_with(
        built: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """Of stage 1 these equal what synthesis paints of the same masks and noise."""
    settings = dataclasses.replace(CONFIG.sample, solver="euler", guidance_scale=scale, n_steps=CONFIG.align.n_steps)
    config = SimpleNamespace(**{**vars(CONFIG), "sample": settings})
    aligning = alignment.Alignment(config, built, context(tmp_path, "clinic"))
    model, _ = velocity_unet.load(built["image_flow"])
    model.adopt_target()
    painter = velocity_unet.in_domain(model, velocity_unet.TARGET)
    expected = sample._solve(painter, aligning.probe.x0, aligning.probe.cond, config.sample)
    assert torch.allclose(aligning._sample(aligning.painter)[0], expected, atol=1e-5)
    rolled: list[torch.Tensor] = []
    monkeypatch.setattr(aligning, "_features", lambda x1, labels: rolled.append(x1.detach()) or [x1.mean((2, 3))])
    monkeypatch.setattr(aligning, "objective", lambda features, known: features[0].square().mean())
    aligning._pull(torch.Generator().manual_seed(1), 1.0, [None], [torch.zeros(0, 3)], 0)
    rows, x0 = aligning._masks_and_noise(torch.Generator().manual_seed(1))
    assert torch.allclose(rolled[0], sample._solve(painter, x0, aligning.cond[rows], config.sample), atol=1e-5)


def test_patience_begins_with_the_reward(built: dict[str, Path], tmp_path: Path) -> None:
    """Looks at recoloured pairs alone, all refused here, end no round; with the reward one refused look does."""
    settings = dataclasses.replace(CONFIG.align, training=dataclasses.replace(CONFIG.align.training, steps=6), check_every=1, check_samples=4,
                                   recolour_steps=3, rounds=1, patience=1, gates=Gates(diversity=10.0))
    metrics = build(align.run, SimpleNamespace(**{**vars(CONFIG), "align": settings}), built, tmp_path / "out")
    gates = pd.read_parquet(tmp_path / "out" / "gates.parquet")
    assert gates["step"].tolist() == [0, 3, 4] and gates["best"].tolist() == [True, False, False]
    assert metrics["steps"] == 4
    assert metrics["held_out_before"] == pytest.approx(gates["held_out_reward"][0]) == metrics["held_out_after"]


def test_without_a_reward_looks_are_as_far_apart_in_time_as_with_one(built: dict[str, Path], tmp_path: Path) -> None:
    """Five steps of denoising take as long as one with the reward: patience must not end such a round after a fifth of its time."""
    short = dataclasses.replace(CONFIG.align.training, steps=12)
    settings = dataclasses.replace(CONFIG.align, training=short, check_every=1, check_samples=4, rounds=1, regions="none", recolour=False,
                                   recolour_steps=0, rho=0.0, denoise="references", gates=Gates(hold=False))
    build(align.run, SimpleNamespace(**{**vars(CONFIG), "align": settings}), built, tmp_path / "out")
    assert pd.read_parquet(tmp_path / "out" / "gates.parquet")["step"].tolist() == [0, 5, 10, 12]


def test_a_look_that_lost_its_place_leaves_the_weights_of_the_start(built: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first look before the reward is the best until the second, the last before it, takes its place and is worse than the start."""
    rewards = iter([-1.0, -0.9, -1.05, -2.0, -2.0])
    look = alignment.Alignment._looker

    def looker(*args: Any) -> Any:
        before, seen = look(*args)
        return before, lambda model: {**seen(model), "held_out_reward": next(rewards)}

    monkeypatch.setattr(alignment.Alignment, "_looker", looker)
    settings = dataclasses.replace(CONFIG.align, training=dataclasses.replace(CONFIG.align.training, steps=2), check_every=1, check_samples=4,
                                   recolour_steps=6, rounds=1, gates=Gates(hold=False))
    assert alignment_steps.rewardless_steps(settings) == 6
    build(align.run, SimpleNamespace(**{**vars(CONFIG), "align": settings}), built, tmp_path / "out")
    gates = pd.read_parquet(tmp_path / "out" / "gates.parquet")
    assert gates["best"].tolist() == [True, *[False] * (len(gates) - 1)] and gates["held_out_reward"].tolist()[:3] == [-1.0, -0.9, -1.05]
    start, _ = velocity_unet.load(built["image_flow"])
    start.adopt_target()
    saved, _ = velocity_unet.load(tmp_path / "out")
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in start.state_dict().items())


def test_before_and_after_are_measured_alike(built: dict[str, Path], tmp_path: Path) -> None:
    """With gates that refuse everything the result is stage 1: by the renewed labeller, too, it has gained nothing."""
    settings = dataclasses.replace(CONFIG.align, training=dataclasses.replace(CONFIG.align.training, steps=4), check_every=2, check_samples=4,
                                   gates=Gates(diversity=10.0))
    metrics = build(align.run, SimpleNamespace(**{**vars(CONFIG), "align": settings}), built, tmp_path / "out")
    looks = pd.read_parquet(tmp_path / "out" / "gates.parquet").groupby("round")["held_out_reward"].first()
    assert metrics["held_out_before"] == pytest.approx(looks[1]) == metrics["held_out_after"] and looks[0] != pytest.approx(looks[1])
    assert metrics["reward_before"] == pytest.approx(metrics["reward_after"])


def test_weights_without_validation_are_the_last(built: dict[str, Path], tmp_path: Path) -> None:
    """No pair to choose by is not the worst Dice: untrained weights would be kept."""
    pairs, training = read_pairs(built["data:source"], "train"), CONFIG.segment.training
    fitted = [fit(Diet(pairs), validation, CONFIG.task, CONFIG.segment.network, training, CONFIG.machine, (0, "segment", "none"),
                  tmp_path / f"{number}.safetensors", context(tmp_path)) for number, validation in enumerate((None, pairs.select(np.zeros(0, int))))]
    assert all(torch.equal(fitted[0][0][name], value) for name, value in fitted[1][0].items()) and np.isnan(fitted[1][1])


@pytest.mark.parametrize("batch", [1, 5, 8, 64])
def test_validation_loss_is_the_mean_over_images_and_each_is_noised_once(built: dict[str, Path], batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = velocity_unet.load(built["image_flow"])
    pairs = read_pairs(built["data:source"], "val")
    images, cond = to_unit(pairs.images), condition(pairs.labels, CONFIG.task, CONFIG.image_flow.clip)
    settings = dataclasses.replace(CONFIG.image_flow, training=dataclasses.replace(CONFIG.image_flow.training, batch=batch))
    parts: list[tuple[float, int]] = []

    def loss(*arguments: Any, **options: Any) -> torch.Tensor:
        found = flow_matching_loss(*arguments, **options)
        parts.append((float(found), len(arguments[1])))
        return found

    monkeypatch.setattr(image_flow, "flow_matching_loss", loss)
    found = image_flow._validation_loss(model, images, cond, settings, 0)
    assert found == image_flow._validation_loss(model, images, cond, settings, 0), "noise and times are fixed"
    losses, sizes = zip(*parts[:len(parts) // 2], strict=True)
    assert sum(sizes) == 4 * len(images) and len(set(losses)) == len(losses)
    assert found == pytest.approx(np.average(losses, weights=sizes), rel=1e-6)


def test_a_target_kept_for_testing_has_no_oracle(built: dict[str, Path], tmp_path: Path) -> None:
    target = discs(12, (50, 60, 130), 2)
    (tmp_path / "target").mkdir()
    write_pairs(tmp_path / "target", Pairs(target.images, target.masks, target.ids, target.table.assign(split="test")))
    config = SimpleNamespace(**{**vars(CONFIG), "arms": ("fourier", "oracle"), "segment": dataclasses.replace(
        CONFIG.segment, training=dataclasses.replace(CONFIG.segment.training, steps=2, warm_up=1))})
    build(segment.run_baselines, config, {**built, "data:target": tmp_path / "target"}, tmp_path / "out")
    assert pd.read_parquet(tmp_path / "out" / "segmenters.parquet")["arm"].tolist() == ["fourier"]


def test_masks_without_a_class_can_be_copies() -> None:
    masks = np.zeros((2, 8, 8), np.uint8)
    masks[0, :4] = 1
    task = dataclasses.replace(CONFIG.task, kind="labels", classes=("a", "b"), values={0: 0, 1: 1, 2: 2}, nested=False)
    known = regions(masks, task)
    assert sample._nearest_dice(masks[0], known, task) == 1.0 and sample._nearest_dice(masks[0], known[1:], task) == 0.0
    assert sample._nearest_dice(masks[1], known, task) == 0.0, "an empty mask is the copy of no other"


PRIVATE: dict[str, Any] = {"privacy": Privacy(epsilon=30.0), "recolour": False}


@pytest.mark.parametrize("changed", [{}, {"recolour_steps": 9}, {"regions": "none", "reward": "skl"}, {"gradient": "last_k", "k": 1}, {"queue": 0},
                                     {"adapter": "lora", "lora_rank": 2, "gradient": "full"}, PRIVATE])
def test_alignment_interrupted_and_resumed_is_byte_equal(built: dict[str, Path], tmp_path: Path, changed: dict[str, Any]) -> None:
    if changed is PRIVATE:
        pytest.importorskip("opacus", reason="the extra 'dp' is not installed")
    short = dataclasses.replace(CONFIG.align.training, steps=14)
    config = SimpleNamespace(**{**vars(CONFIG), "align": dataclasses.replace(CONFIG.align, training=short, check_samples=4, **changed)})
    build(align.run, config, built, tmp_path / "whole")
    work = context(tmp_path / "work", "clinic")
    (tmp_path / "resumed").mkdir()

    def crash(metrics: dict[str, float], step: int) -> None:
        if step == 12:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        align.run(config, built, tmp_path / "resumed", dataclasses.replace(work, log=crash))
    align.run(config, built, tmp_path / "resumed", work)
    expected, found = (load_tensors(tmp_path / name / "weights.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    pd.testing.assert_frame_equal(*(pd.read_parquet(tmp_path / name / "gates.parquet") for name in ("whole", "resumed")))


def test_with_a_budget_nothing_but_the_noised_gradients_sees_the_references(built: dict[str, Path], tmp_path: Path,
                                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise held fixed, held-out references change nothing, and an aligning one changes the weights."""
    pytest.importorskip("opacus", reason="the extra 'dp' is not installed")
    monkeypatch.setattr(alignment_private, "salt", lambda *parts: "fixed")
    short = dataclasses.replace(CONFIG.align.training, steps=8)
    config = SimpleNamespace(**{**vars(CONFIG), "align": dataclasses.replace(CONFIG.align, training=short, **PRIVATE)})
    references, made = read_pairs(built["references"]), {}
    for name, row in (("as they are", None), ("held out", 9), ("aligning", 0)):
        images = references.images.copy()
        if row is not None:
            images[row] = images[row, ::-1, :, ::-1]
        (tmp_path / name).mkdir()
        write_pairs(tmp_path / name, dataclasses.replace(references, images=images))
        metrics = build(align.run, config, {**built, "references": tmp_path / name}, tmp_path / f"{name} out")
        made[name] = (tmp_path / f"{name} out" / "weights.safetensors").read_bytes()
    assert made["held out"] == made["as they are"] != made["aligning"]
    looks, verdict = pd.read_parquet(tmp_path / "aligning out" / "gates.parquet"), read_json(tmp_path / "aligning out" / "verdict.json")
    assert looks[["reward", "held_out_reward", "copy_ratio"]].isna().all(axis=None)
    assert not set(metrics) & {"reward_after", "held_out_after", "copy_ratio"}
    assert verdict["privacy"]["n_records"] == 7 and 29 < verdict["privacy"]["epsilon"] == metrics["epsilon"] <= 30
    assert read_json(tmp_path / "aligning out" / "config.json")["privacy"] == verdict["privacy"]


def test_noise_of_a_budget_is_new_for_other_references_roles_labels_and_settings(built: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("opacus", reason="the extra 'dp' is not installed")
    private = dataclasses.replace(CONFIG.align, **PRIVATE)
    references = read_pairs(built["references"])
    flipped = references.labels[:, ::-1].copy()
    roles = references.table.assign(role=references.table["role"].replace({"align": "held_out", "held_out": "align"}))
    sets = {"given": references, "other images": dataclasses.replace(references, images=references.images[:, ::-1].copy()),
            "other labels": dataclasses.replace(references, masks=flipped), "other roles": dataclasses.replace(references, table=roles)}
    salts = {}
    for name, pairs in sets.items():
        (tmp_path / name).mkdir()
        write_pairs(tmp_path / name, pairs)
        for lr in (1e-3, 2e-3) if name == "given" else (1e-3,):
            settings = dataclasses.replace(private, training=dataclasses.replace(private.training, lr=lr))
            config = SimpleNamespace(**{**vars(CONFIG), "align": settings})
            inputs = {**built, "references": tmp_path / name}
            salts[name, lr] = alignment_private.PrivateAlignment(config, inputs, context(tmp_path / "work", "clinic")).private.salt
    assert len(set(salts.values())) == len(salts) == 5


def test_noise_of_a_budget_is_new_for_another_guidance_and_other_weights_of_the_encoder(built: dict[str, Path], tmp_path: Path,
                                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opacus", reason="the extra 'dp' is not installed")
    monkeypatch.setattr(alignment, "build", lambda name, material: StatConv())
    private = dataclasses.replace(CONFIG.align, **PRIVATE, encoder="pretrained", encoder_weights="vit")
    work = context(tmp_path / "work", "clinic")
    (work.root / "vit").mkdir()
    salts = []
    for guidance, weights in ((1.0, b"a"), (2.0, b"a"), (1.0, b"b"), (1.0, b"a")):
        (work.root / "vit" / "model.safetensors").write_bytes(weights)
        config = SimpleNamespace(**{**vars(CONFIG), "align": private, "sample": dataclasses.replace(CONFIG.sample, guidance_scale=guidance)})
        salts.append(alignment_private.PrivateAlignment(config, built, work).private.salt)
    assert len(set(salts)) == 3 and salts[0] == salts[3], "a resumed run repeats its noise"


@pytest.mark.parametrize("changed", [{}, PRIVATE])
def test_rewards_are_of_single_precision(built: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]) -> None:
    if changed is PRIVATE:
        pytest.importorskip("opacus", reason="the extra 'dp' is not installed")
    kind = alignment_private.PrivateAlignment if changed is PRIVATE else alignment.Alignment
    work = kind(SimpleNamespace(**{**vars(CONFIG), "align": dataclasses.replace(CONFIG.align, **changed)}), built, context(tmp_path, "clinic"))
    known, _ = work._describe()
    for module in (alignment, alignment_private):  # as on a GPU under machine.precision=bf16
        monkeypatch.setattr(module, "autocast", lambda machine, device: torch.autocast("cpu", torch.bfloat16))
    seen: list[bool] = []
    features, distance = work._features, work.objective.distance
    monkeypatch.setattr(work, "_features", lambda *given: (seen.append(torch.is_autocast_enabled("cpu")), features(*given))[1])
    monkeypatch.setattr(work.objective, "distance", lambda *given: (seen.append(torch.is_autocast_enabled("cpu")), distance(*given))[1])
    work._pull(generator(0), 1.0, known, [f[:0] for f in features(work.images[:2], work.labels[:2])], 0)
    assert seen and not any(seen)


def test_filter_refuses_a_pair_whose_image_ignores_its_mask(built: dict[str, Path], tmp_path: Path) -> None:
    pairs = discs(60, (50, 60, 130), 7)
    masks = np.array(pairs.labels)
    masks[9] = np.roll(masks[9], 12, axis=0)
    table = pairs.table.assign(origin="flow")
    (tmp_path / "pairs").mkdir()
    write_pairs(tmp_path / "pairs", Pairs(pairs.images, masks, pairs.ids, table))
    config = SimpleNamespace(**{**vars(CONFIG), "filter": Filter(judge_steps=120)})
    build(filtering.run, config, {**built, "sample_aligned": tmp_path / "pairs"}, tmp_path / "out")
    found = pd.read_parquet(tmp_path / "out" / "manifest.parquet")
    assert found.loc[9, "reason"] == "image does not follow its mask" and found["kept"].mean() > 0.8


def test_a_pair_is_judged_among_those_of_its_strength() -> None:
    """A quarter of the set in the source's look is implausible only where nobody says that it was meant to be."""
    near, far, source = discs(30, (50, 60, 130), 7), discs(10, (120, 60, 40), 8), discs(48, (120, 60, 40), 1)
    strength = np.repeat([1.0, 0.0], [30, 10])
    images = np.concatenate([near.images, far.images])
    images[[3, 35]] = 255 - images[[3, 35]]
    table = pd.concat([near.table, far.table], ignore_index=True)
    told, untold = (filtering._outlyingness(Pairs(images, None, (*near.ids, *far.ids), each), source)
                    for each in (table.assign(strength=strength), table))
    assert set(np.argsort(told)[-2:]) == {3, 35} and np.delete(told, [3, 35]).max() < 2.5
    assert untold[strength == 0].min() > 2.5


def test_a_feature_that_hardly_varies_makes_no_pair_implausible() -> None:
    """Most pairs have one flat ground, a few are a grey level off in places: no more than that."""
    source, images = discs(48, (120, 60, 40), 1), np.full((40, SIZE, SIZE, 3), (50, 60, 130), np.uint8)
    images[:, 8:16, 8:16] += np.random.default_rng(0).integers(0, 80, (40, 1, 1, 3)).astype(np.uint8)
    images[::9, :4, :4] += 1
    found = filtering._outlyingness(Pairs(images, None, tuple(map(str, range(40))), pd.DataFrame({"pair_id": range(40)})), source)
    assert found[::9].max() < np.delete(found, np.arange(0, 40, 9)).max()


def test_area_weights_move_the_set_towards_the_references() -> None:
    rng = np.random.default_rng(0)
    areas = np.exp(rng.normal(-3, 0.3, (400, 1)))
    larger = np.exp(rng.normal(-2.7, 0.3, (10, 1)))
    weight = filtering.area_weights(areas, larger)
    assert weight.min() >= 0.25 and weight.max() <= 4
    moved = np.average(np.log(areas[:, 0]), weights=weight) - np.log(areas).mean()
    assert 0.5 * 0.3 < moved < 1.3 * (np.log(larger).mean() - np.log(areas).mean())
    within = np.exp(np.log(areas).mean() + 0.05 * rng.normal(0, 0.3, (10, 1)))
    assert np.allclose(filtering.area_weights(areas, within), 1), "a shift within its sampling error is none"
    assert np.allclose(filtering.area_weights(areas, larger[:1]), 1), "one reference does not tell"


def test_a_pair_without_a_region_is_weighted_by_the_others_alone() -> None:
    areas = np.exp(np.array([[-2.0], [-1.9], [-2.1], [-np.inf]]))  # the first lies at the mean
    theirs = np.exp(np.random.default_rng(0).normal(-1.95, 0.01, (50, 1)))
    shift = (np.log(theirs).mean() + 2) / np.log(areas[:3]).std()
    shift *= 1 - 1 / (50 * shift**2)
    weight = filtering.area_weights(areas, theirs)
    assert weight[3] / weight[0] == pytest.approx(np.exp(shift**2 / 2)) and 0.5 < shift < 1
    ratios = filtering._area_ratios(np.array([[0.2, 0.0], [0.2, 0.0], [0.2, 0.1]]), np.array([[0.3, 0.1]]), Task(kind="labels", classes=("a", "b"),
                                    values={0: 0, 1: 1, 2: 2}))
    assert ratios == {"area_ratio_a": pytest.approx(1.5)}, "a ratio to nothing is none"


def test_segmenters_find_the_disc_and_arms_differ_in_their_images_only(built: dict[str, Path]) -> None:
    table = pd.concat([pd.read_parquet(built[name] / "segmenters.parquet") for name in built if name.startswith("segment_")])
    assert set(table["arm"]) == {"source", "stage1", "aligned", "oracle"} and set(table["steps"]) == {40}
    test = read_pairs(built["data:source"], "test")
    found = predict(load_segmenter(built["segment_source"] / "source" / "seed0", torch.device("cpu")), test.images, CONFIG.task, torch.device("cpu"))
    assert (2 * (found & test.labels).sum() / (found.sum() + test.labels.sum())) > 0.8


@pytest.mark.parametrize(("n_steps", "begin", "steps"), [(10, 0.7, 3), (12, 0.5, 6), (3, 0.5, 2), (12, 0.0, 12)])
def test_steps_from_a_start_are_about_as_long_as_those_from_noise(n_steps: int, begin: float, steps: int) -> None:
    assert sample._steps(dataclasses.replace(CONFIG.sample, n_steps=n_steps), begin) == steps
