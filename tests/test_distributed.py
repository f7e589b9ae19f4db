"""A stage on two processes that torchrun started: the numbers of one, files written once, one message when it fails."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from toy_project import REPOSITORY, calls, copied

from alignflow_core import distributed
from alignflow_core.artifact import read_json, tree_hash
from alignflow_core.checkpoint import load_tensors
from alignflow_core.config import Times
from alignflow_core.flow.loss import flow_matching_loss
from alignflow_core.runner import run_stage
from alignflow_core.seeding import generator
from alignflow_core.state import load_state, states
from pipelines.compose import write_params

STEPS, STATE = 60, Path(".alignflow", "work", "image_flow", "state.safetensors")
# Two channels a group: with one a group norm would cancel biases before it, and AdamW would turn the rounding in their gradients into steps.
SETTINGS = ["profile=smoke", "image_flow.coupling=minibatch_ot", "image_flow.training.batch=8", f"image_flow.training.steps={STEPS}",
            "image_flow.training.save_every=10", "image_flow.network.norm_groups=4"]


@pytest.mark.parametrize("coupling", ["independent", "minibatch_ot"])
def test_the_mean_over_all_parts_is_the_loss_of_the_batch(coupling: str) -> None:
    x1, cond = torch.randn(2, 8, 3, 6, 6, generator=generator("data"))
    model = torch.nn.Conv2d(3, 3, 1)

    @torch.no_grad()
    def loss(rows: slice) -> float:
        velocity = lambda x_t, t, c: model(x_t) + c * t.view(-1, 1, 1, 1)  # noqa: E731
        return float(flow_matching_loss(velocity, x1, cond, Times(), generator("step"), coupling, 0.3, rows))

    parts = [loss(slice(start, start + 2)) for start in range(0, 8, 2)]
    assert sum(parts) / 4 == pytest.approx(loss(slice(None)), rel=1e-6)
    assert max(parts) > min(parts)


def test_a_process_alone_is_untouched() -> None:
    model, numbers = torch.nn.Linear(1, 1), {"loss": 1.5}
    assert distributed.together(model, torch.device("cpu")) is model
    assert distributed.mean(numbers) is numbers and distributed.largest(3) == 3
    assert distributed.leads() and distributed.own_rows(7) == slice(None) and distributed.local_rank() is None


def test_half_an_environment_is_named(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "MASTER_ADDR")} | {"WORLD_SIZE": "2"}
    done = subprocess.run([sys.executable, "-m", "alignflow_core", "stage", "image_flow"], cwd=REPOSITORY, env=environment, capture_output=True,
                          text=True, timeout=120, check=False)
    assert done.returncode == 2 and "RANK" in done.stderr and "torchrun" in done.stderr and done.stderr.count("\n") == 1


def torchrun(root: Path, *program: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Two processes of a Python program, in a project."""
    variables = os.environ | {"PYTHONPATH": str(REPOSITORY), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"} | (environment or {})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    return subprocess.Popen(command, cwd=root, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what went to stderr."""
    try:
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, said


STAGE = ("-m", "alignflow_core", "stage", "image_flow")


@pytest.fixture(scope="module")
def source_only(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes projects that have the source's splits and nothing else."""
    first = tmp_path_factory.mktemp("distributed") / "first"
    shutil.copytree(phantom_root / "data", first / "data")
    write_params(first / "params.yaml", SETTINGS)
    run_stage(first, "data", "standard", quiet=True)

    def make(folder: Path, *overrides: str) -> Path:
        root = shutil.copytree(first, folder)
        write_params(root / "params.yaml", [*SETTINGS, *overrides])
        return root

    return make


@pytest.fixture(scope="module")
def by_two(source_only: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1, trained by two processes."""
    root = source_only(tmp_path_factory.mktemp("two") / "two")
    code, said = finish(torchrun(root, *STAGE))
    assert code == 0, said
    assert said.count("built") == 1
    return root


@pytest.mark.nightly
def test_two_processes_equal_one(source_only: Callable[..., Path], by_two: Path, tmp_path: Path) -> None:
    alone = source_only(tmp_path / "one")
    run_stage(alone, "image_flow", quiet=True)
    one, two = (root / "artifacts" / "image_flow" for root in (alone, by_two))
    expected, found = (load_tensors(folder / "weights.safetensors") for folder in (one, two))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    curves = [pd.read_parquet(folder / "curves.parquet") for folder in (one, two)]
    assert curves[0][["step", "metric"]].equals(curves[1][["step", "metric"]]), "every step is logged once"
    assert (curves[0]["value"] - curves[1]["value"]).abs().max() < 1e-5
    assert read_json(one / "metrics.json") == pytest.approx(read_json(two / "metrics.json"), abs=1e-5)
    provenance = [read_json(root / "artifacts" / "image_flow.json") for root in (alone, by_two)]
    assert provenance[0]["fingerprint"] == provenance[1]["fingerprint"]


@pytest.mark.nightly
def test_what_is_up_to_date_is_left_alone(by_two: Path) -> None:
    before = (by_two / "artifacts" / "image_flow.json").stat().st_mtime_ns
    code, said = finish(torchrun(by_two, *STAGE))
    assert code == 0 and said.count("up to date") == 1
    assert (by_two / "artifacts" / "image_flow.json").stat().st_mtime_ns == before


@pytest.mark.nightly
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_and_resumed_is_byte_equal(source_only: Callable[..., Path], by_two: Path, tmp_path: Path, number: signal.Signals) -> None:
    root = source_only(tmp_path / "stopped")
    process = torchrun(root, *STAGE)
    while not states(root / STATE) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    code, said = finish(process)
    assert code != 0 and said.count("interrupted; the same command continues") == (number == signal.SIGINT), said
    done = int(load_state(root / STATE)["done"][0])
    assert 0 < done < STEPS and not (root / "artifacts" / "image_flow").exists()
    code, said = finish(torchrun(root, *STAGE))
    assert code == 0, said
    assert tree_hash(root / "artifacts" / "image_flow") == tree_hash(by_two / "artifacts" / "image_flow")


FAILING = """
import os, sys
from alignflow_core import __main__, image_flow
from alignflow_core.errors import StageError
loss, calls = image_flow.flow_matching_loss, []

def failing(*arguments, **named):
    calls.append(1)
    if len(calls) == 12 and os.environ["RANK"] == "1":
        if sys.argv[1] == "raise":
            raise StageError("out of luck")
        return loss(*arguments, **named) * float("nan")
    return loss(*arguments, **named)

image_flow.flow_matching_loss = failing
sys.exit(__main__.main(["stage", "image_flow"]))
"""


@pytest.mark.nightly
@pytest.mark.parametrize(("how", "message"), [("raise", "error: out of luck"), ("nan", "error: step 11: loss, gradient norm not finite")])
def test_an_error_on_one_rank_ends_both_with_one_message(source_only: Callable[..., Path], tmp_path: Path, how: str, message: str) -> None:
    root = source_only(tmp_path / "failing")
    (root / "failing.py").write_text(FAILING)
    code, said = finish(torchrun(root, "failing.py", how))
    ours = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code != 0 and len(ours) == 1 and ours[0].startswith(message), said
    assert int(load_state(root / STATE)["done"][0]) == 10, "the last state is kept"
    assert not list((root / "artifacts").glob("*image_flow*"))


@pytest.mark.nightly
def test_a_batch_that_cannot_be_shared_is_refused(source_only: Callable[..., Path], tmp_path: Path) -> None:
    root = source_only(tmp_path / "odd", "image_flow.training.batch=7")
    code, said = finish(torchrun(root, *STAGE))
    assert code != 0 and said.count("error: training.batch: 7 images cannot be shared evenly by 2 processes") == 1


@pytest.mark.nightly
def test_a_stage_without_joint_training_runs_once(built_toy: Path, tmp_path: Path) -> None:
    root = copied(built_toy, tmp_path)
    shutil.rmtree(root / "artifacts" / "align" / "dim")
    code, said = finish(torchrun(root, "-m", "alignflow_core", "stage", "align", "--target", "dim",
                                 environment={"PYTHONPATH": os.pathsep.join([str(root), str(REPOSITORY)])}))
    assert code == 0 and said.count("built") == 1, said
    assert calls(root) == {"align@dim": 1}
