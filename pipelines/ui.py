"""Both user interfaces on loopback: Dagster with its daemon, and MLflow.

What they show is kept in the project: Dagster's records in ``.alignflow/dagster``, MLflow's in ``mlflow.db``.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO

from alignflow_core.artifact import exclusive
from alignflow_core.config import load_project
from alignflow_core.errors import InputError
from alignflow_core.runner import stop_on_sigterm
from pipelines import guardian, resources, tracking
from pipelines.automation import observe
from pipelines.compose import write_text
from pipelines.webserver import HOST

DAGSTER_PORT, MLFLOW_PORT = 3000, 5000
PORT_FILE = Path(".alignflow", "mlflow.port")  # for links to a run, also of what a terminal builds meanwhile
RUNS_PAGE = "#/experiments/{}/runs?workflowType=machine_learning"  # MLflow's own first page is about chat traces
ALLOWED_HOSTS = f"{HOST}:*,localhost:*,[[]::1]:*"  # patterns; by default MLflow takes 10.* too, and so 10.evil.example
START_SECONDS = 300.0


def serve(root: Path) -> None:
    """Start both, print their addresses, wait for Ctrl-C (or for one of them to end) and stop them.

    Raises:
        InputError: ``params.yaml`` is wrong, the project is served already, or a server did not start or ended by itself.
    """
    root = root.resolve()
    project = load_project(root / "params.yaml")
    stop_on_sigterm()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C, and so would all it starts
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # a closed terminal; nohup ignores it
        signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))
    log_file = root / ".alignflow" / "ui.log"
    with exclusive(root / ".alignflow" / "locks" / "ui.lock"), log_file.open("w") as log, \
            tempfile.TemporaryDirectory(prefix="alignflow-") as folder, \
            free_port(DAGSTER_PORT) as dagster_socket, free_port(MLFLOW_PORT) as mlflow_socket:
        import dagster as dg

        experiment = tracking.experiment_id(tracking.client(root), root, project)
        home = resources.dagster_home(root)
        with dg.DagsterInstance.get() as instance:
            observe(root, instance)
        environment = os.environ | {"DAGSTER_HOME": str(home), "ALIGNFLOW_ROOT": str(root), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                                    "PYTHONWARNINGS": "ignore"}
        dagster_port, mlflow_port = (taken.getsockname()[1] for taken in (dagster_socket, mlflow_socket))
        write_text(root / PORT_FILE, f"{mlflow_port}\n")
        processes: list[subprocess.Popen[bytes]] = []

        def start(*command: str) -> None:
            processes.append(start_guarded(command, root, environment, log))

        def wait(answers: Callable[[], bool]) -> None:
            until = time.monotonic() + START_SECONDS
            while not answers():
                if time.monotonic() > until or any(process.poll() is not None for process in processes):
                    raise InputError(f"a server did not start; {log_file} says why")
                time.sleep(0.3)

        try:
            # One process loads the project's definitions for page and daemon; "Reload" in the page renews it for both.
            # It listens in a temporary folder, for the path of a socket must be short.
            code_server, workspace = Path(folder) / "code", Path(folder) / "workspace.yaml"
            workspace.write_text(f"load_from: [{{grpc_server: {{socket: {code_server}, location_name: alignflow}}}}]\n")
            start("dagster", "code-server", "start", "-m", definitions_module(root), "-d", str(root), "--socket", str(code_server))
            start("mlflow", "ui", "--backend-store-uri", tracking.store_uri(root), "--default-artifact-root", (root / "mlruns").as_uri(),
                  "--host", HOST, "--port", str(mlflow_port), "--allowed-hosts", ALLOWED_HOSTS, "--workers", "1")
            wait(code_server.exists)
            start("pipelines.webserver", str(dagster_port), str(workspace))
            start("dagster._daemon", "run", "--workspace", str(workspace))
            dagster, mlflow = f"http://{HOST}:{dagster_port}", f"http://{HOST}:{mlflow_port}"
            wait(lambda: is_up(dagster) and is_up(mlflow))
            print(f"Dagster: {dagster}\nMLflow:  {mlflow}/{RUNS_PAGE.format(experiment)}\nCtrl-C stops both; their log is {log_file}", flush=True)
            while all(process.poll() is None for process in processes):
                time.sleep(0.5)
            raise InputError(f"one of the servers has ended; {log_file} says why")
        except KeyboardInterrupt:
            print("stopping; a running stage saves its state first", file=sys.stderr)
        finally:
            with ThreadPoolExecutor() as pool:
                list(pool.map(stop, processes))


def last_mlflow_port(root: Path) -> int:
    """The port on which this project's MLflow page is shown, or was last."""
    try:
        return int((root / PORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return MLFLOW_PORT


def definitions_module(root: Path) -> str:
    """The module with the project's definitions that ``workspace.yaml`` names; ``pipelines.definitions`` where there is none.

    Raises:
        InputError: it names none, or several.
    """
    import yaml

    file = root / "workspace.yaml"
    if not file.exists():
        return "pipelines.definitions"
    try:
        (only,) = yaml.safe_load(file.read_text(encoding="utf-8"))["load_from"]
        return str(only["python_module"]["module_name"])
    except (yaml.YAMLError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{file}: must name one python_module with its module_name ({error!r}); see docs/scaling.md, or remove the file") from error


def start_guarded(module: Sequence[str], root: Path, environment: Mapping[str, str], log: IO[str]) -> subprocess.Popen[bytes]:
    """Start ``python -m`` with these words under a guardian: without it a server would outlive us where we are killed."""
    return subprocess.Popen([sys.executable, "-P", guardian.__file__, sys.executable, "-m", *module], cwd=root, env=environment,
                            stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a server with all it has started; of one that ended by itself what it left behind, such as those that follow the log of a run."""
    resources.stop(process)
    resources.kill_group(process)


def free_port(first: int) -> socket.socket:
    """``first``, or the next port that nothing listens on, as the number of a socket that reserves it.

    Servers take seconds to listen. Until then a UDP socket of the same number tells other projects that it is taken.
    """
    for port in range(first, first + 100):
        reservation = socket.socket(type=socket.SOCK_DGRAM)
        with suppress(OSError), socket.socket() as probe:
            reservation.bind((HOST, port))
            if probe.connect_ex((HOST, port)):
                return reservation
        reservation.close()
    raise InputError(f"ports {first} to {first + 99} are all taken; stop other servers")


def is_up(address: str) -> bool:
    """Whether the address answers, be it with an error."""
    try:
        urllib.request.urlopen(address, timeout=2).close()  # noqa: S310 - an address of our own
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
