"""Reading the arrays that stages hand on: pairs of a domain, reference sets, synthetic pairs."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from alignflow_core.errors import InputError

if TYPE_CHECKING:
    import torch

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Pairs:
    """Images and masks with their ids.

    Attributes:
        images: uint8 [N, H, W, 3].
        masks: uint8 [N, H, W], class numbers, 0 is background; ``None`` where unlabelled.
        ids: one opaque id per row (case id or pair id).
        table: the manifest rows, in the same order.
    """

    images: np.ndarray
    masks: np.ndarray | None
    ids: tuple[str, ...]
    table: pd.DataFrame

    def __len__(self) -> int:
        return len(self.images)

    def select(self, chosen: np.ndarray) -> "Pairs":
        """Rows by boolean mask or index array."""
        table = self.table.loc[chosen] if chosen.dtype == bool else self.table.iloc[chosen]
        return Pairs(self.images[chosen], None if self.masks is None else self.masks[chosen],
                     tuple(table.iloc[:, 0].astype(str)), table.reset_index(drop=True))

    @property
    def labels(self) -> np.ndarray:
        """Masks, or an :class:`InputError` where the set is unlabelled."""
        if self.masks is None:
            raise InputError("these pairs have no masks; give labelled images or leave out the arm that needs them")
        return self.masks


def read_array(file: Path) -> np.ndarray:
    """A ``.npy`` array, mapped read-only, never unpickled."""
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not a readable array ({error}); rebuild the artifact it belongs to") from error


def read_pairs(folder: Path, split: str | None = None) -> Pairs:
    """An artifact folder with ``images.npy``, ``manifest.parquet`` and, if labelled, ``masks.npy``.

    The manifest's first column is the id; row i belongs to array row i. ``split`` keeps the rows of one split.
    """
    table = pd.read_parquet(folder / "manifest.parquet")
    masks = read_array(folder / "masks.npy") if (folder / "masks.npy").exists() else None
    pairs = Pairs(read_array(folder / "images.npy"), masks, tuple(table.iloc[:, 0].astype(str)), table)
    return pairs if split is None else pairs.select((table["split"] == split).to_numpy())


def write_pairs(folder: Path, pairs: Pairs) -> None:
    """Write what :func:`read_pairs` reads."""
    np.save(folder / "images.npy", np.ascontiguousarray(pairs.images))
    if pairs.masks is not None:
        np.save(folder / "masks.npy", np.ascontiguousarray(pairs.masks))
    pairs.table.to_parquet(folder / "manifest.parquet", index=False)


def to_unit(images: np.ndarray) -> "torch.Tensor":
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in [-1, 1]."""
    return unit(to_tensor(images))


def to_tensor(images: np.ndarray) -> "torch.Tensor":
    """uint8 [N, H, W, 3] -> uint8 [N, 3, H, W]: a quarter of what :func:`to_unit` takes, for a device to hold."""
    import torch  # here, since the report reads pairs without torch

    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).contiguous()


def unit(images: "torch.Tensor") -> "torch.Tensor":
    """uint8 [N, C, H, W] -> float32 in [-1, 1]."""
    return images.float().div(127.5).sub(1)


def to_bytes(images: "torch.Tensor") -> np.ndarray:
    """float [N, 3, H, W] in [-1, 1] -> uint8 [N, H, W, 3], clipped and rounded."""
    return images.detach().float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
