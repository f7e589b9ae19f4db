"""``alignflow ui`` as a user starts it, and the questions its pages ask."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from toy_project import REPOSITORY

OFF_SWITCHES = ("MLFLOW_DISABLE_TELEMETRY", "DAGSTER_DISABLE_TELEMETRY", "DVC_NO_ANALYTICS", "DO_NOT_TRACK")


@dataclass(frozen=True)
class ServedUi:
    """A running ``alignflow ui``: its process, both addresses, and the page of MLflow that it names."""

    process: subprocess.Popen[str]
    dagster: str
    mlflow: str
    runs_page: str

    def family(self) -> list[psutil.Process]:
        """Everything it has started."""
        return psutil.Process(self.process.pid).children(recursive=True)


def environment(root: Path) -> dict[str, str]:
    """Without the switches that keep libraries from calling home, or proxies: the product itself must be silent."""
    kept = {name: value for name, value in os.environ.items() if name not in OFF_SWITCHES and not name.lower().endswith("_proxy")}
    binaries = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return kept | {"PYTHONPATH": os.pathsep.join([str(root), str(REPOSITORY)]), "PATH": binaries, "PYTHONWARNINGS": "ignore"}


@contextmanager
def served(root: Path) -> Iterator[ServedUi]:
    """``alignflow ui`` in a project, until the end of the block; its own code comes first where it is a toy project."""
    process = subprocess.Popen([sys.executable, "-m", "pipelines.cli", "ui"], cwd=root, env=environment(root), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("Ctrl-C"):
                break
        addresses = [word for line in said for word in line.split() if word.startswith("http://")]
        assert len(addresses) == 2, "".join(said)
        yield ServedUi(process, addresses[0], addresses[1].partition("/#")[0], addresses[1])
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=180)


def status(address: str, path: str = "/", headers: Mapping[str, str] | None = None, method: str = "GET", body: str | None = None) -> int:
    """HTTP status of one request, whatever its headers claim."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    try:
        connection.request(method, path, body, dict(headers or {}))
        return connection.getresponse().status
    finally:
        connection.close()


def asked(address: str, path: str, question: object) -> dict:
    """Answer to a JSON request."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    try:
        connection.request("POST", path, json.dumps(question), {"Content-Type": "application/json"})
        return json.load(connection.getresponse())
    finally:
        connection.close()


def wait_for(happened: Callable[[], bool], seconds: float = 180) -> None:
    """Return once it has happened."""
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.5)


LAUNCH = """
mutation($params: ExecutionParams!) { launchPipelineExecution(executionParams: $params) {
    ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }
"""
STALE = "{ assetNodes { assetKey { path } partitionKeys staleStatus } }"
STALE_PARTITIONS = "query($keys: [AssetKeyInput!]!) { assetNodes(assetKeys: $keys) { assetKey { path } partitionKeys staleStatusByPartition } }"


def graphql(ui: ServedUi, query: str, **variables: object) -> dict:
    """Data of a GraphQL query to Dagster."""
    answer = asked(ui.dagster, "/graphql", {"query": query, "variables": variables})
    assert "errors" not in answer, answer["errors"]
    return answer["data"]


def launch(ui: ServedUi, job: str, partition: str) -> str:
    """Launch a job for one partition, as the page does; returns the run's id."""
    selector = {"repositoryName": "__repository__", "repositoryLocationName": "alignflow", "jobName": job}
    tags = [{"key": "dagster/partition", "value": partition}]
    answer = graphql(ui, LAUNCH, params={"selector": selector, "mode": "default", "executionMetadata": {"tags": tags}})
    return answer["launchPipelineExecution"]["run"]["runId"]


def runs(ui: ServedUi) -> dict[str, str]:
    """Status of every Dagster run."""
    found = graphql(ui, "{ runsOrError { ... on Runs { results { runId status } } } }")
    return {run["runId"]: run["status"] for run in found["runsOrError"]["results"]}


def materializations(ui: ServedUi) -> int:
    """How many partitions Dagster knows to be built."""
    found = graphql(ui, "{ assetNodes { partitionStats { numMaterialized } assetMaterializations(limit: 1) { runId } } }")
    return sum(node["partitionStats"]["numMaterialized"] if node["partitionStats"] else len(node["assetMaterializations"])
               for node in found["assetNodes"])


def stale(ui: ServedUi) -> set[str]:
    """``asset@partition`` (``asset`` where there are none) of everything that is stale or missing."""
    nodes = graphql(ui, STALE)["assetNodes"]
    states = {node["assetKey"]["path"][0]: node["staleStatus"] for node in nodes if not node["partitionKeys"]}
    for node in graphql(ui, STALE_PARTITIONS, keys=[node["assetKey"] for node in nodes if node["partitionKeys"]])["assetNodes"]:
        states |= {f"{node['assetKey']['path'][0]}@{key}": state for key, state in zip(node["partitionKeys"], node["staleStatusByPartition"])}
    return {part for part, state in states.items() if state not in ("FRESH", None)}


def tracked(ui: ServedUi) -> set[str]:
    """Ids of the runs that MLflow's page lists."""
    experiments = asked(ui.mlflow, "/ajax-api/2.0/mlflow/experiments/search", {"max_results": 50})["experiments"]
    found = asked(ui.mlflow, "/ajax-api/2.0/mlflow/runs/search", {"experiment_ids": [e["experiment_id"] for e in experiments], "max_results": 500})
    return {run["info"]["run_id"] for run in found["runs"]}
