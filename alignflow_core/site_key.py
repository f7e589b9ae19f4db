"""Names that leave no name: file names and patients' groups become keyed hashes (HMAC-SHA-256) before they are written anywhere.

An unkeyed hash of a name can be undone by hashing a list of names; without the key of the site this cannot. The key is one file for all
projects of a user, outside of every project, so that runs can be compared and no copy of a project carries it. It is made when first
needed. It decides ids, and the noise of a privacy budget (``reward/private.py``): no split, order or other number depends on it, and another
key makes no artifact stale.
"""

import hashlib
import hmac
import os
import secrets
from functools import cache
from pathlib import Path

from alignflow_core.errors import InputError

VARIABLE = "ALIGNFLOW_SITE_KEY_FILE"
PLACES = (VARIABLE, "XDG_CONFIG_HOME", "HOME")  # what the key's place depends on: a path for each of many names would cost more than its hash
LEAST_BYTES = 32


def key_file() -> Path:
    """``$ALIGNFLOW_SITE_KEY_FILE``, or ``alignflow/site.key`` in the user's configuration folder."""
    given = os.environ.get(VARIABLE)
    return Path(given) if given else Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "alignflow" / "site.key"


def pseudonym(kind: str, name: str, length: int = 16) -> str:
    """Keyed hash of a name, hexadecimal; ``kind`` keeps equal names of different things apart."""
    return hmac.new(_key(*map(os.environ.get, PLACES)), f"{kind}\0{name}".encode(errors="surrogateescape"), hashlib.sha256).hexdigest()[:length]


def key_check() -> str:
    """What tells two keys apart and says nothing about either."""
    return pseudonym("key", "check", 8)


@cache
def _key(*_: str | None) -> bytes:
    """Read the key that goes with these values of :data:`PLACES`, made first if there is none.

    Raises:
        InputError: it cannot be read or made, others may read it, or it is too short.
    """
    file = key_file()
    try:
        if not file.exists():
            _make(file)
        mode, key = file.stat().st_mode, bytes.fromhex(file.read_text(encoding="ascii").strip())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: no readable site key ({error}); name a file of hexadecimal digits in {VARIABLE}, "
                         "or remove this one to make a new one") from error
    if mode & 0o077:
        raise InputError(f"{file}: the site key may be read by others; run 'chmod 600' on it")
    if len(key) < LEAST_BYTES:
        raise InputError(f"{file}: holds {len(key)} bytes, a site key has at least {LEAST_BYTES}; remove it to make a new one")
    return key


def _make(file: Path) -> None:
    """A new random key that appears whole; of several processes one makes it and the others take it."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as stream:
            stream.write(secrets.token_hex(LEAST_BYTES) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.link(part, file)
    except FileExistsError:
        pass
    finally:
        part.unlink(missing_ok=True)
