"""Open sets: a registry maps names, as ``params.yaml`` spells them, to ``module:object`` of this package."""

import importlib
from collections.abc import Mapping
from typing import Any


def load(registry: Mapping[str, str], name: str) -> Any:
    """The object a registered name stands for."""
    module, _, attribute = registry[name].partition(":")
    return getattr(importlib.import_module(f"alignflow_core.{module}"), attribute)
