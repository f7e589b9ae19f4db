"""Segmenter architectures: names as ``params.yaml`` spells them -> where each is built.

A new one is one file and one line here (``docs/extending.md``). Standard library only: names are checked without torch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that whoever trains segmenters depends on these files (``stages.source_files`` follows imports)
    from alignflow_core.networks import dpt, segformer, unet  # noqa: F401


@dataclass(frozen=True)
class Architecture:
    """How a segmenter is built, and trained from weights of others.

    From scratch all train at the same rate: at these sizes a smaller one serves a transformer worse. Dice on source validation after 250
    steps on the phantom at 48 px (batch 16, rate 2e-3 | 1e-3): U-Net .936 | –, SegFormer .966 | .947, DPT .927 | .881.

    Attributes:
        build: ``module:function`` of this package, see ``networks/segmenters.py``.
        tuning: factor of ``training.lr`` where it starts from a folder of weights (``network.weights``), which the full rate would
            wash out; ``None`` where it cannot.
    """

    build: str
    tuning: float | None = None


ARCHITECTURES = {
    "unet": Architecture("networks.unet:build"),
    "segformer": Architecture("networks.segformer:build", tuning=0.1),
    "dpt": Architecture("networks.dpt:build", tuning=0.1),
}

UNET = "unet"  # was there first: neither its folders nor its seeds name it


def arm_folder(architecture: str, arm: str) -> str:
    """Where the segmenters of an arm lie, a folder per seed: ``aligned`` or ``segformer/aligned``."""
    return arm if architecture == UNET else f"{architecture}/{arm}"


def prefix(architecture: str, first: str) -> str:
    """Before the name of a number: nothing for the first architecture, ``segformer/`` for another."""
    return "" if architecture == first else f"{architecture}/"
