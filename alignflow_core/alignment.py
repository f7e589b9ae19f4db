"""What stage 2 does (``align.py``): the painter, its data and its reward, one round at a time."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from alignflow_core.alignment_steps import REWARD_COST, rewarded_steps, rewardless_steps
from alignflow_core.artifact import read_json, write_json
from alignflow_core.checkpoint import prefixed, section
from alignflow_core.config import Align, ImageFlow, Task
from alignflow_core.devices import autocast, placed, prepare
from alignflow_core.errors import InputError
from alignflow_core.flow.ema import Ema
from alignflow_core.flow.guidance import guided
from alignflow_core.flow.loss import flow_matching_loss
from alignflow_core.flow.path import VelocityModel
from alignflow_core.flow.solver import euler, time_grid
from alignflow_core.flow.train import train
from alignflow_core.masks import condition
from alignflow_core.networks import lora, velocity_unet
from alignflow_core.networks.segmenters import load_segmenter, mean_dice, predict, stored_network
from alignflow_core.pairs import Pairs, read_pairs, to_bytes, to_unit
from alignflow_core.reference_instrument import instrument_of, probe_features, refuse_other_instrument
from alignflow_core.reference_moments import MOMENTS_FILE, ReferenceMoments, read_moments
from alignflow_core.reward import regions
from alignflow_core.reward.encoders import Material, Standardised, build
from alignflow_core.reward.gates import RATIOS, Probe, closeness, failures
from alignflow_core.reward.gradient import SCHEMES, Rewarded
from alignflow_core.reward.moments import Moments
from alignflow_core.reward.objective import Known, Objective, steadied
from alignflow_core.reward.recolour import recolour, refocus, spectral_gain, spectrum
from alignflow_core.seeding import derive_seed, generator, normal
from alignflow_core.segmenter_fit import Diet, fit

CALIBRATION_BATCHES = 4
PROBE_REPEATS = 2  # two tell how far samples of a mask differ; more masks tell more of everything else
RECOLOURED = 0.75  # of the denoising loss
SPECTRUM_IMAGES = 64
COLUMNS = ("step", "round", "held_out_reward", "reward", *RATIOS)
NO_COPY_GATE = "not measured: the references are moments, and only their images could tell whether samples copy them"

Weights = dict[str, Tensor]


class Alignment:
    """One target's painter, tuned in rounds."""

    def __init__(self, config: Any, inputs: dict[str, Path], context: Any) -> None:
        self.config, self.inputs, self.context = config, inputs, context
        self.settings: Align = config.align
        self.flow: ImageFlow = config.image_flow
        self.task: Task = config.task
        self.device = prepare(config.machine)
        self.source = read_pairs(inputs["data:source"], "train")
        self.references = read_pairs(inputs["references"])
        if self.settings.regions == "labels" and self.references.masks is None:
            raise InputError(f"target {context.key}: align.regions is 'labels' and its references have no masks; use align.regions=pseudo or none")
        self.images = to_unit(self.source.images).to(self.device)
        self.labels = torch.from_numpy(np.array(self.source.labels)).to(self.device)
        self.cond = condition(self.source.labels, self.task, self.flow.clip).to(self.device)
        self.reference_images = to_unit(self.references.images).to(self.device)
        self.seen = regions.view(self.images)
        self.aligning, self.held_out = _roles(self.references.table["role"])
        self.painter = self._painter()
        self.averaged = self._painter()
        self.times = time_grid(self.settings.n_steps)
        weights = self.settings.encoder_weights
        local = weights is not None and not weights.startswith("hub:")
        encoder = build(self.settings.encoder, Material(
            self.images, self.reference_images[torch.from_numpy(self.aligning).to(self.device)], inputs["image_flow"],
            context.root / str(weights) if local else weights, config.seed, context.work_dir))
        self.labeller = load_segmenter(inputs["labeller"], self.device)
        self.objective = Objective(Standardised(encoder, self.images, self._regions(self.labels)), self.settings)
        self.probe, self.probe_labels = self._probe()
        self.given = self._given()
        self.steps = rewardless_steps(self.settings) + rewarded_steps(self.settings)

    def run(self, out_dir: Path) -> dict[str, float]:
        """All rounds; writes what ``align.run`` says."""
        settings = self.settings
        base_images, base_speed = self._sample(self.painter)
        weights: Weights = {name: value.detach().clone() for name, value in self.painter.state_dict().items()}
        n_rounds = settings.rounds if settings.regions == "pseudo" else 1
        shares = np.diff(np.linspace(0, self.steps, n_rounds + 1).astype(int))
        looks: list[pd.DataFrame] = []
        verdicts: list[dict[str, Any]] = []
        balance, before = 0.0, dict[str, float]()
        for number, steps in enumerate(shares.tolist()):
            known, held_out = self._describe()
            balance = balance or (self._balance(known) if settings.rho else 0.0)
            before, look = self._looker(known, held_out, base_images, base_speed)
            weights, rows, verdict = self._round(number, int(shares[:number].sum()), steps, weights, known, balance, look)
            looks.append(rows)
            verdicts.append(verdict)
            if number + 1 < n_rounds:
                self._relabel(weights, number)
        table = pd.concat(looks, ignore_index=True)
        table["best"] = (table["round"] == n_rounds - 1) & (table["step"] == verdicts[-1]["best_step"])
        table.to_parquet(out_dir / "gates.parquet", index=False)
        promise, unseen = self._promise(), self._why_no_copy_gate()
        write_json(out_dir / "verdict.json", {"rounds": verdicts} | promise | ({"copy_gate": unseen} if unseen else {}))
        self._save(out_dir, weights, promise)
        chosen, done = table[table["best"]].iloc[0], sum(verdict["ended_at"] for verdict in verdicts) - int(shares.cumsum()[:-1].sum())
        return {"best_step": float(chosen["step"]), "steps": float(done), "reward_weight": balance,
                **self._gained(before, chosen, promise), **{name: float(chosen[name]) for name in self._ratios()},
                "gate_failures": float((table["failed"] != "").sum()), **self._numbers()}

    def _round(self, number: int, first: int, steps: int, start: Weights, known: Known, balance: float,
               look: Callable[[nn.Module], dict[str, float]]) -> tuple[Weights, pd.DataFrame, dict[str, Any]]:
        """Tune from ``start``, the weights after ``first`` steps; returns the best weights, one row per look and why the round ended."""
        settings, context = self.settings, self.context
        self.painter.load_state_dict(start)
        state = {f"queue:{i}": f[:0] for i, f in enumerate(self._features(self.images[:2], self.labels[:2]))}
        state |= {"looks": torch.zeros(0, len(COLUMNS), dtype=torch.float64), **prefixed("best", start)}

        def record(model: nn.Module, done: int) -> None:
            seen = look(model)
            context.log({name: seen[name] for name in (*self._rewards_told(), *self._ratios())}, first + done)
            row = torch.tensor([[first + done, number, *(seen[name] for name in COLUMNS[2:])]], dtype=torch.float64)
            state["looks"] = torch.cat([state["looks"], row])

        def step(i: int) -> dict[str, float]:
            draw = generator(self.config.seed, "align", context.key, first + i)
            loss = self._denoise(draw)
            past = [state[f"queue:{n}"] for n in range(len(known))]
            if not balance or first + i < rewardless_steps(settings):
                return {"loss": loss}
            numbers, features = self._pull(draw, balance, known, past, first + i)
            for n, (before, now) in enumerate(zip(past, features, strict=True)):
                joined = torch.cat([before, now])
                state[f"queue:{n}"] = joined[max(0, len(joined) - settings.queue):]
            return {"loss": loss, **numbers}

        def on_step(done: int, ema: Ema) -> bool:
            """Look at the gates; true when the held-out reward has not risen for ``patience`` looks."""
            if not self._looks(done, first, steps):
                return False
            self.averaged.load_state_dict(ema.shadow)
            record(self.averaged, done)
            best, last = self._best(state["looks"]), len(state["looks"]) - 1
            if best == last:
                state.update({f"best:{name}": value.clone() for name, value in ema.shadow.items()})
            elif best == 0:  # an earlier look may have been the best until this one, the last before the reward, took its place
                state.update(prefixed("best", start))
            rewardless = int((state["looks"][:, COLUMNS.index("step")] <= rewardless_steps(settings)).sum()) - 1  # patience begins with the reward
            return last - max(best, rewardless) >= self._patience()

        record(self.painter, 0)
        # A later round starts near its goal: a full step size would first throw it back.
        training = dataclasses.replace(settings.training, steps=steps, lr=settings.training.lr / (1 + number))
        train(self.painter, step, training, context.work_dir / f"round{number}.safetensors",
              lambda metrics, i: context.log(metrics, first + i),
              lambda done, _, note: context.progress(first + done, self.steps, note), on_step, state)
        rows = pd.DataFrame(state["looks"].numpy(), columns=list(COLUMNS)).astype({"step": "int64", "round": "int64"})
        rows["failed"] = ["; ".join(failures(dict(zip(RATIOS, row, strict=True)), settings.gates)) for row in rows[list(RATIOS)].to_numpy().tolist()]
        best, last = self._best(state["looks"]), int(rows["step"].iloc[-1])
        reason = "all steps are done" if last == first + steps else \
            f"in {settings.patience} looks the held-out reward has not risen with all gates kept"
        verdict = {"round": number, "ended_at": last, "best_step": int(rows["step"][best]), "ended_because": reason,
                   "refused": sorted({reason for reason in rows["failed"][best + 1:] if reason}) if settings.gates.hold else []}
        return section("best", state), rows, verdict

    def _looks(self, done: int, first: int, steps: int) -> bool:
        """Whether to look after ``done`` steps of a round: its last, the last before the reward, and evenly in time between.

        Steps without the reward are short; of the looks before it only the last counts.
        """
        before = not self.settings.rho or first + done < rewardless_steps(self.settings)
        pause = self.settings.check_every * (REWARD_COST if before else 1)
        return done == steps or first + done == rewardless_steps(self.settings) or done % pause == 0

    def _best(self, looks: Tensor) -> int:
        """Row of the highest held-out reward among the looks that kept every gate.

        Of those before the reward takes part only the last counts: an earlier one may be nearer by chance, and has learnt less.
        """
        kept = self._kept(looks)
        before = [row for row in kept[1:] if looks[row, COLUMNS.index("step")] <= rewardless_steps(self.settings)]
        return max((row for row in kept if row not in before[:-1]), key=lambda row: float(looks[row, COLUMNS.index("held_out_reward")]))

    def _kept(self, looks: Tensor) -> list[int]:
        """Rows of the looks that kept every gate; the round's start is always one of them."""
        return [row for row, seen in enumerate(looks.tolist()) if not row or not self.settings.gates.hold
                or not failures(dict(zip(COLUMNS, seen, strict=True)), self.settings.gates)]

    def _patience(self) -> float:
        """Looks without a better held-out reward before a round ends."""
        return self.settings.patience

    def _denoise(self, draw: torch.Generator) -> float:
        """Gradient of the denoising loss: on source pairs, and in the target's domain on pairs in the references' colours."""
        if self.settings.denoise != "source":
            return self._denoise_references(draw) if self.settings.denoise == "references" else 0.0
        batch = self.settings.training.batch
        share = round(RECOLOURED * batch) if self.settings.recolour else 0
        total = 0.0
        for domain, n in ((velocity_unet.SOURCE, batch - share), (velocity_unet.TARGET, share)):
            if not n:
                continue
            rows = torch.randint(len(self.images), (n,), generator=draw).to(self.device)
            images = self.images[rows] if domain == velocity_unet.SOURCE else refocus(self._recoloured(rows, draw), self.gain, self.seen[rows])
            with autocast(self.config.machine, self.device):
                loss = flow_matching_loss(velocity_unet.in_domain(self.painter, domain), images, self.cond[rows], self.flow.times, draw,
                                          self.flow.coupling, self.flow.condition_dropout) * (n / batch)
            loss.backward()
            total += loss.item()
        return total

    def _denoise_references(self, draw: torch.Generator) -> float:
        """Gradient of the denoising loss on the aligning references, which have no masks: under the empty condition that guidance uses."""
        chosen = self.reference_images[torch.from_numpy(self.aligning).to(self.device)]
        rows = torch.randint(len(chosen), (self.settings.training.batch,), generator=draw).to(self.device)
        with autocast(self.config.machine, self.device):
            loss = flow_matching_loss(velocity_unet.in_domain(self.painter, velocity_unet.TARGET), chosen[rows],
                                      torch.zeros_like(self.cond[:1]).expand(len(rows), -1, -1, -1), self.flow.times, draw, self.flow.coupling)
        loss.backward()
        return loss.item()

    def _recoloured(self, rows: Tensor, draw: torch.Generator) -> Tensor:
        """Source images of these rows, each in the colours of a reference drawn at random."""
        references, known, seen = self.colours
        images, own, measured, own_seen = self.images[rows], self._regions(self.labels[rows]), self.cores[rows], self.seen[rows]
        if not own.shape[1]:
            own, known = own.new_ones(len(own), 1, *own.shape[2:]), seen[:, None]
            measured = own
        partner = torch.randint(len(references), (len(rows),), generator=draw).to(self.device)
        return recolour(images, own * own_seen[:, None], measured * own_seen[:, None], references, known, seen, partner)

    def _spectral_gain(self) -> Tensor:
        """What takes recoloured source images to the references' sharpness and noise."""
        references, _, seen = self.colours
        draw = generator(self.config.seed, "align", self.context.key, "spectrum")
        rows = torch.randint(len(self.images), (SPECTRUM_IMAGES,), generator=draw).to(self.device)
        return spectral_gain(spectrum(self._recoloured(rows, draw), self.seen[rows]), spectrum(references, seen))

    def _masks_and_noise(self, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """What a batch of samples is painted from: rows of the source's masks, and noise x0."""
        batch = self.settings.training.batch
        rows = torch.randint(len(self.images), (batch,), generator=draw).to(self.device)
        return rows, normal((batch, *self.images.shape[1:]), draw, self.device)

    def _pull(self, draw: torch.Generator, weight: float, known: Known, past: list[Tensor], step: int) -> tuple[dict[str, float], list[Tensor]]:
        """Leave the gradient of ``weight`` times the reward of one batch, steadied by the features of earlier samples; numbers to log, features."""
        settings = self.settings
        rows, x0 = self._masks_and_noise(draw)
        kept: list[Tensor] = []

        def reward(x1: Tensor) -> Tensor:
            with torch.autocast(self.device.type, enabled=False):  # moments are of single precision, as those of the references are
                features = self._features(x1.float(), self.labels[rows])
                kept[:] = [f.detach() for f in features]
                return -self.objective(steadied(features, past), known)

        with autocast(self.config.machine, self.device):
            done: Rewarded = SCHEMES[settings.gradient](self._as_painted(self.painter), x0, self.cond[rows], self.times, reward, settings.k,
                                                        draw, weight)
        return {"batch_reward": done.reward}, kept

    def _balance(self, known: Known) -> float:
        """lambda = rho * mean |g_fm| / mean |g_r| over a few batches of the base model."""
        draws = (generator(self.config.seed, "align", "balance", i) for i in range(CALIBRATION_BATCHES))
        norms = [(self._norm_of(functools.partial(self._denoise, draw)), self._reward_norm(draw, known)) for draw in draws]
        denoise, reward = (sum(each) for each in zip(*norms, strict=True))
        # The reward alone has nothing to be weighed against, and the optimisers do not mind its scale.
        return 1.0 if self.settings.denoise == "none" else self.settings.rho * denoise / max(reward, 1e-12)

    def _reward_norm(self, draw: torch.Generator, known: Known) -> float:
        """|g_r| of one batch."""
        nothing = [f[:0] for f in self._features(self.images[:2], self.labels[:2])]
        return self._norm_of(functools.partial(self._pull, draw, 1.0, known, nothing, 0))

    def _norm_of(self, act: Callable[[], object]) -> float:
        """Norm of the gradient that ``act`` leaves; it is taken away again."""
        self.painter.zero_grad(set_to_none=True)
        act()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in self.painter.parameters() if p.grad is not None))
        self.painter.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def _looker(self, known: Known, held_out: Known, base_images: Tensor,
                base_speed: float) -> tuple[dict[str, float], Callable[[nn.Module], dict[str, float]]]:
        """The rewards of stage 1, and a function from a painter to its rewards and its ratios to stage 1, on the probe set."""
        def seen(images: Tensor, speed: float) -> tuple[list[Tensor], dict[str, float]]:
            features, pictures = self._features(images, self.probe_labels), to_bytes(images)
            agreement = mean_dice(predict(self.labeller, pictures, self.task, self.device), self.probe_labels.cpu().numpy(), self.task).mean()
            return features, dict(zip(RATIOS, (self.probe.diversity(features[0]), speed, float(agreement), self._closeness(pictures)), strict=True))

        base_features, base = seen(base_images, base_speed)

        def look(model: nn.Module) -> dict[str, float]:
            features, own = seen(*self._sample(model))
            return self._rewards(features, held_out, known) | {name: own[name] / max(base[name], 1e-9) for name in RATIOS}

        return self._rewards(base_features, held_out, known), torch.no_grad()(look)

    def _rewards(self, features: list[Tensor], held_out: Known, known: Known) -> dict[str, float]:
        """Of the probe set, by the held-out references and by those aligned to."""
        return {name: -float(self.objective(features, of)) for name, of in (("held_out_reward", held_out), ("reward", known))}

    def _closeness(self, pictures: np.ndarray) -> float:
        """How near the probe's pictures come to the references aligned to (``reward/gates.py``); NaN without images of these."""
        aligning, held_out = (self.references.images[rows] for rows in (self.aligning, self.held_out))
        return closeness(pictures, aligning, None if (self.aligning == self.held_out).all() else held_out) if len(aligning) else math.nan

    def _describe(self) -> tuple[Known, Known]:
        """What is known of the aligning and of the held-out references; sets what recolouring needs of them."""
        if self.given is not None:
            sets = self.given.sets
            return self.objective.known(sets["align"]), self.objective.known(sets.get("held_out", sets["align"]))
        if self.settings.regions == "labels":
            membership = self._regions(torch.from_numpy(np.array(self.references.labels)).to(self.device))
        elif self.settings.regions == "pseudo":
            membership = regions.from_segmenter(self.labeller, self.reference_images, self.task, self.settings.confidence)
        else:
            membership = self.reference_images.new_zeros(len(self.references), 0, *self.reference_images.shape[2:])
        seen = regions.view(self.reference_images)
        chosen = [torch.from_numpy(rows).to(self.device) for rows in (self.aligning, self.held_out)]
        self.colours = self.reference_images[chosen[0]], (membership * seen[:, None])[chosen[0]], seen[chosen[0]]
        self.cores = self._core(self.images, self.labels)
        self.gain = self._spectral_gain()
        aligning, held_out = (self.objective.describe(self.reference_images[rows], membership[rows]) for rows in chosen)
        return aligning, held_out

    def _given(self) -> ReferenceMoments | None:
        """The reference set where it is a file of moments that fits this painter's source, encoder and labeller."""
        file = self.inputs["references"] / MOMENTS_FILE
        if not file.exists():
            return None
        given, encoder = read_moments(file), self.objective.encoder
        own = instrument_of(self.settings, self.task, self.source, self.inputs["labeller"], self.inputs["image_flow"])
        refuse_other_instrument(given, own, probe_features(encoder, own["size"], self.device), f"references of target {self.context.key}")
        sets: dict[str, list[Moments | None]] = {
            role: [None if each is None else Moments(each.count, each.mean.to(self.device), each.variance.to(self.device)) for each in found]
            for role, found in given.sets.items()}
        return dataclasses.replace(given, sets=sets)

    def _why_no_copy_gate(self) -> str | None:
        return NO_COPY_GATE if self.given else None

    def _ratios(self) -> tuple[str, ...]:
        """The gates' ratios that can be measured."""
        return RATIOS if self._why_no_copy_gate() is None else tuple(name for name in RATIOS if name != "copy_ratio")

    def _rewards_told(self) -> tuple[str, ...]:
        """Names of the rewards that are logged."""
        return "held_out_reward", "reward"

    def _gained(self, before: Mapping[str, float], chosen: "pd.Series[Any]", promise: dict[str, Any]) -> dict[str, float]:
        """Numbers of the whole: what stage 1 and the chosen weights are rewarded with, both by what the last round knew of the references."""
        return {f"{told}_{when}": value for name, told in (("reward", "reward"), ("held_out_reward", "held_out"))
                for when, value in (("before", before[name]), ("after", float(chosen[name])))}

    def _promise(self) -> dict[str, Any]:
        """What the weights promise about the references: nothing."""
        return {}

    def _numbers(self) -> dict[str, float]:
        """How many references there are, and how many are aligned to."""
        found = {"align": int(self.aligning.sum()), "held_out": len(self.references) - int(self.aligning.sum())} \
            if self.given is None else self.given.n_images
        return {"n_references": float(sum(found.values())), "n_aligning": float(found["align"])}

    def _relabel(self, weights: Weights, number: int) -> None:
        """Retrain the labeller on source pairs and pairs of the tuned painter."""
        settings = self.settings
        self.averaged.load_state_dict(weights)
        painter = self._as_painted(self.averaged)
        draw = generator(self.config.seed, "align", self.context.key, "pairs", number)
        rows = torch.randperm(len(self.images), generator=draw)[:settings.relabel_pairs]
        painted = []
        with torch.no_grad(), autocast(self.config.machine, self.device):
            for part in rows.split(32):
                x0 = normal((len(part), *self.images.shape[1:]), draw, self.device)
                painted.append(to_bytes(euler(painter, x0, self.cond[part.to(self.device)], self.times)))
        chosen = self.source.select(rows.numpy())
        aligned = Pairs(np.concatenate(painted), chosen.masks, chosen.ids, chosen.table)
        start = {name: value.clone() for name, value in self.labeller.state_dict().items()}
        network = stored_network(read_json(self.inputs["labeller"] / "config.json"))
        trained, _ = fit(Diet(self.source, aligned), None, self.task, network, settings.relabel, self.config.machine,
                         (self.config.seed, "align", self.context.key, "relabel", number), self.context.work_dir / f"relabel{number}.safetensors",
                         dataclasses.replace(self.context, progress=lambda done, total, note: None), start=start)
        self.labeller.load_state_dict(trained)
        self.labeller.eval()

    def _features(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Standardised features of images whose masks are known, of the whole and of each region."""
        features: list[Tensor] = self.objective.encoder(images, self._core(images.detach(), labels))
        return features

    def _core(self, images: Tensor, labels: Tensor) -> Tensor:
        """Regions [N, R, H, W] as far as they would be known if the images were references."""
        membership = self._regions(labels)
        if self.settings.regions != "pseudo":
            return membership
        return regions.core(membership, regions.from_segmenter(self.labeller, images, self.task, self.settings.confidence))

    def _regions(self, labels: Tensor) -> Tensor:
        """Membership [N, R, H, W] of the regions that are compared; R = 0 without regions."""
        if self.settings.regions == "none":
            return torch.zeros(len(labels), 0, *labels.shape[1:], device=self.device)
        return regions.from_labels(labels, len(self.task.classes))

    @torch.no_grad()
    def _sample(self, model: nn.Module) -> tuple[Tensor, float]:
        """The probe's images in the target's domain, and their root mean square velocity."""
        with autocast(self.config.machine, self.device):
            images, speed = self.probe.sample(self._as_painted(model))
        return images.float(), speed

    def _as_painted(self, model: nn.Module) -> VelocityModel:
        """The painter in the target's domain under the guidance that pairs are painted with: reward and gates see what segmenters will."""
        return guided(velocity_unet.in_domain(model, velocity_unet.TARGET), self.config.sample.guidance_scale)

    def _probe(self) -> tuple[Probe, Tensor]:
        """A fixed set of masks with several noises each, and the masks."""
        draw = generator(self.config.seed, "align", "probe")
        masks = max(1, self.settings.check_samples // PROBE_REPEATS)
        rows = torch.randint(len(self.cond), (masks,), generator=draw).repeat_interleave(PROBE_REPEATS)
        x0 = normal((len(rows), *self.images.shape[1:]), draw, self.device)
        rows = rows.to(self.device)
        return Probe(x0, self.cond[rows], self.times, PROBE_REPEATS), self.labels[rows]

    def _painter(self) -> velocity_unet.VelocityUNet:
        """Stage 1 with the target's domain as a copy of the source's; with adapters if they are asked for."""
        model, _ = velocity_unet.load(self.inputs["image_flow"])
        model.requires_grad_(True)
        model.adopt_target()
        if self.settings.adapter == "lora":
            lora.adapt(model, self.settings.lora_rank, derive_seed(self.config.seed, "align", "lora"), free=model.domain_embeddings())
        return cast(velocity_unet.VelocityUNet, placed(model, self.config.machine, self.device))

    def _save(self, out_dir: Path, weights: Weights, promise: dict[str, Any]) -> None:
        """Write the chosen weights as a plain network."""
        self.averaged.load_state_dict(weights)
        lora.merge(self.averaged)
        facts = read_json(self.inputs["image_flow"] / "config.json")
        velocity_unet.save(out_dir, self.averaged.state_dict(), facts["channels"], facts["cond_channels"], self.flow.network, facts["conditioner"],
                           domain=velocity_unet.TARGET, clip=facts["clip"], reward=self.settings.reward, encoder=self.settings.encoder,
                           regions=self.settings.regions, gradient=self.settings.gradient, adapter=self.settings.adapter, **promise)


def _roles(role: "pd.Series[str]") -> tuple[np.ndarray, np.ndarray]:
    """Row masks of the aligning and the held-out references; too few to hold any out: the aligning ones serve twice."""
    aligning, held_out = np.array(role == "align"), np.array(role == "held_out")
    return aligning, held_out if held_out.any() else aligning
