"""Cancelled or killed, whoever asked for a stage takes the whole process tree along: DVC, its shell, the training and what that started."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dagster as dg
import psutil
import pytest
from toy_project import REPOSITORY

from alignflow_core.errors import InputError, StageError
from pipelines import guardian, resources
from pipelines.guardian import STEPS, STOP_SECONDS

STAGE = """
import os, signal, subprocess, sys, time
from pathlib import Path

asked = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: asked.append(1))
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], start_new_session=True)  # as torchrun starts its workers
Path("pids").write_text(f"{os.getpid()} {other.pid}")
Path("pids").rename("pids.txt")
while "stubborn" in sys.argv or not asked:
    time.sleep(0.1)
time.sleep(1)  # the step at hand, and the writing of its state
Path("saved").touch()
other.kill()
sys.exit(130)
"""
CALLER = """
import signal, sys
from pathlib import Path
from pipelines.resources import run_guarded

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it, and so would all below
run_guarded(sys.argv[1:], Path("."))
"""
DVC = [sys.executable, "-m", "dvc", "repro", "--single-item", "training"]
LIMIT = 10.0


@pytest.fixture
def caller(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that has asked DVC for a stage, in its folder; the stage is running."""
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "dvc.yaml").write_text(f"stages: {{training: {{cmd: python stage.py {request.param}, outs: [out]}}}}")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "DVC_NO_ANALYTICS": "1"}
    process = subprocess.Popen([sys.executable, "-c", CALLER, *DVC], cwd=tmp_path, env=environment)
    yield process
    process.kill()
    process.wait()


def tree_below(process: "subprocess.Popen[bytes]", folder: Path) -> list[psutil.Process]:
    """Every process that the caller started, once the stage is running; the stage comes last but one."""
    until = time.monotonic() + 60
    while not (folder / "pids.txt").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    own = [psutil.Process(int(pid)) for pid in (folder / "pids.txt").read_text().split()]
    above = [each for each in psutil.Process(process.pid).children(recursive=True) if each not in own]
    assert len(above) >= 2, "at least the guardian and DVC"
    return [*above, *own]


def left_after(tree: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Who still runs then; a dead process that nobody has collected yet does not."""
    until = time.monotonic() + seconds
    while (left := [each for each in tree if running(each)]) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_steps_fit_into_the_time() -> None:
    assert sum(seconds for _, seconds in STEPS) <= STOP_SECONDS < LIMIT


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.nightly), signal.SIGKILL])
@pytest.mark.parametrize("caller", ["saving"], indirect=True)
def test_a_training_saves_its_state_and_is_gone(caller: "subprocess.Popen[bytes]", tmp_path: Path, number: int) -> None:
    tree = tree_below(caller, tmp_path)
    started = time.monotonic()
    caller.send_signal(number)
    assert left_after(tree, LIMIT) == []
    assert (tmp_path / "saved").exists()
    assert time.monotonic() - started < STEPS[0][1], "it left on the interrupt, not later"


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.nightly), signal.SIGKILL])
@pytest.mark.parametrize("caller", ["stubborn"], indirect=True)
def test_what_ignores_signals_is_killed_in_time(caller: "subprocess.Popen[bytes]", tmp_path: Path, number: int) -> None:
    tree = tree_below(caller, tmp_path)
    caller.send_signal(number)
    assert left_after(tree, LIMIT) == []
    assert not (tmp_path / "saved").exists()
    caller.wait(5)


@pytest.mark.nightly
@pytest.mark.parametrize("caller", ["saving"], indirect=True)
def test_a_second_interrupt_leaves_nothing_either(caller: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    tree = tree_below(caller, tmp_path)
    caller.send_signal(signal.SIGINT)
    time.sleep(0.4)
    caller.send_signal(signal.SIGINT)
    caller.wait(5)
    assert left_after(tree, LIMIT) == []
    assert (tmp_path / "saved").exists()


@pytest.mark.nightly
@pytest.mark.parametrize("caller", ["stubborn"], indirect=True)
def test_the_guardian_killed_by_hand_takes_the_training_along(caller: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    tree = tree_below(caller, tmp_path)
    next(each for each in tree if "guardian.py" in " ".join(each.cmdline())).kill()
    assert caller.wait(5) == 1
    assert left_after(tree[:-1], 2) == []  # the last has a session of its own: only the guardian knew of it
    tree[-1].kill()


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, sys; {code}"]


@pytest.mark.parametrize(("code", "kind", "says"), [
    ("print('error: a.png: broken; replace it', file=sys.stderr); print('error: b.png: empty', file=sys.stderr); sys.exit(2)", InputError,
     "a.png: broken; replace it\nb.png: empty"),
    ("print('error: filter refused all 8 pairs', file=sys.stderr); sys.exit(1)", StageError, "filter refused all 8 pairs"),
    ("sys.exit(1)", StageError, "exit code 1"),
    ("os.kill(os.getpid(), 9)", resources.TransientStageError, "was killed (SIGKILL)"),
    ("sys.exit(143)", resources.TransientStageError, "was killed (SIGTERM)"),
    ("raise MemoryError", resources.TransientStageError, "memory"),
    ("print('error: x.lock: in use by pid 7 on host; wait', file=sys.stderr); sys.exit(2)", resources.TransientStageError, "in use by pid 7"),
    ("print('ERROR: failed to run: x, exited with -9', file=sys.stderr); sys.exit(255)", resources.TransientStageError, "was killed (SIGKILL)"),
    ("print('error: bad\\nERROR: failed to run: x, exited with 2', file=sys.stderr); sys.exit(255)", InputError, "bad"),
])
def test_what_an_exit_means(tmp_path: Path, code: str, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind) as caught:
        resources.run_guarded(python(code), tmp_path)
    assert type(caught.value) is kind and says in str(caught.value)


def test_a_guardian_collects_who_was_left_to_it() -> None:
    """Run workers of a server outlive who started them, and end: nothing stays of them in the table of processes."""
    orphan = "import time\nif os.fork() == 0:\n    if os.fork() == 0:\n        time.sleep(.2)\n    os._exit(0)\nos.wait()\ntime.sleep(60)"
    command = [sys.executable, "-P", guardian.__file__, *python(orphan)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as process:
        seen: set[int] = set()
        until = time.monotonic() + 20
        while time.monotonic() < until and (len(seen) < 2 or len(psutil.Process(process.pid).children()) > 1):
            seen |= {child.pid for child in psutil.Process(process.pid).children()}
            time.sleep(0.02)
        assert len(seen) == 2 and [child.status() == psutil.STATUS_ZOMBIE for child in psutil.Process(process.pid).children()] == [False]
        resources.stop(process)


def test_what_a_command_says_is_passed_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    resources.run_guarded(python("print('step 7', file=sys.stderr)"), tmp_path)
    assert capfd.readouterr().err == "step 7\n"


def test_problems_are_told_whole_and_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = ("err = lambda text: print(text, end='', file=sys.stderr, flush=True); err('step 7\\rerr'); time.sleep(.2); err('or: 0.png: empty\\n'); "
            f"[err(f'error: {{n}}.png: broken; {'replace it ' * 9}\\n') for n in range(1, 400)]; err('an error: none\\nerror'); sys.exit(2)")
    with pytest.raises(InputError) as caught:
        resources.run_guarded(python(f"import time; {code}"), tmp_path)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [f"{n}.png" for n in range(400)], "more than the tail that is kept"
    assert capfd.readouterr().err == "step 7\ran error: none\nerror"


def test_all_threads_are_stopped_at_once_and_start_nothing_new(tmp_path: Path) -> None:
    def sleep(number: int) -> str:
        with pytest.raises(StageError) as caught:
            resources.run_guarded(python(f"import time; open('{number}', 'w').close(); time.sleep(60)"), tmp_path)
        return str(caught.value)

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(sleep, number) for number in range(2)]
        until = time.monotonic() + 30
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        try:
            resources.stop_all()
            assert all("was stopped" in future.result(1) for future in running)
            assert "was stopped" in pool.submit(sleep, 2).result(LIMIT), "a failure of its own would be tried again"
        finally:
            resources.STOPPING.clear()
    assert not resources.RUNNING


def test_runs_whose_process_is_gone_are_failed_and_others_left() -> None:
    gone, here = f"{socket.gethostname()} {2 ** 22 + 1} 0", resources.this_process()
    with dg.DagsterInstance.ephemeral() as instance:
        job = dg.JobDefinition(name="j", graph_def=dg.GraphDefinition("g"))
        tags = {"dead": gone, "alive": here, "elsewhere": "otherhost 1 0", "untagged": ""}
        runs = {name: instance.create_run_for_job(job, tags={resources.PROCESS_TAG: tag} if tag else {}, status=dg.DagsterRunStatus.STARTED)
                for name, tag in tags.items()}
        resources.fail_dead_runs(instance)
        states = {name: instance.get_run_by_id(run.run_id).status for name, run in runs.items()}
    assert states.pop("dead") == dg.DagsterRunStatus.FAILURE
    assert set(states.values()) == {dg.DagsterRunStatus.STARTED}


SERVER = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(120)']); time.sleep(120)"
SERVING = """
import os, sys, time
from pathlib import Path
from pipelines.ui import start_guarded, stop

with open("log", "w") as log:
    process = start_guarded(["server"], Path("."), os.environ, log)
    sys.stdin.read()
    stop(process)
"""


@pytest.mark.parametrize("killed", [True, False])
def test_a_server_goes_with_the_interface(tmp_path: Path, killed: bool) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    serving = subprocess.Popen([sys.executable, "-c", SERVING], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stdin=subprocess.PIPE)
    try:
        until = time.monotonic() + 60
        while len(tree := psutil.Process(serving.pid).children(recursive=True)) < 3:
            assert serving.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        if killed:
            serving.kill()
        else:
            serving.communicate()
        assert left_after(tree, LIMIT) == []
    finally:
        serving.kill()
        serving.wait()
