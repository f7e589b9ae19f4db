"""A simulated schedule: 100 hospitals, each with 20 ways of aligning, on 1 to 64 GPUs, from the measured costs of one target's stages.

    python -m benchmarks --only schedule
    python -m benchmarks.schedule [--table] [--costs RUN]

``--table`` prints docs/scaling.md's table; ``--costs RUN`` takes the costs anew from a finished run. The graph is the product's own, of a
project whose variants ``alignflow ablate`` has added. Stages that want no GPU take none and wait for none.
"""

import argparse
import csv
import heapq
import tempfile
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.row import Row, Skipped, compare

NUMBERS = (12,)
HOSPITALS, GPUS = 100, (1, 2, 4, 8, 16, 32, 64)
AXES = ("reward=coral,cosine,gaussian_skl,gram,mmd,skl,sliced_wasserstein", "align.rho=0.1,1,3", "references.count=1,2,5,20", "align.k=1,4,8",
        "align.rounds=1", "align.regions=none")  # 19 variants; with the hospital's own target 20
COSTS = Path(__file__).parent / "results" / "stage_costs.csv"


@dataclass(frozen=True)
class Work:
    """Tasks with their seconds and what each waits for; ``free`` ones take no GPU."""

    seconds: Mapping[Hashable, float]
    needs: Mapping[Hashable, Set[Hashable]]
    free: Set[Hashable] = frozenset()

    @property
    def busy(self) -> float:
        """Seconds of GPU that all tasks take together."""
        return sum(seconds for task, seconds in self.seconds.items() if task not in self.free)

    def critical(self) -> dict[Hashable, float]:
        """Seconds from the start of each task to the end of all that waits for it, at least."""
        readers = defaultdict(list)
        for task, needed in self.needs.items():
            for each in needed:
                readers[each].append(task)
        found: dict[Hashable, float] = {}
        for task in reversed(in_order(self.needs)):
            found[task] = self.seconds[task] + max((found[reader] for reader in readers[task]), default=0.0)
        return found


def in_order(needs: Mapping[Hashable, Set[Hashable]]) -> list[Hashable]:
    """The tasks, each after what it waits for."""
    from graphlib import TopologicalSorter

    return list(TopologicalSorter(needs).static_order())


def makespan(work: Work, gpus: int) -> float:
    """Seconds until all is done, when a free GPU always takes the ready task with the longest way to the end (list scheduling)."""
    rank = work.critical()
    waiting = {task: len(needed) for task, needed in work.needs.items()}
    readers = defaultdict(list)
    for task, needed in work.needs.items():
        for each in needed:
            readers[each].append(task)
    ready: list[tuple[float, int, Hashable]] = []
    running: list[tuple[float, int, Hashable]] = []
    now, idle, number = 0.0, gpus, 0

    def open_(task: Hashable) -> None:
        nonlocal number
        number += 1  # ties go to the first
        if task in work.free:
            heapq.heappush(running, (now + work.seconds[task], number, task))
        else:
            heapq.heappush(ready, (-rank[task], number, task))

    for task, n in waiting.items():
        if not n:
            open_(task)
    while ready or running:
        while ready and idle:
            _, place, task = heapq.heappop(ready)
            idle -= 1
            heapq.heappush(running, (now + work.seconds[task], place, task))
        now, _, done = heapq.heappop(running)
        idle += done not in work.free
        for reader in readers[done]:
            waiting[reader] -= 1
            if not waiting[reader]:
                open_(reader)
    return now


# -- the project -------------------------------------------------------------------------------------------------------------------------


@cache
def project(hospitals: int = HOSPITALS) -> Any:
    """One source and these target hospitals; ``alignflow ablate`` makes the variants of the first, the others have the same."""
    import yaml

    from alignflow_core.config import build_project, read_params
    from pipelines.ablate import write_variants

    with tempfile.TemporaryDirectory() as folder:
        params: dict[str, Any] = {"source": "home", "domains": {"home": {"dir": "home"}, "h0": {"dir": "h0"}},
                                  "targets": {"h0": {"domain": "h0", "references": {"count": 10}}}}
        file = Path(folder, "params.yaml")
        file.write_text(yaml.safe_dump(params))
        write_variants(Path(folder), [], AXES)
        params = read_params(file)
    targets = {}
    for i in range(hospitals):
        for name, target in params["targets"].items():
            base = target.get("variant_of") and f"h{i}"
            targets[f"h{i}{name.removeprefix('h0')}"] = target | {"domain": f"h{i}", "variant_of": base}
    domains = {"home": {"dir": "home"}, **{f"h{i}": {"dir": f"h{i}"} for i in range(hospitals)}}
    return build_project(params | {"domains": domains, "targets": targets})


def together(found: Any, costs: Mapping[str, float]) -> Work:
    """Every stage of the project once, as DVC, Dagster and ``alignflow run`` build it."""
    from alignflow_core.stages import node_id

    seconds, needs, free = {}, {}, set()
    for stage, key in found.graph.nodes():
        node = node_id(stage.name, key)
        seconds[node] = costs[stage.name] * share_of_arms(found, stage.name, key)
        needs[node] = {node_id(*each) for each in found.graph.inputs(stage, key).values()}
        free |= set() if stage.gpu else {node}
    return Work(seconds, needs, free)


def share_of_arms(found: Any, stage: str, key: str | None) -> float:
    """The recorded target trained every arm; a variant trains the few of its own, each for as many steps."""
    from alignflow_core.config import STAGE_ARMS

    trained, arms = STAGE_ARMS.get(stage), getattr(found.targets.get(str(key)), "arms", None)
    if trained is None or arms is None:
        return 1.0
    return len(set(arms) & set(trained)) / len(set(found.segment.arms) & set(trained))


def alone(work: Work) -> Work:
    """The same results with nothing shared: what every target's measurements need, built for it alone."""
    seconds, needs, free = {}, {}, set()

    def visit(target: str, node: Hashable) -> None:
        if (target, node) in seconds:
            return
        seconds[target, node] = work.seconds[node]
        needs[target, node] = {(target, each) for each in work.needs[node]}
        free.update({(target, node)} & {(target, each) for each in work.free})
        for each in work.needs[node]:
            visit(target, each)

    for node in work.seconds:
        stage, _, target = str(node).partition("@")
        if stage in ("evaluate", "privacy"):
            visit(target, node)
    return Work(seconds, needs, free)


def read_costs(file: Path = COSTS) -> dict[str, float]:
    """Stage -> CPU seconds."""
    with file.open(newline="") as stream:
        return {row["stage"]: float(row["seconds"]) for row in csv.DictReader(stream)}


def write_costs(run: Path, file: Path = COSTS) -> None:
    """CPU seconds of every stage of a finished run, the dearest of its keys; wall seconds of a short stage, which has no samples."""
    from alignflow_core.artifact import read_json
    from alignflow_core.stages import STAGES

    found = {}
    for name in STAGES:
        recorded = [read_json(each) for each in [*(run / "artifacts" / name).glob("*.json"), run / "artifacts" / f"{name}.json"] if each.exists()]
        taken = [_cpu(each) for each in recorded if "fingerprint" in each]
        if taken:
            found[name] = max(taken)
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["stage", "seconds"])
        writer.writerows((name, f"{seconds:.1f}") for name, seconds in found.items())


def _cpu(recorded: Mapping[str, Any]) -> float:
    samples = recorded.get("usage")
    if not samples:
        return float(recorded["seconds"])
    starts = [0.0, *(sample["seconds"] for sample in samples)]
    return sum(sample["cpu_percent"] / 100 * (sample["seconds"] - start) for sample, start in zip(samples, starts))


# -- results -----------------------------------------------------------------------------------------------------------------------------


def rows() -> Iterator[Row | Skipped]:
    work = together(project(), read_costs())
    apart = alone(work)
    longest = max(work.critical().values())
    for gpus in (GPUS[0], GPUS[-1]):
        bound = max(work.busy / gpus, longest)
        yield compare(f"schedule, {HOSPITALS} x 20 targets, {gpus} GPUs: makespan, against its bound", [makespan(work, gpus)], bound, "s", 1.1)
    yield compare("schedule: GPU work, against every target built alone", [work.busy], apart.busy, "s", 0.5)


def table() -> Iterator[str]:
    """Markdown."""
    work = together(project(), read_costs())
    apart = alone(work)
    longest = max(work.critical().values())
    yield f"{len(work.seconds)} stages, {work.busy / 3600:.1f} h of work, longest chain {longest / 3600:.2f} h; nothing shared: " \
          f"{len(apart.seconds)} stages, {apart.busy / 3600:.1f} h ({1 - work.busy / apart.busy:.0%} saved)\n"
    yield "| GPUs | makespan, h | bound, h | utilisation | nothing shared, h | utilisation |"
    yield "|---|---|---|---|---|---|"
    for gpus in GPUS:
        ours, theirs = makespan(work, gpus), makespan(apart, gpus)
        yield f"| {gpus} | {ours / 3600:.2f} | {max(work.busy / gpus, longest) / 3600:.2f} | {work.busy / gpus / ours:.1%} | {theirs / 3600:.2f} | " \
              f"{apart.busy / gpus / theirs:.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedule", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", type=Path, metavar="RUN", help="write results/stage_costs.csv from this run")
    parser.add_argument("--table", action="store_true", help="print the table of docs/scaling.md")
    options = parser.parse_args()
    if options.costs:
        write_costs(options.costs)
    if options.table:
        print("\n".join(table()))


if __name__ == "__main__":
    main()
