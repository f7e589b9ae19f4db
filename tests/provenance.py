"""Provenance of artifacts that a test has put down by hand."""

from pathlib import Path

from alignflow_core.artifact import write_json
from alignflow_core.config import load_project
from alignflow_core.runner import provenance_file
from alignflow_core.stages import node_id


def of_one_piece(root: Path) -> None:
    """As if every artifact of the project had been built from those that lie there; contents are named after their node."""
    graph = load_project(root / "params.yaml").graph
    for stage, key in graph.nodes():
        inputs = {name: node_id(*above) for name, above in graph.inputs(stage, key).items()}
        write_json(provenance_file(root, stage.name, key), {"content": node_id(stage.name, key), "inputs": inputs})


def replaced(root: Path, stage: str, key: str | None) -> None:
    """As if one artifact had been built anew since."""
    file = provenance_file(root, stage, key)
    write_json(file, {"content": "new", "inputs": {}})
