"""``alignflow target``: add a hospital to a project, take one out, list them. Edits ``params.yaml``, and ``dvc.yaml`` where there is one.

What the other targets are built from stays as it is, so nothing of theirs becomes stale.
"""

from pathlib import Path
from typing import Any

from alignflow_core.config import load_project, read_params, wrong_name
from alignflow_core.errors import InputError
from alignflow_core.folders import check_folder
from alignflow_core.validation import nearest
from pipelines.compose import rewrite_params
from pipelines.local import FOR_MOMENTS, is_moments


def add(root: Path, name: str, references: str, like: str | None = None, domain: Path | None = None,
        labelled: bool = True) -> None:
    """Add a target.

    Args:
        root: project root.
        name: of the target; without ``domain`` and ``like`` a folder ``data/target/NAME`` must be its domain.
        references: folder of its reference images, or file of their moments, or how many to draw from its domain.
        like: target whose way of aligning, arms and (without ``domain``) domain it takes; the first target if not given.
        domain: raw folder of its own images, which only measure; becomes the domain NAME.
        labelled: the domain's images have masks; without them nothing is measured on the target.

    Raises:
        InputError: every problem of names and folders; nothing is written then.
    """
    from alignflow_core.reference_moments import read_moments

    params = read_params(root / "params.yaml")
    project = load_project(root / "params.yaml")
    model = like or next(iter(project.targets))
    problems = []
    if why := wrong_name(name):
        problems.append(f"target '{name}': {why}")
    elif name in project.targets:
        problems.append(f"target '{name}': is there already; remove it first, or choose another name")
    if model not in project.targets:
        raise InputError(*problems, f"--like {model}: not a target{nearest(model, project.targets)}")
    if domain is None and (name in project.domains or (root / "data" / "target" / name).is_dir()):
        domain = root / (project.domains[name].dir if name in project.domains else f"data/target/{name}")
    labelled = labelled and (name not in project.domains or project.domains[name].labelled)
    if domain is None and like is None:
        problems.append(f"target '{name}': has no images to be measured on; give their folder with --domain DIR (and --unlabelled if they have no "
                        f"masks), or with --like T the domain of another target")
    elif domain is not None and name in project.domains and (root / project.domains[name].dir).resolve() != domain.resolve():
        problems.append(f"--domain {domain}: '{name}' is another folder already, {project.domains[name].dir}, which other targets read; "
                        "choose another name")
    path = None if references.isdecimal() else Path(references)
    moments = path is not None and is_moments(path)
    if path is not None and moments:
        try:
            read_moments(path)
        except InputError as error:
            problems += error.problems
    for where, has_masks in ((None if moments else path, False), (domain, labelled)):
        if where is not None:
            try:
                check_folder(where, project.task, labelled=has_masks)
            except InputError as error:
                problems += error.problems
    if problems:
        raise InputError(*problems)
    entry = dict(params["targets"][model]) | {"domain": project.targets[model].domain if domain is None else name, "variant_of": None}
    drawn = dict(entry.get("references", {}))
    nowhere: dict[str, Any] = {"dir": None, "file": None}
    entry["references"] = drawn | nowhere | ({"count": int(references)} if path is None else {"file" if moments else "dir": _place(root, path)})
    if moments:
        entry["align"] = entry.get("align", {}) | FOR_MOMENTS
    if domain is not None:
        params["domains"] = params["domains"] | {name: {"dir": _place(root, domain), "labelled": labelled}}
    _write(root, params | {"targets": params["targets"] | {name: entry}})


def remove(root: Path, name: str) -> list[str]:
    """Take a target out, with its variants and, where no other target uses it, its domain; built artifacts stay on disk.

    Returns:
        names of the targets taken out.

    Raises:
        InputError: no such target, or it is the last.
    """
    params, project = read_params(root / "params.yaml"), load_project(root / "params.yaml")
    if name not in project.targets:
        raise InputError(f"target '{name}': not in {root / 'params.yaml'}{nearest(name, project.targets)}")
    gone = [each for each, target in project.targets.items() if each == name or target.variant_of == name]
    kept = {each: target for each, target in params["targets"].items() if each not in gone}
    if not kept:
        raise InputError(f"target '{name}': is the last one, and a project needs one; add another first")
    used = {project.source, *(target["domain"] for target in kept.values())}
    _write(root, params | {"targets": kept, "domains": {each: value for each, value in params["domains"].items() if each in used}})
    return gone


def listing(root: Path) -> str:
    """The targets, one a line: domain, references, way of aligning."""
    lines = []
    for name, target in load_project(root / "params.yaml").targets.items():
        given = target.references
        references = given.dir or given.file or f"{given.count} drawn from {target.domain} (seed {given.seed})"
        variant = f", variant of {target.variant_of}" if target.variant_of else ""
        lines.append(f"{name}: domain {target.domain}, references {references}, {target.align.reward} on {target.align.encoder}{variant}")
    return "\n".join(lines)


def _place(root: Path, folder: Path) -> str:
    """A folder as ``params.yaml`` names it: relative to the root where it lies below it."""
    folder, root = folder.resolve(), root.resolve()
    return folder.relative_to(root).as_posix() if folder.is_relative_to(root) else str(folder)


def _write(root: Path, params: dict[str, Any]) -> None:
    """Write ``params.yaml`` with its first line kept, then ``dvc.yaml`` if the project has one."""
    from pipelines import dvcfile

    rewrite_params(root / "params.yaml", params, "target")
    if (root / "dvc.yaml").exists():
        dvcfile.write(root)
