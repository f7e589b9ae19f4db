"""What DVC calls the version of a folder, for the datasets of MLflow; our own content hash where DVC does not know it.

``dvc.lock`` may be older than an artifact (``alignflow run`` never writes it). It is believed only about a stage whose provenance file on
disk is the one it has recorded: that file holds the content hash of the artifact, and changes with every run.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from alignflow_core.artifact import read_json
from alignflow_core.runner import provenance_file
from alignflow_core.stages import artifact_dir, node_id
from pipelines import dvc_lock

if TYPE_CHECKING:
    from mlflow.entities import Dataset

NodeName = tuple[str, str | None]  # stage and key, as files and trackers spell them
OUTSIDE = "outside the project"
DIGEST_LENGTH = 36  # MLflow's limit, and by luck the length of DVC's "<md5>.dir"


class Versions:
    """Datasets of a project root."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def _lock(self) -> str:
        """Text of ``dvc.lock``; nothing where there is none."""
        file = self.root / "dvc.lock"
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    def artifact(self, node: NodeName, content: str) -> "Dataset":
        """An input artifact with this content hash, named ``align@amber``."""
        file, folder = provenance_file(self.root, *node), artifact_dir(*node).as_posix()
        same = file.exists() and read_json(file)["content"] == content
        return _dataset(node_id(*node), folder, content, self.md5(node, "outs", folder) if same else None)

    def raw(self, provenance: Mapping[str, Any], dotted: str) -> "Dataset":
        """A raw folder or file that the stage of this provenance has read, named by its key of params.yaml."""
        section, _, last = dotted.rpartition(".")
        folder = provenance["params"][section][last]
        return _dataset(dotted, folder, provenance["raw"][dotted], self.md5((provenance["stage"], provenance["key"]), "deps", folder))

    def known(self, node: NodeName) -> bool:
        """Whether the lock speaks of this stage's artifact as it lies here."""
        file = provenance_file(self.root, *node)
        recorded = self._hashes(node, "outs").get(file.relative_to(self.root).as_posix())
        return recorded is not None and file.exists() and recorded == hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()

    def md5(self, node: NodeName, side: str, path: str) -> str | None:
        """The hash of a dependency or an output of a stage, if the lock is to be believed about it."""
        return self._hashes(node, side).get(path) if self.known(node) else None

    def _hashes(self, node: NodeName, side: str) -> dict[str, str]:
        """Path -> hash of the ``deps`` or ``outs`` of a stage."""
        try:
            entry = dvc_lock.entry(self._lock, node_id(*node))
        except yaml.YAMLError:  # being written at this moment
            entry = {}
        return {each["path"]: each["md5"] for each in entry.get(side) or [] if "md5" in each}


def shown(text: str) -> str:
    """A setting or path as a shared record may show it: those that lead out of the project tell of a machine, and can hold names."""
    leads_out = text.startswith("~") or Path(text).is_absolute() or Path(os.path.normpath(text)).parts[:1] == ("..",)
    return OUTSIDE if leads_out else text


def shown_cause(text: str) -> str:
    """Why something is stale, as :func:`shown`."""
    inside = all(shown(word.strip("'\"()[],;")) != OUTSIDE for word in text.split())
    return text if inside else f"something {OUTSIDE} changed; 'alignflow plan' names it"


def _dataset(name: str, path: str, content: str, md5: str | None) -> "Dataset":
    """The source says both hashes, the profile which of them is the digest."""
    from mlflow.entities import Dataset

    source = {"path": shown(path), "content": content} | ({"md5": md5} if md5 else {})
    profile = {"digest": "md5 of DVC" if md5 else "sha256 of AlignFlow, shortened"}
    return Dataset(name, (md5 or content)[:DIGEST_LENGTH], "dvc" if md5 else "artifact", json.dumps(source), profile=json.dumps(profile))
