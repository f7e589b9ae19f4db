"""A project whose stages cost nothing: the real registry, runner and configuration with made-up stage functions.

The package is copied into the project without its stages; a stage there writes a hash of what it was given, and so
changes if and only if something it reads does. Whatever runs in the project takes that package, DVC's commands included.
"""

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]
PLUMBING = ("__init__", "__main__", "artifact", "config", "distributed", "errors", "floors", "registry", "networks/__init__", "networks/registry",
            "reward/__init__", "reward/registry", "painters/__init__", "painters/registry", "runner", "site_key", "stages", "usage", "validation")
MODULES = ("data", "mask_flow", "image_flow", "sample", "segment", "labeller", "comparator", "align", "reward/distances", "reward/statconv",
           "filtering", "privacy", "evaluate", "compare", "report")
TARGETS = ("amber", "dim")

STAGE = '''
from alignflow_core.toy import build


def __getattr__(name):
    return build
'''

TOY = '''
import json

import numpy as np
import pandas as pd

from alignflow_core.artifact import json_hash, tree_hash


def build(config, inputs, out_dir, context):
    """Write a hash of everything given, with the tables that other stages' readers expect."""
    raw = [tree_hash(context.root / folder) for folder in raw_folders(config) if folder]
    given = [repr(config), context.key, raw, {name: (folder / "given.txt").read_text() for name, folder in inputs.items()}]
    digest = json_hash(given)
    (out_dir / "given.txt").write_text(digest)
    node = context.work_dir.name
    with (context.root / "calls.txt").open("a") as stream:
        stream.write(node + "\\n")
    for step in range(3):
        context.log({"loss": 1.0 / (step + 1)}, step)
    stage = node.partition("@")[0]
    if stage in ("data", "references"):
        table = pd.DataFrame({"case_id": ["a", "b"], "stem": ["x", "y"], "domain": context.key, "group": [f"{stage}1", f"{stage}2"],
                              "image_sha256": [f"{digest}1", f"{digest}2"], "width": 8, "height": 8})
        table["split"], table["role"], table["labelled"] = ["train", "test"], ["align", "held_out"], False
        table.to_parquet(out_dir / "manifest.parquet", index=False)
    if stage in ("data", "references") or stage.startswith("sample_"):
        masks = np.zeros((2, 8, 8), np.uint8)
        masks[:, 2:6, 2:6] = 1
        np.save(out_dir / "masks.npy", masks)
        if stage != "sample_masks":
            np.save(out_dir / "images.npy", np.full((2, 8, 8, 3), int(digest[:2], 16), np.uint8))
        if stage.startswith("sample_"):
            pd.DataFrame({"pair_id": ["p", "q"]}).to_parquet(out_dir / "manifest.parquet", index=False)
    if stage == "align":
        looks = pd.DataFrame({"step": [0, 2], "round": 0, "held_out_reward": [-2.0, -1.0], "reward": [-2.0, -0.9], "failed": "",
                              "best": [False, True]})
        ratios = {f"{name}_ratio": [1.0, 0.9] for name in ("diversity", "velocity", "agreement", "copy")}
        looks.assign(**ratios).to_parquet(out_dir / "gates.parquet", index=False)
        rounds = [{"round": 0, "ended_at": 2, "best_step": 2, "ended_because": "all steps are done", "refused": ["copy ratio 0.80 < 0.9"]}]
        (out_dir / "verdict.json").write_text(json.dumps({"rounds": rounds}))
        return {"diversity_ratio": 0.9, "agreement_ratio": 1.0}
    if stage == "filter":
        pd.DataFrame({"pair_id": ["p", "q"], "kept": True, "reason": "", "agreement": [0.8, 0.9]}).to_parquet(out_dir / "manifest.parquet")
        return {"kept_fraction": 1.0}
    if stage == "privacy":
        pd.DataFrame({"pair_id": ["p"], "kept": True, "bank": "references", "flagged": False}).to_parquet(out_dir / "copying.parquet")
        return {"copy_chance_limit_references": 1.0}
    if stage == "evaluate":
        return {"dice_source": 0.5, "dice_aligned": 0.75}
    if stage == "compare":
        rows = [(name.partition(":")[2], "unet", arm, "source", "dice", 9, mean, mean - .1, mean + .1, difference, difference - .1, difference + .1)
                for name in inputs for arm, mean, difference in (("source", .5, np.nan), ("aligned", .75, .25))]
        table = pd.DataFrame(rows, columns=["target", "segmenter", "arm", "baseline", "metric", "n", "mean", "ci_low", "ci_high",
                                            "difference", "diff_ci_low", "diff_ci_high"])
        table.to_parquet(out_dir / "comparison.parquet", index=False)
        table.to_csv(out_dir / "comparison.csv", index=False)
        table.assign(harmed=False).to_parquet(out_dir / "source_test.parquet", index=False)
    if stage == "report":
        (out_dir / "index.html").write_text("<h1>report</h1>")
    return {}


def raw_folders(config):
    yield getattr(getattr(config, "domain", None), "dir", None)
    yield getattr(getattr(config, "references", None), "dir", None)
'''


def write_project(root: Path, targets: tuple[str, ...] = TARGETS) -> Path:
    """A toy project with these targets in ``root``, without DVC."""
    core = root / "alignflow_core"
    for package in ("networks", "painters", "reward"):
        (core / package).mkdir(parents=True)
    for module in PLUMBING:
        shutil.copyfile(REPOSITORY / "alignflow_core" / f"{module}.py", core / f"{module}.py")
    for module in MODULES:
        (core / f"{module}.py").write_text(STAGE)
    (core / "toy.py").write_text(TOY)
    folders = {"standard": "data/source/standard"} | {name: f"data/target/{name}" for name in targets}
    for folder in [*folders.values(), *(f"data/references/{name}" for name in targets)]:
        (root / folder / "images").mkdir(parents=True)
        for number in range(2):
            (root / folder / "images" / f"{number}.png").write_text(f"{folder} {number}")
    run(root, "-c", WRITE_PARAMS, yaml.safe_dump({
        "source": "standard", "profile": "smoke", "task": {"name": "toy"}, "domains": {name: {"dir": folder} for name, folder in folders.items()},
        "targets": {name: {"domain": name, "references": {"count": 2, "dir": f"data/references/{name}"}} for name in targets},
    }))
    return root


def built_by_dvc(root: Path) -> Path:
    """A written project, from a clean checkout on: git, DVC, ``dvc repro``."""
    (root / ".gitignore").write_text("/data/\n/artifacts/\n/.alignflow/\n/mlflow.db\n/mlruns/\n/calls.txt\n__pycache__/\n")
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=root, check=True)
    shutil.copyfile(REPOSITORY / ".dvc" / "config", root / ".dvc" / "config")
    run(root, "-m", "pipelines.dvcfile")
    run(root, "-m", "dvc", "add", "-q", "--no-commit", "data")  # hash only, as a clean checkout has it: nothing is in the cache
    run(root, "-m", "dvc", "repro", "-q")
    return root


WRITE_PARAMS = """
import dataclasses, json, sys, yaml
from pathlib import Path
from alignflow_core.config import build_project
whole = dataclasses.asdict(build_project(yaml.safe_load(sys.argv[1])))
Path("params.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(whole)), sort_keys=False))
"""


def environment(root: Path) -> dict[str, str]:
    """This Python's, with the toy project before the repository on its path."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(REPOSITORY)]), "DVC_NO_ANALYTICS": "1", "PYTHONWARNINGS": "ignore",
                         "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
                         "MLFLOW_DISABLE_TELEMETRY": "true", "DAGSTER_DISABLE_TELEMETRY": "1"}


def run(root: Path, *arguments: str) -> str:
    """Run this Python in the toy project; returns what it printed."""
    done = subprocess.run([sys.executable, *arguments], cwd=root, env=environment(root), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def calls(root: Path) -> Counter[str]:
    """Stages that ran since the last call, with how often."""
    file = root / "calls.txt"
    found = Counter(file.read_text().split()) if file.exists() else Counter()
    file.unlink(missing_ok=True)
    return found


def replace_reference(root: Path, target: str) -> None:
    """Another picture in the place of one reference."""
    (root / "data" / "references" / target / "images" / "0.png").write_text("another picture")


def set_param(root: Path, value: object, *keys: str) -> None:
    """Change one value of ``params.yaml``."""
    params = yaml.safe_load((root / "params.yaml").read_text())
    section = params
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


DOWNSTREAM_OF_REFERENCES = ("references", "align", "sample_aligned", "sample_paired", "filter", "privacy", "segment_baselines", "segment_aligned",
                            "segment_filtered", "evaluate")
DOWNSTREAM_OF_STAGE_2 = tuple(name for name in DOWNSTREAM_OF_REFERENCES[1:] if name != "segment_baselines")
FAN_IN = ("compare", "report")


def rebuilt(target: str) -> Counter[str]:
    """What must run when one reference of a target was replaced."""
    return Counter([*(f"{stage}@{target}" for stage in DOWNSTREAM_OF_REFERENCES), *FAN_IN])


@pytest.fixture(scope="session")
def built_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy project that ``dvc repro`` has built from a clean checkout. Copy it before changing it (:func:`copied`)."""
    from pipelines import tracking

    root = built_by_dvc(write_project(tmp_path_factory.mktemp("toy") / "project"))
    tracking.client(root).search_experiments()  # creating the database takes seconds, copying it does not
    return root


def copied(root: Path, to: Path) -> Path:
    """A copy with a clean record of calls."""
    copy = shutil.copytree(root, to / "project", symlinks=True)
    (copy / "calls.txt").unlink(missing_ok=True)
    return copy
