"""Five hospitals: one reference image replaced, rebuilt, put back; a setting, a source file, a README changed; ten at once; kills."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from test_dagster import STALE
from toy_project import built_by_dvc, calls, copied, environment, rebuilt, replace_reference, run, set_param, write_project

from alignflow_core.config import load_project
from alignflow_core.stages import artifact_dir, node_id

TARGETS = ("amber", "dim", "violet", "north", "south")
DOWNSTREAM_OF_ALIGN = ("align", "sample_aligned", "sample_paired", "filter", "privacy", "segment_aligned", "segment_filtered", "evaluate")


def alignflow(root: Path, *arguments: str) -> list[str]:
    """Lines that ``alignflow`` printed."""
    return run(root, "-m", "pipelines.cli", *arguments).splitlines()


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five targets built by ``dvc repro`` and known to Dagster and MLflow."""
    root = built_by_dvc(write_project(tmp_path_factory.mktemp("five") / "project", TARGETS))
    assert len(alignflow(root, "sync")) == 6 + 9 + 2 + 10 * len(TARGETS) - 2
    return root


def test_what_a_change_reaches(built_toy: Path, tmp_path: Path) -> None:
    """The plan alone, in the ordinary tests: nothing is built."""
    root = copied(built_toy, tmp_path)
    (root / "README.md").write_text("a comment")
    assert alignflow(root, "plan") == ["everything is up to date"]
    (root / "data/references/dim/images/9.png").write_text("one more")
    (root / "data/references/dim/images/0.png").unlink()
    named = [line.partition(": ") for line in alignflow(root, "plan")]
    assert named[0] == ("references@dim", ": ", "1 reference image added, 1 reference image removed")
    assert Counter(node for node, _, _ in named) == rebuilt("dim")


def test_stage_2_depends_on_the_guidance_of_synthesis_and_on_nothing_else_of_it(built_toy: Path, tmp_path: Path) -> None:
    for name, value, reached in (("n_pairs", 9, False), ("guidance_scale", 2.0, True)):
        root = copied(built_toy, tmp_path / name)
        set_param(root, value, "sample", name)
        plan = alignflow(root, "plan")
        assert any(line.startswith("sample_stage1:") for line in plan)
        assert [line for line in plan if line.startswith("align@dim:")] == \
            (["align@dim: sample.guidance_scale changed from 1.0 to 2.0"] if reached else [])


@pytest.mark.nightly
def test_one_reference_image_replaced_and_put_back(five: Path, tmp_path: Path) -> None:
    root = copied(five, tmp_path)
    picture = root / "data/references/violet/images/0.png"
    before = picture.read_text()
    replace_reference(root, "violet")
    named = [line.partition(": ") for line in alignflow(root, "plan")]
    assert Counter(node for node, _, _ in named) == rebuilt("violet")
    assert named[0][2] == "1 reference image replaced"
    assert run(root, "-c", STALE).split() == ["references@violet:STALE"]
    assert Counter(alignflow(root, "materialize", "--stale")) == rebuilt("violet")
    assert calls(root) == rebuilt("violet")
    assert run(root, "-c", STALE).split() == [] and "up to date" in run(root, "-m", "dvc", "status")
    picture.write_text(before)
    assert Counter(node.partition(": ")[0] for node in alignflow(root, "plan")) == rebuilt("violet")
    alignflow(root, "materialize", "--stale")
    assert calls(root) == Counter(), "DVC's run cache remembers: nothing trains"
    assert alignflow(root, "plan") == ["everything is up to date"] and run(root, "-c", STALE).split() == []


@pytest.mark.nightly
def test_a_setting_and_a_source_file(five: Path, tmp_path: Path) -> None:
    root = copied(five, tmp_path)
    set_param(root, 1.5, "targets", "south", "align", "rho")
    reached = rebuilt("south") - Counter(["references@south", "segment_baselines@south"])
    assert Counter(line.partition(": ")[0] for line in alignflow(root, "plan")) == reached
    assert alignflow(root, "plan")[0] == "align@south: targets.south.align.rho changed from 0.3 to 1.5"
    alignflow(root, "materialize", "--stale")
    assert calls(root) == reached
    with (root / "alignflow_core" / "align.py").open("a") as stream:
        stream.write("# another line\n")
    reached = Counter([*(f"{stage}@{target}" for stage in DOWNSTREAM_OF_ALIGN for target in TARGETS), "compare", "report"])
    assert Counter(line.partition(": ")[0] for line in alignflow(root, "plan")) == reached
    alignflow(root, "materialize", "--stale")
    ran = calls(root)
    assert ran == Counter(f"align@{target}" for target in TARGETS), "the aligned weights came out identical: nothing follows them"
    assert alignflow(root, "plan") == ["everything is up to date"]


@pytest.mark.nightly
def test_a_sixth_hospital(five: Path, tmp_path: Path) -> None:
    root = copied(five, tmp_path)
    run(root, "-c", "import shutil; [shutil.copytree(f'data/{k}/south', f'data/{k}/west') for k in ('target', 'references')]")
    (root / "data/target/west/images/0.png").write_text("another hospital")
    params = "from pathlib import Path; from pipelines.targets import _write; from alignflow_core.config import read_params; p = Path('.'); " \
             "q = read_params(p / 'params.yaml'); q['domains']['west'] = {'dir': 'data/target/west'}; " \
             "q['targets']['west'] = q['targets']['south'] | {'domain': 'west', 'references': {'dir': 'data/references/west'}}; _write(p, q)"
    run(root, "-c", params)  # the toy's pictures are text, which 'alignflow target add' would refuse
    stale = Counter(line.partition(": ")[0] for line in alignflow(root, "plan"))
    assert stale == rebuilt("west") + Counter(["data@west"])
    alignflow(root, "materialize", "--stale")
    assert calls(root) == stale


@pytest.mark.nightly
def test_ten_materialisations_at_once(tmp_path: Path) -> None:
    names = tuple(f"t{i}" for i in range(10))
    root = built_by_dvc(write_project(tmp_path / "project", names))
    alignflow(root, "sync")
    calls(root)
    for name in names:
        set_param(root, 1.5, "targets", name, "align", "rho")
    commands = [[sys.executable, "-m", "pipelines.cli", "materialize", "--target", name] for name in names]
    running = [subprocess.Popen(command, cwd=root, env=environment(root), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for command in commands]
    told = [process.communicate(timeout=900) for process in running]
    assert [process.returncode for process in running] == [0] * 10, [err[-2000:] for _, err in told]
    chains = [Counter(f"{stage}@{name}" for stage in DOWNSTREAM_OF_ALIGN) for name in names]
    assert [Counter(out.split()) for out, _ in told] == chains
    assert calls(root) == sum(chains, Counter())
    assert [line.partition(": ")[0] for line in alignflow(root, "plan")] == ["compare", "report"]


def contents(root: Path) -> dict[str, str]:
    """Content of every artifact."""
    return {node_id(stage.name, key): (root / artifact_dir(stage.name, key) / "given.txt").read_text()
            for stage, key in load_project(root / "params.yaml").graph.nodes()}


@pytest.mark.nightly
@pytest.mark.parametrize("command", [["-m", "dvc", "repro", "-q"], ["-m", "pipelines.cli", "materialize", "--stale"]], ids=["dvc", "worker"])
def test_killed_at_ten_moments_the_same_command_continues(built_toy: Path, tmp_path: Path, command: list[str]) -> None:
    root = copied(built_toy, tmp_path)
    set_param(root, 7, "seed")
    draw = random.Random(0)
    whole = time.monotonic()
    run(shutil.copytree(root, tmp_path / "whole", symlinks=True), *command)
    whole = time.monotonic() - whole
    for number in range(10):
        process = subprocess.Popen([sys.executable, *command], cwd=root, env=environment(root), start_new_session=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(whole * (number + draw.random()) / 10)
        except subprocess.TimeoutExpired:
            if command[1] == "dvc":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()  # what it started has to go by itself
            process.wait()
    run(root, *command)
    assert contents(root) == contents(tmp_path / "whole")
    assert alignflow(root, "plan") == ["everything is up to date"]
