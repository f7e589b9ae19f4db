"""Whether artifacts that lie side by side were made from each other: a run that was stopped may have new ones beside old ones."""

from pathlib import Path

from alignflow_core.artifact import read_json
from alignflow_core.config import Project
from alignflow_core.runner import provenance_file
from alignflow_core.stages import STAGES
from pipelines.versions import NodeName


def of_one_piece(root: Path, project: Project, node: NodeName) -> bool:
    """Whether everything upstream of a built artifact lies on disk as it was read."""
    known: dict[NodeName, bool] = {}

    def visit(stage: str, key: str | None) -> bool:
        if (stage, key) not in known:
            read = read_json(provenance_file(root, stage, key))["inputs"]
            known[stage, key] = all(provenance_file(root, *above).exists() and read_json(provenance_file(root, *above))["content"] == read.get(name)
                                    and visit(*above) for name, above in project.graph.inputs(STAGES[stage], key).items())
        return known[stage, key]

    return visit(*node)
