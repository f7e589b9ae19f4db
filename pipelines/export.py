"""Synthetic pairs for other tools: PNG files and a table, written from arrays, so that no metadata travels."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alignflow_core.config import Project, Task, load_project
from alignflow_core.errors import InputError
from alignflow_core.stages import artifact_dir

if TYPE_CHECKING:
    import pandas as pd

    from alignflow_core.pairs import Pairs

DATASET_IDS = (1, 999)  # three digits; nnU-Net's own examples have low numbers
FIRST_DATASET = 501


def export_folder(run: Path, out: Path) -> dict[str, int]:
    """Write the kept pairs of every target: ``out/<target>/{images,masks}/<pair_id>.png`` and ``manifest.csv``.

    Masks are encoded as the task reads them, so each folder can stand where a folder of real pairs can.

    Args:
        run: project root, for instance ``runs/demo``.
        out: new folder; it appears complete or not at all.

    Returns:
        Folder below ``out`` -> number of pairs, one for each target.

    Raises:
        InputError: no built run, or ``out`` exists.
    """
    project = _built_project(run, out)
    return _published(out, lambda part: {target: _export_target(run, target, project.task, part / target) for target in project.targets})


def export_nnunet(run: Path, out: Path, with_source: bool = False, first: int = FIRST_DATASET) -> dict[str, int]:
    """Write an nnU-Net v2 dataset for every target: ``out/DatasetXXX_<target>/{dataset.json,imagesTr,labelsTr}`` and ``manifest.csv``.

    After nnU-Net's documentation (``dataset_format.md``, ``region_based_training.md``): an RGB image is one file, ``<case>_0000.png``, which its
    ``NaturalImage2DIO`` reads as three channels; labels are ``<case>.png`` with consecutive class numbers, 0 for background. Classes that lie
    inside one another are regions, each with what lies in it, as everywhere in AlignFlow.

    Args:
        with_source: the source's training pairs too; else synthetic pairs alone.
        first: number of the first target's dataset; the others follow.

    Returns, raises: as :func:`export_folder`.
    """
    project = _built_project(run, out, with_source)
    last, (low, high) = first + len(project.targets) - 1, DATASET_IDS
    if not low <= first <= last <= high:
        raise InputError(f"--dataset-id: datasets {first} to {last} do not all lie in {low} to {high}; give another first number")
    names = {target: f"Dataset{number:03d}_{target}" for number, target in enumerate(project.targets, start=first)}
    return _published(out, lambda part: {name: _nnunet_dataset(run, project, target, part / name, with_source) for target, name in names.items()})


def _built_project(run: Path, out: Path, with_source: bool = False) -> Project:
    """The run's configuration, if what is exported is built for every target and ``out`` is free."""
    project = load_project(run / "params.yaml")
    problems = [f"{out}: exists; name a new folder"] if out.exists() else []
    needed = [run / artifact_dir(stage, target) for target in project.targets for stage in ("sample_aligned", "filter")]
    needed += [run / artifact_dir("data", project.source)] if with_source else []
    problems += [f"{folder}: not built yet; finish the run first" for folder in needed if not (folder / "manifest.parquet").exists()]
    if problems:
        raise InputError(*problems)
    return project


def _published(out: Path, write: Callable[[Path], dict[str, int]]) -> dict[str, int]:
    """What ``write`` puts into the folder it is given appears at ``out`` complete or not at all."""
    part = out.with_name(f".{out.name}.part{os.getpid()}")
    try:
        counts = write(part)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return counts


def _kept(run: Path, target: str) -> "tuple[Pairs, pd.DataFrame]":
    """The pairs of a target that filtering kept, and their rows with its scores."""
    import pandas as pd

    from alignflow_core.pairs import read_pairs

    verdicts = pd.read_parquet(run / artifact_dir("filter", target) / "manifest.parquet")
    kept = read_pairs(run / artifact_dir("sample_aligned", target)).select(verdicts["kept"].to_numpy(dtype=bool))
    return kept, kept.table.merge(verdicts.drop(columns=["kept", "reason"]), on="pair_id", validate="one_to_one")


def _write_png(folder: Path, arrays: np.ndarray, names: list[str]) -> None:
    """uint8 arrays [N, H, W] or [N, H, W, 3] as ``<name>.png``."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(names, arrays, strict=True):
        Image.fromarray(np.ascontiguousarray(array)).save(folder / f"{name}.png")


def _export_target(run: Path, target: str, task: Task, folder: Path) -> int:
    kept, table = _kept(run, target)
    _write_png(folder / "images", kept.images, list(kept.ids))
    _write_png(folder / "masks", mask_values(task)[kept.labels], list(kept.ids))
    table.to_csv(folder / "manifest.csv", index=False)
    return len(kept)


def _nnunet_dataset(run: Path, project: Project, target: str, folder: Path, with_source: bool) -> int:
    """One dataset; its manifest says which cases are synthetic and which belong to one patient, by number."""
    import pandas as pd

    from alignflow_core.pairs import read_pairs

    kept, table = _kept(run, target)
    rows = [pd.DataFrame({"case": [f"synthetic_{name}" for name in kept.ids], "origin": "synthetic"}).join(table)]
    sets = [kept]
    if with_source:
        source = read_pairs(run / artifact_dir("data", project.source), "train")
        group = source.table["group"].factorize()[0]
        rows.append(pd.DataFrame({"case": [f"source_{name}" for name in source.ids], "origin": "source", "group": group}))
        sets.append(source)
    manifest = pd.concat(rows, ignore_index=True)
    for names, pairs in zip((part["case"].tolist() for part in rows), sets, strict=True):
        _write_png(folder / "imagesTr", pairs.images, [f"{name}_0000" for name in names])
        _write_png(folder / "labelsTr", pairs.labels, names)
    manifest.to_csv(folder / "manifest.csv", index=False)
    description = nnunet_description(project.task, len(manifest))
    (folder / "dataset.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")  # the order of regions matters: not sorted
    return len(manifest)


def nnunet_description(task: Task, n_cases: int) -> dict[str, Any]:
    """Content of ``dataset.json``: channels, labels or regions, number of cases, file ending.

    Raises:
        InputError: a class has a name that nnU-Net keeps for itself.
    """
    for name in ("background", "ignore"):
        if name in task.classes:
            raise InputError(f"task.classes: nnU-Net means something else by '{name}'; give the class another name, or take --format folder")
    numbers = list(range(1, len(task.classes) + 1))
    regions = task.nested and len(numbers) > 1
    labels: dict[str, int | list[int]] = {"background": 0}
    for number, name in zip(numbers, task.classes, strict=True):
        labels[name] = numbers[number - 1:] if regions and number < len(numbers) else number
    found: dict[str, Any] = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": labels, "numTraining": n_cases, "file_ending": ".png",
                             "overwrite_image_reader_writer": "NaturalImage2DIO"}
    return found | ({"regions_class_order": numbers} if regions else {})


def mask_values(task: Task) -> np.ndarray:
    """File value of each class number, uint8 [classes + 1]: the inverse of how the task reads masks."""
    if task.kind == "refuge":
        values = [255, 128, 0]
    elif task.kind == "binary":
        values = [0, 255]
    else:
        numbers = {number: value for value, number in reversed(task.values.items())}
        values = [numbers.get(number, 0) for number in range(len(task.classes) + 1)]
    return np.array(values, dtype=np.uint8)
