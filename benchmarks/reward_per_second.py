"""Reward gained per CPU second: ours against AlignProp's last-K scheme (arXiv 2310.03739), from one stage-1 painter.

A small run of the built-in data (32 px, a short stage 1) is built up to what ``align`` reads, then the ways tune the same weights on the
same references with the same noise. ``last_k`` back-propagates through the last K = 1 step, as AlignProp's truncated scheme does, and the reward
alone pulls (no recoloured pairs, rho 10, no gates). ``sparse`` differs in the gradient scheme alone; ``whole`` is stage 2 as the profile has it:
recoloured pairs first, then the reward. Compared is the mean gain in reward of the fixed probe set over the looks, at equal CPU time: the dearer
way is cut off where the cheaper one ends. The repeats are the targets.
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
ALONE = {"recolour": False, "rho": 10.0, "rounds": 1}  # the reward alone
WAYS: dict[str, dict[str, Any]] = {"sparse": ALONE | {"gradient": "sparse", "k": 2}, "last_k": ALONE | {"gradient": "last_k", "k": 1},
                                   "whole": {"gradient": "sparse", "k": 2, "rounds": 1}}
RUN = ("profile=demo", "machine.threads=1", "data.size=32", "image_flow.clip=6", "image_flow.training.steps=250", "labeller.training.steps=120")
PEER = "against back-propagating the last step (AlignProp)"
NAMES = {"sparse": f"reward per CPU second, gradient scheme alone, {PEER}", "whole": f"reward per CPU second, all of stage 2, {PEER}"}


def rows() -> Iterator[Row | Skipped]:
    """A row for each of our ways; where back-propagating the last step gains nothing there is no ratio."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ALIGNFLOW_SITE_KEY_FILE"] = str(Path(folder, "site.key"))  # the user's own stays untouched
        root = Path(folder, "run")
        build(root)
        curves = {(way, target): curve(root, target, way) for target in TARGETS for way in WAYS}
    for way, name in NAMES.items():
        gains = [gain(curves[way, target], curves["last_k", target]) for target in TARGETS]
        if min(peer for _, peer in gains) <= 0:
            yield Skipped(name, f"the peer gains nothing: mean gain (ours, theirs) {[tuple(round(g, 3) for g in pair) for pair in gains]}")
        else:
            yield compare(name, *map(list, zip(*gains)), "reward", 2.0, at_least=True)


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


def gain(ours: Any, peer: Any) -> tuple[float, float]:
    """Mean gain in reward within the CPU seconds of the cheaper way: ours, the peer's."""
    import numpy as np

    at = np.linspace(0, min(float(table["seconds"].iloc[-1]) for table in (ours, peer)), 50)
    ours_found, peer_found = (float(np.interp(at, table["seconds"], table["reward"] - table["reward"].iloc[0]).mean()) for table in (ours, peer))
    return ours_found, peer_found


def curve(root: Path, target: str, way: str) -> Any:
    """Reward of the probe set against CPU seconds, from one alignment."""
    import pandas as pd

    from alignflow_core import align
    from alignflow_core.config import load_project
    from alignflow_core.runner import Context, stage_config
    from alignflow_core.stages import STAGES, artifact_dir

    project, stage = load_project(root / "params.yaml"), STAGES["align"]
    config = stage_config(project, stage, target)
    training = dataclasses.replace(config.align.training, steps=STEPS)
    config.align = dataclasses.replace(config.align, patience=2 * STEPS, check_every=5, training=training,
                                       gates=dataclasses.replace(config.align.gates, hold=False), **WAYS[way])
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
