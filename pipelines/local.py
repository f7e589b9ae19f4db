"""The inline runner: raw folders -> report in one process, with neither git nor DVC."""

import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignflow_core.config import NAME_PATTERN, Task, build_project, load_project
from alignflow_core.errors import InputError
from alignflow_core.stages import artifact_dir, node_id
from alignflow_core.validation import nearest
from pipelines.compose import compose, options, write_params


@dataclass(frozen=True)
class Folders:
    """What ``alignflow run`` is given: raw folders with ``images/`` and ``masks/``.

    Attributes:
        source: the source domain; its folder name becomes its name.
        targets: target name -> folder.
        references: how many images to draw from each target, or a folder of reference images; with several targets
            it holds one folder for each, by target name.
    """

    source: Path
    targets: Mapping[str, Path]
    references: str

    def layout(self) -> dict[str, Any]:
        """``source``, ``domains`` and ``targets`` of params.yaml, with absolute folders.

        Raises:
            InputError: bad target name, or a folder given twice.
        """
        problems = [f"--target {name}={folder}: a name is letters, digits, '-' and '_' (at most 63); write NAME=DIR"
                    for name, folder in self.targets.items() if not re.fullmatch(NAME_PATTERN, name)]
        problems += [f"--target {name}={folder}: is the source folder too; give the target's own folder"
                     for name, folder in self.targets.items() if folder.resolve() == self.source.resolve()]
        if problems:
            raise InputError(*problems)
        source = re.sub(r"[^A-Za-z0-9_-]+", "-", self.source.resolve().name).strip("-_")[:50] or "source"
        source = f"{source}-source" if source in self.targets else source
        domains = {source: self.source} | dict(self.targets)
        return {"source": source,
                "domains": {name: {"dir": str(folder.resolve())} for name, folder in domains.items()},
                "targets": {name: {"domain": name, "references": self._references(name)} for name in self.targets}}

    def reference_dir(self, target: str) -> Path | None:
        """Folder of a target's references, ``None`` where they are drawn from the target."""
        if self.references.isdecimal():
            return None
        return Path(self.references) if len(self.targets) == 1 else Path(self.references, target)

    def _references(self, target: str) -> dict[str, Any]:
        folder = self.reference_dir(target)
        return {"count": int(self.references)} if folder is None else {"dir": str(folder.resolve())}


def task_named(name: str, overrides: Sequence[str] = ()) -> Task:
    """The task of that name, as ``conf/task`` and the overrides say it."""
    if name not in options("task"):
        raise InputError(f"--task {name}: unknown task{nearest(name, options('task'))}")
    anywhere: dict[str, Any] = {"source": "a", "domains": {"a": {"dir": "a"}, "b": {"dir": "b"}}, "targets": {"b": {"domain": "b"}}}
    return build_project(compose([f"task={name}", *overrides], anywhere)).task


def prepare_run(folders: Folders, task: str, out: Path, overrides: Sequence[str]) -> None:
    """Check every folder and option, then write ``out/params.yaml``; without a profile among the overrides it is ``cpu``.

    Raises:
        InputError: all problems of all folders and options; nothing has been written then.
    """
    from alignflow_core.folders import check_folder

    problems: list[str] = []
    if out.exists() and not out.is_dir():
        problems.append(f"--out {out}: is a file; give a folder")
    if task not in options("task") or task == "phantom":
        valid = tuple(name for name in options("task") if name != "phantom")  # its masks are those of refuge
        raise InputError(*problems, f"--task {task}: not a task for folders of one's own{nearest(task, valid)}")
    settings = [f"task={task}", *([] if any(o.startswith("profile=") for o in overrides) else ["profile=cpu"]), *overrides]
    try:
        layout = folders.layout()
        masks_as = build_project(compose(settings, layout)).task
    except InputError as error:
        problems += error.problems
        masks_as = task_named(task)
    references = [folder for folder in map(folders.reference_dir, folders.targets) if folder is not None]
    for folder in (folders.source, *folders.targets.values(), *references):
        try:
            check_folder(folder, masks_as, labelled=folder not in references)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*problems)
    write_params(out / "params.yaml", settings, layout)


def write_builtin_data(root: Path) -> None:
    """The phantom below ``root/data``, complete or not at all; left alone where it exists."""
    from alignflow_core.phantom import write_phantom

    if (root / "data").exists():
        return
    part = root / ".phantom.part"
    shutil.rmtree(part, ignore_errors=True)
    write_phantom(part)
    (part / "data").rename(root / "data")
    part.rmdir()


def run_all(root: Path, quiet: bool = False) -> Path:
    """Build every artifact of a project that is not up to date, in this process, and track it; returns the report's page.

    A stage interrupted earlier continues where it stopped. One line a stage goes to stderr.
    """
    from alignflow_core.runner import run_stage
    from pipelines.tracking import attempt

    nodes = list(load_project(root / "params.yaml").graph.nodes())
    width = max(len(node_id(stage.name, key)) for stage, key in nodes)
    for number, (stage, key) in enumerate(nodes, 1):
        started = time.monotonic()
        ran = run_stage(root, stage.name, key, quiet=quiet)
        lost = attempt(root, stage.name, key)  # also of a stage found up to date: it may have been interrupted before it was tracked
        if lost:
            print(f"{node_id(stage.name, key)}: {lost}; the same command makes up for it", file=sys.stderr, flush=True)
        if not quiet:
            state = f"built in {time.monotonic() - started:.1f} s" if ran else "up to date"
            print(f"[{number:2d}/{len(nodes)}] {node_id(stage.name, key):{width}}  {state}", file=sys.stderr, flush=True)
    return root / artifact_dir("report", None) / "index.html"
