"""``alignflow doctor``: what this machine and project have, what is wrong, and how to mend it."""

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from mimetypes import guess_type
from pathlib import Path

from alignflow_core.config import load_project
from alignflow_core.errors import InputError
from alignflow_core.floors import FLOORS, below
from pipelines.workers import usable_cores

PACKAGES = ("torch", "monai", "dagster", "dagster-webserver", "dvc", "mlflow", "pandas", "pyarrow", "hydra-core", "omegaconf", "pillow",
            "safetensors")
TELEMETRY_OFF = {"MLFLOW_DISABLE_TELEMETRY": "true", "DAGSTER_DISABLE_TELEMETRY": "1", "DVC_NO_ANALYTICS": "1"}
FREE_GB = 2.0


@dataclass(frozen=True)
class Finding:
    """One line of the examination; ``remedy`` is empty where all is well."""

    subject: str
    state: str
    remedy: str = ""


def examine(root: Path) -> Iterator[Finding]:
    """Look at packages, device, disk, telemetry and the project in ``root``. Raises :class:`InputError` where that is no folder."""
    if not root.is_dir():
        raise InputError(f"--root {root}: no such folder; create it or correct the path")
    yield Finding("python", sys.version.split()[0])
    for package in PACKAGES:
        try:
            installed = version(package)
            old = package in FLOORS and below(installed, FLOORS[package])
            yield Finding(package, installed, f"older than {FLOORS[package]}, below which it is not safe: run 'make setup'" if old else "")
        except PackageNotFoundError:
            yield Finding(package, "missing", "run 'make setup'")
    for program in ("git", "dvc"):
        found = shutil.which(program) or shutil.which(str(Path(sys.executable).with_name(program)))
        yield Finding(program, "found" if found else "missing",
                      "" if found else f"install {program}; 'alignflow run' and 'alignflow demo' work without it")
    yield from _device()
    free = shutil.disk_usage(root).free / 1e9
    yield Finding("disk", f"{free:.1f} GB free", "" if free > FREE_GB else "make room: a run needs up to 2 GB")
    for variable, off in TELEMETRY_OFF.items():
        value = os.environ.get(variable, "unset")
        yield Finding("telemetry", f"{variable}={value}", "" if value.lower() in ("1", "true") else f"export {variable}={off}")
    yield from _project(root)


def _device() -> Iterator[Finding]:
    yield Finding("cores", str(usable_cores()))
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("device", f"torch does not load ({error})", "run 'make setup' after removing .venv")
        return
    if torch.cuda.is_available():
        yield Finding("device", f"cuda: {torch.cuda.get_device_name(0)}")
    elif torch.version.cuda and Path("/dev/nvidia0").exists():
        yield Finding("device", f"cpu, though a GPU is there (torch for CUDA {torch.version.cuda})", "update the NVIDIA driver")
    else:
        yield Finding("device", f"cpu, {torch.get_num_threads()} threads")


def _project(root: Path) -> Iterator[Finding]:
    file = root / "params.yaml"
    try:
        project = load_project(file)
    except InputError as error:
        for problem in error.problems:
            yield Finding("params.yaml", problem, "run 'alignflow compose', or correct the file")
        return
    yield Finding("params.yaml", f"profile {project.profile}, task {project.task.name}, targets {', '.join(project.targets)}")
    domains = [domain.dir for domain in project.domains.values()]
    references = [target.references.dir for target in project.targets.values() if target.references.dir]
    for name in domains + references:
        folder = root / name / "images"
        if name in references and not folder.is_dir():
            folder = root / name  # reference images may lie in the folder itself
        count = sum((guess_type(file.name)[0] or "").startswith("image/") for file in folder.iterdir()) if folder.is_dir() else 0
        yield Finding("data", f"{name}: {count} images", "" if count else "run 'alignflow phantom .' (built-in data), 'dvc pull', or mend the path")
    for name in (target.references.file for target in project.targets.values() if target.references.file):
        there = (root / name).is_file()
        yield Finding("data", f"{name}: {'moments of references' if there else 'missing'}", "" if there else "put the hospital's file there")
