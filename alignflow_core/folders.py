"""Raw folders as hospitals bring them: every file opened, every problem found, nothing written.

A raw folder has ``images/`` and ``masks/``, partners share the stem. An optional ``groups.csv`` or ``sequences.csv``
(header ``stem,<anything>``) names the patient or sequence of a stem; no split ever cuts a group.
"""

import csv
import io
import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignflow_core.config import Task
from alignflow_core.errors import InputError
from alignflow_core.readers import SUFFIXES, Picture, ReadError, read_bytes, read_image, read_mask

GROUP_FILES = ("groups.csv", "sequences.csv")
CHECK_SIZE = 64  # a check that keeps nothing decodes every image too, large JPEGs at reduced scale
IGNORED = ("thumbs.db", "desktop.ini")  # and names with a leading dot
# Takes the number of images of the folder, one of them at the size asked for, and its mask at full size where there is one.
Keep = Callable[[int, Picture, Picture | None], None]


@dataclass(frozen=True, slots=True)
class Case:
    """One image and its mask; files relative to the folder, size in pixels, hashes of the files' bytes."""

    stem: str
    image_file: str
    mask_file: str
    group: str
    width: int
    height: int
    image_sha256: str
    mask_sha256: str
    empty: bool


@dataclass(frozen=True)
class Listing:
    """A folder that passed the check; ``mask_file`` and ``mask_sha256`` are empty where ``labelled`` is false."""

    folder: Path
    root: Path
    cases: tuple[Case, ...]
    labelled: bool

    @property
    def empty_masks(self) -> tuple[str, ...]:
        """Mask files without any foreground: kept, since a healthy case may have none."""
        return tuple(case.mask_file for case in self.cases if case.empty)


def check_folder(folder: Path, task: Task, labelled: bool = True, root: Path | None = None,
                 progress: Callable[[int, int, str], None] = lambda done, total, note: None, size: int = CHECK_SIZE,
                 keep: Keep = lambda n, image, mask: None) -> Listing:
    """Open every file of a folder of pairs or references, each once; writes nothing.

    Args:
        folder: has ``images/`` and ``masks/``. With ``labelled=False``, ``masks/`` may be missing and the images may lie in the folder itself.
        root: folder that links may not lead out of; the folder itself if not given.
        size: side in pixels at which images are decoded.
        keep: is called with every case that can be read, in the order of the cases; what it kept is whole only if no problem is raised.

    Returns:
        The cases sorted by stem. Files with equal bytes share a group.

    Raises:
        InputError: all problems at once.
    """
    folder = folder.resolve()
    root = folder if root is None or not folder.is_relative_to(root.resolve()) else root.resolve()
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; create it or correct the path")
    image_dir, mask_dir = folder / "images", folder / "masks"
    if not labelled:
        image_dir = image_dir if image_dir.is_dir() else folder
        labelled = mask_dir.is_dir()
    problems = [f"{each}: no such folder; put the files there" for each in (image_dir, mask_dir)[:1 + labelled] if not each.is_dir()]
    if problems:
        raise InputError(*problems)
    images = _by_stem(image_dir, problems, ignored=(*GROUP_FILES, "masks") if image_dir == folder else ())
    masks = _by_stem(mask_dir, problems) if labelled else {}
    if not images:
        problems.append(f"{image_dir}: holds no image; put at least one of {', '.join(SUFFIXES)} there")
    if labelled:
        problems += [f"{image_dir / images[s]}: has no mask of that stem in {mask_dir}; add it or remove the image"
                     for s in images.keys() - masks.keys()]
        problems += [f"{mask_dir / masks[s]}: has no image of that stem in {image_dir}; add it or remove the mask"
                     for s in masks.keys() - images.keys()]
    groups = _read_groups(folder, root, images, problems)
    cases = []
    for done, stem in enumerate(sorted(images), 1):
        image_file, mask_file = image_dir / images[stem], mask_dir / masks[stem] if stem in masks else None
        image = _try(problems, image_file, read_image, image_file, root, size)
        mask = _try(problems, mask_file, read_mask, mask_file, root, task) if mask_file else None
        if image and mask and (image.width, image.height) != (mask.width, mask.height):
            problems.append(f"{mask_file}: is {mask.width}x{mask.height}, its image {image_file.name} is {image.width}x{image.height}; "
                            "export both at one size")
        if image and (mask or not labelled):
            cases.append(Case(stem, image_file.relative_to(folder).as_posix(), mask_file.relative_to(folder).as_posix() if mask_file else "",
                              groups.get(stem, stem), image.width, image.height, image.sha256, mask.sha256 if mask else "",
                              mask is not None and not mask.pixels.any()))
            keep(len(images), image, mask)
        progress(done, len(images), "checked")
    if labelled and cases and all(case.empty for case in cases):
        problems.append(f"{mask_dir}: no mask has any foreground when read as task '{task.name}'; "
                        "choose another task, or set task.threshold or task.values")
    if problems:
        raise InputError(*sorted(problems))
    return Listing(folder, root, _merge_copies(cases), labelled)


def _try(problems: list[str], file: Path, read: Callable[..., Picture], *arguments: Any) -> Picture | None:
    """What ``read`` gives, or a new problem that names the file."""
    try:
        return read(*arguments)
    except ReadError as error:
        problems.append(f"{file}: {error}")
        return None


def _by_stem(folder: Path, problems: list[str], ignored: tuple[str, ...] = ()) -> dict[str, str]:
    """Names of the image files of a folder by stem; stems that differ in nothing but suffix or case are a problem."""
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in sorted(os.listdir(folder)):
        if name.startswith(".") or name.lower() in (*IGNORED, *ignored):
            continue
        if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):  # ends of lines, and bytes that are no UTF-8
            problems.append(f"{folder / name}".encode("unicode_escape").decode() + ": has a name that cannot be written; rename it")
            continue
        stem, suffix = os.path.splitext(name)
        other = taken.setdefault(stem.casefold(), name)
        if suffix.lower() not in SUFFIXES:
            problems.append(f"{folder / name}: is not an image file ({', '.join(SUFFIXES)}); move it elsewhere")
            continue
        found.setdefault(stem, name)
        if other != name:
            problems.append(f"{folder / name}: has the stem of {other}; rename or remove one of them")
    return found


def group_files(folder: Path) -> list[Path]:
    """The files of a folder that name groups, however they are capitalised; one that cannot be read counts too."""
    return sorted(file for file in folder.iterdir() if file.name.lower() in GROUP_FILES)


def _read_groups(folder: Path, root: Path, stems: Mapping[str, str], problems: list[str]) -> dict[str, str]:
    """Stem -> group as the folder's groups file says; no file, no entries."""
    files = group_files(folder)
    if len(files) != 1:
        problems += [f"{file}: two group files in one folder; keep one" for file in files[1:]]
        return {}
    file = files[0]
    try:
        rows = list(csv.reader(io.StringIO(read_bytes(file, root).decode("utf-8-sig")), strict=True))
    except (ReadError, UnicodeDecodeError, csv.Error) as error:
        problems.append(f"{file}: not readable as CSV ({error}); save it as UTF-8 with the header 'stem,group'")
        return {}
    if not rows or len(rows[0]) < 2 or rows[0][0].strip() != "stem":
        problems.append(f"{file}: must begin with the header 'stem,group'; add it")
        return {}
    groups: dict[str, str] = {}
    for line, row in enumerate(rows[1:], 2):
        if not any(cell.strip() for cell in row):
            continue
        stem, group = row[0].strip(), row[1].strip() if len(row) > 1 else ""
        if not group:
            problems.append(f"{file}, line {line}: no group for stem '{stem}'; fill it in")
        elif stem not in stems:
            problems.append(f"{file}, line {line}: no image has the stem '{stem}'; remove the line or correct it (stems have no suffix)")
        elif groups.setdefault(stem, group) != group:
            problems.append(f"{file}, line {line}: stem '{stem}' is in group '{groups[stem]}' and in '{group}'; keep one")
    return groups


def _merge_copies(cases: Sequence[Case]) -> tuple[Case, ...]:
    """Join the groups of images with equal bytes, so that no two splits hold the same image."""
    parent: dict[str, str] = {}

    def leader(group: str) -> str:
        while parent.setdefault(group, group) != group:
            parent[group] = parent[parent[group]]  # halved at every visit: a chain of copies stays short
            group = parent[group]
        return group

    first: dict[str, str] = {}
    for case in cases:
        a, b = sorted((leader(case.group), leader(first.setdefault(case.image_sha256, case.group))))
        parent[b] = a
    return tuple(case if case.group == (found := leader(case.group)) else replace(case, group=found) for case in cases)
