"""Stage 2: raise a differentiable reward for one target, the denoising loss kept in (arXiv 2604.02868, stage 2).

Each step minimises ``L_fm(source pairs) - lambda * r(samples, references)``. lambda balances the two gradients'
norms before the first step, ``|lambda g_r| = rho |g_fm|``, and stays: distances differ by orders of magnitude.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from alignflow_core.checkpoint import section
from alignflow_core.config import Align, ImageFlow, Task
from alignflow_core.devices import autocast, prepare
from alignflow_core.flow.ema import Ema
from alignflow_core.flow.loss import flow_matching_loss
from alignflow_core.flow.solver import time_grid
from alignflow_core.flow.train import train
from alignflow_core.masks import condition
from alignflow_core.networks import velocity_unet
from alignflow_core.pairs import read_pairs, to_unit
from alignflow_core.reward.distances import DISTANCES, Reference, describe
from alignflow_core.reward.encoders import fit_encoder
from alignflow_core.reward.gates import Probe
from alignflow_core.reward.gradient import SCHEMES, Rewarded
from alignflow_core.seeding import generator

CALIBRATION_BATCHES = 4
PROBE_REPEATS = 4


def run(config: Any, inputs: dict[str, Path], out_dir: Path, context: Any) -> dict[str, float]:
    """Tune the stage-1 painter towards the reference set; write the weights of the best held-out reward.

    Writes ``weights.safetensors``, ``config.json`` and ``gates.parquet`` (one row per look at the fixed probe set).
    """
    settings: Align = config.align
    flow: ImageFlow = config.image_flow
    task: Task = config.task
    device = prepare(config.machine)
    pairs, references = read_pairs(inputs["data:source"], "train"), read_pairs(inputs["references"])
    images, cond = to_unit(pairs.images).to(device), condition(pairs.labels, task, flow.clip).to(device)
    encoder = fit_encoder(settings.encoder, images)
    aligning, held_out = (_describe(encoder, to_unit(references.images)[role].to(device), settings.prior_count)
                          for role in _roles(references.table["role"]))
    model, facts = velocity_unet.load(inputs["image_flow"])
    model.adopt_target()
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    painter = velocity_unet.in_domain(model, velocity_unet.TARGET)
    times = time_grid(settings.n_steps)
    batch = settings.training.batch
    state = {"queue": torch.zeros(0, aligning.mean.numel(), device=device)}

    def denoise(draw: torch.Generator) -> float:
        rows = torch.randint(len(images), (batch,), generator=draw).to(device)
        with autocast(config.machine, device):
            loss = flow_matching_loss(model, images[rows], cond[rows], flow.times, draw, flow.coupling, flow.condition_dropout)
        loss.backward()
        return loss.item()

    def pull(draw: torch.Generator, weight: float) -> tuple[Rewarded, Tensor]:
        """Reward gradient of one batch, steadied by the features of earlier samples."""
        rows = torch.randint(len(images), (batch,), generator=draw).to(device)
        x0 = torch.randn((batch, *images.shape[1:]), generator=draw).to(device)
        past, kept = state["queue"], []

        def reward(x1: Tensor) -> Tensor:
            features = encoder(x1.float())
            kept.append(features.detach())
            # The batch is only a part of the set whose moments are compared: its gradient is scaled back up.
            whole = (len(past) + len(features)) / len(features)
            scaled = features * whole + features.detach() * (1 - whole)
            return -DISTANCES[settings.reward](torch.cat([past, scaled]), aligning, settings.temperature)

        with autocast(config.machine, device):
            done = SCHEMES[settings.gradient](painter, x0, cond[rows], times, reward, settings.k, draw, weight)
        return done, kept[0]

    weight = _balance(model, settings, denoise, pull, config.seed)
    probe = _probe(config.seed, cond, images.shape[1:], settings, device)
    base: dict[str, float] = {}

    def look(velocity_model: nn.Module) -> dict[str, float]:
        """Held-out reward and the gates' ratios to the base."""
        with autocast(config.machine, device):
            x1, speed = probe.sample(velocity_unet.in_domain(velocity_model, velocity_unet.TARGET))
        features = encoder(x1.float())
        base.setdefault("speed", speed)
        base.setdefault("diversity", probe.diversity(features))
        distance = DISTANCES[settings.reward]
        return {"held_out_reward": -float(distance(features, held_out, settings.temperature)),
                "reward": -float(distance(features, aligning, settings.temperature)),
                "diversity_ratio": probe.diversity(features) / base["diversity"], "velocity_ratio": speed / base["speed"]}

    first = look(model)
    state["looks"] = torch.tensor([[0.0, *first.values()]], dtype=torch.float64)
    state |= {f"best:{name}": value.detach().clone() for name, value in model.state_dict().items()}
    averaged, _ = velocity_unet.load(inputs["image_flow"])
    averaged = averaged.to(device)

    def step(i: int) -> dict[str, float]:
        draw = generator(config.seed, "align", context.key, i)
        loss = denoise(draw)
        done, features = pull(draw, weight)
        past = torch.cat([state["queue"], features])
        state["queue"] = past[max(0, len(past) - settings.queue):]
        return {"loss": loss, "reward": done.reward}

    def on_step(done: int, ema: Ema) -> bool:
        """Look at the gates; true when the held-out reward has not risen for ``patience`` looks."""
        if done % settings.check_every and done != settings.training.steps:
            return False
        averaged.load_state_dict(ema.shadow)
        seen = look(averaged)
        context.log(seen, done)
        state["looks"] = torch.cat([state["looks"], torch.tensor([[float(done), *seen.values()]], dtype=torch.float64)])
        best_row, last_row = int(state["looks"][:, 1].argmax()), len(state["looks"]) - 1
        if best_row == last_row:
            state.update({f"best:{name}": value.clone() for name, value in ema.shadow.items()})
        return last_row - best_row >= settings.patience

    train(model, step, settings.training, context.work_dir / "state.safetensors", context.log, context.progress, on_step, state)

    rows = state["looks"]
    best_row = int(rows[:, 1].argmax())
    table = pd.DataFrame(rows.numpy(), columns=["step", *first])
    table["step"] = table["step"].astype("int64")
    table["best"] = table.index == best_row
    table.to_parquet(out_dir / "gates.parquet", index=False)
    velocity_unet.save(out_dir, section("best", state), facts["channels"], facts["cond_channels"],
                       flow.network, domain=velocity_unet.TARGET, clip=facts["clip"], reward=settings.reward, gradient=settings.gradient)
    chosen, start = table.iloc[best_row], table.iloc[0]
    return {"best_step": float(chosen["step"]), "steps": float(table["step"].iloc[-1]), "reward_weight": weight,
            "reward_before": float(start["reward"]), "reward_after": float(chosen["reward"]),
            "held_out_before": float(start["held_out_reward"]), "held_out_after": float(chosen["held_out_reward"]),
            "diversity_ratio": float(chosen["diversity_ratio"]), "velocity_ratio": float(chosen["velocity_ratio"]),
            "n_references": float(len(references)), "n_aligning": float((references.table["role"] == "align").sum())}


def _roles(role: "pd.Series[str]") -> tuple[np.ndarray, np.ndarray]:
    """Row masks of the aligning and the held-out references; too few to hold any out: the aligning ones serve twice."""
    aligning, held_out = np.array(role == "align"), np.array(role == "held_out")
    return aligning, held_out if held_out.any() else aligning


@torch.no_grad()
def _describe(encoder: nn.Module, images: Tensor, prior_count: float) -> Reference:
    return describe(encoder(images), prior_count)


def _probe(seed: int, cond: Tensor, shape: torch.Size, settings: Align, device: torch.device) -> Probe:
    """A fixed set of masks with several noises each."""
    draw = generator(seed, "align", "probe")
    masks = max(1, settings.check_samples // PROBE_REPEATS)
    rows = torch.randint(len(cond), (masks,), generator=draw).repeat_interleave(PROBE_REPEATS)
    x0 = torch.randn((len(rows), *shape), generator=draw).to(device)
    return Probe(x0, cond[rows.to(device)], time_grid(settings.n_steps), PROBE_REPEATS)


def _balance(model: nn.Module, settings: Align, denoise: Callable[[torch.Generator], float],
             pull: Callable[[torch.Generator, float], tuple[Rewarded, Tensor]], seed: int) -> float:
    """lambda = rho * mean |g_fm| / mean |g_r| over a few batches of the base model."""
    norms = {"denoise": 0.0, "reward": 0.0}
    for i in range(CALIBRATION_BATCHES):
        draw = generator(seed, "align", "balance", i)
        for name, act in (("denoise", lambda d: denoise(d)), ("reward", lambda d: pull(d, 1.0))):
            model.zero_grad(set_to_none=True)
            act(draw)
            norms[name] += math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    model.zero_grad(set_to_none=True)
    return settings.rho * norms["denoise"] / max(norms["reward"], 1e-12)

