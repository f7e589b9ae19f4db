"""Ingest of large JPEGs (decode, check, hash, resize) against MONAI's LoadImage and Resize, which neither check nor hash."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.row import Row, Skipped, compare, in_turn, missing

NUMBERS = (9,)
N, SIDE, SIZE, REPEATS = 4, 2000, 128, 5
NAME = f"ingest of a {SIDE}² JPEG to {SIZE}²"


def rows() -> Iterator[Row | Skipped]:
    """A reading alone, and all that stage ``data`` does with a file: it is read once, its pixels written while the rest is still being checked."""
    import torch

    from alignflow_core.config import Task
    from alignflow_core.data import _arrays
    from alignflow_core.folders import check_folder
    from alignflow_core.readers import read_image

    torch.set_num_threads(1)
    names = {"read": f"{NAME}, against MONAI", "stage": f"{NAME}, with all of stage data, against MONAI"}
    why = missing("monai")
    if why:
        yield from (Skipped(name, why) for name in names.values())
        return
    from monai.transforms import Compose, LoadImage, Resize

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as written:
        root = Path(folder)
        files = photographs(root)
        theirs = Compose([LoadImage(image_only=True, ensure_channel_first=True), Resize((SIZE, SIZE))])
        ours, peer = read_image(files[0], root, SIZE).pixels, np.asarray(theirs(files[0])).transpose(2, 1, 0)
        assert np.abs(ours.astype(float) - peer).mean() < 3, "not the same picture"

        def stage() -> None:
            with _arrays(Task(), SIZE, Path(written)) as (keep, _):
                check_folder(root, Task(), labelled=False, size=SIZE, keep=keep)

        once, whole, peers = ([seconds / N for seconds in taken] for taken in in_turn(
            REPEATS, lambda: [read_image(file, root, SIZE) for file in files], stage, lambda: [theirs(file) for file in files]))
    yield compare(names["read"], once, peers, "s", 0.2)
    yield compare(names["stage"], whole, peers, "s", 0.2)


def photographs(folder: Path) -> list[Path]:
    """Smooth colours with grain, as cameras save them."""
    from PIL import Image

    draw = np.random.default_rng(0)
    files = []
    for number in range(N):
        smooth = Image.fromarray(draw.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        grained = np.asarray(smooth) + draw.normal(0, 6, (SIDE, SIDE, 1))
        files.append(folder / f"{number}.jpg")
        Image.fromarray(grained.clip(0, 255).astype(np.uint8)).save(files[-1], quality=92)
    return files
