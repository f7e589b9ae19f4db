"""The reference kit: what a hospital needs to turn its images into one file of feature moments, and the command that does it.

A kit is a folder: the encoder's standardisation by the source, the source's labeller for pseudo-masks (and for the encoder ``flow`` the stage-1
checkpoint), ``kit.json`` with the settings and the SHA-256 of every file, and ``README.txt``. It holds no image and no file name of the source.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignflow_core.artifact import file_hash, file_hashes, publish, read_json, write_json
from alignflow_core.checkpoint import load_tensors, save_tensors
from alignflow_core.config import Machine, Project, References, Target, Task
from alignflow_core.devices import prepare
from alignflow_core.errors import InputError
from alignflow_core.folders import check_folder
from alignflow_core.networks.segmenters import load_segmenter
from alignflow_core.pairs import read_pairs, to_unit
from alignflow_core.reference_instrument import instrument_of, probe_features, same_probe
from alignflow_core.reference_moments import LEAST_IMAGES, ReferenceMoments, write_moments
from alignflow_core.reference_roles import ROLES, in_drawn_order, roles
from alignflow_core.reward import regions
from alignflow_core.reward.encoders import Material, Restored, Standardised, build
from alignflow_core.reward.objective import measured
from alignflow_core.reward.registry import PORTABLE_ENCODERS
from alignflow_core.stages import STAGES, artifact_dir
from alignflow_core.validation import build as build_config

FORMAT = 1
STATISTICS = "encoder.safetensors"
CHECKPOINT = ("weights.safetensors", "config.json")
MAX_THREADS = 64
FEW = 5  # images: moments of fewer say much about each of them

README = """AlignFlow reference kit

Measures your images where they are and writes one small file of statistics. No image leaves this machine; nothing is sent.

1. Install AlignFlow {version} (any machine, no GPU needed).
2. Put {least} or more images into a folder, without masks. More are better; ten to twenty are enough.
3. Run

       alignflow reference-moments KIT IMAGES --out moments.safetensors

   KIT is this folder, IMAGES yours. The command prints what it has written.
4. Hand over moments.safetensors. It holds, for images as a whole and for each region ({regions}), how many
   images there are and the mean and variance of every image feature ({encoder}). It holds no image and no file name, and nothing
   per image unless a count is 1.
   What such numbers can still reveal: docs/reference-kit.md of AlignFlow. Whether they may leave is your decision.

This folder holds networks and statistics computed from the images of another site{stage1}. Treat it as that site asks you to.
"""


def write_kit(project: Project, root: Path, target: str, out: Path) -> None:
    """Write the kit of a target's way of aligning.

    Args:
        project, root: configuration and folder of a run whose source data and labeller (and for ``flow`` stage 1) are built.
        target: what it aligns with decides encoder, regions and confidence; its ``references`` decide the split.
        out: new folder.

    Raises:
        InputError: an encoder or regions that cannot travel; something not built; ``out`` exists.
    """
    if out.exists():
        raise InputError(f"{out}: exists; remove it or give another folder")
    chosen = project.targets[target]
    _refuse_unportable(target, chosen)
    inputs = {name: root / artifact_dir(*node) for name, node in project.graph.inputs(STAGES["align"], target).items() if name != "references"}
    device = prepare(project.machine)
    source = read_pairs(inputs["data:source"], "train")
    images, labels = to_unit(source.images).to(device), torch.from_numpy(np.array(source.labels)).to(device)
    encoder = build(chosen.align.encoder, Material(images, images[:0], inputs["image_flow"], None, project.seed, root))
    n_classes = len(project.task.classes)
    pseudo = chosen.align.regions == "pseudo"
    fitted = Standardised(encoder, images, regions.from_labels(labels, n_classes) if pseudo else images.new_zeros(len(images), 0, *images.shape[2:]))
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    probe = probe_features(fitted, images.shape[2], device)
    save_tensors(part / STATISTICS, {f"probe/{i}": value for i, value in enumerate(probe)} | {
        f"{name}/{i}": value for i, pair in enumerate(fitted.moments) for name, value in zip(("mean", "scale"), pair, strict=True)})
    if pseudo:
        _copy_checkpoint(inputs["labeller"], part / "labeller")
    if chosen.align.encoder == "flow":
        _copy_checkpoint(inputs["image_flow"], part / "stage1")
    instrument = instrument_of(chosen.align, project.task, source, inputs["labeller"], inputs["image_flow"])
    _describe(part, instrument, chosen, project)
    publish(part, out)


def _refuse_unportable(target: str, chosen: Target) -> None:
    """Raise :class:`InputError` where the references' features cannot be measured away from here."""
    problems = []
    if chosen.align.encoder not in PORTABLE_ENCODERS:
        problems.append(f"target {target}: align.encoder '{chosen.align.encoder}' cannot travel in a kit; "
                        f"choose one of {', '.join(PORTABLE_ENCODERS)}")
    if chosen.align.regions == "labels":
        problems.append(f"target {target}: align.regions 'labels' needs masks at the hospital; set align.regions=pseudo or none")
    if problems:
        raise InputError(*problems)


def _copy_checkpoint(folder: Path, to: Path) -> None:
    """Weights and config of a network; where its pretrained weights lay stays here."""
    to.mkdir()
    shutil.copyfile(folder / CHECKPOINT[0], to / CHECKPOINT[0])
    config = read_json(folder / CHECKPOINT[1])
    if "weights" in config["network"]:
        config["network"]["weights"] = dict.fromkeys(config["network"]["weights"], "")
    write_json(to / CHECKPOINT[1], config)


def _describe(part: Path, instrument: Mapping[str, Any], chosen: Target, project: Project) -> None:
    """README.txt and kit.json; the latter last, as it names the content of all others."""
    names = region_names(instrument)[1:]
    (part / "README.txt").write_text(README.format(
        version=version("alignflow"), least=LEAST_IMAGES, regions=", ".join(names) or "none", encoder=instrument["encoder"],
        stage1="; stage1/ can paint images like that site's" if instrument["stage1"] else ""), encoding="utf-8")
    write_json(part / "kit.json", {
        "format": FORMAT, "alignflow": version("alignflow"), "instrument": instrument, "threads": project.machine.threads,
        "split": {"seed": chosen.references.seed, "held_out_fraction": chosen.references.held_out_fraction},
        "align": {"reward": chosen.align.reward, "prior_count": chosen.align.prior_count}, "files": file_hashes(part)})


def region_names(instrument: Mapping[str, Any]) -> list[str]:
    """What the sets of moments are about, in their order."""
    return ["whole image", *(("background", *instrument["task"]["classes"]) if instrument["regions"] == "pseudo" else ())]


def apply_kit(kit: Path, images: Path, out: Path, progress: Callable[[int, int, str], None] = lambda done, total, note: None) -> ReferenceMoments:
    """Measure a folder of images with a kit and write the file of moments.

    Raises:
        InputError: the kit is damaged or altered, images cannot be read (all of them named), fewer than five different ones, ``out`` exists.
    """
    if out.exists() or out.suffix != ".safetensors":
        raise InputError(f"{out}: {'exists; remove it or give' if out.exists() else 'give'} a new file that ends in .safetensors")
    facts = _checked(kit)
    try:
        task, split = _task(facts["instrument"]), References(**facts["split"])
        device = prepare(Machine(device="cpu", threads=min(int(facts["threads"]), MAX_THREADS)))
        encoder, labeller = _instrument(kit, facts["instrument"], device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{kit}: cannot be used ({' '.join(str(error).split())[:200]}); ask for the kit again, or install the AlignFlow "
                         f"that made it ({facts.get('alignflow')})") from error
    pictures: list[np.ndarray] = []
    listing = check_folder(images, task, labelled=False, progress=progress, size=facts["instrument"]["size"],
                           keep=lambda n, image, mask: pictures.append(image.pixels))
    different = len({case.image_sha256 for case in listing.cases})
    if different < LEAST_IMAGES:
        raise InputError(f"{images}: has {different} different images, and moments of fewer than {LEAST_IMAGES} say too much about each; add images")
    order = in_drawn_order([case.stem for case in listing.cases], split.seed)
    pixels = to_unit(np.stack([pictures[i] for i in order]))
    membership = pixels.new_zeros(len(pixels), 0, *pixels.shape[2:]) if labeller is None else \
        regions.from_segmenter(labeller, pixels, task, facts["instrument"]["confidence"])
    role = np.array(roles([listing.cases[i].group for i in order], split.held_out_fraction))
    rows = {name: torch.from_numpy(role == name) for name in ROLES if (role == name).any()}
    known = ReferenceMoments(facts["instrument"], {name: int(chosen.sum()) for name, chosen in rows.items()},
                             {name: measured(encoder, pixels[chosen], membership[chosen]) for name, chosen in rows.items()},
                             probe_features(encoder, pixels.shape[2], device))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_moments(out, known)
    return known


def _checked(kit: Path) -> dict[str, Any]:
    """``kit.json`` of a kit whose files are what it says."""
    facts = read_json(kit / "kit.json") if (kit / "kit.json").is_file() else None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT or not isinstance(facts.get("files"), dict):
        raise InputError(f"{kit}: is no reference kit of format {FORMAT}; give the folder that 'alignflow reference-kit' wrote")
    known = {STATISTICS, "README.txt", *(f"{folder}/{name}" for folder in ("labeller", "stage1") for name in CHECKPOINT)}
    wrong = sorted(name for name, sha256 in facts["files"].items()
                   if name not in known or not (kit / name).is_file() or file_hash(kit / name) != sha256)
    if wrong or STATISTICS not in facts["files"]:
        raise InputError(*(f"{kit / name}: missing or not what kit.json records; ask for the kit again" for name in wrong or [STATISTICS]))
    return facts


def _task(instrument: Mapping[str, Any]) -> Task:
    """The task a kit was made for; JSON has turned the label values into text."""
    problems: list[str] = []
    raw = dict(instrument["task"])
    task = build_config(Task, raw | {"values": {int(value): number for value, number in raw["values"].items()}}, "task", problems)
    if problems:
        raise ValueError(problems[0])
    return task  # type: ignore[no-any-return]


def _instrument(kit: Path, instrument: Mapping[str, Any], device: torch.device) -> tuple[Standardised, torch.nn.Module | None]:
    """Encoder and labeller of a kit, after a look at the probe.

    Raises:
        ValueError: a checkpoint is not the one named, or features differ from those where the kit was made.
    """
    for name in ("labeller", "stage1"):
        if instrument[name] is not None and read_json(kit / name / "config.json")["weights_sha256"] != instrument[name]:
            raise ValueError(f"{name} is not the network that kit.json names")
    if instrument["encoder"] not in PORTABLE_ENCODERS:
        raise ValueError(f"unknown encoder {json.dumps(instrument['encoder'])}")
    nothing = torch.zeros(0, 3, instrument["size"], instrument["size"], device=device)
    stored = load_tensors(kit / STATISTICS)
    n_sets = len(region_names(instrument))
    moments: list[tuple[Tensor, Tensor]] = [(stored[f"mean/{i}"].to(device), stored[f"scale/{i}"].to(device)) for i in range(n_sets)]
    encoder = Restored(build(instrument["encoder"], Material(nothing, nothing, kit / "stage1", None, 0, kit)), moments)
    if not same_probe([stored[f"probe/{i}"] for i in range(len(moments))], probe_features(encoder, instrument["size"], device)):
        raise ValueError("its encoder gives other features here than where the kit was made")
    return encoder, None if instrument["labeller"] is None else load_segmenter(kit / "labeller", device)


def summary(known: ReferenceMoments) -> list[str]:
    """What a file of moments holds, in lines for the person who decides whether it may leave."""
    lines = []
    for role, word in zip(ROLES, ("aligned to", "held out"), strict=True):
        if role in known.sets:
            counts = zip(region_names(known.instrument), known.sets[role], strict=True)
            lines.append(f"{known.n_images[role]} images {word}: mean and variance of features of " + ", ".join(
                f"{name} ({0 if each is None else each.count})" for name, each in counts))
    few = min(each.count for sets in known.sets.values() for each in sets if each is not None)
    if few < FEW:
        lines.append(f"note: some of these are moments of {few} {'image' if few == 1 else 'images'} and say much about "
                     f"{'it' if few == 1 else 'each'}; more images make them safer")
    return lines
