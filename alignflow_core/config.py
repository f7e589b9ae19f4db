"""Frozen configuration of every stage, validated when built; the only reader of ``params.yaml``."""

import re
import typing
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import yaml

from alignflow_core.errors import InputError
from alignflow_core.networks.registry import ARCHITECTURES
from alignflow_core.painters.registry import CONDITIONERS, OBJECTIVES, ON_A_FROZEN_BASE, PROCESSES
from alignflow_core.reward.registry import DISTANCES, ENCODERS, FROM_MOMENTS, PORTABLE_ENCODERS
from alignflow_core.stages import Graph
from alignflow_core.validation import at_least, between, build, nearest, one_of, positive

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}"
# What YAML 1.1 (ours) or 1.2 (DVC's) reads as a number, a date or a word of its own: DVC would look for align@8 where we say align@08.
NO_TEXT = r"[0-9][0-9_]*([eE]-?[0-9]+)?|0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}|(?i:null|true|false|yes|no|on|off)"

# The downstream arms, which say what images a segmenter is trained on, by the stage that trains them: it reads what these need and nothing else.
STAGE_ARMS = {
    "segment_source": ("source", "source+colour"),
    "segment_stage1": ("stage1", "stage1+colour"),
    "segment_baselines": ("reinhard", "fourier", "references-labelled", "oracle"),
    "segment_aligned": ("aligned",),
    "segment_filtered": ("aligned+filtered", "aligned+filtered+colour"),
}
# In the order of the tables.
ARMS = ("source", "source+colour", "reinhard", "fourier", "stage1", "stage1+colour", "aligned", "aligned+filtered", "aligned+filtered+colour",
        "references-labelled", "oracle")
SHARED_ARMS = STAGE_ARMS["segment_source"] + STAGE_ARMS["segment_stage1"]
TARGET_ARMS = tuple(arm for arm in ARMS if arm not in SHARED_ARMS)

COLOUR = "+colour"  # suffix of an arm under strong colour augmentation; a comparator's arms are its name without and with it
KIND_CLASSES = {"binary": 1, "refuge": 2}  # that masks of this kind can have


def wrong_name(name: str) -> str:
    """Why a domain, target or comparator cannot be called so, and what to do; empty where it can."""
    if not re.fullmatch(NAME_PATTERN, name):
        return "a name is letters, digits, '-' and '_' (at most 63); choose another"
    return f"YAML reads '{name}' as a number, a date or a yes or no; write for instance site{name}" if re.fullmatch(NO_TEXT, name) else ""


def in_order(arms: typing.Iterable[str]) -> tuple[str, ...]:
    """Arms in the order of the tables: the comparators' after stage 1, as they come."""
    found = dict.fromkeys(arms)
    others = [arm for arm in found if arm not in ARMS]
    after = ARMS.index("aligned")
    return tuple(arm for arm in (*ARMS[:after], *others, *ARMS[after:]) if arm in found)


@dataclass(frozen=True)
class Machine:
    """Where a stage computes. ``threads`` is fixed because float sums depend on it."""

    device: str = "auto"
    threads: int = 2
    precision: str = "fp32"
    compile: bool = False

    def __post_init__(self) -> None:
        one_of("machine.device", self.device, ("auto", "cpu", "cuda"))
        one_of("machine.precision", self.precision, ("fp32", "bf16"))
        at_least("machine.threads", self.threads, 1)


@dataclass(frozen=True)
class Task:
    """How masks are read.

    Attributes:
        kind: ``binary`` (grey >= threshold is foreground), ``refuge`` (255 background, 128 disc,
            0 cup; thresholds midway) or ``labels`` (``values`` maps file value to class number).
        classes: foreground names; class number = position + 1.
        nested: class k lies inside class k-1 (disc contains cup); region k is then ``label >= k``.
    """

    name: str = "binary"
    kind: str = "binary"
    classes: tuple[str, ...] = ("foreground",)
    nested: bool = False
    threshold: int = 128
    values: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of("task.kind", self.kind, ("binary", "refuge", "labels"))
        at_least("number of task.classes", len(self.classes), 1)
        if len(set(self.classes)) < len(self.classes):
            raise InputError(f"task.classes: {', '.join(self.classes)} names one twice; name each once")
        # A class that no mask can have would count as found in every image.
        if self.kind in KIND_CLASSES and len(self.classes) != KIND_CLASSES[self.kind]:
            raise InputError(f"task.classes: masks of kind '{self.kind}' have {KIND_CLASSES[self.kind]}, got {', '.join(self.classes)}; "
                             "name as many, or set task.kind=labels with task.values")
        if self.kind == "labels":
            wrong = [v for v in self.values.values() if not 0 <= v <= len(self.classes)]
            if not self.values or wrong:
                raise InputError(f"task.values: needs file value -> class number in 0..{len(self.classes)}, got {self.values}")
            beyond = [value for value in self.values if not 0 <= value < 2**16]
            if beyond:
                raise InputError(f"task.values: no pixel of a mask can be {beyond[0]}; file values are 0 to 65535")
            unseen = [name for number, name in enumerate(self.classes, 1) if number not in self.values.values()]
            if unseen:
                raise InputError(f"task.values: no value stands for {', '.join(unseen)}; give one, or leave the class out of task.classes")


@dataclass(frozen=True)
class Domain:
    """A raw folder with ``images/`` and ``masks/``; one that is not ``labelled`` needs no masks, and nothing is measured by them."""

    dir: str
    labelled: bool = True


@dataclass(frozen=True)
class References:
    """The reference set: ``count`` images drawn from the target's training split by ``seed``, or a folder ``dir``, or a ``file`` of moments
    that ``alignflow reference-moments`` wrote where the images are (``docs/reference-kit.md``).

    About ``held_out_fraction`` of them, in whole patients or sequences, steer when alignment stops and are not aligned to; a ``file`` was split
    when it was made.
    """

    count: int = 10
    seed: int = 0
    dir: str | None = None
    file: str | None = None
    held_out_fraction: float = 0.3

    def __post_init__(self) -> None:
        at_least("references.count", self.count, 1)
        between("references.held_out_fraction", self.held_out_fraction, 0.0, 0.9)
        if self.dir is not None and self.file is not None:
            raise InputError("references: dir and file are both given; set one of them to null")


@dataclass(frozen=True)
class Network:
    """U-Net of a velocity model (MONAI ``DiffusionModelUNet``)."""

    channels: tuple[int, ...] = (16, 32, 64, 128)
    attention: tuple[bool, ...] = (False, False, False, True)
    n_res_blocks: int = 1
    head_channels: int = 32
    norm_groups: int = 8

    def __post_init__(self) -> None:
        if len(self.channels) != len(self.attention):
            raise InputError("network: channels and attention must have the same length")
        if any(c % self.norm_groups for c in self.channels):
            raise InputError(f"network.channels: each must be a multiple of norm_groups ({self.norm_groups})")
        if any(c % self.head_channels for c, attends in zip(self.channels, [*self.attention[:-1], True], strict=True) if attends):
            raise InputError(f"network.head_channels: {self.head_channels} must divide the channels of levels with attention and of the last level")


@dataclass(frozen=True)
class Training:
    """The training loop of a network.

    ``optimiser: muon`` steps matrices by Muon at ten times ``lr`` (``flow/muon.py``), everything else by AdamW as ``adamw`` does.
    """

    steps: int = 1500
    batch: int = 16
    optimiser: str = "adamw"
    lr: float = 1e-3
    beta2: float = 0.99
    weight_decay: float = 0.01
    warm_up: int = 100
    clip: float = 1.0
    ema: float = 0.995
    save_every: int = 100
    log_every: int = 10

    def __post_init__(self) -> None:
        at_least("training.steps", self.steps, 1)
        at_least("training.batch", self.batch, 1)
        at_least("training.save_every", self.save_every, 1)
        at_least("training.log_every", self.log_every, 1)
        at_least("training.warm_up", self.warm_up, 0)
        positive("training.clip", self.clip)
        one_of("training.optimiser", self.optimiser, ("adamw", "muon"))
        positive("training.lr", self.lr)
        between("training.ema", self.ema, 0.0, 1.0)


@dataclass(frozen=True)
class Times:
    """Law of the training times: logit-normal(mean, std) mixed with a uniform share; shift > 1 moves towards noise."""

    mean: float = 0.0
    std: float = 1.0
    uniform_share: float = 0.1
    shift: float = 1.0

    def __post_init__(self) -> None:
        positive("times.std", self.std)
        between("times.uniform_share", self.uniform_share, 0.0, 1.0)
        positive("times.shift", self.shift)


@dataclass(frozen=True)
class MaskFlow:
    """The flow over signed distance maps; ``clip`` is the distance in pixels at working size that maps to 1, ``size`` the grid it works on."""

    network: Network = field(default_factory=Network)
    training: Training = field(default_factory=Training)
    times: Times = field(default_factory=Times)
    clip: float = 12.0
    size: int = 32

    def __post_init__(self) -> None:
        positive("mask_flow.clip", self.clip)
        at_least("mask_flow.size", self.size, 8)


@dataclass(frozen=True)
class ImageFlow:
    """Stage 1. ``condition_dropout`` trains the unconditional branch that guidance needs."""

    network: Network = field(default_factory=Network)
    training: Training = field(default_factory=Training)
    times: Times = field(default_factory=Times)
    clip: float = 12.0
    coupling: str = "independent"
    condition_dropout: float = 0.1
    flip: bool = True

    def __post_init__(self) -> None:
        one_of("image_flow.coupling", self.coupling, ("independent", "minibatch_ot"))
        positive("image_flow.clip", self.clip)
        between("image_flow.condition_dropout", self.condition_dropout, 0.0, 1.0)


@dataclass(frozen=True)
class Comparator:
    """A painter beside our own, trained on the same source with the trunk, batch and total of steps of ``image_flow``.

    Attributes:
        process, conditioner, objective: names of ``painters/registry.py``.
        n_steps: of the sampler of a diffusion; one network call each. Flows are drawn as ``sample`` says, as ours are.
    """

    process: str = "diffusion"
    conditioner: str = "controlnet"
    objective: str = "denoise"
    n_steps: int = 25

    def __post_init__(self) -> None:
        one_of("comparators: process", self.process, PROCESSES)
        one_of("comparators: conditioner", self.conditioner, CONDITIONERS)
        one_of("comparators: objective", self.objective, OBJECTIVES)
        at_least("comparators: n_steps", self.n_steps, 2)
        if (self.objective == "siamese") != (self.conditioner == "dense_controlnet"):
            raise InputError("comparators: objective siamese and conditioner dense_controlnet go together; give both or neither")

    @property
    def base(self) -> str | None:
        """Process of the frozen unconditional painter that it adds to; ``None`` for one trained as a whole."""
        return self.process if self.conditioner in ON_A_FROZEN_BASE else None


@dataclass(frozen=True)
class ComparatorBase:
    """The unconditional painters that comparators freeze, Siamese-Diffusion but for its decoder.

    Theirs is a ``share`` of ``image_flow.training.steps``, the rest is the comparator's own.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        between("comparator_base.share", self.share, 0.05, 0.95)


@dataclass(frozen=True)
class SegmenterNetwork:
    """A segmenter.

    Attributes:
        channels: of the U-Net per level, each half the size of the one before; transformers get as many levels and about as many parameters.
        norm: of the U-Net: ``instance`` forgives a shift of colour or contrast that a whole image shares; ``batch`` does not.
        architecture: a name of ``networks/registry.py``. For the downstream arms ``segment.architectures`` stands in its place; the
            judges of ``filter`` keep to this.
        weights: architecture -> local folder with config.json and model.safetensors, as ``transformers`` writes them, to start from.
    """

    channels: tuple[int, ...] = (16, 32, 64, 128)
    norm: str = "batch"
    architecture: str = "unet"
    weights: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of("segmenter network.norm", self.norm, ("batch", "instance"))
        one_of("segmenter network.architecture", self.architecture, ARCHITECTURES)
        known = [name for name, architecture in ARCHITECTURES.items() if architecture.tuning is not None]
        for name in self.weights:
            one_of("segmenter network.weights", name, known)


@dataclass(frozen=True)
class Labeller:
    """The segmenter that stage 2 asks for the references' pseudo-masks: source pairs under strong colour augmentation."""

    network: SegmenterNetwork = field(default_factory=SegmenterNetwork)
    training: Training = field(default_factory=Training)
    colour_strength: float = 0.4
    check_every: int = 50

    def __post_init__(self) -> None:
        at_least("labeller.colour_strength", self.colour_strength, 0.0)
        at_least("labeller.check_every", self.check_every, 1)


@dataclass(frozen=True)
class Gates:
    """Limits on a fixed set of noise and masks, as ratios to stage 1 (see ``reward/gates.py``); ``hold`` off only records them."""

    hold: bool = True
    diversity: float = 0.8
    velocity: float = 1.1
    agreement: float = 0.75
    copying: float = 0.9


@dataclass(frozen=True)
class Privacy:
    """Differential privacy of the references in stage 2 (see ``reward/private.py``, docs/privacy.md).

    Attributes:
        epsilon: budget that the aligned weights may spend on each reference; null: no such promise.
        delta: probability with which the promise may fail; well below one over the number of references.
    """

    epsilon: float | None = None
    delta: float = 1e-3

    def __post_init__(self) -> None:
        if self.epsilon is not None and not self.epsilon > 0:
            raise InputError(f"align.privacy.epsilon: must be above 0, got {self.epsilon}; null makes no promise")
        if not 0 < self.delta < 1:
            raise InputError(f"align.privacy.delta: must be between 0 and 1, got {self.delta}; it is a probability, such as 1e-3")


@dataclass(frozen=True)
class Align:
    """Stage 2 of one target (see ``align.py``).

    Attributes:
        reward, encoder: names of ``reward/registry.py``.
        encoder_weights: of ``encoder: pretrained``, a folder with config.json and model.safetensors or ``hub:OWNER/NAME``.
        regions: ``none``, ``pseudo`` (from a segmenter's confident pixels) or ``labels`` (the references' own masks).
        region_share: weight of the mean distance over regions; the rest is the whole image's.
        confidence: least probability of a pseudo-labelled pixel.
        rounds: with ``pseudo``, the steps are shared by so many rounds; before each but the first the segmenter is retrained on
            ``relabel_pairs`` aligned pairs (``relabel``) and labels the references anew.
        recolour: three quarters of the denoising loss are taken in the target's domain, on source pairs in the references' colours (by region).
        recolour_steps: with ``recolour``, steps of the denoising loss alone before the ``training.steps`` in which the reward takes part;
            without (moments, a privacy budget), a fifth as many more of the latter, which take as long.
        denoise: data of the denoising loss: ``source`` (default), ``references`` (without masks) or ``none`` (the reward alone).
        gradient: ``sparse`` (default), ``last_k``, ``random_k``, ``one_step`` or ``full``; with the first two ``k`` network calls carry gradient.
        n_steps: solver steps of the rollout.
        adapter: ``all`` weights or ``lora`` of rank ``lora_rank``.
        rho: ratio of the reward gradient's norm to the denoising gradient's, fixed at step 0; 0 leaves the reward out.
        prior_count: pseudo-count of the source's own variances when shrinking the reference moments.
        queue: feature vectors of earlier samples kept to steady the sample moments.
        check_every: steps with the reward between looks at the held-out reward and the gates; without it five times as many.
        patience: looks without a better held-out reward before stopping.
        privacy: differential privacy of the references.
    """

    reward: str = "frechet"
    encoder: str = "statconv"
    encoder_weights: str | None = None
    regions: str = "pseudo"
    region_share: float = 0.5
    confidence: float = 0.8
    rounds: int = 2
    relabel: Training = field(default_factory=Training)
    relabel_pairs: int = 96
    recolour: bool = True
    recolour_steps: int = 0
    denoise: str = "source"
    gradient: str = "sparse"
    k: int = 2
    n_steps: int = 8
    adapter: str = "all"
    lora_rank: int = 16
    training: Training = field(default_factory=Training)
    rho: float = 0.3
    prior_count: float = 10.0
    temperature: float = 1.0
    queue: int = 24
    check_every: int = 20
    check_samples: int = 16
    patience: int = 5
    gates: Gates = field(default_factory=Gates)
    privacy: Privacy = field(default_factory=Privacy)

    def __post_init__(self) -> None:
        one_of("align.reward", self.reward, DISTANCES)
        one_of("align.encoder", self.encoder, ENCODERS)
        one_of("align.regions", self.regions, ("none", "pseudo", "labels"))
        one_of("align.gradient", self.gradient, ("sparse", "last_k", "random_k", "one_step", "full"))
        one_of("align.denoise", self.denoise, ("source", "references", "none"))
        one_of("align.adapter", self.adapter, ("all", "lora"))
        between("align.region_share", self.region_share, 0.0, 1.0)
        between("align.confidence", self.confidence, 0.0, 1.0)
        at_least("align.rounds", self.rounds, 1)
        at_least("align.recolour_steps", self.recolour_steps, 0)
        at_least("align.lora_rank", self.lora_rank, 1)
        at_least("align.k", self.k, 1)
        at_least("align.rho", self.rho, 0.0)
        at_least("align.prior_count", self.prior_count, 0.0)
        positive("align.temperature", self.temperature)
        at_least("align.queue", self.queue, 0)
        at_least("align.relabel_pairs", self.relabel_pairs, 1)
        at_least("align.check_every", self.check_every, 1)
        at_least("align.check_samples", self.check_samples, 2)
        at_least("align.patience", self.patience, 1)
        if self.rho > 0:  # samples are compared as a set, whose spread one does not tell
            at_least("align.training.batch", self.training.batch, 2)
        if self.denoise == "none" and self.rho == 0:
            raise InputError("align.denoise: 'none' with align.rho 0 leaves nothing to train on; give one of them")
        if self.k > self.n_steps:
            raise InputError(f"align.k: {self.k} is more than align.n_steps ({self.n_steps}); lower k")
        if (self.encoder == "pretrained") != (self.encoder_weights is not None):
            raise InputError("align.encoder_weights: encoder 'pretrained' needs it, others do not; give a folder with config.json and "
                             "model.safetensors, or hub:OWNER/NAME where the network may be used")
        if self.privacy.epsilon is not None:
            self._refuse_leaks()
        if self.rounds > self.training.steps:
            raise InputError(f"align.rounds: {self.rounds} is more than align.training.steps ({self.training.steps}); lower rounds")

    def _refuse_leaks(self) -> None:
        """With a budget, the weights may depend on the references through noised gradients alone."""
        needed = {"recolour": False, "denoise": "source", "gradient": "sparse"}
        problems = [f"align.{name}: must be {str(value).lower()} with align.privacy.epsilon, got {str(getattr(self, name)).lower()}; "
                    "anything else would read the references without noise" for name, value in needed.items() if getattr(self, name) != value]
        if self.encoder == "ssl":
            problems.append("align.encoder: 'ssl' is trained on the references and cannot go with align.privacy.epsilon; use statconv")
        if self.reward not in FROM_MOMENTS:
            problems.append(f"align.reward: '{self.reward}' is of all references together and cannot be split as align.privacy.epsilon needs; "
                            f"use {', '.join(FROM_MOMENTS)}")
        if self.rho == 0:
            problems.append("align.rho: 0 leaves the reward out, and align.privacy.epsilon has nothing to protect; raise it or set epsilon to null")
        if problems:
            raise InputError(*problems)


@dataclass(frozen=True)
class Target:
    """One partition: a target domain with a reference set and its way of aligning.

    Attributes:
        arms: of :data:`TARGET_ARMS`, those trained for this target; ``null`` for all of ``segment.arms``.
        synthetic_share: of each batch; ``null`` for ``segment.synthetic_share``.
        painter: comparator whose painter is aligned; ``null`` for our own stage 1. It must be a flow.
        variant_of: target whose ablation this is (see ``alignflow ablate``).
    """

    domain: str
    references: References = field(default_factory=References)
    align: Align = field(default_factory=Align)
    arms: tuple[str, ...] | None = None
    synthetic_share: float | None = None
    painter: str | None = None
    variant_of: str | None = None

    def __post_init__(self) -> None:
        unknown = [arm for arm in self.arms or () if arm not in TARGET_ARMS]
        if unknown:
            raise InputError(*(f"arms: unknown arm '{arm}'{nearest(arm, TARGET_ARMS)}" for arm in unknown))
        between("synthetic_share", self.synthetic_share or 0.0, 0.0, 1.0)
        if self.references.file is not None:
            problems = list(_needs_images(self.align))
            if problems:
                raise InputError(*problems)


def _needs_images(align: Align) -> typing.Iterator[str]:
    """Why this way of aligning cannot do with a file of moments, each with what to set."""
    words = "references.file holds moments and no images"
    if align.reward not in FROM_MOMENTS:
        yield f"align.reward: {words}, '{align.reward}' compares with each of them; choose one of {', '.join(FROM_MOMENTS)}"
    if align.encoder not in PORTABLE_ENCODERS:
        yield f"align.encoder: {words}, and a reference kit cannot hold '{align.encoder}'; choose one of {', '.join(PORTABLE_ENCODERS)}"
    if align.regions == "labels":
        yield f"align.regions: {words}, and its regions are pseudo-masks; set align.regions=pseudo or none"
    if align.denoise == "references":
        yield f"align.denoise: {words} to train on; set align.denoise=source"
    if align.recolour:
        yield f"align.recolour: {words} to take colours from; set align.recolour=false"
    if align.regions == "pseudo" and align.rounds != 1:
        yield f"align.rounds: {words} to label anew between rounds; set align.rounds=1"
    if align.privacy.epsilon is not None:
        yield f"align.privacy.epsilon: {words}, and noise is added to the gradient of each; set it to null"


@dataclass(frozen=True)
class Data:
    """Working size in pixels and the split of the source and of every other domain (train, val, test; sum 1).

    Models are chosen on the source's val, which so must have a share. A target without one lets ``oracle`` keep its last weights.
    """

    size: int = 64
    source_split: tuple[float, float, float] = (0.7, 0.15, 0.15)
    target_split: tuple[float, float, float] = (0.4, 0.1, 0.5)
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("data.size", self.size, 24)
        for name in ("source_split", "target_split"):
            split = getattr(self, name)
            if len(split) != 3 or min(split) < 0 or abs(sum(split) - 1) > 1e-6:
                raise InputError(f"data.{name}: needs three shares of train, val, test that sum to 1, got {list(split)}")
        if not self.target_split[2]:
            raise InputError(f"data.target_split: needs a share of test, which results and pictures are compared with; got {list(self.target_split)}")
        if not all(self.source_split[:2]):
            raise InputError(f"data.source_split: needs a share of train and of val, on which models are chosen; got {list(self.source_split)}")


@dataclass(frozen=True)
class Sample:
    """Synthesis. ``mask_source``: ``real`` source masks, ``flow`` masks, or ``mixed`` half and half.

    ``guidance_scale`` (arXiv 2207.12598) makes pictures obey their masks more at twice the network calls; 1 is off. Stage 2 rolls out and is
    judged under the same guidance.

    ``n_paired`` held-out masks of the target are painted too, to be compared with their real images. ``strengths`` dial alignment:
    0 paints with stage 1, 1 with the aligned weights, between and beyond with weights on their line; each aligned pair takes one of them.
    ``starts`` are times on the path: an aligned pair of a real mask is painted from one of them on, from that mask's own image noised to this time
    (SDEdit, arXiv 2108.01073); 0 is noise alone, from which pairs of drawn masks always are.

    ``n_steps`` of ``solver`` are one network call each by ``euler``, two by ``midpoint`` and ``heun`` (docs/decisions/0018-midpoint.md).
    """

    n_pairs: int = 256
    n_paired: int = 32
    batch: int = 32
    solver: str = "midpoint"
    n_steps: int = 3
    guidance_scale: float = 1.0
    strengths: tuple[float, ...] = (1.0,)
    starts: tuple[float, ...] = (0.0,)
    mask_source: str = "mixed"
    area_quantile: float = 0.005
    copy_dice: float = 0.98

    def __post_init__(self) -> None:
        one_of("sample.solver", self.solver, ("euler", "heun", "midpoint"))
        one_of("sample.mask_source", self.mask_source, ("real", "flow", "mixed"))
        at_least("sample.n_pairs", self.n_pairs, 4)
        at_least("sample.n_paired", self.n_paired, 2)
        at_least("sample.batch", self.batch, 1)
        at_least("sample.n_steps", self.n_steps, 1)
        between("sample.area_quantile", self.area_quantile, 0.0, 0.5)
        between("sample.copy_dice", self.copy_dice, 0.0, 1.0)
        at_least("number of sample.strengths", len(self.strengths), 1)
        for strength in self.strengths:
            between("sample.strengths", strength, 0.0, 1.5)
        at_least("number of sample.starts", len(self.starts), 1)
        for start in self.starts:
            between("sample.starts", start, 0.0, 0.9)


@dataclass(frozen=True)
class Filter:
    """Filtering of synthetic pairs (see ``filtering.py``).

    ``outlier_limit``: outlyingness (1 is typical) above which a pair is implausible; ``copy_quantile``: share of real images
    that may be taken for copies; ``agreement_ratio``: least share of the set's median mask agreement; ``judge_steps``.
    ``match_areas`` draws kept pairs more often whose regions are as large as the references' are judged to be.
    """

    outlier_limit: float = 2.5
    copy_quantile: float = 0.01
    agreement_ratio: float = 0.85
    judge_steps: int = 200
    match_areas: bool = False

    def __post_init__(self) -> None:
        positive("filter.outlier_limit", self.outlier_limit)
        between("filter.copy_quantile", self.copy_quantile, 0.0, 1.0)
        at_least("filter.agreement_ratio", self.agreement_ratio, 0.0)
        at_least("filter.judge_steps", self.judge_steps, 1)


@dataclass(frozen=True)
class Segment:
    """Downstream segmenters. Every architecture, arm and seed gets the same number of optimiser steps.

    ``architectures`` are names of ``networks/registry.py``; the report's main tables are about the first of them.
    """

    architectures: tuple[str, ...] = ("unet",)
    arms: tuple[str, ...] = ARMS
    seeds: int = 2
    network: SegmenterNetwork = field(default_factory=SegmenterNetwork)
    training: Training = field(default_factory=Training)
    synthetic_share: float = 0.5
    check_every: int = 50
    colour_strength: float = 0.4
    fourier_beta: float = 0.05

    def __post_init__(self) -> None:
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown:
            raise InputError(*(f"segment.arms: unknown arm '{arm}'{nearest(arm, ARMS)}" for arm in unknown))
        at_least("number of segment.arms", len(self.arms), 1)
        at_least("number of segment.architectures", len(self.architectures), 1)
        for name in self.architectures:
            one_of("segment.architectures", name, ARCHITECTURES)
        if len(set(self.architectures)) < len(self.architectures):
            raise InputError(f"segment.architectures: {', '.join(self.architectures)} names one twice; name each once")
        at_least("segment.seeds", self.seeds, 1)
        between("segment.synthetic_share", self.synthetic_share, 0.0, 1.0)
        at_least("segment.check_every", self.check_every, 1)
        at_least("segment.colour_strength", self.colour_strength, 0.0)
        between("segment.fourier_beta", self.fourier_beta, 0.0, 0.5)


@dataclass(frozen=True)
class Evaluate:
    """Tables: bootstrap resamples, confidence level and the arms that others are compared with.

    ``lpips_weights``: a local safetensors file (``docs/metrics.md``); without it there is the stand-in alone.
    """

    bootstrap: int = 10_000
    level: float = 0.95
    baselines: tuple[str, ...] = ("source", "stage1")
    copy_quantile: float = 0.01
    lpips_weights: str | None = None

    def __post_init__(self) -> None:
        at_least("evaluate.bootstrap", self.bootstrap, 1)
        between("evaluate.level", self.level, 0.01, 0.9999)
        between("evaluate.copy_quantile", self.copy_quantile, 0.0, 1.0)


@dataclass(frozen=True)
class Report:
    """The page: examples per target in the image grids."""

    examples: int = 6


@dataclass(frozen=True)
class Project:
    """Everything in ``params.yaml``.

    Attributes:
        reward, encoder: in place of every target's own, variants apart; for experiments such as ``dvc exp run -S reward=mmd``.
    """

    source: str
    domains: dict[str, Domain]
    targets: dict[str, Target]
    profile: str = "demo"
    seed: int = 0
    reward: str | None = None
    encoder: str | None = None
    machine: Machine = field(default_factory=Machine)
    task: Task = field(default_factory=Task)
    data: Data = field(default_factory=Data)
    mask_flow: MaskFlow = field(default_factory=MaskFlow)
    image_flow: ImageFlow = field(default_factory=ImageFlow)
    labeller: Labeller = field(default_factory=Labeller)
    comparators: dict[str, Comparator] = field(default_factory=dict)
    comparator_base: ComparatorBase = field(default_factory=ComparatorBase)
    sample: Sample = field(default_factory=Sample)
    filter: Filter = field(default_factory=Filter)
    segment: Segment = field(default_factory=Segment)
    evaluate: Evaluate = field(default_factory=Evaluate)
    report: Report = field(default_factory=Report)

    def __post_init__(self) -> None:
        named: dict[str, typing.Iterable[str]] = {"domains": self.domains, "targets": self.targets, "comparators": self.comparators}
        problems = [f"{kind}.{name}: {why}" for kind, names in named.items() for name in names if (why := wrong_name(name))]
        if self.source not in self.domains:
            problems.append(f"source: '{self.source}' is not among domains{nearest(self.source, self.domains)}")
        elif not self.domains[self.source].labelled:
            problems.append(f"domains.{self.source}.labelled: the source is learnt from, and needs masks; set it to true and give them")
        for name, target in self.targets.items():
            if target.domain not in self.domains:
                problems.append(f"targets.{name}.domain: '{target.domain}' is not among domains{nearest(target.domain, self.domains)}")
            elif target.variant_of is not None and target.variant_of not in self.targets:
                problems.append(f"targets.{name}.variant_of: '{target.variant_of}' is not among targets{nearest(target.variant_of, self.targets)}")
            elif target.painter is not None and target.painter not in self.comparators:
                problems.append(f"targets.{name}.painter: '{target.painter}' is not among comparators{nearest(target.painter, self.comparators)}")
            elif target.painter is not None and self.comparators[target.painter].process != "flow":
                process = self.comparators[target.painter].process
                problems.append(f"targets.{name}.painter: stage 2 rolls out a flow, '{target.painter}' is a {process}; name a flow")
            elif target.domain == self.source:
                problems.append(f"targets.{name}.domain: '{target.domain}' is the source; name another domain")
        problems += [f"targets.{name}.variant_of: '{target.variant_of}' is itself a variant; name the target that both belong to"
                     for name, target in self.targets.items()
                     if target.variant_of in self.targets and self.targets[target.variant_of].variant_of is not None]
        problems += [f"comparators.{name}: is the name of an arm; choose another" for name in self.comparators if name in ARMS]
        others = (*self.comparators, *(name + COLOUR for name in self.comparators))
        arms = (*ARMS, *others)
        problems += [f"evaluate.baselines: unknown arm '{arm}'{nearest(arm, arms)}" for arm in self.evaluate.baselines if arm not in arms]
        measured = any(self.domains[target.domain].labelled for target in self.targets.values() if target.domain in self.domains)
        if measured and not {*self.segment.arms, *others} & set(self.evaluate.baselines):
            problems.append(f"evaluate.baselines: none of {', '.join(self.evaluate.baselines)} is among segment.arms; "
                            "add one there, or name one that is")
        problems += self._odd_sides()
        if self.filter.match_areas:
            problems += [f"filter.match_areas: needs the reference images of every target, targets.{name}.references.file holds moments alone; "
                         "set filter.match_areas=false" for name, target in self.targets.items() if target.references.file is not None]
        if not self.targets:
            problems.append("targets: none given; name at least one target domain")
        if problems:
            raise InputError(*problems)

    @cached_property
    def graph(self) -> Graph:
        """The stage registry laid over this project's domains and targets."""
        return Graph(tuple(self.domains), self.source, {name: target.domain for name, target in self.targets.items()},
                     {name: comparator.base for name, comparator in self.comparators.items()},
                     {name: target.painter for name, target in self.targets.items()})

    def _odd_sides(self) -> list[str]:
        """Sides that a U-Net cannot halve at each of its levels and double again."""
        sides: dict[str, tuple[str, int, typing.Sequence[int]]] = {
            "image_flow.network": ("data.size", self.data.size, self.image_flow.network.channels),
            "mask_flow.network": ("mask_flow.size", min(self.mask_flow.size, self.data.size), self.mask_flow.network.channels)}
        for name, used, architectures in (("labeller.network", self.labeller.network, ()),
                                          ("segment.network", self.segment.network, self.segment.architectures)):
            if "unet" in (used.architecture, *architectures):
                sides[name] = ("data.size", self.data.size, used.channels)
        return [f"{setting}: {side} is not a multiple of {step}, and {network} halves it {len(channels) - 1} times; "
                f"give a multiple, such as {max(step, side // step * step)}"
                for network, (setting, side, channels) in sides.items() if side % (step := 2 ** (len(channels) - 1))]


def load_project(file: Path) -> Project:
    """Read and validate ``params.yaml``.

    Raises:
        InputError: missing file, broken YAML, unknown key, wrong type or value; all problems at once where possible.
    """
    return _project_of(_text(file), file)


@lru_cache(maxsize=4)  # an orchestrator asks for the same text several times a stage
def _project_of(text: bytes, file: Path) -> Project:
    return build_project(_plain(text, file), str(file))


def read_params(file: Path) -> dict[str, Any]:
    """``params.yaml`` as plain data. Raises :class:`InputError` where it is not a mapping."""
    return _plain(_text(file), file)


def _text(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); run 'alignflow compose' to write it") from error


def _plain(text: bytes, file: Path) -> dict[str, Any]:
    try:
        raw = parse_yaml(text.decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not valid YAML ({' '.join(str(error).split())}); mend it or run 'alignflow compose'") from error
    if not isinstance(raw, dict):
        raise InputError(f"{file}: must be a mapping of sections; run 'alignflow compose' to write it")
    return raw


def parse_yaml(text: str) -> Any:
    """Plain data of a YAML text, by libyaml where PyYAML has it: ten times as fast, and every stage and check reads ``params.yaml``."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def build_project(raw: dict[str, Any], origin: str = "params") -> Project:
    """Build a :class:`Project` from plain data; ``origin`` is named in errors."""
    problems: list[str] = []
    value = build(Project, _experiment(raw), "", problems)
    if problems:
        raise InputError(*(f"{origin}: {problem}" for problem in problems))
    return typing.cast(Project, value)


def _experiment(raw: dict[str, Any]) -> dict[str, Any]:
    """Plain data with a project-wide ``reward`` or ``encoder`` put into every target that is no variant."""
    chosen = {name: raw[name] for name in ("reward", "encoder") if raw.get(name) is not None}
    if "encoder" in chosen:
        chosen["encoder_weights"] = None
    if not chosen or not isinstance(raw.get("targets"), dict):
        return raw
    targets = {name: target | {"align": target.get("align", {}) | chosen} if isinstance(target, dict) and target.get("variant_of") is None else target
               for name, target in raw["targets"].items()}
    return raw | {"targets": targets}
