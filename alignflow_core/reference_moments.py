"""A reference set as one file of feature moments: what a hospital hands over in place of its images (``docs/reference-kit.md``).

The file holds, for the aligning and for the held-out part, count, mean and variance of the standardised features of the whole image and of
each region, and nothing per image: no pixels, no file names, no hashes of images. It also says what it was measured with (the *instrument*), so
that no painter is aligned to moments of other features. safetensors, read as untrusted data.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from alignflow_core.artifact import write_whole
from alignflow_core.errors import InputError
from alignflow_core.readers import ReadError, read_bytes
from alignflow_core.reference_roles import ROLES
from alignflow_core.reward.moments import Moments

FORMAT = "alignflow reference moments 1"
METADATA = "alignflow"  # safetensors' own metadata hold text by name: JSON under this one
MOMENTS_FILE = "moments.safetensors"  # in the artifact of stage ``references``
LEAST_IMAGES = 5
MAX_BYTES = 64 * 2**20
REMEDY = "ask for the file again (alignflow reference-moments)"

Sets = list[Moments | None]  # of the whole image, then of each region; ``None`` where no image has the region


@dataclass(frozen=True)
class ReferenceMoments:
    """What is known of a reference set without its images.

    Attributes:
        instrument: what the features depend on, see ``reference_instrument.py``.
        n_images: by role.
        sets: by role; a held-out part may be missing.
        probe: standardised features of a made-up image, whole and regions, each [D]: two instruments that agree here are the same.
    """

    instrument: Mapping[str, Any]
    n_images: Mapping[str, int]
    sets: Mapping[str, Sets]
    probe: list[Tensor]


def write_moments(file: Path, known: ReferenceMoments) -> None:
    """Write the file; the same moments always give the same bytes."""
    tensors: dict[str, np.ndarray] = {f"probe/{i}": value.numpy() for i, value in enumerate(known.probe)}
    for role, sets in known.sets.items():
        for i, each in enumerate(sets):
            if each is not None:
                tensors |= {f"{role}/{i}/count": np.array([each.count], np.int64), f"{role}/{i}/mean": each.mean.cpu().numpy(),
                            f"{role}/{i}/variance": each.variance.cpu().numpy()}
    facts = {"format": FORMAT, "instrument": dict(known.instrument), "n_images": dict(known.n_images)}
    # Several entries of metadata come in any order; one keeps the bytes the same.
    told = {METADATA: json.dumps(facts | {"sha256": _digest(tensors, facts)}, sort_keys=True)}
    write_whole(file, save(tensors, told))


def read_moments(file: Path) -> ReferenceMoments:
    """Read and check a file of moments, whoever wrote it.

    Raises:
        InputError: not such a file, damaged, altered, or of fewer than five images.
    """
    try:
        data = read_bytes(file, file.parent)
    except ReadError as error:
        raise InputError(f"{file}: {error}") from error
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"has {len(data) / 2**20:.0f} MiB, moments have less than {MAX_BYTES // 2**20}")
        tensors, facts = _parsed(data)
        return _checked(tensors, facts)
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{file}: is no intact file of reference moments ({reason}); {REMEDY}") from error


def _parsed(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and facts of safetensors bytes whose checksum is right; nothing but 1-D float32 and int64 is accepted."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    facts = json.loads(header.pop("__metadata__")[METADATA])
    if facts.get("format") != FORMAT:
        raise ValueError(f"format is not '{FORMAT}'")
    if any(each["dtype"] not in ("F32", "I64") or len(each["shape"]) != 1 for each in header.values()):
        raise ValueError("holds other tensors than moments")
    tensors = load(data)
    if facts.get("sha256") != _digest(tensors, {name: value for name, value in facts.items() if name != "sha256"}):
        raise ValueError("its content is not what its checksum says")
    return tensors, facts


def _checked(tensors: dict[str, np.ndarray], facts: Mapping[str, Any]) -> ReferenceMoments:
    """The record that these tensors spell; every tensor is used and every number is possible."""
    n_images, left = dict(facts["n_images"]), dict(tensors)
    probe = [_vector(left.pop(f"probe/{i}")) for i in range(sum(name.startswith("probe/") for name in tensors))]
    if not set(n_images) <= set(ROLES) or "align" not in n_images or not all(type(n) is int and n >= 1 for n in n_images.values()):
        raise ValueError("its numbers of images are not numbers of images")
    if sum(n_images.values()) < LEAST_IMAGES:
        raise ValueError(f"is of fewer than {LEAST_IMAGES} images")
    sets: dict[str, Sets] = {role: [] for role in n_images}
    for role, found in sets.items():
        for i, like in enumerate(probe):
            if f"{role}/{i}/mean" not in left:
                found.append(None)
                continue
            count = left.pop(f"{role}/{i}/count").tolist()[0]
            mean, variance = (_vector(left.pop(f"{role}/{i}/{name}")) for name in ("mean", "variance"))
            if mean.shape != like.shape or variance.shape != like.shape or (variance < 0).any() or not 1 <= count <= n_images[role]:
                raise ValueError(f"moments {role}/{i} are not those of a set of images")
            found.append(Moments(count, mean, variance))
        if not found or found[0] is None or found[0].count != n_images[role]:
            raise ValueError(f"lacks the moments of whole images of part {role}")
    if left:
        raise ValueError("holds other tensors than moments")
    return ReferenceMoments(dict(facts["instrument"]), n_images, sets, probe)


def _vector(values: np.ndarray) -> Tensor:
    """A finite float32 vector."""
    if values.dtype != np.float32 or not np.isfinite(values).all():
        raise ValueError("holds numbers that are not finite")
    return torch.from_numpy(np.array(values))


def _digest(tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> str:
    """SHA-256 over facts and tensors: finds damage and careless edits; it is no signature."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"\0{name}\0{tensors[name].dtype}\0{tensors[name].shape}\0".encode() + np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()
