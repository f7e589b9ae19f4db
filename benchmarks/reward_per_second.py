"""Reward gained per CPU second: our sparse gradient against AlignProp's last-K scheme (arXiv 2310.03739), from one stage-1 painter.

    python benchmarks/reward_per_second.py RUN TARGET [--steps 60] [--json FILE]

RUN is a finished run (``alignflow demo`` makes one). Both schemes tune the same weights on the same references with the same noise,
optimiser and step size; the reward alone pulls (no recoloured pairs, rho 10, no gates). ``last_k`` back-propagates through the last K = 1
step, as AlignProp's truncated scheme does. Compared is the mean gain in reward of the fixed probe set over the looks, at equal CPU
time: the dearer scheme is cut off where the cheaper one ends. Bar: 2.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BAR = 2.0
SCHEMES = {"sparse": 2, "last_k": 1}


def curve(root: Path, target: str, scheme: str, steps: int) -> Any:
    """Reward of the probe set against CPU seconds, from one alignment."""
    import pandas as pd

    from alignflow_core import align
    from alignflow_core.config import load_project
    from alignflow_core.runner import Context, stage_config
    from alignflow_core.stages import STAGES, artifact_dir

    project, stage = load_project(root / "params.yaml"), STAGES["align"]
    config = stage_config(project, stage, target)
    config.machine = dataclasses.replace(config.machine, threads=1)
    training = dataclasses.replace(config.align.training, steps=steps)
    config.align = dataclasses.replace(config.align, gradient=scheme, k=SCHEMES[scheme], recolour=False, rho=10.0, rounds=1, patience=steps,
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


def main() -> int:
    """Measure, print, and fail where the bar is missed."""
    import numpy as np

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("target")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    options = parser.parse_args()
    curves = {scheme: curve(options.run.resolve(), options.target, scheme, options.steps) for scheme in SCHEMES}
    end = min(float(table["seconds"].iloc[-1]) for table in curves.values())
    at = np.linspace(0, end, 50)
    gain = {scheme: float(np.interp(at, table["seconds"], table["reward"] - table["reward"].iloc[0]).mean()) for scheme, table in curves.items()}
    for scheme, table in curves.items():
        print(f"{scheme:7s} reward {table['reward'].iloc[0]:.2f} -> {table['reward'].iloc[-1]:.2f} in {table['seconds'].iloc[-1]:.0f} CPU s; "
              f"mean gain within {end:.0f} s: {gain[scheme]:+.3f}")
    # Where back-propagating the last step gains nothing, the ratio has no bound.
    ratio = gain["sparse"] / gain["last_k"] if gain["last_k"] > 0 else float("inf")
    met = gain["sparse"] > 0 and ratio >= BAR
    print(f"ratio {ratio:.2f} (bar {BAR}) {'' if met else 'MISSED'}")
    if options.json:
        options.json.write_text(json.dumps({"gain": gain, "ratio": ratio, "bar": BAR, "seconds": end}, indent=1) + "\n", encoding="utf-8")
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
