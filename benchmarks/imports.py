"""CPU seconds of imports: the core and the command line alone, each stage's module against torch.

Stages that build networks need MONAI, whose import takes longer than all else: the bar is not for them.
"""

import os
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.row import Row, Skipped, compare

NUMBERS = (11,)
REPEATS = 5
LIMIT = 0.3  # s
WITH_MONAI = ("mask_flow", "image_flow", "sample", "segment", "comparator", "labeller", "align", "filtering", "privacy", "evaluate")


def rows() -> Iterator[Row | Skipped]:
    """All commands in turn, so that each stage stands beside the same imports of torch."""
    from alignflow_core.stages import STAGES

    modules = list(dict.fromkeys(stage.function.partition(":")[0] for stage in STAGES.values()))
    alone = ("import alignflow_core", "alignflow --help")
    commands = {alone[0]: ["-c", alone[0]], alone[1]: ["-m", "pipelines.cli", "--help"], "torch": ["-c", "import torch"],
                **{module: ["-c", f"import alignflow_core.{module}"] for module in modules if module not in WITH_MONAI}}
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(REPEATS + 1):
        for name, command in commands.items():
            seconds = _child(command)
            if turn:  # the first round writes byte code
                taken[name].append(seconds)
    for name in alone:
        yield compare(f"{name}, against {LIMIT} s", taken[name], LIMIT, "s", 1.0)
    for module in modules:
        name = f"import of stage module {module}, against torch"
        yield Skipped(name, "uses MONAI") if module in WITH_MONAI else compare(name, taken[module], taken["torch"], "s", 1.1)


def _child(arguments: list[str]) -> float:
    """CPU seconds of a Python of its own."""
    before = os.times()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])
