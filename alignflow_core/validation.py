"""Plain data -> frozen dataclasses, with every problem named by its dotted key; and the checks their fields use."""

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from typing import Any

from alignflow_core.errors import InputError


def build(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """Turn plain data into ``kind`` (a dataclass, or a type its fields may have); problems are collected, not raised one by one."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            problems.append(f"{where or 'top level'}: must be a section, got {value!r}")
            return None
        hints = typing.get_type_hints(kind)
        prefix = f"{where}." if where else ""
        problems += [f"{prefix}{key}: unknown key{nearest(str(key), hints)}" for key in value if key not in hints]
        problems += [f"{prefix}{f.name}: missing" for f in dataclasses.fields(kind)
                     if f.name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
        before = len(problems)
        parts = {key: build(hints[key], value[key], prefix + key, problems) for key in hints if key in value}
        if len(problems) > before or any(p.startswith(prefix) and p.endswith(": missing") for p in problems):
            return None
        try:
            return kind(**parts)
        except InputError as error:
            problems += [f"{p} (in {where})" if where else p for p in error.problems]
            return None
    if origin is types.UnionType:
        if value is None and type(None) in args:
            return None
        return build(next(a for a in args if a is not type(None)), value, where, problems)
    if origin is tuple and isinstance(value, list | tuple):
        each = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(each) == len(value):
            return tuple(build(a, v, f"{where}[{i}]", problems) for i, (a, v) in enumerate(zip(each, value, strict=True)))
    elif origin is dict and isinstance(value, dict):
        return {build(args[0], k, where, problems): build(args[1], v, f"{where}.{k}", problems) for k, v in value.items()}
    elif kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):  # YAML 1.1 reads 1e-3 as text
        with contextlib.suppress(ValueError, OverflowError):
            if math.isfinite(number := float(value)):
                return number
    elif kind in (int, bool, str) and type(value) is kind:
        return value
    problems.append(f"{where}: must be {getattr(kind, '__name__', str(kind))}, got {value!r}")
    return None


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` or the list of valid names."""
    names = list(names)
    close = difflib.get_close_matches(name, names, 1)
    return f" (did you mean '{close[0]}'?)" if close else f" (valid: {', '.join(names)})"


def one_of(key: str, value: str, valid: typing.Collection[str]) -> None:
    """Refuse a value outside ``valid``."""
    if value not in valid:
        raise InputError(f"{key}: unknown value '{value}'{nearest(value, valid)}")


def at_least(key: str, value: float, low: float) -> None:
    """Refuse a value below ``low``."""
    if value < low:
        raise InputError(f"{key}: must be at least {low}, got {value}")


def positive(key: str, value: float) -> None:
    """Refuse zero and below."""
    if not value > 0:
        raise InputError(f"{key}: must be above 0, got {value}")


def between(key: str, value: float, low: float, high: float) -> None:
    """Refuse a value outside [low, high]."""
    if not low <= value <= high:
        raise InputError(f"{key}: must lie in [{low}, {high}], got {value}")
