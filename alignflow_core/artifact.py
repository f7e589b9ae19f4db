"""Artifacts on disk: content hashes, atomic publication, the lock that guards one folder."""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from alignflow_core.errors import InputError


def file_hash(file: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """Relative name -> SHA-256 of every file of a folder, sorted by name."""
    return dict(_each_file(folder))


def _each_file(folder: Path) -> Iterator[tuple[str, str]]:
    """What :func:`file_hashes` holds, one by one."""
    # Names and no paths: there may be very many.
    names = sorted(_names(folder), key=lambda name: name.replace(os.sep, "\0"))  # by parts, without a list for each
    return ((name, file_hash(folder / name)) for name in names if (folder / name).is_file())


def _names(folder: Path, inside: str = "", above: tuple[str, ...] = ()) -> Iterator[str]:
    """Relative names of all files; links to folders are followed, as those who read the files follow them, but not in circles."""
    place = os.path.realpath(os.path.join(folder, inside))
    if place in above:
        return
    with contextlib.suppress(OSError), os.scandir(place) as entries:  # what is gone or closed to us has no files
        for entry in entries:
            name = os.path.join(inside, entry.name)
            yield from _names(folder, name, (*above, place)) if entry.is_dir() else (name,)


def raw_hashes(path: Path) -> Iterator[tuple[str, str]]:
    """Names and hashes of a raw folder's files as in :func:`file_hashes`; of a raw file its name and hash."""
    return iter([(path.name, file_hash(path))]) if path.is_file() else _each_file(path)


def tree_hash(folder: Path) -> str:
    """SHA-256 over the sorted relative names and contents of a folder (or of one file)."""
    return file_hash(folder) if folder.is_file() else listing_hash(_each_file(folder))


def listing_hash(listing: Iterable[tuple[str, str]]) -> str:
    """The :func:`tree_hash` of a folder of these names and hashes."""
    digest = hashlib.sha256()
    for name, content in listing:
        digest.update(f"{name}\0{content}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def json_hash(value: Any) -> str:
    """SHA-256 of canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def write_whole(file: Path, content: bytes | Iterable[bytes]) -> None:
    """Write a file that gets its name when all of it is on the disk: no reader sees half of it, and none is left by a loss of power.

    Args:
        content: all of it, or its pieces in order.
    """
    part = file.with_name(f".{file.name}.part{os.getpid()}")
    try:
        with part.open("wb") as stream:
            for piece in (content,) if isinstance(content, bytes) else content:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    except BaseException:  # pieces may fail too, when they are made
        part.unlink(missing_ok=True)
        raise


def write_json(file: Path, value: Any) -> None:
    """Write indented JSON with sorted keys."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pieces = json.JSONEncoder(indent=1, sort_keys=True).iterencode(value)  # provenance names every raw file: never as one string
    write_whole(file, itertools.chain((piece.encode() for piece in pieces), (b"\n",)))


def read_json(file: Path) -> Any:
    """Read JSON; a missing or broken file is an :class:`InputError` that names it."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}); rebuild the artifact it belongs to") from error


def open_array(file: Path, shape: tuple[int, ...]) -> IO[bytes]:
    """A new ``.npy`` file of uint8, of which the header is written and the pixels are to follow.

    A mapped array would hold every page that was written until the file is closed.
    """
    from numpy.lib import format as npy

    stream = file.open("wb")
    npy.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return stream


def publish(part_dir: Path, out_dir: Path) -> None:
    """Move a finished folder into place: fsync its files, rename, fsync the parent."""
    for file in sorted(part_dir.rglob("*")):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    old = out_dir.with_name(f".{out_dir.name}.old")  # one name: what a process killed here left goes with the next
    shutil.rmtree(old, ignore_errors=True)
    if out_dir.exists():
        out_dir.rename(old)
    part_dir.rename(out_dir)
    sync_folder(out_dir.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def exclusive(file: Path, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold an advisory lock that dies with the process.

    Args:
        file: the lock; it holds the pid and host of the last process that had it.
        wait: told who holds the lock before waiting for it; without it a held lock is an error.

    Raises:
        InputError: another process holds it and ``wait`` is not given; names its pid and host.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            holder = f"in use by {stream.read().strip() or 'another process'}"
            if wait is None:
                raise InputError(f"{file}: {holder}; wait for it or stop it") from None
            wait(holder)
            fcntl.flock(stream, fcntl.LOCK_EX)
        stream.truncate(0)
        stream.write(f"pid {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        yield
