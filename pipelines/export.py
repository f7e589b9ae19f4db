"""Synthetic pairs for other tools: PNG files and a table, written from arrays, so that no metadata travels."""

import os
import shutil
from pathlib import Path

import numpy as np

from alignflow_core.config import Task, load_project
from alignflow_core.errors import InputError
from alignflow_core.stages import artifact_dir


def export_folder(run: Path, out: Path) -> dict[str, int]:
    """Write the kept pairs of every target: ``out/<target>/{images,masks}/<pair_id>.png`` and ``manifest.csv``.

    Masks are encoded as the task reads them, so each folder can stand where a folder of real pairs can.

    Args:
        run: project root, for instance ``runs/demo``.
        out: new folder; it appears complete or not at all.

    Returns:
        Number of pairs per target.

    Raises:
        InputError: no built run, or ``out`` exists.
    """
    project = load_project(run / "params.yaml")
    problems = [f"{out}: exists; name a new folder"] if out.exists() else []
    needed = [run / artifact_dir(stage, target) for target in project.targets for stage in ("sample_aligned", "filter")]
    problems += [f"{folder}: not built yet; finish the run first" for folder in needed if not (folder / "manifest.parquet").exists()]
    if problems:
        raise InputError(*problems)
    part = out.with_name(f".{out.name}.part{os.getpid()}")
    try:
        counts = {target: _export_target(run, target, project.task, part / target) for target in project.targets}
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return counts


def _export_target(run: Path, target: str, task: Task, folder: Path) -> int:
    import pandas as pd
    from PIL import Image

    from alignflow_core.pairs import read_pairs

    verdicts = pd.read_parquet(run / artifact_dir("filter", target) / "manifest.parquet")
    pairs = read_pairs(run / artifact_dir("sample_aligned", target))
    kept = pairs.select(verdicts["kept"].to_numpy(dtype=bool))
    for part, arrays in (("images", kept.images), ("masks", mask_values(task)[kept.labels])):
        (folder / part).mkdir(parents=True)
        for pair_id, array in zip(kept.ids, arrays, strict=True):
            Image.fromarray(array).save(folder / part / f"{pair_id}.png")
    table = kept.table.merge(verdicts.drop(columns=["kept", "reason"]), on="pair_id", validate="one_to_one")
    table.to_csv(folder / "manifest.csv", index=False)
    return len(kept)


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
