"""Whether artifacts that lie side by side were made from each other: a run that was stopped may have new ones beside old ones."""

from functools import cache
from pathlib import Path
from typing import Any

from alignflow_core.artifact import read_json
from alignflow_core.config import Project
from alignflow_core.runner import provenance_file
from alignflow_core.stages import STAGES
from pipelines.versions import NodeName


def of_one_piece(root: Path, project: Project, node: NodeName) -> bool:
    """Whether an artifact and everything upstream of it is built, and lies on disk as it was read."""
    @cache
    def made(stage: str, key: str | None) -> Any:
        file = provenance_file(root, stage, key)
        return read_json(file) if file.exists() else None

    @cache
    def whole(stage: str, key: str | None) -> bool:
        own = made(stage, key)
        return own is not None and all(whole(*above) and made(*above)["content"] == own["inputs"].get(name)
                                       for name, above in project.graph.inputs(STAGES[stage], key).items())

    return whole(*node)
