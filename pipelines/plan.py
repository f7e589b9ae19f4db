"""What is stale and why, by the fingerprints on disk.

Dagster knows staleness per partition but shows it neither transitively nor above the partition, and it
does not look at the disk. The fingerprints of :mod:`alignflow_core.runner` do, so they decide here.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignflow_core.artifact import json_hash, read_json, tree_hash
from alignflow_core.config import Project, load_project
from alignflow_core.runner import chosen_files, code_files, listed, provenance_file, raw_dirs, raw_exists, raw_kind, stage_params
from alignflow_core.stages import STAGES, Stage, artifact_dir, node_id

Node = tuple[Stage, str | None]

LISTED = 3  # changed values or files named one by one; more are counted


@dataclass(frozen=True)
class Lane:
    """Nodes that are built one after another in one Dagster run: all of a domain, of a target, what targets share, or the results."""

    job: str
    key: str | None

    def __str__(self) -> str:
        return " ".join([self.job.removeprefix("build_"), *([self.key] if self.key else [])])


def job_of(stage: Stage) -> str:
    """Name of the Dagster job that builds a stage: ``build_domain``, ``build_shared``, ``build_target`` or ``build_results``."""
    if stage.scope != "project":
        return f"build_{stage.scope}"
    fan_in = any(spec.endswith(":all") for spec in stage.inputs)
    return "build_results" if fan_in else "build_shared"


def lanes(nodes: Iterable[Node]) -> dict[Lane, list[Node]]:
    """The nodes by lane, each lane in building order."""
    found: dict[Lane, list[Node]] = {}
    for stage, key in nodes:
        found.setdefault(Lane(job_of(stage), key), []).append((stage, key))
    return found


def upstream_lanes(project: Project, lane: Lane, nodes: Iterable[Node]) -> set[Lane]:
    """The lanes whose artifacts these nodes of a lane read."""
    inputs = {each for stage, key in nodes for each in project.graph.inputs(stage, key).values()}
    return {Lane(job_of(STAGES[name]), key) for name, key in inputs} - {lane}


def stale_nodes(project: Project, root: Path, nodes: Iterable[Node]) -> list[Node]:
    """Those of the nodes that do not fit the project as it lies on disk, and those among them that read such a one."""
    found: dict[str, Node] = {}
    for stage, key in nodes:
        if any(causes(project, root, stage, key)) or any(node_id(*each) in found for each in project.graph.inputs(stage, key).values()):
            found[node_id(stage.name, key)] = (stage, key)
    return list(found.values())


def plan(root: Path) -> list[tuple[str, str]]:
    """Every stale node, after all it depends on, with the cause in words: ``("references@zeiss", "1 reference image replaced")``.

    What depends on a stale node is listed too, though it may turn out up to date once that is rebuilt.

    Raises:
        InputError: ``params.yaml`` is missing or wrong.
    """
    root = root.resolve()
    project = load_project(root / "params.yaml")
    stale: dict[str, str] = {}
    for stage, key in project.graph.nodes():
        reasons = list(causes(project, root, stage, key))
        upstream = dict.fromkeys(node_id(*each) for each in project.graph.inputs(stage, key).values())
        waiting = [node for node in upstream if node in stale]
        if waiting and not reasons:
            reasons = [f"upstream stale: {', '.join(waiting)}"]
        if reasons:
            stale[node_id(stage.name, key)] = "; ".join(reasons)
    return list(stale.items())


def causes(project: Project, root: Path, stage: Stage, key: str | None) -> Iterator[str]:
    """Why an artifact does not fit the project as it lies on disk; nothing where it does."""
    file, folder = provenance_file(root, stage.name, key), root / artifact_dir(stage.name, key)
    if not file.exists():
        yield "not built yet"
        return
    recorded = read_json(file)
    if not folder.is_dir():
        yield "its folder was deleted"
    elif recorded["content"] != tree_hash(folder):
        yield "files of the artifact were altered"
    yield from _changed_params(recorded["params"], stage_params(project, stage, key))
    yield from _changed_code(recorded, code_files(stage.name, chosen_files(project, stage, key).values()))
    for dotted, raw in raw_dirs(project, stage, key, root).items():
        yield from _changed_files(recorded, dotted, raw, root, "reference " if stage.name == "references" else "")
    inputs = {name: provenance_file(root, *node) for name, node in project.graph.inputs(stage, key).items()}
    for name, upstream in inputs.items():
        if upstream.exists() and recorded["inputs"].get(name) != read_json(upstream)["content"]:
            yield f"input {name} {'changed' if name in recorded['inputs'] else 'is new'}"
    gone = recorded["inputs"].keys() - inputs.keys()
    if gone:
        yield f"inputs no longer read: {', '.join(sorted(gone))}"


def _changed_params(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Settings whose values differ, with both values where they are few."""
    changed = list(_differing(before, now))
    if len(changed) > LISTED:
        yield f"params changed: {', '.join(where for where, _, _ in changed)}"
    else:
        yield from (f"{where} changed from {_shown(old)} to {_shown(new)}" for where, old, new in changed)


def _differing(before: Any, now: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, with both values. JSON has turned tuples into lists and keys into text."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        now = {str(key): value for key, value in now.items()}
        for key in sorted(before.keys() | now.keys()):
            yield from _differing(before.get(key), now.get(key), f"{where}.{key}" if where else key)
    elif (list(before) if isinstance(before, tuple) else before) != (list(now) if isinstance(now, tuple) else now):
        yield where, before, now


def _shown(value: Any) -> str:
    """A value as ``params.yaml`` spells it, shortened; a whole section is only named."""
    if isinstance(value, Mapping):
        return "a section"
    text = "null" if value is None else str(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _changed_code(recorded: Mapping[str, Any], now: Mapping[str, str]) -> Iterator[str]:
    """Source files that differ."""
    before = recorded.get("code_files")
    if before is None:  # of an earlier version
        if recorded["code"] != json_hash(now):
            yield "code changed"
        return
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        more = f" and {len(changed) - LISTED} more" if len(changed) > LISTED else ""
        yield f"code changed: {', '.join(changed[:LISTED])}{more}"


def _changed_files(recorded: Mapping[str, Any], dotted: str, raw: Path, root: Path, kind: str) -> Iterator[str]:
    """What happened to the files of a raw folder, or to a raw file: ``2 images added, 1 mask replaced``."""
    place = raw.relative_to(root) if raw.is_relative_to(root) else raw
    if not raw_exists(dotted, raw):
        yield f"raw {raw_kind(dotted)} {place} ({dotted}) is missing"
        return
    content, now = listed(raw)
    if recorded["raw"].get(dotted) == content:
        return
    before = recorded.get("raw_files", {}).get(dotted)
    if before is None:
        yield f"reads other files now, those of {place}"
        return
    if before and not before.keys() & now.keys() and set(before.values()) & set(now.values()):
        yield f"files of {place} changed; which ones is unknown under another site key"
        return
    counts: Counter[tuple[str, str]] = Counter()
    for name in before.keys() | now.keys():
        if before.get(name) != now.get(name):
            counts["added" if name not in before else "removed" if name not in now else "replaced", name.rpartition("/")[0]] += 1
    yield ", ".join(f"{n} {kind}{_noun(folder, n)} {what}" for (what, folder), n in sorted(counts.items(), key=lambda each: each[0][::-1]))


def _noun(folder: str, n: int) -> str:
    noun = {"images": "image", "masks": "mask"}.get(folder, "file")
    return noun if n == 1 else f"{noun}s"
