"""What reference features are measured with, and whether two sides measure with the same: moments mean nothing to another instrument.

Hashes and settings say what is exactly the same; a made-up image, the probe, says what they cannot: another version of the encoder, altered
statistics.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignflow_core.artifact import json_hash, read_json
from alignflow_core.config import Align, Task
from alignflow_core.errors import InputError
from alignflow_core.pairs import Pairs
from alignflow_core.reference_moments import ReferenceMoments
from alignflow_core.reward.encoders import Standardised

TOLERANCE = 0.05, 0.01  # absolute and relative, of the probe's features: two machines' arithmetic, not two instruments


def instrument_of(settings: Align, task: Task, source: Pairs, labeller: Path, stage1: Path) -> dict[str, Any]:
    """What reference features depend on, as plain JSON data; two sides with equal instruments measure the same.

    Args:
        source: the training pairs that standardise; their manifest has ``image_sha256`` and ``mask_sha256``.
        labeller, stage1: checkpoint folders.
    """
    pseudo = settings.regions == "pseudo"
    plain: dict[str, Any] = json.loads(json.dumps({
        "encoder": settings.encoder, "size": int(source.images.shape[1]), "task": asdict(task), "regions": settings.regions,
        "confidence": settings.confidence if pseudo else None, "source": json_hash(source.table[["image_sha256", "mask_sha256"]].to_numpy().tolist()),
        "labeller": read_json(labeller / "config.json")["weights_sha256"] if pseudo else None,
        "stage1": read_json(stage1 / "config.json")["weights_sha256"] if settings.encoder == "flow" else None}))
    return plain


@torch.no_grad()
def probe_features(encoder: Standardised, size: int, device: torch.device) -> list[Tensor]:
    """Features of one made-up image of smooth blobs and fine noise, [D] each, every region being the whole image."""
    draw = torch.Generator().manual_seed(2604)
    blobs = torch.nn.functional.interpolate(torch.randn(1, 3, 6, 6, generator=draw), size=(size, size), mode="bilinear", align_corners=False)
    image = (0.6 * blobs + 0.1 * torch.randn(1, 3, size, size, generator=draw)).tanh().to(device)
    everywhere = torch.ones(1, len(encoder.moments) - 1, size, size, device=device)
    return [features[0].cpu() for features in encoder(image, everywhere)]


def refuse_other_instrument(given: ReferenceMoments, own: Mapping[str, Any], probe: list[Tensor], origin: str) -> None:
    """Raise :class:`InputError` where the moments were measured with another kit than one of this run would be."""
    differing = [name for name in own if given.instrument.get(name) != own[name]]
    if differing:
        raise InputError(f"{origin}: was measured with another kit (other {', '.join(differing)}); make a kit of this run "
                         "(alignflow reference-kit) and ask for its moments")
    if not same_probe(given.probe, probe):
        raise InputError(f"{origin}: its kit's encoder gives other features than this run's, so it is another version's or was altered; "
                         "make a kit of this run (alignflow reference-kit) and ask for its moments")


def same_probe(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two instruments see the probe alike."""
    absolute, relative = TOLERANCE
    return len(one) == len(other) and all(a.shape == b.shape and torch.allclose(a, b, relative, absolute) for a, b in zip(one, other, strict=True))
