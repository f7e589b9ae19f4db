"""Both pages: who is answered, what listens, how they stop and what stays."""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from served_ui import ServedUi, environment, graphql, launch, materializations, runs, served, stale, status, tracked, wait_for
from starlette.datastructures import Headers
from toy_project import copied, replace_reference, run, set_param

from alignflow_core.artifact import exclusive
from pipelines.resources import PROCESS_TAG
from pipelines.ui import last_mlflow_port
from pipelines.webserver import OwnPagesOnly, is_own

OURS, FOREIGN = {"host": "127.0.0.1:3000"}, {"host": "127.0.0.1.evil.example:3000"}
ENDED = ("SUCCESS", "FAILURE", "CANCELED")
SYNC = "from pathlib import Path; from pipelines.sync import sync; print(*sync(Path('.')))"


@pytest.mark.parametrize(("headers", "own"), [
    (OURS, True),  # a script
    ({"host": "localhost:8080"}, True),  # forwarded over ssh
    ({"host": "[::1]:3000"}, True),
    ({"host": "127.0.0.1"}, True),
    (OURS | {"origin": "http://127.0.0.1:3000", "sec-fetch-site": "same-origin"}, True),
    (OURS | {"sec-fetch-site": "none", "sec-fetch-dest": "document"}, True),  # typed in
    (OURS | {"sec-fetch-site": "cross-site", "sec-fetch-dest": "document"}, True),  # a link
    (FOREIGN, False),
    ({"host": "10.evil.example"}, False),
    ({"host": "evil.example@127.0.0.1.evil.example"}, False),
    ({"host": "0.0.0.0:3000"}, False),
    ({"host": "["}, False),
    ({"host": ""}, False),
    ({}, False),
    (OURS | {"origin": "http://evil.example"}, False),
    (OURS | {"origin": "null"}, False),
    (OURS | {"origin": "http://127.0.0.1:5000"}, False),  # another server on this machine is another's page
    (OURS | {"sec-fetch-site": "cross-site", "sec-fetch-dest": "image"}, False),
    (OURS | {"sec-fetch-site": "same-site", "sec-fetch-dest": "empty"}, False),
    (OURS | {"sec-fetch-site": "cross-site", "sec-fetch-dest": "iframe"}, False),
])
def test_who_is_answered(headers: dict[str, str], own: bool) -> None:
    assert is_own(Headers(headers)) is own


@pytest.mark.parametrize(("kind", "headers", "first"), [
    ("http", OURS, {"type": "passed on"}),
    ("http", FOREIGN, {"type": "http.response.start", "status": 403}),
    ("websocket", OURS, {"type": "passed on"}),
    ("websocket", FOREIGN, {"type": "websocket.close", "code": 1008}),
    ("lifespan", {}, {"type": "passed on"}),
])
def test_the_guard(kind: str, headers: dict[str, str], first: dict[str, object]) -> None:
    sent: list[dict[str, object]] = []

    async def send(message):
        sent.append(message)

    async def page(scope, receive, send):
        await send({"type": "passed on"})

    scope = {"type": kind, "method": "GET", "path": "/", "headers": Headers(headers).raw}
    asyncio.run(OwnPagesOnly(page)(scope, None, send))
    assert first.items() <= sent[0].items()


@pytest.fixture(scope="module")
def ui(built_toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedUi]:
    """Both pages of a built project."""
    root = copied(built_toy, tmp_path_factory.mktemp("ui"))
    run(root, "-c", SYNC)
    with served(root) as running:
        yield running


@pytest.mark.nightly
def test_only_loopback_listens(ui: ServedUi) -> None:
    used = [(process.name(), connection) for process in ui.family() for connection in process.net_connections("inet")]
    assert {connection.laddr.ip for _, connection in used} == {"127.0.0.1"}, used
    listening = {connection.laddr.port for _, connection in used if connection.status == psutil.CONN_LISTEN}
    assert listening == {urlsplit(address).port for address in (ui.dagster, ui.mlflow)}
    assert last_mlflow_port(Path(psutil.Process(ui.process.pid).cwd())) == urlsplit(ui.mlflow).port


SOCKET = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "A" * 22 + "==",
          "Sec-WebSocket-Protocol": "graphql-ws"}
RELOAD = "/graphql?query=mutation%7BreloadWorkspace%7B__typename%7D%7D"


@pytest.mark.nightly
def test_foreign_requests_are_refused(ui: ServedUi) -> None:
    for address in (ui.dagster, ui.mlflow):
        port = urlsplit(address).port
        assert [status(address, headers={"Host": f"{name}:{port}"}) for name in ("127.0.0.1", "localhost", "[::1]")] == [200, 200, 200]
        foreign = ("evil.example", f"evil.example:{port}", "10.evil.example", "192.168.0.7")
        assert [status(address, headers={"Host": name}) for name in foreign] == [403] * 4
    cross_site = {"Origin": "http://evil.example"}
    assert status(ui.mlflow, "/ajax-api/2.0/mlflow/experiments/create", cross_site, "POST", "{}") == 403
    assert status(ui.dagster, RELOAD, method="POST") == 200, "what a foreign page must not do"
    assert status(ui.dagster, RELOAD, cross_site, "POST") == 403
    assert status(ui.dagster, RELOAD, {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "image"}) == 403
    assert status(ui.dagster, "/graphql", SOCKET | cross_site) == 403
    assert status(ui.dagster, "/graphql", SOCKET | {"Origin": ui.dagster}) == 101


@pytest.mark.nightly
def test_a_second_one_is_refused(ui: ServedUi) -> None:
    root = Path(psutil.Process(ui.process.pid).cwd())
    second = subprocess.run([sys.executable, "-m", "pipelines.cli", "ui"], cwd=root, env=environment(root), capture_output=True, text=True,
                            timeout=60, check=False)
    assert second.returncode == 2
    assert f"in use by pid {ui.process.pid} on" in second.stderr


def alive(processes: list[psutil.Process]) -> list[str]:
    """What is still there."""
    return [" ".join(process.cmdline()) for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.nightly
def test_it_stops_in_the_middle_of_a_run_and_remembers(built_toy: Path, tmp_path: Path) -> None:
    root = copied(built_toy, tmp_path)
    run(root, "-c", SYNC)
    replace_reference(root, "amber")
    os.mkfifo(root / "calls.txt")  # nobody reads it: the first stage that says it ran will wait there
    with served(root) as first:
        assert stale(first) == {"reference_set@amber"}
        interrupted = launch(first, "build_target", "amber")
        wait_for(lambda: any({"alignflow_core", "references"} <= set(process.cmdline()) for process in first.family()))
        assert runs(first) == {interrupted: "STARTED"}
        built, recorded, processes = materializations(first), tracked(first), first.family()
    assert first.process.returncode == 0
    assert alive(processes) == []
    for lock in ("ui", "references@amber"):
        with exclusive(root / ".alignflow" / "locks" / f"{lock}.lock"):
            pass
    assert (root / ".dvc" / "tmp" / "rwlock").read_text() == "{}"

    (root / "calls.txt").unlink()
    with served(root) as second:
        assert runs(second)[interrupted] == "FAILURE"
        assert materializations(second) >= built and tracked(second) >= recorded
        wait_for(lambda: len(runs(second)) == 2 and all(state in ENDED for state in runs(second).values()))
        assert sorted(runs(second).values()) == ["FAILURE", "SUCCESS"], "what lost its process is tried once more"
        assert stale(second) == {"comparison", "report"}, "they read the metrics of all targets"
        processes = second.family()
        second.process.terminate()
        second.process.wait(180)
    assert second.process.returncode == 143
    assert alive(processes) == []


@pytest.mark.nightly
def test_killed_it_takes_its_servers_along(built_toy: Path, tmp_path: Path) -> None:
    root = copied(built_toy, tmp_path)
    with served(root) as ui:
        processes = ui.family()
        ui.process.kill()
        wait_for(lambda: not alive(processes), 20)
    with served(root) as ui:
        assert status(ui.dagster) == status(ui.mlflow) == 200


def worker_killed(ui: ServedUi) -> bool:
    """Whether a run was at work, whose process has been killed."""
    found = graphql(ui, "{ runsOrError { ... on Runs { results { status tags { key value } } } } }")["runsOrError"]["results"]
    tags = [{tag["key"]: tag["value"] for tag in run["tags"]} for run in found if run["status"] == "STARTED"]
    pids = [int(each[PROCESS_TAG].split()[1]) for each in tags if PROCESS_TAG in each]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(pids)


def killed(ui: ServedUi, words: set[str]) -> bool:
    """Whether a process of the family with these words in its command was there to be killed."""
    victims = [process for process in ui.family() if words <= set(process.cmdline())]
    for process in victims:
        process.kill()
    return bool(victims)


KILLS = 10


@pytest.mark.nightly
def test_daemon_killed_at_ten_moments(built_toy: Path, tmp_path: Path) -> None:
    root = copied(built_toy, tmp_path)
    run(root, "-c", SYNC)
    set_param(root, 1.5, "targets", "amber", "align", "rho")
    draw = random.Random(0)
    for number in range(KILLS):
        with served(root) as ui:
            launch(ui, "build_target", "amber")
            time.sleep(number + draw.random())
            assert killed(ui, {"dagster._daemon"})
            assert ui.process.wait(60) == 2, "without its daemon the interface ends, and says so"
    continues(root, tmp_path)


@pytest.mark.nightly
def test_run_workers_killed_at_ten_moments(built_toy: Path, tmp_path: Path) -> None:
    root = copied(built_toy, tmp_path)
    run(root, "-c", SYNC)
    draw = random.Random(0)
    with served(root) as ui:
        for number in range(KILLS):
            set_param(root, 2.0 + number, "targets", "amber", "align", "rho")  # so that there is something to build
            before = set(runs(ui))
            launch(ui, "build_target", "amber")
            wait_for(lambda: any(state == "STARTED" for state in runs(ui).values()))
            time.sleep(6 * draw.random())
            assert worker_killed(ui)
            wait_for(lambda: all(state in ENDED for state in runs(ui).values()) and set(runs(ui)) > before)  # noqa: B023
    set_param(root, 1.5, "targets", "amber", "align", "rho")
    continues(root, tmp_path)


def continues(root: Path, folder: Path) -> None:
    """The interface starts again and builds the target as if nothing had been: the same contents as in an uninterrupted copy."""
    whole = shutil.copytree(root, folder / "whole", symlinks=True)
    run(whole, "-m", "pipelines.cli", "materialize", "--target", "amber")
    with served(root) as ui:
        wait_for(lambda: all(state in ENDED for state in runs(ui).values()))
        last = launch(ui, "build_target", "amber")
        wait_for(lambda: runs(ui)[last] in ENDED)
        assert runs(ui)[last] == "SUCCESS"
    stages = ("references", "align", "sample_aligned", "sample_paired", "filter", "privacy", "segment_baselines", "segment_aligned",
              "segment_filtered", "evaluate")
    contents = [[(place / "artifacts" / stage / "amber" / "given.txt").read_text() for stage in stages] for place in (root, whole)]
    assert contents[0] == contents[1]
    assert [line.partition(":")[0] for line in run(root, "-m", "pipelines.cli", "plan").splitlines()] == ["compare", "report"]
