"""How a stage is run on behalf of Dagster, and where Dagster keeps its records."""

import contextlib
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import psutil

from alignflow_core.artifact import exclusive
from alignflow_core.config import load_project
from alignflow_core.errors import InputError, StageError
from alignflow_core.runner import is_current, plan_stage, run_stage
from alignflow_core.stages import STAGES, node_id
from pipelines import dvcfile, guardian
from pipelines.compose import write_text
from pipelines.versions import NodeName, Versions

DVC = (sys.executable, "-m", "pipelines.dvc_command", "--wait-for-lock")
KILLED = (128 + signal.SIGKILL, 128 + signal.SIGTERM)  # by the kernel for want of memory, by a scheduler that wants the machine back
SIGNS = ("OutOfMemoryError", "MemoryError", "out of memory", "in use by pid", "is being blocked by", "Unable to acquire lock")
RUNNING: set[subprocess.Popen[bytes]] = set()
STOPPING = threading.Event()  # nothing new may start in any thread
PROCESS_TAG = "alignflow/process"
SETTINGS = Path(__file__).with_name("dagster.yaml")  # of a project that has none of its own
TAIL = 20_000  # bytes of a command's output that its failure is read from
PROBLEM = b"error: "  # begins each line of bad input or of a failure, see alignflow_core.errors.exit_code
ENDED_BY: dict[str, Exception] = {}  # node -> what ended its step in this process, with the names of files that Dagster is not told


class TransientStageError(StageError):
    """A failure that a second try may cure: the process was killed, memory ran out, a lock was held."""


class NoDvcError(InputError):
    """The project is no DVC project."""


class StageRunner(dg.ConfigurableResource):
    """Builds one artifact unless it is up to date.

    Attributes:
        root: absolute path of the project root.
        mode: ``dvc`` asks DVC, which skips what is up to date, reuses its run cache and records ``dvc.lock``;
            ``inline`` calls the stage in this process, with neither git nor DVC.
    """

    root: str
    mode: str = "dvc"

    def build(self, stage: str, key: str | None) -> None:
        """Build the artifact of one stage and key.

        Raises:
            InputError: an input is missing or refused, or ``dvc.yaml`` is out of date.
            NoDvcError: mode ``dvc`` without DVC.
            TransientStageError: it may succeed when it is tried again.
            StageError: DVC or the stage has failed; what they said is in the log.
        """
        root = Path(self.root)
        if self.mode == "inline":
            try:
                run_stage(root, stage, key)
            except Exception as error:
                if curable(f"{type(error).__name__}: {error}"):
                    raise TransientStageError(str(error)) from error
                raise
            return
        if not (root / ".dvc").is_dir():
            raise NoDvcError(f"{root}: not a DVC project; run 'git init' and 'dvc init' there, or choose the inline runner")
        plan = plan_stage(load_project(root / "params.yaml"), root, STAGES[stage], key)  # names a missing input better than DVC does
        built = is_current(root, stage, key, plan)
        if built and Versions(root).known((stage, key)):
            return  # what DVC would find out too, in a hundredth of the time
        dvcfile.refuse_outdated(root)
        repro = [*DVC, "repro", "--single-item", node_id(stage, key)]
        if built:
            commit_unrecorded(root, [(stage, key)])
        elif not (STAGES[stage].raw and (root / "data.dvc").exists()):
            run_guarded(repro, root)
        else:
            # 'repro' of a single item would leave new data without a version; and DVC gives up a commit while a stage reads what it is about
            with exclusive(root / ".alignflow" / "locks" / "data.lock", wait=lambda holder: None):
                run_guarded([*DVC, "commit", "--quiet", "--force", "data.dvc"], root)
                run_guarded(repro, root)


def commit_unrecorded(root: Path, nodes: Iterable[NodeName]) -> None:
    """Let ``dvc.lock`` name artifacts that are up to date and that it does not know: ``dvc repro`` would delete them and build them again.

    They were built without DVC, or by a run that ended before DVC wrote them down. Nothing where the project is none of DVC's, or ``dvc.yaml``
    is out of date.

    Args:
        root: project root.
        nodes: stage and key of artifacts that are up to date.
    """
    if not (root / ".dvc").is_dir() or not dvcfile.is_current(root):
        return
    versions = Versions(root)
    unknown = [node_id(*node) for node in nodes if not versions.known(node)]
    if unknown:
        run_guarded([*DVC, "commit", "--quiet", "--force", *unknown], root)


def run_guarded(command: list[str], root: Path) -> None:
    """Run a command that goes down with this process, however that ends (see :mod:`pipelines.guardian`).

    A cancelled Dagster run would otherwise leave the training behind: DVC and the shell between do not pass signals on.
    What the command says is passed on as it comes, apart from problems: these are in the error.

    Raises:
        InputError: a stage under it refused its input.
        TransientStageError: it may succeed when it is tried again.
        StageError: it ended with another exit code than 0.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # dvc.yaml says "python"
    heard, theirs = os.openpty() if os.isatty(2) else os.pipe()  # a person who watches gets more progress than a log
    with subprocess.Popen([sys.executable, "-P", guardian.__file__, *command], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                          stderr=theirs, start_new_session=True, env=os.environ | {"PATH": path, "DVC_NO_ANALYTICS": "1"}) as process:
        RUNNING.add(process)
        os.close(theirs)
        said, problems = bytearray(), list[bytes]()
        listener = threading.Thread(target=pass_on, args=(heard, said, problems), daemon=True)
        listener.start()
        try:
            if STOPPING.is_set():  # since before it was among those that run
                stop(process)
            code = process.wait()
        except BaseException:
            stop(process)
            raise
        finally:
            RUNNING.discard(process)
        if code < 0:  # the guardian itself was killed
            kill_group(process)
        listener.join(2.0)  # not for ever: something that goes on in the background may hold the other end
    if STOPPING.is_set() and code:
        raise StageError(f"'{' '.join(command[1:])}' was stopped; run it again, and it continues from its last saved state")
    if code:
        raise failure(command, code, said.decode(errors="replace"), [line.decode(errors="replace").strip() for line in problems])


def pass_on(heard: int, said: bytearray, problems: list[bytes]) -> None:
    """Write to standard error what is heard, and keep its end; lines that tell of problems are kept alone.

    They may name raw files, and Dagster keeps what a step writes.
    """
    line, passed = b"", 0  # the one at hand, and how much of it has been passed on
    with contextlib.suppress(OSError):  # so ends a terminal
        while chunk := os.read(heard, 1 << 16):
            for piece in chunk.splitlines(keepends=True):
                line += piece
                ended = line.endswith((b"\n", b"\r"))
                if not PROBLEM.startswith(line[:len(PROBLEM)]):
                    os.write(2, line[passed:])
                    said += line[passed:]
                    passed = len(line)
                elif ended:
                    problems.append(line.removeprefix(PROBLEM))
                if ended:
                    line, passed = b"", 0
            del said[:-TAIL]
    if line.startswith(PROBLEM):  # whoever was killed ended no line
        problems.append(line.removeprefix(PROBLEM))
    else:
        os.write(2, line[passed:])
    os.close(heard)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Close the guardian's standard input, on which it stops what it runs; it does so too if we are interrupted again and do not wait."""
    if process.stdin:
        process.stdin.close()
    try:
        process.wait(guardian.STOP_SECONDS)
    except subprocess.TimeoutExpired:
        kill_group(process)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left of a process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def failure(command: list[str], code: int, said: str, problems: Sequence[str]) -> InputError | StageError:
    """What a command's exit code, last words and problems mean. DVC says what its stage ended with; its own code is always 255."""
    ended = re.findall(r"exited with (-?\d+)", said)
    code = int(ended[-1]) if ended else code
    code = 128 - code if code < 0 else code
    what = f"'{' '.join(command[1:])}'"
    passing = [problem for problem in problems if curable(problem)]
    if code in KILLED:
        return TransientStageError(f"{what} was killed ({signal.Signals(code - 128).name}); free memory if there was too little. Run it again: "
                                   "it continues from its last saved state")
    if passing or curable(said):
        return TransientStageError("\n".join(passing) or f"{what} ended for want of memory or of a lock; its output says which. Run it again later")
    if problems and code != 1:  # also a code that DVC did not tell: a file that is named must not pass for a failure of the stage
        return InputError(*problems)
    return StageError("\n".join(problems) or f"{what} ended with exit code {code}; its output says why")


def curable(said: str) -> bool:
    """Whether these words tell of something that may be over by the next try: memory or a lock that others hold."""
    return any(sign in said for sign in SIGNS)


def stop_all() -> None:
    """Stop everything that threads of this process wait for, all at once, and start nothing new: an interrupt reaches the main thread alone.

    Whoever starts threads again clears :data:`STOPPING` first.
    """
    STOPPING.set()
    running = list(RUNNING)
    for process in running:
        if process.stdin:
            process.stdin.close()
    for process in running:
        stop(process)


def this_process() -> str:
    """This process as a run's tag: host, pid and start, for pids are used again."""
    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time():.0f}"


@contextlib.contextmanager
def without_file_names() -> Iterator[None]:
    """Turn an unreadable input into a failure that does not name it, as the records of Dagster must not: it may have a patient's name."""
    try:
        yield
    except OSError as error:
        raise dg.Failure(unreadable(error), allow_retries=False) from None


def unreadable(error: OSError) -> str:
    """What Dagster is told of an input that cannot be read."""
    return f"an input cannot be read ({error.strerror}); 'alignflow plan' names it"


def nameless(look: Callable[..., Any]) -> Callable[..., Any]:
    """A sensor's look whose record does not name a raw file that cannot be read: it may have a patient's name."""
    @functools.wraps(look)
    def looked(context: dg.SensorEvaluationContext) -> Any:
        try:
            return look(context)
        except OSError as error:
            return dg.SkipReason(unreadable(error))

    return looked


def fail_dead_runs(instance: dg.DagsterInstance) -> None:
    """Mark as failed what Dagster takes for running though its process on this machine is gone: nobody else does after a SIGKILL."""
    for run in instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])):
        host, _, rest = run.tags.get(PROCESS_TAG, "").partition(" ")
        if host == socket.gethostname() and not is_alive(*map(int, rest.split())):
            instance.report_run_failed(run, "Its process was killed; the same command or another run continues from what was saved last.")


def is_alive(pid: int, started: int) -> bool:
    """Whether the process of this pid and start is still there."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) <= 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def project_root() -> Path:
    """``ALIGNFLOW_ROOT``, or the current folder."""
    return Path(os.environ.get("ALIGNFLOW_ROOT", ".")).resolve()


def dagster_home(root: Path) -> Path:
    """The project's ``DAGSTER_HOME``, made ready: ``.alignflow/dagster`` with the settings of ``dagster.yaml``.

    Sets the environment variable as well, so that Dagster's own commands started from here agree.
    """
    home = root.resolve() / ".alignflow" / "dagster"
    home.mkdir(parents=True, exist_ok=True)
    settings = root / "dagster.yaml"
    wanted, kept = (settings if settings.exists() else SETTINGS).read_text(encoding="utf-8"), home / "dagster.yaml"
    if not kept.exists() or kept.read_text(encoding="utf-8") != wanted:
        write_text(kept, wanted)  # by rename: others may be reading it
    os.environ |= {"DAGSTER_HOME": str(home), "DAGSTER_DISABLE_TELEMETRY": "1"}
    return home
