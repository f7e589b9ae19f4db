"""The inline runner: raw folders -> report, with neither git nor DVC."""

import itertools
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignflow_core.artifact import exclusive
from alignflow_core.config import Project, Task, build_project, load_project, wrong_name
from alignflow_core.errors import InputError
from alignflow_core.stages import artifact_dir, node_id
from alignflow_core.validation import nearest
from pipelines.compose import RUN_LOCK, compose, options, recompose, write_params
from pipelines.plan import Node

MOMENTS_SUFFIX = ".safetensors"
# Of ``align``: without what needs the references' images, and with a reward that pulls as hard as it must alone (docs/decisions/0009).
FOR_MOMENTS = {"rounds": 1, "recolour": False, "rho": 3.0}


@dataclass(frozen=True)
class Folders:
    """What ``alignflow run`` is given: raw folders with ``images/`` and ``masks/``.

    Attributes:
        source: the source domain; its folder name becomes its name.
        targets: target name -> folder.
        references: how many images to draw from each target, or a folder of reference images, or a file of their moments (``alignflow
            reference-moments``); with several targets a folder with one folder NAME or one file NAME.safetensors for each.
        unlabelled: names of targets without masks, on which nothing is measured.
    """

    source: Path
    targets: Mapping[str, Path]
    references: str
    unlabelled: Collection[str] = ()

    def layout(self) -> dict[str, Any]:
        """``source``, ``domains`` and ``targets`` of params.yaml, with absolute folders.

        A target whose references are moments is aligned in one round without recolouring, which need images, and with a stronger reward.

        Raises:
            InputError: bad target name, or a folder given twice.
        """
        problems = [f"--target {name}={folder}: {why}" for name, folder in self.targets.items() if (why := wrong_name(name))]
        problems += [f"--target {name}={folder}: is the source folder too; give the target's own folder"
                     for name, folder in self.targets.items() if folder.resolve() == self.source.resolve()]
        problems += [f"--unlabelled {name}: not a target{nearest(name, self.targets)}" for name in self.unlabelled if name not in self.targets]
        if len(self.targets) > 1 and Path(self.references).is_file():
            problems.append(f"--references {self.references}: is one file, there are {len(self.targets)} targets; give a folder with "
                            f"NAME{MOMENTS_SUFFIX} for each")
        if problems:
            raise InputError(*problems)
        source = re.sub(r"[^A-Za-z0-9_-]+", "-", self.source.resolve().name).strip("-_")[:50] or "source"
        source = f"{source}-source" if source in self.targets or wrong_name(source) else source
        domains = {source: self.source} | dict(self.targets)
        return {"source": source,
                "domains": {name: {"dir": str(folder.resolve())} | ({"labelled": False} if name in self.unlabelled else {})
                            for name, folder in domains.items()},
                "targets": {name: {"domain": name} | self._references(name) for name in self.targets}}

    def reference_path(self, target: str) -> Path | None:
        """Folder of a target's references, or file of their moments; ``None`` where they are drawn from the target."""
        if self.references.isdecimal():
            return None
        given = Path(self.references)
        if len(self.targets) == 1:
            return given
        return file if (file := given / f"{target}{MOMENTS_SUFFIX}").is_file() else given / target

    def _references(self, target: str) -> dict[str, Any]:
        path = self.reference_path(target)
        if path is None:
            return {"references": {"count": int(self.references)}}
        if not is_moments(path):
            return {"references": {"dir": str(path.resolve())}}
        return {"references": {"file": str(path.resolve())}, "align": dict(FOR_MOMENTS)}


def is_moments(path: Path) -> bool:
    """Whether a path given for references is a file of moments (or was meant to be one)."""
    return path.is_file() or path.suffix == MOMENTS_SUFFIX


def task_named(name: str, overrides: Sequence[str] = ()) -> Task:
    """The task of that name, as ``conf/task`` and the overrides say it."""
    if name not in options("task"):
        raise InputError(f"--task {name}: unknown task{nearest(name, options('task'))}")
    anywhere: dict[str, Any] = {"source": "a", "domains": {"a": {"dir": "a"}, "b": {"dir": "b"}}, "targets": {"b": {"domain": "b"}}}
    return build_project(compose([f"task={name}", *overrides], anywhere)).task


def wrong_task(task: str, overrides: Sequence[str]) -> list[str]:
    """What is wrong with a task for folders of one's own; nothing if it is fine."""
    valid = tuple(name for name in options("task") if name != "phantom")  # which brings data of its own; its masks are those of refuge
    problems = [] if task in valid else [f"--task {task}: not a task for folders of one's own{nearest(task, valid)}"]
    return problems + [f"{override}: the task is said twice; give --task alone" for override in overrides if override.startswith("task=")]


def prepare_run(folders: Folders, task: str, out: Path, overrides: Sequence[str],
                lacking: Callable[[Project], list[str]] = lambda project: []) -> None:
    """Check every folder and option, then write ``out/params.yaml``; without a profile among the overrides it is ``cpu``.

    Variants that it has already stay. ``lacking``: problems that only the caller has with the settings, told with all others.

    Raises:
        InputError: all problems of all folders, files of moments and options, or other domains or targets there; nothing has been written then.
    """
    from alignflow_core.folders import check_folder
    from alignflow_core.reference_moments import read_moments

    problems: list[str] = []
    if out.exists() and not out.is_dir():
        problems.append(f"--out {out}: is a file; give a folder")
    if wrong := wrong_task(task, overrides):
        raise InputError(*problems, *wrong)
    settings = [f"task={task}", *([] if any(o.startswith("profile=") for o in overrides) else ["profile=cpu"]), *overrides]
    try:
        layout = _unless_asked_otherwise(folders.layout(), overrides)
        project = build_project(recompose(out / "params.yaml", settings, layout))
        problems += lacking(project)
        masks_as = project.task
    except InputError as error:
        problems += error.problems
        masks_as = task_named(task)
    without = [name for name, folder in folders.targets.items()
               if name not in folders.unlabelled and folder.is_dir() and not (folder / "masks").is_dir()]
    given = [path for path in map(folders.reference_path, folders.targets) if path is not None]
    references = [path for path in given if not is_moments(path)]
    for file in (path for path in given if is_moments(path)):
        try:
            read_moments(file)
        except InputError as error:
            problems += error.problems
    problems += [f"--target {name}={folder}: has no masks/, by which results are measured; add them, or take 'alignflow run --unlabelled {name}'"
                 for name, folder in folders.targets.items() if name in without]
    checked = {folders.source: True} | {folder: name not in folders.unlabelled for name, folder in folders.targets.items() if name not in without}
    for folder, labelled in (checked | dict.fromkeys(references, False)).items():
        try:
            check_folder(folder, masks_as, labelled=labelled)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*problems)
    write_params(out / "params.yaml", settings, layout)


def _unless_asked_otherwise(layout: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The layout without those settings for moments that an override speaks of: that one counts, or the validation says why it cannot be."""
    asked = {override.partition("=")[0] for override in overrides}
    targets = {name: target | {"align": {key: value for key, value in target["align"].items() if f"align.{key}" not in asked}}
               for name, target in layout["targets"].items() if "align" in target}
    return layout | {"targets": layout["targets"] | targets}


def build_for_kit(root: Path, target: str | None, quiet: bool = False) -> str:
    """Build what a reference kit is made of where it is not up to date: source data, labeller, for ``encoder: flow`` the painter.

    Returns:
        the target: the one given, or the only one that is no variant.

    Raises:
        InputError: unknown target, or none given where there are several.
    """
    from alignflow_core.runner import run_stage
    from alignflow_core.stages import STAGES

    project = load_project(root / "params.yaml")
    names = [name for name, each in project.targets.items() if each.variant_of is None]
    if target is None and len(names) > 1:
        raise InputError(f"{root}: has the targets {', '.join(names)}; say with --target whose way of aligning the kit is for")
    chosen = target or names[0]
    if chosen not in project.targets:
        raise InputError(f"--target {chosen}: not a target of {root}{nearest(chosen, project.targets)}")
    needed = project.graph.inputs(STAGES["align"], chosen)
    wanted = ["data:source", "labeller", *(["image_flow"] if project.targets[chosen].align.encoder == "flow" else [])]
    for name, key in (needed[each] for each in wanted):
        if name == "comparator" and (base := project.comparators[str(key)].base):
            run_stage(root, "comparator_base", base, quiet=quiet)
        run_stage(root, name, key, quiet=quiet)
    return chosen


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


def run_all(root: Path, quiet: bool = False, jobs: int | None = None) -> Path:
    """Build every artifact of a project that is not up to date, and track it; returns the report's page.

    Stages that do not need each other are built side by side, ``jobs`` at once (as many as the cores hold ``machine.threads`` if not given; one
    is built in this process). A stage interrupted earlier continues where it stopped. One line a stage goes to stderr.

    Raises:
        InputError: another command is building this project; nothing is built then.
    """
    with exclusive(root / RUN_LOCK):
        return _run_all(root, quiet, jobs)


def _run_all(root: Path, quiet: bool, jobs: int | None) -> Path:
    """:func:`run_all`, alone on its project."""
    from pipelines.tracking import attempt
    from pipelines.workers import build_side_by_side, default_jobs

    project = load_project(root / "params.yaml")
    nodes = list(project.graph.nodes())
    width, count = max(len(node_id(stage.name, key)) for stage, key in nodes), itertools.count(1)

    def built(node: Node, ran: bool, seconds: float) -> None:
        name = node_id(node[0].name, node[1])
        lost = attempt(root, node[0].name, node[1])  # also of a stage found up to date: it may have been interrupted before it was tracked
        if lost:
            print(f"{name}: {lost}; the same command makes up for it", file=sys.stderr, flush=True)
        if not quiet:
            state = f"built in {seconds:.1f} s" if ran else "up to date"
            print(f"[{next(count):2d}/{len(nodes)}] {name:{width}}  {state}", file=sys.stderr, flush=True)

    jobs = jobs or default_jobs(project)
    if jobs > 1:
        build_side_by_side(root, project, jobs, quiet, built)
    else:
        from alignflow_core.runner import run_stage

        for stage, key in nodes:
            started = time.monotonic()
            built((stage, key), run_stage(root, stage.name, key, quiet=quiet), time.monotonic() - started)
    return root / artifact_dir("report", None) / "index.html"
