"""Synthetic pairs as nnU-Net v2 datasets, past the same copy audit as every export."""

import json
from pathlib import Path
from typing import Any

from alignflow_core.artifact import write_json
from alignflow_core.config import Project, Task, load_project
from alignflow_core.errors import InputError
from alignflow_core.stages import artifact_dir
from pipelines.export import BLOCK, Choice, Gate, audit_record, chosen, pairs_of, published, refuse_unbuilt, write_png

DATASET_IDS = (1, 999)  # three digits; nnU-Net's own examples have low numbers
FIRST_DATASET = 501


def export_nnunet(run: Path, out: Path, gate: Gate = BLOCK, with_source: bool = False, first: int = FIRST_DATASET) -> dict[str, Choice]:
    """Write an nnU-Net v2 dataset for every target: ``out/DatasetXXX_<target>/{dataset.json,imagesTr,labelsTr}`` and ``manifest.csv``.

    After nnU-Net's documentation (``dataset_format.md``, ``region_based_training.md``): an RGB image is one file, ``<case>_0000.png``, which its
    ``NaturalImage2DIO`` reads as three channels; labels are ``<case>.png`` with consecutive class numbers, 0 for background. Classes that lie
    inside one another are regions, each with what lies in it, as everywhere in AlignFlow.

    Args:
        gate: what to do about near copies among the synthetic pairs.
        with_source: the source's training pairs too, real patients' images as they are; else synthetic pairs alone.
        first: number of the first target's dataset; the others follow.

    Returns, raises: as :func:`pipelines.export.export_folder`.
    """
    project = load_project(run / "params.yaml")
    refuse_unbuilt(run, project, out, *([run / artifact_dir("data", project.source)] if with_source else []))
    last, (low, high) = first + len(project.targets) - 1, DATASET_IDS
    if not low <= first <= last <= high:
        raise InputError(f"--dataset-id: datasets {first} to {last} do not all lie in {low} to {high}; give another first number")
    nnunet_description(project.task, 0)
    choices = chosen(run, project, gate)

    def write(part: Path) -> None:
        for number, (target, choice) in enumerate(choices.items(), start=first):
            _dataset(run, project, target, part / f"Dataset{number:03d}_{target}", choice, gate, with_source)
        write_json(part / "audit.json", audit_record(choices, gate))

    published(out, write)
    return choices


def _dataset(run: Path, project: Project, target: str, folder: Path, choice: Choice, gate: Gate, with_source: bool) -> None:
    """One dataset; its manifest says which cases are synthetic and which belong to one patient, by number."""
    import pandas as pd

    from alignflow_core.pairs import read_pairs

    written, table = pairs_of(run, target, choice, gate)
    cases = pd.DataFrame({"case": [f"synthetic_{name}" for name in written.ids], "origin": "synthetic"})
    rows = [cases.join(table.rename(columns={"origin": "mask_origin"}))]
    sets = [written]
    if with_source:
        source = read_pairs(run / artifact_dir("data", project.source), "train")
        group = source.table["group"].factorize()[0]
        rows.append(pd.DataFrame({"case": [f"source_{name}" for name in source.ids], "origin": "source", "group": group}))
        sets.append(source)
    manifest = pd.concat(rows, ignore_index=True)
    for names, pairs in zip((part["case"].tolist() for part in rows), sets, strict=True):
        write_png(folder / "imagesTr", pairs.images, [f"{name}_0000" for name in names])
        write_png(folder / "labelsTr", pairs.labels, names)
    manifest.to_csv(folder / "manifest.csv", index=False)
    description = nnunet_description(project.task, len(manifest))
    (folder / "dataset.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")  # the order of regions matters: not sorted


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
