"""What Dagster, DVC and MLflow cost on top of the stages when one of five reference sets changes (stages here cost nothing).

    python -m benchmarks --only orchestration

Seconds of ``alignflow materialize --stale`` beyond those of the stage commands themselves, against 5 s + 0.1 s for every stage that does not
change. CPU seconds of all processes: on an idle machine the wall seconds are about the same.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.row import Row, Skipped, compare

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

NUMBERS = (10,)
REPEATS = 3
TARGETS = ("amber", "dim", "violet", "north", "south")


def rows() -> Iterator[Row | Skipped]:
    from toy_project import DOWNSTREAM_OF_REFERENCES, FAN_IN, built_by_dvc, calls, rebuilt, run, write_project

    from alignflow_core.config import load_project

    chain = [(name, "amber") for name in DOWNSTREAM_OF_REFERENCES] + [(name, None) for name in FAN_IN]
    with tempfile.TemporaryDirectory() as folder:
        root = built_by_dvc(write_project(Path(folder) / "project", TARGETS))
        run(root, "-m", "pipelines.cli", "sync")
        unchanged = len(list(load_project(root / "params.yaml").graph.nodes())) - len(chain)
        calls(root)
        over = []
        for number in range(REPEATS):
            (root / "data/references/amber/images/0.png").write_text(f"picture {number}")
            whole = _seconds(root, "-m", "pipelines.cli", "materialize", "--stale")
            assert calls(root) == rebuilt("amber")  # its stages, and no other
            for name, key in chain:
                (root / "artifacts" / name / (f"{key}.json" if key else "")).with_suffix(".json").unlink()  # so that it runs again
                whole -= _seconds(root, "-m", "alignflow_core", "stage", name, *(["--target", key] if key else []), "--quiet")
            calls(root)
            over.append(whole)
    yield compare(f"orchestration of {len(chain)} rebuilt stages beside {unchanged} unchanged ones", over, 5 + 0.1 * unchanged, "CPU s", 1.0)


def _seconds(root: Path, *arguments: str) -> float:
    """CPU seconds of a command and all that it starts."""
    from toy_project import environment

    before = os.times()
    subprocess.run([sys.executable, *arguments], cwd=root, env=environment(root), check=True, capture_output=True)
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])
