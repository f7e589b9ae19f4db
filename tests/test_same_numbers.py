"""Whoever runs the stages, one process or one process each, the artifacts are the same bytes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alignflow_core.artifact import read_json
from alignflow_core.config import load_project
from alignflow_core.runner import provenance_file
from alignflow_core.stages import node_id
from pipelines.compose import write_params
from pipelines.local import run_all, write_builtin_data


@pytest.mark.nightly
def test_one_process_or_one_each_give_the_same_artifacts(tmp_path: Path) -> None:
    together, apart = tmp_path / "together", tmp_path / "apart"
    together.mkdir()
    write_params(together / "params.yaml", ["profile=smoke"])
    write_builtin_data(together)
    shutil.copytree(together, apart)
    run_all(together, quiet=True)
    nodes = list(load_project(apart / "params.yaml").graph.nodes())
    for stage, key in nodes:
        scope = [] if key is None else [f"--{stage.scope}", key]
        command = [sys.executable, "-m", "alignflow_core", "stage", stage.name, *scope, "--root", str(apart), "--quiet"]
        subprocess.run(command, check=True, timeout=300)
    differing = [node_id(stage.name, key) for stage, key in nodes
                 if read_json(provenance_file(together, stage.name, key))["content"] != read_json(provenance_file(apart, stage.name, key))["content"]]
    assert set(differing) <= {"report"}, differing  # the page prints how long each stage took
