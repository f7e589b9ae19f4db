"""``dvc.lock``, stage by stage: the file grows with the project, but a command is about one stage of it.

DVC writes it with two spaces a level and nothing else, so that a stage's entry is found by its indentation, without a parser.
"""

import re
from typing import Any

STAGES = re.compile(r"^stages:\n(?:(?:  .*)?\n)*", re.M)
ENTRY = r"^  {}:\n(?:(?:    .*)?\n)*"


def span(text: str, name: str) -> tuple[int, int] | None:
    """Where the entry of a stage such as ``align@amber`` stands in the text of a lock, name included; ``None`` where there is none."""
    section = STAGES.search(text)
    found = section and re.compile(ENTRY.format(re.escape(name)), re.M).search(text, *section.span())
    return found.span() if found else None


def entry(text: str, name: str) -> dict[str, Any]:
    """What the lock says of a stage: ``cmd``, ``deps``, ``params``, ``outs``; nothing where it has no entry, or only its beginning.

    Raises:
        YAMLError: the entry is no YAML, being written at this moment for instance.
    """
    from alignflow_core.config import parse_yaml

    found = span(text, name)
    said = parse_yaml(text[slice(*found)])[name] if found else None
    return said if isinstance(said, dict) else {}


def replaced(text: str, entries: dict[str, str]) -> str | None:
    """The text with these stages' entries (as they are written under ``stages:``) in place of theirs, new ones at the end of the stages.

    Returns:
        ``None`` where the text has no stages, or not in DVC's way of writing.
    """
    for name, new in entries.items():
        section = STAGES.search(text)
        if section is None:
            return None
        start, end = span(text, name) or (section.end(), section.end())
        text = text[:start] + new + text[end:]
    return text
