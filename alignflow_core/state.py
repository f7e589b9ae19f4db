"""Resumable training state: the last two saves, each one file whose name holds its step and the hash of its bytes.

A byte that changes on the disk makes a file unequal to its name; then the save before it is taken. Which is the latest is decided by
the step, never by a time. Tensors only (safetensors), never pickle.
"""

import errno
import hashlib
import shutil
import sys
from pathlib import Path

from safetensors.torch import save as to_bytes
from torch import Tensor

from alignflow_core.artifact import sync_folder, write_whole
from alignflow_core.checkpoint import load_tensors
from alignflow_core.errors import InputError, StageError

KEPT = 2
HASH_LENGTH = 32
MIB = 2**20


def save_state(file: Path, step: int, tensors: dict[str, Tensor]) -> None:
    """Save a step; the two latest stay.

    Args:
        file: ``work/state.safetensors`` stands for ``work/state.000000120.<hash>.safetensors``.

    Raises:
        StageError: the disk is full; what was there is intact.
    """
    content = to_bytes({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    try:
        write_whole(file.with_name(f"{file.stem}.{step:09d}.{digest(content)}.safetensors"), content)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StageError(f"{file.parent}: no space for a state of {len(content) / MIB:.1f} MiB; free some and run the same command, "
                         "which continues from the state before") from error
    sync_folder(file.parent)
    for old in states(file)[KEPT:]:
        old.unlink(missing_ok=True)


def load_state(file: Path) -> dict[str, Tensor]:
    """The latest save that is whole; empty where there is none. Damaged ones are named on stderr and removed."""
    for leftover in file.parent.glob(f".{_escaped(file.stem)}.*.part*"):
        leftover.unlink(missing_ok=True)
    for saved in states(file):
        if digest(saved.read_bytes()) == saved.name.split(".")[-2]:
            return load_tensors(saved)
        print(f"{saved}: damaged, its bytes are not those that were saved; the state before it is taken", file=sys.stderr, flush=True)
        saved.unlink()
    return {}


def digest(content: bytes) -> str:
    """Start of the SHA-256 of a save, as its name holds it."""
    return hashlib.sha256(content).hexdigest()[:HASH_LENGTH]


def states(file: Path) -> list[Path]:
    """Saves of a state, the latest step first."""
    return sorted(file.parent.glob(f"{_escaped(file.stem)}.{'[0-9]' * 9}.{'[0-9a-f]' * HASH_LENGTH}.safetensors"), reverse=True)


def ensure_space(folder: Path, needed: int) -> None:
    """Refuse long work that could not be saved. Raises :class:`InputError` naming the folder, what is needed and what is free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"{folder}: {needed / MIB:.1f} MiB are needed to save the work and {free / MIB:.1f} MiB are free; "
                         "free some or use another disk")


def _escaped(stem: str) -> str:
    """A stem as a glob pattern."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in stem)
