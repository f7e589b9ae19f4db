"""The one place that opens images and masks from outside. Whatever a file holds, the answer is pixels or a :class:`ReadError`.

Images: JPEG, PNG (8 and 16 bit), TIFF, BMP, GIF of one frame; 1 bit, grey, palette, RGB, RGBA, CMYK; turned as EXIF says.
Masks: the same, read by the task into class numbers.
"""

import contextlib
import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from alignflow_core.config import Task

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".gif")
MAX_BYTES = 256 * 2**20
MAX_PIXELS = 64_000_000
TOO_LARGE = f"has more than {MAX_PIXELS // 10**6} million pixels; make it smaller"
WIDE_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")


class ReadError(Exception):
    """Why a file cannot be used and what to do about it, in one line without the file's name."""


@dataclass(frozen=True)
class Picture:
    """Pixels at the size asked for, with the original's size in pixels (upright) and the SHA-256 of its bytes.

    ``pixels`` is uint8 [H, W, 3] for an image, uint8 [H, W] of class numbers for a mask.
    """

    pixels: np.ndarray
    width: int
    height: int
    sha256: str


def read_image(file: Path, root: Path, size: int | None = None) -> Picture:
    """An image as RGB; ``size`` makes it a square of that side, antialiased.

    16-bit grey is scaled from 0..65535, transparency is laid over black.

    Args:
        file: path below ``root``; a link may not lead out of it.

    Raises:
        ReadError: not a regular file, too large, not one of the formats, several frames, damaged.
    """
    data = read_bytes(file, root)
    image, width, height = _decode(data, size)
    with _decoding():
        if image.mode in WIDE_MODES:
            image = Image.fromarray(_to_8_bit(_wide(image)))
        image = _opaque(image)
        if size is not None:
            image = image.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=2.0)
        return Picture(np.asarray(image), width, height, hashlib.sha256(data).hexdigest())


def read_mask(file: Path, root: Path, task: Task) -> Picture:
    """A mask as class numbers.

    Raises:
        ReadError: as :func:`read_image`; under ``labels`` also values that ``task.values`` does not name, or colour.
    """
    data = read_bytes(file, root)
    image, width, height = _decode(data, None)
    with _decoding():
        values = _label_values(image, task) if task.kind == "labels" else _grey(image)
    return Picture(_classes(values, task), width, height, hashlib.sha256(data).hexdigest())


def resize_classes(classes: np.ndarray, task: Task, size: int) -> np.ndarray:
    """Class numbers uint8 [H, W] -> uint8 [size, size].

    Nested regions (``label >= k``) keep the pixels that they cover by more than half, so they stay nested;
    otherwise each pixel takes the class that covers most of it.
    """
    n = len(task.classes)
    regions = [classes >= k for k in range(1, n + 1)] if task.nested else [classes == k for k in range(n + 1)]
    cover = [np.asarray(Image.fromarray(region.astype(np.uint8) * 255).resize((size, size), Image.Resampling.BOX)) for region in regions]
    if task.nested:
        return np.stack([c > 127 for c in cover]).sum(axis=0, dtype=np.uint8)
    return np.argmax(np.stack(cover), axis=0).astype(np.uint8)


def read_bytes(file: Path, root: Path) -> bytes:
    """Bytes of a regular file of bounded size inside ``root``; :class:`ReadError` otherwise."""
    try:
        if not file.resolve().is_relative_to(root.resolve()):
            raise ReadError("is a link that leads out of the data folder; copy the file in")
        with open(file, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as stream:  # a pipe must not hang the check
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ReadError("is not a regular file; remove it")
            if status.st_size > MAX_BYTES:
                raise ReadError(f"has {status.st_size / 2**20:.0f} MiB, the limit is {MAX_BYTES // 2**20}; make it smaller")
            return stream.read(MAX_BYTES + 1)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise ReadError(f"cannot be opened ({getattr(error, 'strerror', None) or error}); check the file and its permissions") from error


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Turn whatever a decoder throws at bad bytes into :class:`ReadError`; decoders throw nearly anything."""
    try:
        yield
    except ReadError:
        raise
    except Exception as error:
        raise ReadError(f"cannot be decoded ({' '.join(str(error).split())[:120] or type(error).__name__}); export it again") from error


def _decode(data: bytes, size: int | None) -> tuple[Image.Image, int, int]:
    """Decoded upright image, with its upright width and height before any shrinking while decoding."""
    with _decoding(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata; the size limit below is ours
        try:
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.UnidentifiedImageError:
            raise ReadError("is not a JPEG, PNG, TIFF, BMP or GIF image; convert or remove it") from None
        except Image.DecompressionBombError:  # Pillow's own, higher limit
            raise ReadError(TOO_LARGE) from None
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ReadError(TOO_LARGE)
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # cameras append a preview to a JPEG and call it MPO
            raise ReadError(f"holds {frames} frames or pages; save one image a file")
        if image.mode == "F":
            raise ReadError("has floating point pixels, whose range is unknown; save it with 8 or 16 bits")
        if size is not None:
            image.draft(None, (2 * size, 2 * size))  # large JPEGs are decoded at 1/2, 1/4 or 1/8
        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.size == image.size[::-1] and image.getexif().get(0x0112, 1) >= 5:
            width, height = height, width
        return upright, width, height


def _wide(image: Image.Image) -> np.ndarray:
    """Integers [H, W] of a grey image of more than 8 bits."""
    return np.asarray(image).astype(np.int64)


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    """0..65535 -> 0..255, rounded."""
    if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise ReadError("holds values outside 0..65535; save it with 8 or 16 bits")
    return ((values + 128) // 257).astype(np.uint8)


def _opaque(image: Image.Image) -> Image.Image:
    """RGB of an 8-bit image, what is transparent laid over black."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("RGB")


def _grey(image: Image.Image) -> np.ndarray:
    """Luminance uint8 [H, W]; equal channels keep their value. Wide values up to 255 are taken as they are."""
    if image.mode in WIDE_MODES:
        values = _wide(image)
        return values.astype(np.uint8) if values.min(initial=0) >= 0 and values.max(initial=0) <= 255 else _to_8_bit(values)
    return np.asarray(_opaque(image).convert("L"))


def _label_values(image: Image.Image, task: Task) -> np.ndarray:
    """The numbers a label mask stores, [H, W]: palette indices, wide values, or the grey of equal channels."""
    if image.mode == "1":
        return np.asarray(image).astype(np.int64) * (1 if 1 in task.values else 255)
    if image.mode in WIDE_MODES:
        return _wide(image)
    if image.mode in ("L", "P"):
        return np.asarray(image)
    channels = np.asarray(image.convert("RGB"))
    if (channels != channels[..., :1]).any():
        raise ReadError("is a coloured mask; save class numbers as grey or palette values")
    return channels[..., 0]


def _classes(values: np.ndarray, task: Task) -> np.ndarray:
    """File values [H, W] -> class numbers uint8 [H, W]."""
    if task.kind == "binary":
        return (values >= task.threshold).astype(np.uint8)
    if task.kind == "refuge":  # 255 background, 128 disc, 0 cup: thresholds midway
        return (values < 192).astype(np.uint8) + (values < 64).astype(np.uint8)
    found = np.unique(values)
    unknown = [int(v) for v in found if int(v) not in task.values]
    if unknown:
        shown = ", ".join(map(str, unknown[:8])) + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else "")
        raise ReadError(f"has unknown label values {shown}; known: {', '.join(map(str, sorted(task.values)))}; mend the mask or task.values")
    table: np.ndarray = np.array([task.values[int(v)] for v in found], np.uint8)
    return table[np.searchsorted(found, values)]
