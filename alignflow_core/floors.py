"""The oldest versions that may touch images, weights or servers: below them are holes that are known and mended. Standard library only."""

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from alignflow_core.errors import InputError

FLOORS = {
    "torch": "2.11",  # loads of weights that ran code (CVE-2025-32434, CVE-2026-24747)
    "monai": "1.6.1",
    "mlflow": "3.17.2",
    "pillow": "13.0",  # decodes whatever it is given
    "hydra-core": "1.3.7",  # _target_ from files (GHSA-37p2-j732-x8pj, CVE-2026-106439)
    "safetensors": "0.8",
}


def below(installed: str, floor: str) -> bool:
    """Whether a version is older than another, by its numbers: ``2.13.0+cpu``, ``1.4.0rc3``."""
    return _numbers(installed) < _numbers(floor)


def _numbers(text: str) -> tuple[int, ...]:
    release = re.match(r"\d+(\.\d+)*", text)
    found = [int(part) for part in release.group().split(".")] if release else []
    return tuple([*found, 0, 0, 0, 0][:4])


@cache
def refuse_old_packages() -> None:
    """Stop where an installed package is below its floor; what is not installed is not asked for here.

    Raises:
        InputError: one line a package.
    """
    problems = []
    for name, floor in FLOORS.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if below(installed, floor):
            problems.append(f"{name} {installed}: older than {floor}, below which it is not safe with files from others; run 'make setup', or "
                            f"install '{name}>={floor}'")
    if problems:
        raise InputError(*problems)
