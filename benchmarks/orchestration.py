"""What Dagster, DVC and MLflow cost on top of the stages when one of five reference sets changes (stages here cost nothing).

``python benchmarks/orchestration.py [--json FILE]``: seconds of ``alignflow materialize --stale`` beyond those of the stage commands
themselves, against a bar of 5 s + 0.1 s for every stage that does not change; and against ``dvc repro`` of the whole project.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from toy_project import DOWNSTREAM_OF_REFERENCES, FAN_IN, built_by_dvc, environment, run, write_project

TARGETS = ("amber", "dim", "violet", "north", "south")
N_STAGES = 6 + 6 + 2 + 6 * len(TARGETS)


def seconds(root: Path, *arguments: str) -> tuple[float, float]:
    """Wall and CPU seconds (children included) of a command."""
    before, started = os.times(), time.monotonic()
    run(root, *arguments)
    after = os.times()
    return time.monotonic() - started, sum(after[2:4]) - sum(before[2:4])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    chain = [(name, "amber") for name in DOWNSTREAM_OF_REFERENCES] + [(name, None) for name in FAN_IN]
    bar = 5 + 0.1 * (N_STAGES - len(chain))
    with tempfile.TemporaryDirectory() as folder:
        root = write_project(Path(folder) / "project", TARGETS)
        started = time.monotonic()
        built_by_dvc(root)
        whole = time.monotonic() - started
        run(root, "-m", "pipelines.cli", "sync")
        walls, cpus = [], []
        for number in range(options.repeats):
            (root / "data/references/amber/images/0.png").write_text(f"picture {number}")
            wall, cpu = seconds(root, "-m", "pipelines.cli", "materialize", "--stale")
            alone = []
            for name, key in chain:
                command = [sys.executable, "-m", "alignflow_core", "stage", name, *(["--target", key] if key else []), "--quiet"]
                (root / "artifacts" / name / (f"{key}.json" if key else "")).with_suffix(".json").unlink()  # so that it runs again
                started, before = time.monotonic(), os.times()
                subprocess.run(command, cwd=root, env=environment(root), check=True, capture_output=True)
                after = os.times()
                alone.append((time.monotonic() - started, sum(after[2:4]) - sum(before[2:4])))
            walls.append(wall - sum(w for w, _ in alone))
            cpus.append(cpu - sum(c for _, c in alone))
    rows = []
    for unit, values in (("wall", walls), ("CPU", cpus)):
        ours = statistics.median(values)
        rows.append({"name": f"orchestration, {len(chain)} of {N_STAGES} stages rebuilt, {unit}", "ours": round(ours, 2), "peer": round(bar, 2),
                     "unit": "s", "ratio": round(ours / bar, 2), "bar": 1.0, "ok": ours <= bar, "n": len(values),
                     "spread": [round(min(values), 2), round(max(values), 2)]})
    for row in rows:
        print(row)
    print(f"dvc repro of the whole project, stages that cost nothing: {whole:.1f} s")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
