"""Stages side by side without Dagster: a few processes, each building one stage after another and keeping what it has imported.

They go when the process that started them does: on an interrupt after their training has saved its state, and when it was killed.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from alignflow_core.config import Project
from alignflow_core.errors import InputError, StageError
from alignflow_core.stages import node_id
from pipelines.plan import Node

STOP_SECONDS = 10.0  # for a training to save its state
STOPPED = 128 + signal.SIGTERM


def usable_cores() -> int:
    """Cores that this process may use; all of the machine where the system does not say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_jobs(project: Project) -> int:
    """As many stages at once as the cores hold ``machine.threads``."""
    return max(1, usable_cores() // project.machine.threads)


def build_side_by_side(root: Path, project: Project, jobs: int, quiet: bool, built: Callable[[Node, bool, float], None]) -> None:
    """Build every node that is not up to date after those it reads from, ``jobs`` at a time.

    Args:
        root: project root.
        project: its configuration.
        jobs: processes.
        quiet: no progress on stderr.
        built: is called in this process, with the node, whether it ran and its seconds.

    Raises:
        InputError: bad input of a stage.
        StageError: a stage failed, or its process was killed. Nothing new is started then; what runs is finished first.
    """
    graph = project.graph
    waiting = {node_id(stage.name, key): ((stage, key), {node_id(*each) for each in graph.inputs(stage, key).values()})
               for stage, key in graph.nodes()}
    far = dict.fromkeys(waiting, 0)  # how long a chain of stages waits for a node: the longest goes first
    for name, (_, needed) in reversed(waiting.items()):
        far |= {each: max(far[each], far[name] + 1) for each in needed}
    running: dict[Future[tuple[bool, float]], Node] = {}
    failed: list[tuple[Node, BaseException]] = []
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        while running or (waiting and not failed):
            ready = [] if failed else sorted((name for name, (_, needed) in waiting.items() if not needed), key=far.__getitem__, reverse=True)
            for name in ready[:jobs - len(running)]:
                node, _ = waiting.pop(name)
                try:
                    running[pool.submit(_build, root, node[0].name, node[1], quiet)] = node
                except BrokenProcessPool as broken:  # killed while it had nothing to do
                    failed.append((node, broken))
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                node, error = running.pop(future), future.exception()
                if error is not None:
                    failed.append((node, error))
                    if running and not quiet:
                        print(f"{node_id(node[0].name, node[1])}: failed; waiting for "
                              f"{', '.join(node_id(s.name, k) for s, k in running.values())}", file=sys.stderr, flush=True)
                    continue
                for _, needed in waiting.values():
                    needed.discard(node_id(node[0].name, node[1]))
                built(node, *future.result())
    except BaseException:
        _stop(pool)
        raise
    pool.shutdown()
    if failed:
        raise _told(failed)


def _told(failed: list[tuple[Node, BaseException]]) -> BaseException:
    """One error that says what several said; one of a kind that nobody foresaw as it is."""
    problems = []
    for node, error in failed:
        if isinstance(error, BrokenProcessPool):
            problems.append(f"{node_id(node[0].name, node[1])}: its process was killed; free memory if there was too little, or build one stage at a "
                            "time (--jobs 1). The same command continues from the last saved state")
        elif isinstance(error, InputError | StageError):
            problems += str(error).splitlines()
        else:
            return error
    return InputError(*problems) if all(isinstance(error, InputError) for _, error in failed) else StageError("\n".join(problems))


def _begin() -> None:
    """What a process does first: an interrupt of the terminal is its parent's business; without a parent it leaves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: the state is being saved
    raise SystemExit(STOPPED)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_SECONDS)
    os._exit(STOPPED)


def _build(root: Path, stage: str, key: str | None, quiet: bool) -> tuple[bool, float]:
    """One stage; whether it ran, and its seconds."""
    from alignflow_core.runner import run_stage

    started = time.monotonic()
    try:
        return run_stage(root, stage, key, quiet=quiet), time.monotonic() - started
    except SystemExit:
        os._exit(STOPPED)  # the pool would take it for a result and wait for more work


def _stop(pool: ProcessPoolExecutor) -> None:
    """Stop the processes: terminated, which lets a training save its state, then killed."""
    processes = list((pool._processes or {}).values())  # public only from Python 3.14 (terminate_workers)
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ValueError, ProcessLookupError):
            process.kill()
