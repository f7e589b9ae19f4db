"""Hydra groups -> ``params.yaml``: the only place that knows Hydra, called once in a command."""

import dataclasses
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from alignflow_core.artifact import exclusive
from alignflow_core.config import Project, build_project, read_params
from alignflow_core.errors import InputError
from alignflow_core.validation import nearest

CONF_DIR = Path(__file__).parent / "conf"
GROUPS = ("profile", "task", "reward", "encoder", "comparators")
EXPERIMENT_KEYS = ("reward", "encoder")  # of a whole project, see alignflow_core/config.py
RUN_LOCK = ".alignflow/locks/run.lock"  # of a command that builds a whole project in its own processes (``local.run_all``)
TARGET_DEFAULTS = ("align", "references")  # top-level sections that every target starts from


def options(group: str) -> tuple[str, ...]:
    """Names a group can take: ``options("task") == ("binary", "labels", "phantom", "refuge")``."""
    return tuple(sorted(file.stem for file in (CONF_DIR / group).glob("*.yaml")))


def compose(overrides: Sequence[str] = (), layout: dict[str, Any] | None = None) -> dict[str, Any]:
    """The configuration of a whole project as plain data, validated and with every default filled in.

    Args:
        overrides: ``group=name`` (profile=cpu) or ``dotted.key=value`` (align.rho=2, targets.dim.references.count=5,
            targets.dim=null leaves that target out).
        layout: ``source``, ``domains`` and ``targets`` of a project of one's own, beneath the overrides.

    Raises:
        InputError: unknown key, group, name or value, with the nearest valid one.
    """
    raw = _hydra(_normalised(overrides))
    wrong = [f"configuration: {key}: must be a section, got {raw[key]!r}" for key in ("domains", "targets", *TARGET_DEFAULTS)
             if not isinstance(raw.get(key, {}), dict)]
    if wrong:
        raise InputError(*wrong)
    given = {name: target for name, target in raw.pop("targets", {}).items() if target is not None}
    if layout:
        raw = merged(layout, raw)
        given = merged(layout["targets"], given)
    elif "source" not in raw:
        raise InputError("configuration: this task brings no data of its own; use 'alignflow run' with your folders, or add "
                         "source=NAME domains.NAME.dir=DIR for each domain and targets.NAME.domain=NAME for each target")
    defaults = {section: raw.pop(section, {}) for section in TARGET_DEFAULTS}
    raw["targets"] = {name: merged(defaults, target) if isinstance(target, dict) else target for name, target in given.items()}
    used = [raw.get("source"), *(target.get("domain") for target in raw["targets"].values() if isinstance(target, dict))]
    raw["domains"] = {name: domain for name, domain in raw.get("domains", {}).items() if name in used}
    try:
        project = build_project(raw, "configuration")
    except InputError as error:
        raise InputError(*_once(error.problems, tuple(raw["targets"]))) from None
    return as_plain(project)


def render(params: dict[str, Any], overrides: Sequence[str] = ()) -> str:
    """The text of ``params.yaml``; its first line says what it was composed from."""
    origin = f"# Composed by alignflow from pipelines/conf; overrides: {shlex.join(overrides) or 'none'}\n"
    return origin + yaml.safe_dump(params, sort_keys=False, default_flow_style=None, width=150, allow_unicode=True)


def write_params(file: Path, overrides: Sequence[str] = (), layout: dict[str, Any] | None = None) -> dict[str, Any]:
    """Recompose, then write ``params.yaml`` by rename; nothing is written when the configuration is wrong."""
    params = recompose(file, overrides, layout)
    _refuse_while_built(file)
    write_text(file, render(params, overrides))
    return params


def _refuse_while_built(file: Path) -> None:
    """Each stage reads ``params.yaml`` when it begins: a run whose settings change on the way would mix two configurations.

    Raises:
        InputError: a command is building this project.
    """
    lock = file.parent / RUN_LOCK
    if lock.exists():
        with exclusive(lock):
            pass


def recompose(file: Path, overrides: Sequence[str] = (), layout: dict[str, Any] | None = None) -> dict[str, Any]:
    """Compose, and keep the variants that ``params.yaml`` has, each as what it changes of its base: a command given again loses none.

    Raises:
        InputError: wrong configuration, or ``params.yaml`` has domains or targets that would be lost.
    """
    params = compose(overrides, layout)
    now, targets = _entries(file, "targets"), params["targets"]
    refuse_to_lose(file, params)
    for name, target in now.items():
        base = target.get("variant_of")
        if name not in targets and base in targets and base in now:
            targets[name] = merged(targets[base], _changes(now[base], target))
    lost = [name for name in now if name not in targets]
    if lost:
        raise InputError(f"{file}: has the targets {', '.join(lost)}, which this command would drop; give it the options of the first time, take "
                         "them out with 'alignflow target remove', or choose another folder")
    return as_plain(build_project(params, str(file)))


def refuse_to_lose(file: Path, params: dict[str, Any]) -> list[str]:
    """Targets of ``params.yaml`` that these params would drop; none where it cannot be read.

    Raises:
        InputError: it has domains of its own, which nothing but that file knows.
    """
    built_in = yaml.safe_load((CONF_DIR / "task" / "phantom.yaml").read_text(encoding="utf-8"))["domains"]  # profiles take some of them
    known, own = ({name: {"labelled": True} | domain for name, domain in domains.items()}
                  for domains in (built_in | params["domains"], _entries(file, "domains")))
    lost = [name for name in own if own[name] != known.get(name)]
    if lost:
        raise InputError(f"{file}: has the domains {', '.join(lost)}, which composing it anew would drop; edit that file, move it away first, or "
                         "choose another folder")
    return [name for name in _entries(file, "targets") if name not in params["targets"]]


def _entries(file: Path, section: str) -> dict[str, Any]:
    """Sections below ``domains`` or ``targets`` of ``params.yaml``; none where it cannot be read, for then writing it anew is the remedy."""
    try:
        entries = read_params(file).get(section)
    except InputError:
        return {}
    return {str(name): entry for name, entry in entries.items() if isinstance(entry, dict)} if isinstance(entries, dict) else {}


def rewrite_params(file: Path, params: dict[str, Any], origin: str) -> None:
    """Validate changed params and write them in place of the old, keeping the line that says what these were composed from.

    Raises:
        InputError: they are wrong, ``origin`` being named; nothing is written then.
    """
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    build_project(params, origin)
    own = {key: params.get(key) for key in EXPERIMENT_KEYS}  # stand in for the targets' own values, which must not be lost
    plain = as_plain(build_project(params | dict.fromkeys(EXPERIMENT_KEYS), origin)) | own
    text = render(plain).partition("\n")[2]
    _refuse_while_built(file)
    write_text(file, f"{first}\n{text}" if first.startswith("#") else text)


def write_text(file: Path, text: str) -> None:
    """Write by rename, so that a reader never sees half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``base``, section by section; neither is changed."""
    both = {key: merged(base[key], over[key]) for key in base.keys() & over.keys() if isinstance(base[key], dict) and isinstance(over[key], dict)}
    return base | over | both


def _changes(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """What ``over`` has otherwise than ``base``: merged into that it gives ``over`` again."""
    return {key: _changes(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
            for key, value in over.items() if key not in base or value != base[key]}


def _normalised(overrides: Iterable[str]) -> list[str]:
    """Overrides in Hydra's grammar, where a value that no file mentions needs ``++``; unknown names are left to the validation."""
    problems, found = [], []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w.@+-]*", key):
            problems.append(f"'{override}': not key=value; write for instance profile=cpu or align.rho=2")
        elif key.partition(".")[0] == "hydra":  # Hydra would take it for a setting of its own, and nothing would come of it
            problems.append(f"{override}: unknown key; leave it out, params.yaml has no settings of Hydra")
        elif key in GROUPS and value not in options(key):
            problems.append(f"{override}: unknown {key} '{value}'{nearest(value, options(key))}")
        else:
            found.append(override if key in GROUPS else f"++{override}")
    if problems:
        raise InputError(*problems)
    return found


def _hydra(overrides: list[str]) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(CONF_DIR)):
            plain = cast(dict[str, Any], OmegaConf.to_container(hydra_compose("config", overrides), resolve=True))
    except (HydraException, OmegaConfBaseException) as error:
        reason = " ".join(str(error).replace("++", "").partition("See https")[0].split())
        raise InputError(f"configuration: {reason}; quote values with special characters: \"key='value'\"") from error
    return plain


def _once(problems: Sequence[str], targets: tuple[str, ...]) -> list[str]:
    """A problem that every target has stems from a default section: say it once, of that section."""
    pattern = re.compile(rf"targets\.(?:{'|'.join(map(re.escape, targets))})\.({'|'.join(TARGET_DEFAULTS)})\b")
    general = [pattern.sub(r"\1", problem) for problem in problems]
    return list(dict.fromkeys(g if general.count(g) == len(targets) else p for p, g in zip(problems, general, strict=True)))


def as_plain(project: Project) -> dict[str, Any]:
    """A project as ``params.yaml`` holds it, every default filled in."""
    return cast(dict[str, Any], _plain(dataclasses.asdict(project)))


def _plain(value: Any) -> Any:
    """Tuples to lists, as YAML reads them back."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
