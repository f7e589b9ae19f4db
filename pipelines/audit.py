"""``alignflow audit``: near copies of training or reference images among synthetic ones, of a run or of an exported folder."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignflow_core.config import Project, load_project
from alignflow_core.errors import InputError
from alignflow_core.stages import artifact_dir
from pipelines.lineage import of_one_piece

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


@dataclass(frozen=True)
class Verdict:
    """What the audit of one target's pairs says.

    Attributes:
        ids: the pairs that were looked at.
        table: one row a pair and bank (``alignflow_core.audit.table``).
        banks: for each bank, how many images it has, the threshold, what it was read off and how often it errs.
        missing: why this is no audit, a line each; empty where it is one.
        not_compared: what the generator was given and cannot be compared with, a line each.
    """

    ids: tuple[str, ...]
    table: "pd.DataFrame"
    banks: dict[str, dict[str, Any]]
    missing: list[str]
    not_compared: tuple[str, ...] = ()

    @property
    def copies(self) -> list[str]:
        """Ids of the flagged pairs, in their order."""
        flagged = set(self.table.loc[self.table["flagged"], "pair_id"])
        return [each for each in self.ids if each in flagged]

    @property
    def words(self) -> dict[str, str]:
        """Pair id -> verdict in words: ``no copy found``, ``near copy of references 0a1b…`` or ``not audited``."""
        found = dict.fromkeys(self.ids, "not audited" if self.missing else "no copy found")
        for row in self.table[self.table["flagged"]].to_dict("records"):
            found[row["pair_id"]] = f"near copy of {row['bank']} {row['nearest']}"
        return found

    def as_json(self) -> dict[str, Any]:
        """Plain data for ``audit.json`` and ``--json``; thresholds that do not exist are null."""
        closest = self.table[self.table["flagged"]].sort_values("ratio")
        rows = closest[["pair_id", "bank", "nearest", "ratio"]].to_dict("records")
        unseen = {"not_compared": list(self.not_compared)} if self.not_compared else {}
        return unseen | {"pairs": len(self.ids), "audited": not self.missing, "not_calibrated": self.missing, "banks": self.banks, "flagged": rows}


def mixed(run: Path, project: Project, targets: Iterable[str]) -> list[str]:
    """Targets whose pairs, verdicts, references and images on disk are not of each other: after a change of a run that was not finished."""
    return [f"{run / artifact_dir('filter', target)}: judged other pairs, or pairs of other references or images, than lie there now; finish the "
            "run first" for target in targets if not of_one_piece(run, project, ("filter", target))]


def audit_run(run: Path, target: str, chosen: "np.ndarray | None" = None) -> Verdict:
    """Audit the pairs of one target of a run that filtering kept, or those of a boolean row mask.

    Raises:
        InputError: an artifact is not built, or the run was changed and not finished.
    """
    import pandas as pd

    from alignflow_core.pairs import read_pairs

    _refuse_unfinished(run, load_project(run / "params.yaml"), target)
    pairs = read_pairs(run / artifact_dir("sample_aligned", target))
    if chosen is None:
        chosen = pd.read_parquet(run / artifact_dir("filter", target) / "manifest.parquet")["kept"].to_numpy(dtype=bool)
    kept = pairs.select(chosen)
    return audit_images(run, target, kept.images, kept.ids)


def audit_images(run: Path, target: str, images: "np.ndarray", ids: Sequence[str]) -> Verdict:
    """Audit images, uint8 [N, H, W, 3], against what the generator of a run's target has seen."""
    from alignflow_core import audit
    from alignflow_core.pairs import read_pairs

    project = load_project(run / "params.yaml")
    domains = project.source, project.targets[target].domain
    folders = [run / artifact_dir("data", domain) for domain in domains]
    known = audit.banks(read_pairs(folders[0]), read_pairs(run / artifact_dir("references", target)), read_pairs(folders[1], "test"))
    checks = audit.check(images, known, project.evaluate.copy_quantile)
    banks = {name: {"images": len(known[name].seen), "calibration_images": found.n_calibration, "calibrated": found.calibrated,
                    "held_out_near_copies": found.n_twice,
                    "threshold": _number(found.threshold), "false_flag_rate_at_most": _number(found.false_flag_rate),
                    "flagged": int(found.flagged.sum())} for name, found in checks.items()}
    unseen = () if "references" in known else ("references: a file of moments, no images here; only where they are can copies of them be looked for",)
    return Verdict(tuple(ids), audit.table(tuple(ids), checks, known), banks, audit.uncalibrated(checks), unseen)


def _number(value: float) -> float | None:
    return None if value != value else float(value)


def audit_folder(folder: Path, run: Path | None) -> dict[str, Verdict]:
    """Audit a run folder (every target's kept pairs), or a folder of exported pairs against the run it came from.

    Args:
        folder: has ``params.yaml``, or ``<target>/images`` for targets of ``run``, or is one such ``<target>``.
        run: what an exported folder is held against.

    Raises:
        InputError: neither kind of folder, an unreadable image, a run that is not built.
    """
    if run is None:
        if not (folder / "params.yaml").exists():
            raise InputError(f"{folder}: is no run (it has no params.yaml); for an exported folder name its run: --against RUN")
        return {target: audit_run(folder, target) for target in load_project(folder / "params.yaml").targets}
    project = load_project(run / "params.yaml")
    found = {os.path.basename(os.path.abspath(each.parent)): each  # '.' has a name too; one that is a link keeps its own
             for each in sorted([folder / "images", *folder.glob("*/images")]) if each.is_dir()}
    unknown = [name for name in found if name not in project.targets]
    if not found or unknown:
        raise InputError(*[f"{folder / name}: '{name}' is no target of {run}; valid: {', '.join(project.targets)}" for name in unknown]
                         or [f"{folder}: has no <target>/images; give a folder that 'alignflow export' wrote"])
    return {target: _audit_files(run, project, target, images) for target, images in found.items()}


def _audit_files(run: Path, project: Project, target: str, folder: Path) -> Verdict:
    """Audit the image files of a folder, read as untrusted input at the run's working size."""
    import numpy as np

    from alignflow_core.readers import SUFFIXES, ReadError, read_image

    _refuse_unfinished(run, project, target)
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    images, problems = [], [] if files else [f"{folder}: holds no image; give a folder that 'alignflow export' wrote"]
    for file in files:
        try:
            images.append(read_image(file, folder, project.data.size).pixels)
        except ReadError as error:
            problems.append(f"{file}: {error}")
    if problems:
        raise InputError(*problems)
    return audit_images(run, target, np.stack(images), [file.stem for file in files])


def _refuse_unfinished(run: Path, project: Project, target: str) -> None:
    """Raise :class:`InputError` unless what an audit reads is built, and of one piece."""
    folders = [*(run / artifact_dir("data", domain) for domain in (project.source, project.targets[target].domain)),
               *(run / artifact_dir(stage, target) for stage in ("references", "sample_aligned", "filter"))]
    missing = [folder for folder in folders if not (folder / "manifest.parquet").exists()]
    if missing:
        raise InputError(*(f"{folder}: not built yet; finish the run first" for folder in missing))
    if problems := mixed(run, project, [target]):
        raise InputError(*problems)


def files_of(root: Path, ids: Sequence[str]) -> dict[str, list[Path]]:
    """Image files of a project's raw folders by case id.

    Raises:
        InputError: an id of no file, as this machine's site key spells them.
    """
    from alignflow_core.data import case_id
    from alignflow_core.site_key import key_file

    project = load_project(root / "params.yaml")
    folders = [(domain, root / entry.dir) for domain, entry in project.domains.items()]
    folders += [(target.domain, root / target.references.dir) for target in project.targets.values() if target.references.dir]
    found: dict[str, list[Path]] = {each: [] for each in ids}
    for domain, folder in dict.fromkeys(folders):
        place = folder / "images" if (folder / "images").is_dir() else folder
        for file in sorted(place.iterdir()) if place.is_dir() else ():
            found.get(case_id(domain, file.stem), []).append(file)
    unknown = [each for each, files in found.items() if not files]
    if unknown:
        raise InputError(*(f"{each}: no image of {root / 'params.yaml'} has this id under {key_file()}; check the project and the key"
                           for each in unknown))
    return found


def told(target: str, verdict: Verdict) -> str:
    """A verdict for the terminal."""
    head = f"{target}: audited, {len(verdict.ids)} pairs" if not verdict.missing else f"{target}: not calibrated, so this is no audit"
    lines = [head, *(f"  {line}" for line in (*verdict.missing, *verdict.not_compared))]
    for name, facts in verdict.banks.items():
        if facts["threshold"] is not None:
            lines.append(f"  {name}: {facts['flagged']} near copies of {facts['images']} images (ratio below {facts['threshold']:.2f}, read off "
                         f"{facts['calibration_images']} real images held out; false flags at most {100 * facts['false_flag_rate_at_most']:.1f} %)")
        if facts["held_out_near_copies"]:
            lines.append(f"  {name}: note: {facts['held_out_near_copies']} held-out real images are near copies of given ones: a patient under two "
                         "names? a groups.csv keeps a patient in one split")
    for row in verdict.table[verdict.table["flagged"]].sort_values("ratio").to_dict("records"):
        lines.append(f"  {row['pair_id']}: near copy of {row['bank']} {row['nearest']}, ratio {row['ratio']:.2f}")
    return "\n".join(lines)
