"""Both user interfaces on loopback: Dagster with its daemon, and MLflow."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from alignflow_core.config import load_project
from alignflow_core.errors import InputError
from alignflow_core.runner import stop_on_sigterm
from pipelines import tracking
from pipelines.automation import observe
from pipelines.resources import dagster_home, stop_group

HOST = "127.0.0.1"  # neither has a login
DAGSTER_PORT, MLFLOW_PORT = 3000, 5000
RUNS_PAGE = "#/experiments/{}/runs?workflowType=machine_learning"  # MLflow's own first page is about chat traces
START_SECONDS = 300.0


def serve(root: Path) -> None:
    """Start both, print their addresses, wait for Ctrl-C (or for one of them to end) and stop them.

    Raises:
        InputError: ``params.yaml`` is wrong, or one of them did not start or ended by itself.
    """
    import dagster as dg

    root = root.resolve()
    project = load_project(root / "params.yaml")
    stop_on_sigterm()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C, and so would all it starts
    experiment = tracking.experiment_id(tracking.client(root), root, project)
    home = dagster_home(root)
    with dg.DagsterInstance.get() as instance:
        observe(root, instance)
    environment = os.environ | {"DAGSTER_HOME": str(home), "ALIGNFLOW_ROOT": str(root), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                                "PYTHONWARNINGS": "ignore"}
    dagster_port, mlflow_port = free_port(DAGSTER_PORT), free_port(MLFLOW_PORT)
    commands = {
        f"http://{HOST}:{dagster_port}": ["-m", "dagster", "dev", "-m", "pipelines.definitions", "-d", str(root), "-h", HOST,
                                           "-p", str(dagster_port)],
        f"http://{HOST}:{mlflow_port}": ["-m", "mlflow", "ui", "--backend-store-uri", tracking.store_uri(root), "--default-artifact-root",
                                         (root / "mlruns").as_uri(), "--host", HOST, "--port", str(mlflow_port), "--workers", "1"],
    }
    log_file = root / ".alignflow" / "ui.log"
    processes: list[subprocess.Popen[bytes]] = []
    with log_file.open("w") as log:
        try:
            for command in commands.values():
                processes.append(subprocess.Popen([sys.executable, *command], cwd=root, env=environment, stdout=log, stderr=log,
                                                  start_new_session=True))
            for address in commands:
                wait_for(address, processes, log_file)
            dagster, mlflow = commands
            print(f"Dagster: {dagster}\nMLflow:  {mlflow}/{RUNS_PAGE.format(experiment)}\nCtrl-C stops both; their log is {log_file}", flush=True)
            while all(process.poll() is None for process in processes):
                time.sleep(0.5)
            raise InputError(f"one of the servers has ended; {log_file} says why")
        except KeyboardInterrupt:
            print("stopping", file=sys.stderr)
        finally:
            with ThreadPoolExecutor() as pool:
                list(pool.map(stop_group, processes))


def free_port(first: int) -> int:
    """``first``, or the next port that nothing listens on."""
    for port in range(first, first + 100):
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)):
                return port
    raise InputError(f"ports {first} to {first + 99} are all taken; stop other servers")


def wait_for(address: str, processes: list[subprocess.Popen[bytes]], log_file: Path) -> None:
    """Return once the address answers."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and all(process.poll() is None for process in processes):
        try:
            urllib.request.urlopen(address, timeout=2).close()  # noqa: S310 - an address of our own
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.3)
    raise InputError(f"{address}: did not start; {log_file} says why")
