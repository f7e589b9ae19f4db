"""Seeds by name: every random draw is a function of the project seed and a path of words.

A step's batch depends on ``(seed, stage, step)`` and a pair's noise on ``(seed, pair)``, never on
what was drawn before; resuming needs no generator state, and pair *i* is the same in any batch.
"""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(*names: object) -> int:
    """63-bit seed from SHA-256 of the names joined by ``/``."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*names: object) -> "torch.Generator":
    """CPU generator seeded by the names; draws are moved to the device, so all devices agree."""
    import torch  # here, since the tables and the report want a seed and no torch

    return torch.Generator().manual_seed(derive_seed(*names))
