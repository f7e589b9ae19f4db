"""Reward gained per CPU second: our sparse gradient against AlignProp's last-K scheme (arXiv 2310.03739), from one stage-1 painter.

A small run of the built-in data (32 px, a short stage 1) is built up to what ``align`` reads, then both schemes tune the same weights on the
same references with the same noise, optimiser and step size; the reward alone pulls (no recoloured pairs, rho 10, no gates). ``last_k``
back-propagates through the last K = 1 step, as AlignProp's truncated scheme does. Compared is the mean gain in reward of the fixed probe
set over the looks, at equal CPU time: the dearer scheme is cut off where the cheaper one ends. The repeats are the targets.
"""

import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.row import Row, Skipped, compare

NUMBERS = (7,)
TARGETS, STEPS = ("amber", "violet"), 40
SCHEMES = {"sparse": 2, "last_k": 1}
RUN = ("profile=demo", "machine.threads=1", "data.size=32", "image_flow.clip=6", "image_flow.training.steps=250", "labeller.training.steps=120")
NAME = "reward per CPU second, against back-propagating the last step (AlignProp)"


def rows() -> Iterator[Row | Skipped]:
    """One row; where back-propagating the last step gains nothing there is no ratio."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ALIGNFLOW_SITE_KEY_FILE"] = str(Path(folder, "site.key"))  # the user's own stays untouched
        root = Path(folder, "run")
        build(root)
        gains = [gain(root, target) for target in TARGETS]
    if min(peer for _, peer in gains) <= 0:
        yield Skipped(NAME, f"the peer gains nothing: mean gain (ours, theirs) {[tuple(round(g, 3) for g in pair) for pair in gains]}")
        return
    yield compare(NAME, *map(list, zip(*gains)), "reward", 2.0, at_least=True)


def build(root: Path) -> None:
    """Built-in data and every artifact that ``align`` reads."""
    from alignflow_core.config import load_project
    from alignflow_core.phantom import write_phantom
    from alignflow_core.runner import run_stage
    from alignflow_core.stages import STAGES
    from pipelines.compose import write_params

    write_params(root / "params.yaml", list(RUN))
    write_phantom(root, size=48)
    graph = load_project(root / "params.yaml").graph

    def make(name: str, key: str | None) -> None:
        for upstream in graph.inputs(STAGES[name], key).values():
            make(*upstream)
        if name != "align":
            run_stage(root, name, key, quiet=True)

    for target in TARGETS:
        make("align", target)


def gain(root: Path, target: str) -> tuple[float, float]:
    """Mean gain in reward within the CPU seconds of the cheaper scheme: ours, the peer's."""
    import numpy as np

    curves = {scheme: curve(root, target, scheme) for scheme in SCHEMES}
    at = np.linspace(0, min(float(table["seconds"].iloc[-1]) for table in curves.values()), 50)
    found = {scheme: float(np.interp(at, table["seconds"], table["reward"] - table["reward"].iloc[0]).mean()) for scheme, table in curves.items()}
    return found["sparse"], found["last_k"]


def curve(root: Path, target: str, scheme: str) -> Any:
    """Reward of the probe set against CPU seconds, from one alignment."""
    import pandas as pd

    from alignflow_core import align
    from alignflow_core.config import load_project
    from alignflow_core.runner import Context, stage_config
    from alignflow_core.stages import STAGES, artifact_dir

    project, stage = load_project(root / "params.yaml"), STAGES["align"]
    config = stage_config(project, stage, target)
    training = dataclasses.replace(config.align.training, steps=STEPS)
    config.align = dataclasses.replace(config.align, gradient=scheme, k=SCHEMES[scheme], recolour=False, rho=10.0, rounds=1, patience=STEPS,
                                       check_every=5, training=training, gates=dataclasses.replace(config.align.gates, hold=False))
    inputs = {name: root / artifact_dir(*where) for name, where in project.graph.inputs(stage, target).items()}
    with tempfile.TemporaryDirectory() as folder:
        out, work = Path(folder, "out"), Path(folder, "work")
        out.mkdir()
        work.mkdir()
        looked: list[float] = []

        def log(metrics: dict[str, float], step: int) -> None:
            if "held_out_reward" in metrics:
                looked.append(time.process_time())

        align.run(config, inputs, out, Context(target, root, work, log, lambda done, total, note: None))
        table = pd.read_parquet(out / "gates.parquet")
    table["seconds"] = [at - looked[0] for at in looked]
    return table
