"""How a stage is run on behalf of Dagster, and where Dagster keeps its records."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import dagster as dg

from alignflow_core.config import load_project
from alignflow_core.errors import InputError, StageError
from alignflow_core.runner import plan_stage, run_stage
from alignflow_core.stages import STAGES, node_id

RUNNING: set[subprocess.Popen[bytes]] = set()
GRACE_SECONDS = 60.0  # for a training loop to save its state


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
            InputError: an input is missing.
            StageError: DVC or the stage has failed; what they said is in the log.
        """
        root = Path(self.root)
        if self.mode == "inline":
            run_stage(root, stage, key)
            return
        if not (root / ".dvc").is_dir():
            raise InputError(f"{root}: not a DVC project; run 'git init' and 'dvc init' there, or choose the inline runner")
        plan_stage(load_project(root / "params.yaml"), root, STAGES[stage], key)  # names a missing input better than DVC does
        dvc = [sys.executable, "-m", "dvc", "--wait-for-lock"]
        if STAGES[stage].raw and (root / "data.dvc").exists():  # 'repro' of a single item would leave new data without a version
            run_in_group([*dvc, "commit", "--quiet", "--force", "data.dvc"], root)
        run_in_group([*dvc, "repro", "--quiet", "--single-item", node_id(stage, key)], root)


def run_in_group(command: list[str], root: Path) -> None:
    """Run a command as a process group of its own, which goes down with the caller.

    A cancelled Dagster run would otherwise leave the training behind: DVC and the shell between do not pass signals on.

    Raises:
        StageError: it ended with another exit code than 0.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # dvc.yaml says "python"
    process = subprocess.Popen(command, cwd=root, start_new_session=True, env=os.environ | {"PATH": path, "DVC_NO_ANALYTICS": "1"})
    RUNNING.add(process)
    try:
        code = process.wait()
    except BaseException:
        stop_group(process)
        raise
    finally:
        RUNNING.discard(process)
    if code:
        raise StageError(f"'{' '.join(command[1:])}' ended with exit code {code}; its output says why")


def stop_all() -> None:
    """Stop every process group that threads of this process wait for: an interrupt reaches the main thread alone."""
    for process in list(RUNNING):
        stop_group(process)


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process group, then terminate, then kill what does not leave.

    An interrupt comes first: stages save their state on it and DVC still releases its locks.
    """
    for number, seconds in ((signal.SIGINT, GRACE_SECONDS), (signal.SIGTERM, 10.0), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            pass
        break


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
    shutil.copyfile(settings if settings.exists() else Path(__file__).parents[1] / "dagster.yaml", home / "dagster.yaml")
    os.environ |= {"DAGSTER_HOME": str(home), "DAGSTER_DISABLE_TELEMETRY": "1"}
    return home
