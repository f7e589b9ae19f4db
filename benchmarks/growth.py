"""Cost against size: images, image side, targets, steps of stage 2, references, manifest rows; peak memory of ingest.

    python -m benchmarks --only growth
    python -m benchmarks.growth "ingest, images" 1000      # one measurement: CPU seconds and peak memory of a process of its own
    python -m benchmarks.growth "stage 2, steps"           # one curve, as a line of JSON

Costs are CPU seconds on one thread, the least of three measurements (other work on the machine only adds): an exponent over two decades moves by
.04 with 5 % of one cost. Peaks of memory are the largest of the three. The exponents are those of ``fit.exponent``, the constant part (start,
imports, jackknife) taken out.
Linear means an exponent of at most 1.05. A cost that rises with the pixels has an exponent of 2 in the side.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignflow_core.config import Network
from benchmarks.fit import exponent
from benchmarks.row import Row, Skipped, compare

NUMBERS = (12,)
LINEAR, SQUARE, CONSTANT = 1.05, 2.1, 1.1
REPEATS = 3
SIDE = 32  # working size, pixels
PARAMS: dict[str, Any] = {"source": "a", "domains": {"a": {"dir": "a"}, "b": {"dir": "b"}},
                          "targets": {"t": {"domain": "b", "references": {"count": 1}}},
                          "machine": {"threads": 1, "device": "cpu"}, "data": {"size": SIDE}}
SMALL = Network(channels=(8, 16), attention=(False, False), head_channels=8)

Act = Callable[[], object]


@dataclass(frozen=True)
class Curve:
    """``prepare(size, folder)`` makes what is needed and returns what is measured."""

    prepare: Callable[[int, Path], Act]
    sizes: tuple[int, ...]
    bar: float
    memory: bool = False  # the peak shall not grow from the last size but one to the last


def rows() -> Iterator[Row | Skipped]:
    for name in CURVES:
        yield from curve_rows(name)


def curve_rows(name: str) -> Iterator[Row]:
    """The exponent of one curve, with its points, and what its memory does."""
    curve = CURVES[name]
    found = [[apart(name, size) for size in curve.sizes] for _ in range(REPEATS)]
    seconds = [min(each["cpu"] for each in costs) for costs in zip(*found, strict=True)]
    megabytes = [max(each["megabytes"] for each in costs) for costs in zip(*found, strict=True)]
    for size, cpu, peak in zip(curve.sizes, seconds, megabytes, strict=True):
        print(f"  {name} {size}: {cpu:.2f} CPU s, peak {peak:.0f} MB", file=sys.stderr, flush=True)
    points = tuple({"size": size, "cpu_seconds": round(cpu, 3), "peak_megabytes": round(peak, 1)}
                   for size, cpu, peak in zip(curve.sizes, seconds, megabytes, strict=True))
    row = compare(f"{name}, {curve.sizes[0]} to {curve.sizes[-1]}: exponent", [exponent(curve.sizes, seconds)], 1.0, "", curve.bar)
    yield replace(row, points=points)
    if curve.memory:
        yield compare(f"{name}: peak memory at {curve.sizes[-1]}, against {curve.sizes[-2]}", [megabytes[-1]], megabytes[-2], "MB", CONSTANT)


def apart(name: str, size: int) -> dict[str, float]:
    """One measurement in a process of its own, with one thread."""
    one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    done = subprocess.run([sys.executable, "-m", "benchmarks.growth", name, str(size)], env=os.environ | one_thread, check=True, text=True,
                          stdout=subprocess.PIPE)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(name: str, size: int) -> dict[str, float]:
    """CPU seconds of the act and the process's peak memory during it, files that it has mapped included."""
    with tempfile.TemporaryDirectory() as folder:
        act = CURVES[name].prepare(size, Path(folder))
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        start = time.process_time()
        act()
        seconds = time.process_time() - start
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"cpu": seconds, "megabytes": int(status["VmHWM"].split()[0]) / 1024}


# -- images ------------------------------------------------------------------------------------------------------------------------------


def ingest(n: int, folder: Path, side: int = 128) -> Act:
    """Stage ``data`` of n pairs; every image has other bytes, or equal ones would be one patient."""
    import numpy as np
    import yaml
    from PIL import Image

    from alignflow_core.runner import run_stage

    ramp = np.add.outer(np.arange(side), np.arange(side)) % 256
    image, mask = folder / "image.jpg", folder / "mask.png"
    Image.fromarray(np.stack([ramp, ramp.T, 255 - ramp], 2).astype(np.uint8)).save(image)
    Image.fromarray(((ramp > 90) * 255).astype(np.uint8)).save(mask)
    bytes_of = {"images": image.read_bytes(), "masks": mask.read_bytes()}
    for kind, suffix in (("images", "jpg"), ("masks", "png")):
        (folder / "a" / kind).mkdir(parents=True)
        for i in range(n):  # decoders read no further than an image's end
            (folder / "a" / kind / f"{i:07d}.{suffix}").write_bytes(bytes_of[kind] + i.to_bytes(4, "big"))
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    return lambda: run_stage(folder, "data", "a", quiet=True)


def sampling(n: int, folder: Path, side: int = 16, network: Network = SMALL) -> Act:
    """Stage ``sample_stage1`` of n masks."""
    import numpy as np
    import pandas as pd

    from alignflow_core.masks import condition
    from alignflow_core.networks import velocity_unet
    from alignflow_core.runner import Context
    from alignflow_core.sample import run_stage1
    from alignflow_core.stages import STAGES

    config = section("sample_stage1", {"sample": {"n_steps": 2, "solver": "euler"}})
    masks = np.zeros((n, side, side), np.uint8)
    masks[:, 4:12, 4:12] = 1
    for name in ("image_flow", "sample_masks", "out", "work"):
        (folder / name).mkdir()
    np.save(folder / "sample_masks" / "masks.npy", masks)
    pd.DataFrame({"mask_id": [f"mask{i:06d}" for i in range(n)]}).to_parquet(folder / "sample_masks" / "manifest.parquet")
    channels = condition(masks[:1], config.task, 8.0).shape[1]
    weights = velocity_unet.build(3, channels, network, 0).state_dict()
    velocity_unet.save(folder / "image_flow", weights, 3, channels, network, clip=8.0, domain=velocity_unet.SOURCE, size=side)
    inputs = {name: folder / name for name in STAGES["sample_stage1"].inputs}
    return lambda: run_stage1(config, inputs, folder / "out", Context(None, folder, folder / "work", lambda *_: None, lambda *_: None))


def evaluation(n: int, folder: Path) -> Act:
    """What ``evaluate`` measures on n synthetic images: distances with their intervals and floor, appearance, overlap with n masks."""
    import numpy as np

    from alignflow_core import evaluate
    from alignflow_core.config import Task
    from alignflow_core.metrics.overlap import overlap

    few, many = pairs(40), pairs(n)
    data = evaluate.Measured(few, few, few, many, many, np.arange(n) < 40, {})
    return lambda: (evaluate._image_distances(data, "t", 0), evaluate._looks(data, Task()), overlap(data.aligned.labels, data.aligned.labels, Task()))


def copies(n: int, folder: Path) -> Act:
    """The copy audit of n images against the same bank."""
    from alignflow_core.metrics.copying import copy_check

    asked, bank, unseen = pairs(n).images, pairs(30, seed=1).images, pairs(30, seed=2)
    return lambda: copy_check(asked, bank, unseen.images, unseen.table["group"].to_numpy(), 0.05)


def pairs(n: int, seed: int = 0) -> Any:
    """Blobs on noise, each its own patient."""
    import numpy as np
    import pandas as pd

    from alignflow_core.pairs import Pairs

    draw = np.random.Generator(np.random.PCG64(seed))
    images = draw.integers(0, 256, (n, SIDE, SIDE, 3), np.uint8)
    masks = np.zeros((n, SIDE, SIDE), np.uint8)
    for mask, at in zip(masks, draw.integers(4, 20, n), strict=True):
        mask[at:at + 8, 6:20] = 1
    ids = tuple(f"p{i:06d}" for i in range(n))
    return Pairs(images, masks, ids, pd.DataFrame({"case_id": ids, "group": ids, "split": "train"}))


# -- the graph and the manifest ----------------------------------------------------------------------------------------------------------


def planning(n: int, folder: Path) -> Act:
    """``alignflow plan`` of a project of n targets that is up to date, with the text of its ``dvc.yaml``."""
    import yaml

    from alignflow_core.artifact import tree_hash, write_json
    from alignflow_core.config import load_project
    from alignflow_core.runner import plan_stage, provenance_file
    from alignflow_core.stages import artifact_dir
    from pipelines.dvcfile import render
    from pipelines.plan import plan

    file = folder / "params.yaml"
    for domain in PARAMS["domains"]:
        (folder / domain).mkdir()
    file.write_text(yaml.safe_dump(PARAMS | {"targets": {f"t{i}": PARAMS["targets"]["t"] for i in range(n)}}))
    project = load_project(file)
    for stage, key in project.graph.nodes():
        out = folder / artifact_dir(stage.name, key)
        out.mkdir(parents=True)
        (out / "metrics.json").write_text(f"{stage.name} {key}")
        found = plan_stage(project, folder, stage, key)
        write_json(provenance_file(folder, stage.name, key), vars(found) | {"content": tree_hash(out)})

    def act() -> None:
        assert plan(folder) == []
        render(load_project(file), folder)

    return act


def manifest(n: int, folder: Path) -> Act:
    """Read a manifest of n rows with one split of its arrays, deal its patients anew, look for references among its test images."""
    import numpy as np
    import pandas as pd

    from alignflow_core.data import _refuse_test_images, split_groups
    from alignflow_core.pairs import read_pairs

    table = pd.DataFrame({"case_id": [f"{i:016x}" for i in range(n)], "group": [f"{i // 8}-{i % 4}" for i in range(n)], "image_sha256": [
        f"{i:064x}" for i in range(n)], "split": np.array(["train", "val", "test", "train"])[np.arange(n) % 4]})
    table.to_parquet(folder / "manifest.parquet", index=False)
    np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (n, 1, 1, 3)).flush()

    def act() -> None:
        read = read_pairs(folder, "train")
        split_groups(read.table["group"].tolist(), (0.7, 0.1, 0.2), 0, "a")
        whole = pd.read_parquet(folder / "manifest.parquet")
        _refuse_test_images(whole[whole["split"] == "train"].head(10), ["here"] * min(10, n), whole[whole["split"] == "test"], "a")

    return act


# -- stage 2 -----------------------------------------------------------------------------------------------------------------------------


def reward_step(n_steps: int, k: int) -> Act:
    """One reward gradient of a small network."""
    import torch

    from alignflow_core.flow.solver import time_grid
    from alignflow_core.networks import velocity_unet
    from alignflow_core.reward.gradient import sparse

    torch.set_num_threads(1)
    model = velocity_unet.in_domain(velocity_unet.build(3, 2, SMALL, seed=0), velocity_unet.TARGET)
    draw = torch.Generator().manual_seed(0)
    x0, cond = (torch.randn(4, c, SIDE, SIDE, generator=draw) for c in (3, 2))

    def act() -> None:
        for _ in range(4):
            sparse(model, x0, cond, time_grid(n_steps), lambda x1: -x1.mean((2, 3)).square().mean(), k, draw, 1.0)

    act()  # buffers that any use allocates
    return act


def references(n: int, folder: Path) -> Act:
    """Features of n references and their moments, as alignment takes them once."""
    import torch

    from alignflow_core.reward.encoders import Standardised
    from alignflow_core.reward.statconv import StatConv

    torch.set_num_threads(1)
    images = torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encoder = Standardised(StatConv(), images[:8], images[:8, :0])

    def act() -> None:
        for part in images.split(64):
            encoder(part, part[:, :0])

    return act


def section(stage: str, changes: dict[str, Any]) -> Any:
    """A stage's configuration in a small project."""
    from alignflow_core.config import build_project
    from alignflow_core.runner import stage_config
    from alignflow_core.stages import STAGES

    return stage_config(build_project(PARAMS | changes), STAGES[stage], None)


CURVES = {
    "ingest, images": Curve(ingest, (100, 1000, 10_000), LINEAR, memory=True),
    "ingest, side of 20 images": Curve(lambda side, folder: ingest(20, folder, side), (512, 1024, 2048), SQUARE),
    "sampling, images": Curve(sampling, (100, 1000, 10_000), LINEAR),
    "sampling, side of 4 images": Curve(lambda side, folder: sampling(4, folder, side, Network()), (64, 128, 256), SQUARE),
    "evaluation, images": Curve(evaluation, (100, 1000, 10_000), LINEAR),
    "copy audit, images": Curve(copies, (30, 60, 120), LINEAR),
    "planning, targets": Curve(planning, (20, 80, 320), LINEAR),
    "manifest, rows": Curve(manifest, (1000, 10_000, 100_000, 1_000_000), LINEAR),
    "stage 2, steps": Curve(lambda n, folder: reward_step(n, 2), (8, 32, 128), LINEAR),
    "stage 2, K of 64 steps": Curve(lambda k, folder: reward_step(64, k), (4, 16, 64), LINEAR),
    "references, images": Curve(references, (20, 200, 2000), LINEAR),
}

if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps([row.record() for row in curve_rows(sys.argv[1])]))
    else:
        print(json.dumps(measured(sys.argv[1], int(sys.argv[2]))))
