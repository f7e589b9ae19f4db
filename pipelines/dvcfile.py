"""``dvc.yaml`` written from the stage registry: ``python -m pipelines.dvcfile [--check]``.

DVC and Dagster so share one graph. Every key of a stage is an entry of its ``foreach``, hence names
like ``align@amber``; an entry depends only on its own keys of ``params.yaml``, so that changing one
target leaves the others fresh.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from alignflow_core.config import Project, load_project
from alignflow_core.errors import InputError
from alignflow_core.runner import chosen_files, code_hash, provenance_file
from alignflow_core.stages import PACKAGE_DIR, STAGES, Stage, artifact_dir, source_files
from pipelines.compose import write_text

HEADER = "# Written from alignflow_core/stages.py and params.yaml by 'python -m pipelines.dvcfile'; do not edit.\n"

COMPARISON_PLOT = {"x": "mean", "y": "arm", "template": "bar_horizontal", "title": "Comparison (mean over the test images)"}


def render(project: Project, root: Path = Path(".")) -> str:
    """Text of ``dvc.yaml`` for a project.

    Args:
        project: its configuration.
        root: project root. Where the package lies inside it, stages depend on their source files; an installed
            package is named by the hash of its code in the command instead, which DVC compares as well.
    """
    artifacts = [artifact_dir(stage.name, key) for stage, key in project.graph.nodes()]
    return HEADER + yaml.safe_dump({
        "stages": {stage.name: _stage(project, stage, root.resolve()) for stage in project.graph.stages()},
        "metrics": [f"{folder.as_posix()}/metrics.json" for folder in artifacts],
        "plots": [{f"{artifact_dir('compare', None).as_posix()}/comparison.csv": COMPARISON_PLOT}],
    }, sort_keys=False, width=150)


def _stage(project: Project, stage: Stage, root: Path) -> dict[str, Any]:
    """One entry under ``stages:``; ``${key}`` and ``${item.…}`` are filled in by DVC."""
    key = None if stage.scope == "project" else "${key}"
    option = "" if key is None else f" --{stage.scope} {key}"
    sources, mark = _sources(stage, root)
    out = artifact_dir(stage.name, key)
    entry = {
        "desc": stage.description,
        "cmd": f"python -m alignflow_core stage {stage.name}{option}{mark}",
        "deps": [*_inputs(project, stage, key), *(["${item.raw}"] if stage.raw else []), *sources],
        "params": [*(dotted.replace("{key}", "${key}") for dotted in stage.params),
                   *(f"${{item.{word}_by}}" for word in _project_wide(stage))],
        "outs": [out.as_posix(), provenance_file(Path(), stage.name, key).as_posix()],
    }
    if key is None:
        return entry
    return {"foreach": {each: _item(project, stage, each, root) for each in project.graph.keys(stage) if each}, "do": entry}


def _project_wide(stage: Stage) -> dict[str, str]:
    """What a target chooses by name and a whole project may choose for an experiment (the stage itself reads the target's entry, resolved):
    the project's key -> the target's."""
    return {dotted.rpartition(".")[2]: dotted for dotted in stage.chosen} if stage.scope == "target" else {}


def _inputs(project: Project, stage: Stage, key: str | None) -> list[str]:
    """Artifact folders a stage reads."""
    found = []
    for spec in stage.inputs:
        name, _, which = spec.partition(":")
        if which == "all":
            found += [artifact_dir(name, each) for each in project.graph.keys(STAGES[name])]
        elif which in ("own", "painter"):
            found.append(Path("${item." + which + "}"))
        elif which:
            found.append(artifact_dir(name, project.source if which == "source" else "${item.domain}"))
        else:
            found.append(artifact_dir(name, None if STAGES[name].scope == "project" else key))
    return [folder.as_posix() for folder in found]


def _item(project: Project, stage: Stage, key: str, root: Path) -> dict[str, str]:
    """What ``${item.…}`` stands for: the target's domain, the raw folder or file, what it paints with, the files of what it chooses by name
    and the setting that may choose it.

    References drawn from their domain have no folder of their own; the domain's stands in for it. For a comparator without a base
    a file of the source's does, on which it depends anyway.
    """
    if stage.scope == "domain":
        return {"raw": project.domains[key].dir}
    found = {"domain": project.source}
    if stage.scope == "target":
        found["domain"], references = project.targets[key].domain, project.targets[key].references
        found |= {"raw": references.dir or references.file or project.domains[found["domain"]].dir} if stage.raw else {}
    inputs = project.graph.inputs(stage, key)
    for name, _, which in (spec.partition(":") for spec in stage.inputs):
        if which in ("own", "painter"):
            found[which] = (artifact_dir(*inputs[name]) if name in inputs else artifact_dir("data", project.source) / "metrics.json").as_posix()
    # an experiment leaves a variant alone, which so depends on its own entry only
    for word, dotted in _project_wide(stage).items():
        found[f"{word}_by"] = dotted.replace("{key}", key) if project.targets[key].variant_of else word
    chosen = chosen_files(project, stage, key)
    if PACKAGE_DIR.is_relative_to(root):
        return found | {name: (PACKAGE_DIR / file).relative_to(root).as_posix() for name, file in chosen.items()}
    return found | ({"code": code_hash(stage.name, chosen.values())[:12]} if chosen else {})


def _sources(stage: Stage, root: Path) -> tuple[list[str], str]:
    """Source files as dependencies, or a shell comment that pins an installed package."""
    if PACKAGE_DIR.is_relative_to(root):
        files = [(PACKAGE_DIR / name).relative_to(root).as_posix() for name in source_files(stage.name)]
        return [*files, *(f"${{item.{dotted.rpartition('.')[2]}}}" for dotted in stage.chosen)], ""
    return [], f"  # code {'${item.code}' if stage.chosen else code_hash(stage.name)[:12]}"


def write(root: Path) -> bool:
    """Write ``dvc.yaml`` under ``root``; returns whether it changed."""
    text, file = render(load_project(root / "params.yaml"), root), root / "dvc.yaml"
    if file.exists() and file.read_text(encoding="utf-8") == text:
        return False
    write_text(file, text)
    return True


def is_current(root: Path) -> bool:
    """Whether ``dvc.yaml`` says what registry and ``params.yaml`` say."""
    file = root / "dvc.yaml"
    return file.exists() and file.read_text(encoding="utf-8") == render(load_project(root / "params.yaml"), root)


def refuse_outdated(root: Path) -> None:
    """Raise :class:`InputError` where ``dvc.yaml`` is not what registry and ``params.yaml`` say: DVC would compare with the wrong things."""
    if not is_current(root):
        raise InputError(f"{root / 'dvc.yaml'}: out of date; run 'python -m pipelines.dvcfile' there")


def main(arguments: list[str] | None = None) -> int:
    """Write ``dvc.yaml``; with ``--check`` only compare and exit with 3 where it is out of date."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.dvcfile", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 3 if dvc.yaml is out of date")
    parser.add_argument("--root", type=Path, default=Path("."), help="project root with params.yaml (default: here)")
    options = parser.parse_args(arguments)
    try:
        if not options.check:
            print(f"{options.root / 'dvc.yaml'}: {'written' if write(options.root) else 'unchanged'}")
        elif not is_current(options.root):
            print(f"{options.root / 'dvc.yaml'}: out of date; run 'python -m pipelines.dvcfile'", file=sys.stderr)
            return 3
    except InputError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
