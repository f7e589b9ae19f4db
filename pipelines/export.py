"""Synthetic pairs for other tools: PNG files and a table, written from arrays, so that no metadata travels; the copy audit is the gate."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alignflow_core.artifact import write_json
from alignflow_core.config import Project, Task, load_project
from alignflow_core.errors import InputError
from alignflow_core.stages import artifact_dir
from pipelines.audit import Verdict, audit_run, mixed

if TYPE_CHECKING:
    import pandas as pd

    from alignflow_core.pairs import Pairs

WARNING = "near copies of patients' images may be among these pairs: treat the whole folder as patients' data"


@dataclass(frozen=True)
class Gate:
    """What happens to near copies of real images.

    Attributes:
        on_copy: ``block`` refuses the export, ``replace`` leaves them out and fills up from other kept pairs, ``keep`` writes them with a warning.
        accept_copies: must be said in addition to ``keep``.
        pairs: most pairs a target; ``None`` for all.
    """

    on_copy: str = "block"
    accept_copies: bool = False
    pairs: int | None = None

    def __post_init__(self) -> None:
        if self.on_copy == "keep" and not self.accept_copies:
            raise InputError("--on-copy keep: writes near copies of patients' images; say --accept-copies too, or use --on-copy replace")
        if self.pairs is not None and self.pairs < 1:
            raise InputError(f"--pairs {self.pairs}: give at least 1")


BLOCK = Gate()


@dataclass(frozen=True)
class Choice:
    """Rows of a target's pairs to write, bool [N], what the audit said of the kept ones, and the copies that were left out."""

    rows: np.ndarray
    verdict: Verdict
    left_out: list[str]


def export_folder(run: Path, out: Path, gate: Gate = BLOCK) -> dict[str, Choice]:
    """Write kept pairs of every target: ``out/<target>/{images,masks}/<pair_id>.png``, ``manifest.csv``, and ``out/audit.json``.

    Masks are encoded as the task reads them, so each folder can stand where a folder of real pairs can.

    Args:
        run: project root, for instance ``runs/demo``.
        out: new folder; it appears complete or not at all.
        gate: what to do about near copies of training and reference images.

    Returns:
        What was written, by target.

    Raises:
        InputError: no built run, or ``out`` exists; copies are found, or cannot be looked for, and the gate blocks.
    """
    project = load_project(run / "params.yaml")
    refuse_unbuilt(run, project, out)
    choices = chosen(run, project, gate)

    def write(part: Path) -> None:
        for target, choice in choices.items():
            written, table = pairs_of(run, target, choice, gate)
            write_png(part / target / "images", written.images, list(written.ids))
            write_png(part / target / "masks", mask_values(project.task)[written.labels], list(written.ids))
            table.to_csv(part / target / "manifest.csv", index=False)
        write_json(part / "audit.json", audit_record(choices, gate))

    published(out, write)
    return choices


def refuse_unbuilt(run: Path, project: Project, out: Path, *more: Path) -> None:
    """Raise :class:`InputError` unless what is exported is built for every target, of one piece, and ``out`` is free."""
    problems = [f"{out}: exists; name a new folder"] if out.exists() else []
    needed = [*(run / artifact_dir(stage, target) for target in project.targets for stage in ("sample_aligned", "filter")), *more]
    unbuilt = [folder for folder in needed if not (folder / "manifest.parquet").exists()]
    problems += [f"{folder}: not built yet; finish the run first" for folder in unbuilt]
    problems += [] if unbuilt else mixed(run, project, project.targets)
    if problems:
        raise InputError(*problems)


def published(out: Path, write: Callable[[Path], None]) -> None:
    """What ``write`` puts into the folder it is given appears at ``out`` complete or not at all."""
    part = out.with_name(f".{out.name}.part{os.getpid()}")
    try:
        write(part)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def chosen(run: Path, project: Project, gate: Gate) -> dict[str, Choice]:
    """The pairs of every target that may leave, past the gate.

    Raises:
        InputError: copies are found, or cannot be looked for, and the gate blocks.
    """
    choices = {target: _choose(run, target, gate) for target in project.targets}
    if gate.on_copy != "keep":
        _refuse(choices, blocked=gate.on_copy == "block")
    return choices


def _choose(run: Path, target: str, gate: Gate) -> Choice:
    """Audit the kept pairs of a target; under ``replace`` the wanted number is filled from those without a flag."""
    import pandas as pd

    verdicts = pd.read_parquet(run / artifact_dir("filter", target) / "manifest.parquet")
    kept = verdicts["kept"].to_numpy(dtype=bool)
    numbers = np.flatnonzero(kept)
    first = np.zeros(len(kept), bool)
    first[numbers[:gate.pairs]] = True
    verdict = audit_run(run, target, kept if gate.on_copy == "replace" else first)
    if gate.on_copy != "replace":
        return Choice(first, verdict, [])
    copied = verdicts["pair_id"].isin(verdict.copies).to_numpy()
    rows = np.zeros(len(kept), bool)
    rows[numbers[~copied[numbers]][:gate.pairs]] = True
    return Choice(rows, verdict, verdicts.loc[first & copied, "pair_id"].astype(str).tolist())


def _refuse(choices: dict[str, Choice], blocked: bool) -> None:
    """Stop where copies cannot be looked for, where they are found and not wanted, or where nothing else is left."""
    problems = []
    for target, choice in choices.items():
        problems += [f"{target}: not calibrated, so copies cannot be told from chance ({line}); hold out more real images, or take all of it for "
                     "patients' data and say --on-copy keep --accept-copies" for line in choice.verdict.missing]
        if blocked and choice.verdict.copies:
            problems.append(f"{target}: {len(choice.verdict.copies)} of {len(choice.verdict.ids)} pairs are near copies of real images: "
                            f"{', '.join(choice.verdict.copies)}; leave them out with --on-copy replace")
        elif not choice.rows.any():
            problems.append(f"{target}: every kept pair is a near copy of a real image; the generator has learned its images by heart, "
                            "train it on more images or for fewer steps")
    if problems:
        raise InputError(*problems)


def pairs_of(run: Path, target: str, choice: Choice, gate: Gate) -> "tuple[Pairs, pd.DataFrame]":
    """The chosen pairs of a target, and a row for each with its scores and what the audit said of it."""
    import pandas as pd

    from alignflow_core.pairs import read_pairs

    verdicts = pd.read_parquet(run / artifact_dir("filter", target) / "manifest.parquet")
    written = read_pairs(run / artifact_dir("sample_aligned", target)).select(choice.rows)
    table = written.table.merge(verdicts.drop(columns=["kept", "reason"]), on="pair_id", validate="one_to_one")
    table["copy_audit"] = [choice.verdict.words[each] for each in written.ids]
    if gate.on_copy == "keep":
        table["warning"] = WARNING
    return written, table


def write_png(folder: Path, arrays: np.ndarray, names: list[str]) -> None:
    """uint8 arrays [N, H, W] or [N, H, W, 3], or uint16 ones [N, H, W], as ``<name>.png``."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(names, arrays, strict=True):
        Image.fromarray(np.ascontiguousarray(array)).save(folder / f"{name}.png")


def audit_record(choices: dict[str, Choice], gate: Gate) -> dict[str, Any]:
    """Content of ``audit.json``."""
    return {"on_copy": gate.on_copy, "targets": {target: _record(choice, gate) for target, choice in choices.items()}}


def _record(choice: Choice, gate: Gate) -> dict[str, Any]:
    """A target's part of ``audit.json``."""
    wanted = int(min(gate.pairs or len(choice.verdict.ids), len(choice.verdict.ids)))
    written = int(choice.rows.sum())
    facts = choice.verdict.as_json() | {"written": written, "left_out": choice.left_out,
                                        "filled_up": max(0, written - (wanted - len(choice.left_out)))}
    return facts | ({"warning": WARNING} if gate.on_copy == "keep" else {})


def mask_values(task: Task) -> np.ndarray:
    """File value of each class number, uint8 (uint16 where one is above 255) [classes + 1]: the inverse of how the task reads masks."""
    if task.kind == "refuge":
        values = [255, 128, 0]
    elif task.kind == "binary":
        values = [0, 255]
    else:
        numbers = {number: value for value, number in reversed(task.values.items())}
        values = [numbers.get(number, 0) for number in range(len(task.classes) + 1)]
    return np.array(values, dtype=np.uint8 if max(values) < 256 else np.uint16)
