"""``alignflow init``: a project of one's own, empty of images: settings, folders, and what git, DVC and Dagster need to find it."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from alignflow_core.config import build_project
from alignflow_core.errors import InputError
from alignflow_core.validation import nearest
from pipelines import dvcfile
from pipelines.compose import compose, render, write_text
from pipelines.local import wrong_task

IGNORED = """\
# what a project produces, and its images: DVC versions them
/data/
/artifacts/
/runs/
/.alignflow/
/mlflow.db*
/mlruns/
/dvc_plots/
__pycache__/
"""
WORKSPACE = """\
load_from:
  - python_module:
      module_name: pipelines.definitions
      working_directory: .
"""
DVC_CONFIG = """\
[core]
    analytics = false
    autostage = false
    check_update = false
"""


def init(root: Path, source: str, targets: Sequence[str], references: int | None, task: str, overrides: Sequence[str],
         unlabelled: Collection[str] = ()) -> list[str]:
    """Write a project.

    Args:
        root: its folder; may exist, but holds no ``params.yaml``.
        source: name of the source domain.
        targets: names of the target domains, each a target of its own.
        references: images to draw from each target domain; ``None`` for a folder of references a target.
        task: how masks are read.
        overrides: further settings.
        unlabelled: targets without masks, on which nothing is measured.

    Returns:
        what is left for the user to do, a line each.

    Raises:
        InputError: a project is there already, or a wrong name, task or setting; nothing is written then.
    """
    if wrong := wrong_task(task, overrides):
        raise InputError(*wrong)
    if (root / "params.yaml").exists():
        raise InputError(f"{root / 'params.yaml'}: a project is here already; change it with 'alignflow target' or by hand, or choose another folder")
    if source in targets:
        raise InputError(f"--source {source}: is a target too; give them different names")
    if _ignored(root):
        raise InputError(f"{root}: git ignores it, and DVC keeps no project there; choose another folder")
    if unknown := [name for name in unlabelled if name not in targets]:
        raise InputError(*(f"--unlabelled {name}: not a target{nearest(name, targets)}" for name in unknown))
    domains: dict[str, dict[str, Any]] = {source: {"dir": f"data/source/{source}"}} | {
        name: {"dir": f"data/target/{name}"} | ({"labelled": False} if name in unlabelled else {}) for name in targets}
    drawn = {name: {"count": references} if references is not None else {"dir": f"data/references/{name}"} for name in targets}
    layout: dict[str, Any] = {"source": source, "domains": domains,
                              "targets": {name: {"domain": name, "references": drawn[name]} for name in targets}}
    profile = [] if any(o.startswith("profile=") for o in overrides) else ["profile=cpu"]
    overrides = [f"task={task}", *profile, *overrides]
    params = compose(overrides, layout)
    folders = {str(domain["dir"]): bool(domain.get("labelled", True)) for domain in domains.values()}
    for folder, labelled in folders.items():
        for part in ("images", "masks")[:1 + labelled]:
            (root / folder / part).mkdir(parents=True, exist_ok=True)
    references_dirs = [str(entry["dir"]) for entry in drawn.values() if "dir" in entry]
    for folder in references_dirs:
        (root / folder / "images").mkdir(parents=True, exist_ok=True)
    settings = Path(__file__).with_name("dagster.yaml").read_text(encoding="utf-8")
    for name, text in (("dagster.yaml", settings), (".gitignore", IGNORED), (".dvcignore", ".alignflow\nmlruns\n"), ("workspace.yaml", WORKSPACE)):
        if not (root / name).exists():
            write_text(root / name, text)
    _version_control(root)
    write_text(root / "dvc.yaml", dvcfile.render(build_project(params), root))
    write_text(root / "params.yaml", render(params, overrides))  # last: until it is there, the same command begins again
    what = "images and masks" if all(folders.values()) else "images, and masks where there is a folder for them,"
    return [*([] if root.resolve() == Path.cwd() else [f"cd {shlex.quote(str(root))}"]),
            f"put {what} into {', '.join(folders)}" + (f", reference images into {', '.join(references_dirs)}" if references_dirs else ""),
            *(f"alignflow check {folder} --task {task}{'' if labelled else ' --unlabelled'}" for folder, labelled in folders.items()),
            "dvc add data; git add -A; git commit", "alignflow materialize; alignflow ui"]


def _ignored(root: Path) -> bool:
    """Whether a repository around the folder ignores it."""
    above = next(folder for folder in (root.resolve(), *root.resolve().parents) if folder.is_dir())
    asked = ["git", "check-ignore", "--quiet", "--no-index", f"{root.resolve()}/"]
    return shutil.which("git") is not None and subprocess.run(asked, cwd=above, capture_output=True, check=False).returncode == 0


def _version_control(root: Path) -> None:
    """``git init`` outside a repository and ``dvc init``; without git, DVC works on its own."""
    inside = False
    if shutil.which("git"):
        inside = subprocess.run(["git", "rev-parse"], cwd=root, capture_output=True, check=False).returncode == 0
        if not inside:
            subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
            inside = True
    if not (root / ".dvc").is_dir():
        at_top = inside and (root / ".git").exists()
        kind = [] if at_top else ["--subdir"] if inside else ["--no-scm"]
        subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet", *kind], cwd=root, check=True)
    config = root / ".dvc" / "config"
    if not config.exists() or config.read_text(encoding="utf-8").split() in ([], ["[core]", "no_scm", "=", "True"]):  # as 'dvc init' leaves it
        write_text(config, DVC_CONFIG if inside else f"{DVC_CONFIG}    no_scm = true\n")
