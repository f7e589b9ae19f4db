"""Stages side by side: order, failures, and nobody left behind by an interrupt or a kill."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from alignflow_core.config import load_project
from alignflow_core.errors import InputError, StageError
from alignflow_core.stages import STAGES, node_id
from pipelines.compose import write_params
from pipelines.plan import Node
from pipelines.workers import STOP_SECONDS, build_side_by_side, default_jobs

LONG = ["profile=smoke", "image_flow.training.steps=1000000", "image_flow.training.save_every=1000000"]
FEW: list[Node] = [(STAGES["data"], "standard"), (STAGES["data"], "amber"), (STAGES["references"], "amber"), (STAGES["data"], "violet")]


def build(root: Path, nodes: list[Node], quiet: bool = True) -> list[str]:
    project = load_project(root / "params.yaml")
    built: list[str] = []
    few: Any = SimpleNamespace(graph=SimpleNamespace(nodes=lambda: nodes, inputs=project.graph.inputs))
    build_side_by_side(root, few, 2, quiet, lambda node, ran, seconds: built.append(node_id(node[0].name, node[1])) if ran and seconds > 0 else None)
    return built


@pytest.fixture
def root(phantom_root: Path, tmp_path: Path) -> Path:
    shutil.copytree(phantom_root / "data", tmp_path / "data")
    write_params(tmp_path / "params.yaml", LONG)
    return tmp_path


def test_a_stage_follows_what_it_reads_and_nothing_is_built_twice(root: Path) -> None:
    built = build(root, FEW)
    assert sorted(built) == sorted(node_id(stage.name, key) for stage, key in FEW)
    assert built.index("data@amber") < built.index("references@amber")
    assert build(root, FEW) == []


def test_bad_input_is_told_whole_and_what_ran_beside_it_is_kept(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("amber", "violet"):
        broken = sorted((root / "data" / "target" / name / "images").iterdir())[0]
        broken.write_bytes(b"no image")
    with pytest.raises(InputError) as error:
        build(root, [FEW[1], FEW[3], FEW[0], FEW[2]], quiet=False)
    assert all("/images/" in problem for problem in error.value.problems) and 1 <= len(error.value.problems) <= 2
    assert not (root / "artifacts" / "references").exists()
    (root / "data" / "target" / "amber").rename(root / "data" / "target" / "gone")
    with pytest.raises(InputError, match="no such folder"):
        build(root, FEW)
    assert (root / "artifacts" / "data" / "standard").is_dir()


def test_a_killed_process_is_a_failure_that_says_so(root: Path) -> None:
    build(root, FEW[:1])

    def kill() -> None:
        while not (root / ".alignflow" / "work" / "image_flow").is_dir():
            time.sleep(0.05)
        for child in multiprocessing.active_children():
            child.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(StageError, match="image_flow: its process was killed; free memory"):
        build(root, [FEW[0], (STAGES["image_flow"], None)])
    killer.join()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_who_asked_leaves_and_takes_the_stages_along(root: Path, number: int) -> None:
    started = subprocess.Popen([sys.executable, "-c", "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
                                "from pipelines.cli import main; sys.exit(main(sys.argv[1:]))", "demo", "--out", str(root), "--jobs", "2", *LONG],
                               stderr=subprocess.PIPE, text=True)
    assert started.stderr is not None
    for line in started.stderr:  # progress of the training: its loop has begun
        if line.startswith("image_flow: "):
            break
    tree = psutil.Process(started.pid).children(recursive=True)
    assert len(tree) >= 2
    started.send_signal(number)
    _, alive = psutil.wait_procs(tree, STOP_SECONDS + 5)
    assert not alive
    assert started.wait(5) == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}[number]
    started.stderr.close()
    assert not (root / "artifacts" / "image_flow").exists()
    assert list((root / ".alignflow" / "work" / "image_flow").glob("*.safetensors")), "the training's state was saved"


@pytest.mark.parametrize(("cores", "jobs"), [(8, 4), (1, 1), (None, 1)])
def test_jobs_where_the_system_does_not_say_which_cores_are_ours(monkeypatch: pytest.MonkeyPatch, cores: int | None, jobs: int) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    project: Any = SimpleNamespace(machine=SimpleNamespace(threads=2))
    assert default_jobs(project) == jobs
