"""Ablations as targets: ``alignflow ablate`` adds variants of a target to ``params.yaml``; what they share is built once.

A variant differs from its base in one axis (or, with a grid, in one value of each): ``reward=frechet,skl`` takes the files of that Hydra
group, any other axis is a key of a target, ``references.count=1,2,5`` or ``align.rho=0.1,1``.
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from alignflow_core.config import build_project, load_project, read_params
from alignflow_core.errors import InputError
from alignflow_core.validation import nearest
from pipelines.compose import CONF_DIR, GROUPS, as_plain, merged, options, rewrite_params

TARGET_GROUPS = ("reward", "encoder")
DRAWN = ("references.count", "references.seed")  # sets of references drawn from the domain, so that all are alike but for this
# A variant needs no rivals of its own: those of its base see the same images.
ARMS = ["aligned", "aligned+filtered"]

Axis = list[tuple[str, dict[str, Any]]]  # (how a value is spelled in a target's name, what it changes)


def write_variants(root: Path, bases: Sequence[str], axes: Sequence[str], grid: bool = False) -> list[str]:
    """Add the variants to ``root/params.yaml``; names of those that were not there yet.

    Args:
        root: project root.
        bases: targets to vary; none for all that are no variants themselves.
        axes: ``key=value,value``.
        grid: every combination of the axes instead of one axis at a time.

    Raises:
        InputError: unknown target, key, group or value; nothing is written then.
    """
    file = root / "params.yaml"
    load_project(file)  # what is wrong there already is no fault of the axes
    params = read_params(file)
    targets: dict[str, Any] = params["targets"]
    unknown = [f"--target {name}: not in {file}{nearest(name, targets)}" for name in bases if name not in targets]
    if unknown:
        raise InputError(*unknown)
    parsed = [_axis(axis) for axis in axes]
    chosen = list(itertools.product(*parsed)) if grid else [(value,) for axis in parsed for value in axis]
    wanted: dict[str, Any] = {}
    for base in bases or [name for name, target in targets.items() if target.get("variant_of") is None]:
        for combination in chosen:
            variant = merged(targets[base], {"arms": ARMS, "variant_of": base})
            for _, change in combination:
                variant = merged(variant, change)
            name = "-".join([base, *(word for word, _ in combination)])
            if wanted.setdefault(name, variant) != variant:
                raise InputError(f"two variants of {base} would be named {name}; ablate one of their keys after the other, or only one")
    project = as_plain(build_project(params | {"targets": targets | wanted}, "ablate"))
    differing = [f"targets.{name}: is there already with other settings; remove it from {file} first"
                 for name in wanted if name in targets and targets[name] != project["targets"][name]]
    if differing:
        raise InputError(*differing)
    rewrite_params(file, params | {"targets": targets | wanted}, "ablate")
    return [name for name in wanted if name not in targets]


def _axis(text: str) -> Axis:
    """``reward=frechet,skl`` -> what each value changes in a target."""
    key, equals, values = text.partition("=")
    if not equals or not values:
        raise InputError(f"'{text}': not KEY=VALUE,VALUE; write for instance reward=frechet,skl or references.count=1,5,10")
    found: Axis = []
    for value in values.split(","):
        if key in GROUPS and key not in TARGET_GROUPS:
            raise InputError(f"{text}: a {key} is not a target's own; vary {' or '.join(TARGET_GROUPS)}, or a key such as align.rho")
        if key in TARGET_GROUPS:
            if value not in options(key):
                raise InputError(f"{text}: unknown {key} '{value}'{nearest(value, options(key))}")
            change = {"align": yaml.safe_load((CONF_DIR / key / f"{value}.yaml").read_text(encoding="utf-8"))}
            if key == "encoder":
                change["align"].setdefault("encoder_weights", None)
            found.append((value, change))
            continue
        change = {}
        place = change
        *path, last = key.split(".")
        for part in path:
            place[part] = place = {}
        try:
            place[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"{text}: '{value}' is no value of YAML; a list cannot be varied, for a comma parts values") from error
        if key in DRAWN:
            change["references"] |= {"dir": None, "file": None}
        word = f"{last}-{value}" if value[:1].isalpha() else f"{last}{value}"
        found.append((re.sub(r"[^A-Za-z0-9_-]+", "_", word), change))
    return found
