"""Built-in data: fundus-like images of one source and three target cameras, with disc and cup masks.

The anatomy (disc, cup, vessels, tissue texture) has one law for every camera; a camera decides colour, illumination,
contrast between regions, tone, blur and noise. Its light is steady up to a few per cent from image to image, so ten
images say what it is like. Measured at 64 px over four seeds: a segmenter trained on the source has a mean Dice
of .97 there, but .34 to .80 on amber, .24 to .45 on dim and .40 to .65 on violet; strong colour augmentation brings .86
to .90, .94 and .94; one segmenter trained on the target itself has .97 on amber and .95 on dim.

The files are the same bytes on every machine: draws are raw words of PCG64, arithmetic is elementwise float64
``+ - * / sqrt floor`` (exactly rounded by IEEE 754, in a fixed order; no exp, no sums whose order is the processor's),
and the PNG encoder stores instead of compressing. Our choice; the paper has no such data.

``python -m alignflow_core.phantom DIR`` writes the folder.
"""

import hashlib
import struct
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Colour = tuple[float, float, float]

N_SOURCE, N_TARGET, N_REFERENCES = 220, 160, 10
BACKGROUND, RIM, CUP = 255, 128, 0  # REFUGE encoding of the mask files


@dataclass(frozen=True)
class Camera:
    """What a camera makes of the anatomy. Colours are RGB in [0, 1]; lengths are in half image widths.

    Attributes:
        tissue, rim, cup: colours of the three regions.
        blood: transmission of a vessel per channel.
        edge: half width of the soft transition between regions.
        tilt, vignette: relative loss of light across the image and towards its corners.
        tone: 0 is linear; above, ``x (1 + tone) / (1 + tone x)`` lifts the shadows.
        blur: passes of the binomial filter 1-2-1 at 96 pixels.
        noise: standard deviation of the sensor noise.
    """

    tissue: Colour
    rim: Colour
    cup: Colour
    blood: Colour
    edge: float
    tilt: float
    vignette: float
    tone: float
    blur: int
    noise: float


SOURCE, TARGETS = "standard", ("amber", "dim", "violet")
CAMERAS = {
    "standard": Camera((0.58, 0.30, 0.16), (0.80, 0.52, 0.28), (0.92, 0.76, 0.52), (0.72, 0.48, 0.55), 0.05, 0.10, 0.15, 0.0, 1, 0.015),
    "amber": Camera((0.68, 0.48, 0.10), (0.78, 0.57, 0.12), (0.90, 0.76, 0.32), (0.78, 0.54, 0.67), 0.05, 0.12, 0.15, 0.1, 2, 0.020),
    "dim": Camera((0.30, 0.13, 0.09), (0.39, 0.21, 0.12), (0.52, 0.38, 0.23), (0.79, 0.63, 0.69), 0.06, 0.20, 0.30, 0.2, 3, 0.015),
    "violet": Camera((0.56, 0.29, 0.19), (0.67, 0.43, 0.41), (0.84, 0.70, 0.66), (0.68, 0.55, 0.58), 0.05, 0.12, 0.15, 0.0, 2, 0.020),
}


class Draws:
    """Random numbers of one image, a function of its name alone."""

    def __init__(self, name: str) -> None:
        self._words = np.random.PCG64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))

    def unit(self, *shape: int) -> np.ndarray:
        """Uniform in [0, 1): the upper 53 bits of a word."""
        size = 1
        for length in shape:
            size *= length
        return ((self._words.random_raw(size) >> np.uint64(11)).astype(np.float64) / 2.0**53).reshape(shape)

    def between(self, low: float, high: float) -> float:
        """One uniform number."""
        return low + (high - low) * float(self.unit(1)[0])

    def normal(self, *shape: int) -> np.ndarray:
        """Near standard normal: twelve uniforms less six."""
        total = self.unit(*shape)
        for _ in range(11):
            total = total + self.unit(*shape)
        return total - 6.0


@dataclass(frozen=True)
class Anatomy:
    """One eye on the pixel grid, float64 [H, W] each.

    ``disc`` and ``cup`` are distances from the border, positive inside; ``vessels`` is coverage in [0, 1];
    ``texture`` is a relative brightness around 0.
    """

    disc: np.ndarray
    cup: np.ndarray
    vessels: np.ndarray
    texture: np.ndarray


def draw_anatomy(draws: Draws, x: np.ndarray, y: np.ndarray) -> Anatomy:
    """Draw an eye; ``x``, ``y`` are pixel centres in [-1, 1], y downwards."""
    centre = draws.between(-0.16, 0.16), draws.between(-0.16, 0.16)
    height = draws.between(0.42, 0.62)
    width = height * draws.between(0.82, 1.0)
    disc = _blob(draws, x, y, centre, (width, height), 0.05)
    ratio = draws.between(0.38, 0.72)
    slack = 1.0 - ratio
    cup_centre = (centre[0] + width * slack * draws.between(-0.3, 0.3), centre[1] + height * slack * draws.between(-0.3, 0.3))
    cup = _blob(draws, x, y, cup_centre, (width * ratio * draws.between(0.9, 1.05), height * ratio), 0.07)
    texture = 0.5 * _value_noise(draws, x, y, 4) + 0.3 * _value_noise(draws, x, y, 9) + 0.2 * _value_noise(draws, x, y, 20)
    return Anatomy(disc, np.minimum(cup, disc - 0.04), _vessels(draws, x, y, cup_centre), texture)


def _blob(draws: Draws, x: np.ndarray, y: np.ndarray, centre: tuple[float, float], axes: tuple[float, float], wobble: float) -> np.ndarray:
    """Border distance of a tilted ellipse with a little second and third harmonic."""
    half_tangent = draws.between(-0.15, 0.15)
    cos = (1.0 - half_tangent * half_tangent) / (1.0 + half_tangent * half_tangent)
    sin = 2.0 * half_tangent / (1.0 + half_tangent * half_tangent)
    dx, dy = x - centre[0], y - centre[1]
    u, v = (cos * dx + sin * dy) / axes[0], (cos * dy - sin * dx) / axes[1]
    radius = np.sqrt(u * u + v * v) + 1e-9
    c, s = u / radius, v / radius
    c2, s2 = c * c - s * s, 2.0 * c * s
    border = 1.0 + wobble * (draws.between(-0.7, 0.7) * c2 + draws.between(-0.7, 0.7) * s2
                             + draws.between(-0.7, 0.7) * (c * c2 - s * s2) + draws.between(-0.7, 0.7) * (s * c2 + c * s2))
    return (border - radius) * (0.5 * (axes[0] + axes[1]))


def _value_noise(draws: Draws, x: np.ndarray, y: np.ndarray, cells: int) -> np.ndarray:
    """Smooth noise in about [-1, 1]: random knots, smoothstep between them."""
    knots = 2.0 * draws.unit(cells + 1, cells + 1) - 1.0
    u, v = (x + 1.0) * (0.5 * cells), (y + 1.0) * (0.5 * cells)
    column, row = np.floor(u), np.floor(v)
    a, b = _smooth(u - column), _smooth(v - row)
    i, j = row.astype(np.intp), column.astype(np.intp)
    upper = knots[i, j] + a * (knots[i, j + 1] - knots[i, j])
    lower = knots[i + 1, j] + a * (knots[i + 1, j + 1] - knots[i + 1, j])
    return upper + b * (lower - upper)


def _vessels(draws: Draws, x: np.ndarray, y: np.ndarray, centre: tuple[float, float]) -> np.ndarray:
    """Coverage of two upper and two lower arcades with a branch each, drawn as beads along quadratic curves."""
    cover = np.zeros_like(x)
    root = centre[0] - draws.between(0.0, 0.10), centre[1] + draws.between(-0.05, 0.05)
    for vertical in (-1.0, 1.0):
        for sideways in (-1.0, 1.0):
            bend = root[0] + sideways * draws.between(0.0, 0.25), root[1] + vertical * draws.between(0.35, 0.75)
            end = root[0] + sideways * draws.between(0.5, 1.4), root[1] + vertical * draws.between(0.9, 1.5)
            thickness = draws.between(0.030, 0.055)
            trunk = _curve(root, bend, end, 48)
            start = trunk[int(draws.between(12, 30))]
            tip = start[0] - sideways * draws.between(0.1, 0.7), start[1] + vertical * draws.between(0.3, 0.9)
            knee = 0.5 * (start[0] + tip[0]) + draws.between(-0.2, 0.2), 0.5 * (start[1] + tip[1]) + draws.between(-0.2, 0.2)
            for points, scale in ((trunk, 1.0), (_curve(start, knee, tip, 30), 0.65)):
                for k, (px, py) in enumerate(points):
                    width = thickness * scale * (1.0 - 0.5 * k / len(points))
                    dx, dy = x - px, y - py
                    np.maximum(cover, 1.4 - 1.4 * (dx * dx + dy * dy) / (width * width), out=cover)
    return np.minimum(cover, 1.0)


def _curve(start: tuple[float, float], bend: tuple[float, float], end: tuple[float, float], n: int) -> list[tuple[float, float]]:
    """Points of a quadratic Bézier curve."""
    times = [k / n for k in range(n)]
    return [tuple((1.0 - t) * (1.0 - t) * start[i] + 2.0 * t * (1.0 - t) * bend[i] + t * t * end[i] for i in (0, 1))  # type: ignore[misc]
            for t in times]


def _smooth(value: np.ndarray) -> np.ndarray:
    """Smoothstep of a value cut to [0, 1]."""
    value = np.minimum(np.maximum(value, 0.0), 1.0)
    return value * value * (3.0 - 2.0 * value)


def photograph(draws: Draws, camera: Camera, eye: Anatomy, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Picture of an eye, uint8 [H, W, 3]."""
    size = x.shape[0]
    in_disc = _smooth(0.5 + eye.disc / (2.0 * camera.edge))
    in_cup = _smooth(0.5 + eye.cup / (2.6 * camera.edge))
    tilt_x, tilt_y = draws.between(-camera.tilt, camera.tilt), draws.between(-camera.tilt, camera.tilt)
    light = (1.0 + tilt_x * x + tilt_y * y - camera.vignette * 0.5 * (x * x + y * y)) * draws.between(0.94, 1.06)
    relief = 1.0 + (0.10 - 0.06 * in_disc) * eye.texture
    contrast = draws.between(0.88, 1.12)
    channels = []
    for tissue, rim, cup, blood in zip(camera.tissue, camera.rim, camera.cup, camera.blood, strict=True):
        colour = tissue + contrast * ((rim - tissue) * in_disc + (cup - rim) * in_cup)
        value = colour * relief * (1.0 - (1.0 - blood) * eye.vessels) * light * draws.between(0.97, 1.03)
        value = value * (1.0 + camera.tone) / (1.0 + camera.tone * value)
        for _ in range(max(1, int(camera.blur * (size / 96.0) * (size / 96.0) + 0.5))):
            value = _blurred(value)
        value = value + camera.noise * draws.normal(size, size)
        channels.append(np.floor(np.minimum(np.maximum(value, 0.0), 1.0) * 255.0 + 0.5))
    return np.stack(channels, axis=-1).astype(np.uint8)


def _blurred(value: np.ndarray) -> np.ndarray:
    """One pass of the 1-2-1 filter along both axes, edges repeated."""
    wide = np.concatenate([value[:, :1], value, value[:, -1:]], axis=1)
    value = (wide[:, :-2] + 2.0 * wide[:, 1:-1] + wide[:, 2:]) / 4.0
    tall = np.concatenate([value[:1], value, value[-1:]], axis=0)
    return (tall[:-2] + 2.0 * tall[1:-1] + tall[2:]) / 4.0


def draw_pair(camera: str, name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 [size, size, 3] and REFUGE mask uint8 [size, size] of the eye called ``name``."""
    draws = Draws(f"{camera}/{name}")
    axis = (2.0 * np.arange(size) + 1.0) / size - 1.0
    x, y = np.broadcast_to(axis[None, :], (size, size)), np.broadcast_to(axis[:, None], (size, size))
    eye = draw_anatomy(draws, x, y)
    mask = np.where(eye.cup > 0, CUP, np.where(eye.disc > 0, RIM, BACKGROUND)).astype(np.uint8)
    return photograph(draws, CAMERAS[camera], eye, x, y), mask


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG of uint8 [H, W] or [H, W, 3] in stored deflate blocks: no compressor, so no version of one matters."""
    height, width = pixels.shape[:2]
    rows = np.zeros((height, 1 + pixels.size // height), np.uint8)  # filter byte 0 leads each row
    rows[:, 1:] = pixels.reshape(height, -1)
    raw = rows.tobytes()
    blocks = [raw[i : i + 65535] for i in range(0, len(raw), 65535)]
    stream = b"".join(struct.pack("<BHH", i + 1 == len(blocks), len(b), len(b) ^ 0xFFFF) + b for i, b in enumerate(blocks))
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    data = b"\x78\x01" + stream + struct.pack(">I", zlib.adler32(raw))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def write_phantom(folder: Path, size: int = 96) -> None:
    """Write ``source/standard``, ``target/<camera>`` and ``references/<camera>``, each with ``images/`` and ``masks/``, below ``folder/data``.

    References are fresh eyes that are in no other folder. Files of an earlier call are overwritten.

    Args:
        folder: project root.
        size: side of the images in pixels.
    """
    sets = [(f"source/{SOURCE}", SOURCE, "s", N_SOURCE)]
    sets += [(f"target/{camera}", camera, "t", N_TARGET) for camera in TARGETS]
    sets += [(f"references/{camera}", camera, "r", N_REFERENCES) for camera in TARGETS]
    for place, camera, letter, count in sets:
        images, masks = (folder / "data" / place / part for part in ("images", "masks"))
        images.mkdir(parents=True, exist_ok=True)
        masks.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            name = f"{letter}{number:03d}"
            image, mask = draw_pair(camera, name, size)
            (images / f"{name}.png").write_bytes(encode_png(image))
            (masks / f"{name}.png").write_bytes(encode_png(mask))


if __name__ == "__main__":
    write_phantom(Path(sys.argv[1]))
