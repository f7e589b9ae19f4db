"""Seeds by name: every random draw is a function of the project seed and a path of words.

A step's batch depends on ``(seed, stage, step)`` and a pair's noise on ``(seed, pair)``, never on
what was drawn before; resuming needs no generator state, and pair *i* is the same in any batch.
"""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


def derive_seed(*names: object) -> int:
    """63 bits of SHA-256 of the names joined by ``/``; numpy's generators take them all, torch's on a CPU the lower 32."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def normal(shape: "Sequence[int]", draw: "torch.Generator", device: "torch.device") -> "torch.Tensor":
    """Standard normal noise on the device, a function of the CPU generator's state.

    A GPU draws from a generator of its own that ``draw`` seeds: 32 images of 256 px take a core 65 ms, as long as their forward pass takes a GPU.
    """
    import torch

    if device.type == "cpu":
        return torch.randn(*shape, generator=draw)
    seed = int(torch.randint(2**62, (1,), generator=draw))
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def generator(*names: object) -> "torch.Generator":
    """CPU generator seeded by the names; all draws but noise (:func:`normal`) are made by it and moved to the device."""
    import torch  # here, since the tables and the report want a seed and no torch

    return torch.Generator().manual_seed(derive_seed(*names))
