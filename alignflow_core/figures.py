"""Figures of the report as data URIs: one style, one colour per arm and per image set, everywhere."""

import base64
import io
import itertools
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion

from alignflow_core.ablations import Axis
from alignflow_core.config import COLOUR, Task, in_order
from alignflow_core.masks import regions

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# After Okabe and Ito: told apart with any colour vision, and in print by their order and labels.
ARM_COLOURS = {
    "source": "#6b7280", "source+colour": "#9aa1ac", "reinhard": "#cc79a7", "fourier": "#8f5fae", "stage1": "#d98e04",
    "stage1+colour": "#e6b566", "aligned": "#4aa3df", "aligned+filtered": "#00589c", "aligned+filtered+colour": "#003a66",
    "references-labelled": "#00906a", "oracle": "#1f2328",
    "t2i-adapter": "#a0522d", "controlnet-diffusion": "#7a8f00", "controlnet-flow": "#b5477f", "siamese-diffusion": "#4b6a88",
}
OTHER_COLOURS = ("#c46a4a", "#5d5d9e", "#2f8f83", "#8a6d3b")
SETS = {  # colour, marker, size, opacity
    "source": ("#9aa1ac", "o", 9, 0.7), "target test": ("#00906a", "o", 13, 0.75), "stage1": ("#d98e04", "^", 13, 0.75),
    "aligned": ("#00589c", "s", 11, 0.75), "references": ("#c8102e", "*", 110, 1.0),
}
CLASS_COLOURS = ("#ffffff", "#00e0ff", "#ff6ad5", "#ffd400", "#7cff6b")
FILL = ("#eef2f7", "#93b4d8", "#1d4f8f", "#5b2a86", "#0b6e4f", "#8a5a00")
TILE, GAP, LEAST_COLUMNS = 150, 6, 5
WIDE = 8.0  # last over first value of a curve from which it is drawn over their logarithms
STYLE: Any = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelcolor": "#3b4350",
    "axes.edgecolor": "#b9c0ca", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e7eaef",
    "axes.axisbelow": True, "xtick.color": "#3b4350", "ytick.color": "#3b4350", "legend.frameon": False, "legend.fontsize": 8.5,
    "figure.facecolor": "white", "svg.hashsalt": "alignflow", "savefig.bbox": "tight", "savefig.pad_inches": 0.05,
}


def colour_of(arm: str) -> str:
    """An arm's colour; a comparator's by its name, the same on every page."""
    plain = arm.removesuffix(COLOUR)
    return ARM_COLOURS.get(arm) or ARM_COLOURS.get(plain) or OTHER_COLOURS[sum(plain.encode()) % len(OTHER_COLOURS)]


def forest(table: pd.DataFrame, targets: list[str], label: str) -> str:
    """Mean and interval of every arm, one panel per target.

    Args:
        table: rows of one metric of comparison.parquet, one per target and arm.
        label: of the value axis.
    """
    arms = in_order(table["arm"])[::-1]
    columns = min(3, len(targets))
    rows = -(-len(targets) // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(9.6, rows * (0.29 * len(arms) + 0.85)), sharey=True, squeeze=False)
        for axis, target in zip(axes.flat, targets, strict=False):
            part = {row["arm"]: row for row in table[table["target"] == target].to_dict("records")}
            for y, arm in enumerate(arms):
                if arm not in part:
                    continue
                mean, low, high = (part[arm][name] for name in ("mean", "ci_low", "ci_high"))
                _interval(axis, ([low, high], [y, y]), (mean, y), colour_of(arm))
                axis.annotate(f"{mean:.3f}", (mean, y), (0, 6.5), textcoords="offset points", ha="center", fontsize=7.5, color="#3b4350")
            axis.set(title=target, yticks=range(len(arms)), yticklabels=arms, ylim=(-0.6, len(arms) - 0.25))
            axis.margins(x=0.08)
            axis.grid(axis="y", visible=False)
            axis.tick_params(axis="y", length=0)
        for axis in axes[-1]:
            axis.set_xlabel(label)
        for axis in list(axes.flat)[len(targets):]:
            axis.set_visible(False)
        figure.tight_layout(w_pad=1.5)
        return as_svg(figure)


def feature_map(features: pd.DataFrame) -> str:
    """t-SNE (van der Maaten and Hinton 2008; PCA start, fixed seed) of the measuring descriptors, coloured by set."""
    from sklearn.manifold import TSNE

    vectors = features.drop(columns=["set", "id"]).to_numpy(np.float64)
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(vectors)
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axis = plt.subplots(figsize=(4.7, 3.7))
        others = [name for name in dict.fromkeys(features["set"]) if name not in SETS]
        comparators = {name: (colour_of(name), marker, 11, 0.6) for name, marker in zip(others, itertools.cycle("vPXD<>"), strict=False)}
        for name, (colour, marker, size, alpha) in (SETS | comparators).items():
            chosen = (features["set"] == name).to_numpy()
            axis.scatter(points[chosen, 0], points[chosen, 1], s=size, c=colour, marker=marker, alpha=alpha, label=f"{name} ({chosen.sum()})",
                         edgecolors="white", linewidths=0.8 if name == "references" else 0.25, zorder=2)
        axis.set(xticks=[], yticks=[])
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=3, handletextpad=0.2, columnspacing=1.0)
        return as_svg(figure)


def gates(table: pd.DataFrame) -> str:
    """Reward on aligned and held-out references above, the ratios that must not fall or blow up below, over the steps of stage 2."""
    with plt.rc_context(STYLE):
        figure, (upper, lower) = plt.subplots(2, 1, figsize=(4.7, 4.1), sharex=True)
        upper.plot(table["step"], table["reward"], color="#4aa3df", label="references aligned to")
        upper.plot(table["step"], table["held_out_reward"], color="#00589c", lw=2, label="references held out")
        upper.set(ylabel="reward")
        ratios = {"diversity_ratio": "#00906a", "velocity_ratio": "#d98e04", "agreement_ratio": "#8f5fae", "copy_ratio": "#c0392b"}
        for name, colour in ratios.items():
            if table[name].isna().all():  # not measured
                continue
            lower.plot(table["step"], table[name], color=colour, label=name.removesuffix("_ratio"))
        failed = table[table["failed"] != ""]
        upper.plot(failed["step"], failed["held_out_reward"], "x", color="#c0392b", label="refused" if len(failed) else None)
        lower.axhline(1, color="#b9c0ca", lw=0.8)
        lower.set(xlabel="step", ylabel="ratio to stage 1")
        for axis in (upper, lower):
            for step in table.loc[table["best"], "step"]:
                axis.axvline(step, color="#1f2328", lw=1, ls=":", label="kept" if axis is upper else None)
            axis.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.97), ncols=3, borderaxespad=0, handlelength=1.6, columnspacing=1.2)
        figure.tight_layout()
        return as_svg(figure)


def ablation(varied: Axis, base: str, against: str) -> str:
    """Difference in Dice to the arm ``against``, with its interval, of a target and its variants: a curve over numbers, else a row for each."""
    with plt.rc_context(STYLE):
        if varied.values is not None:
            return _ablation_curve(varied, varied.values, base, against)
        rows = varied.rows
        figure, axis = plt.subplots(figsize=(9.6, 0.3 * len(rows) + 0.9))
        for y, row in enumerate(reversed(rows)):
            _interval(axis, ([row["diff_ci_low"], row["diff_ci_high"]], [y, y]), (row["difference"], y), _of_variant(row, base))
        axis.axvline(0, color="#1f2328", lw=0.8)
        axis.set(yticks=range(len(rows)), yticklabels=[row["name"] for row in reversed(rows)], ylim=(-0.6, len(rows) - 0.4),
                 xlabel=f"Dice minus {against}")
        axis.grid(axis="y", visible=False)
        figure.tight_layout()
        return as_svg(figure)


def _ablation_curve(varied: Axis, values: list[float], base: str, against: str) -> str:
    figure, axis = plt.subplots(figsize=(9.6, 2.8))
    axis.plot(values, [row["difference"] for row in varied.rows], color=ARM_COLOURS["aligned"], lw=1.2)
    for value, row in zip(values, varied.rows, strict=True):
        _interval(axis, ([value, value], [row["diff_ci_low"], row["diff_ci_high"]]), (value, row["difference"]), _of_variant(row, base))
    axis.axhline(0, color="#1f2328", lw=0.8)
    if values[0] > 0 and values[-1] >= WIDE * values[0]:
        axis.set_xscale("log")
        axis.minorticks_off()
    axis.set(xticks=values, xticklabels=[f"{value:g}" for value in values], xlabel=varied.name, ylabel=f"Dice minus {against}")
    figure.tight_layout()
    return as_svg(figure)


def _interval(axis: Axes, line: tuple[list[float], list[float]], dot: tuple[float, float], colour: str) -> None:
    """A bar from end to end and a dot for the estimate."""
    axis.plot(*line, color=colour, lw=2.6, solid_capstyle="round")
    axis.plot(*dot, "o", color=colour, ms=6.5, mec="white", mew=0.8)


def _of_variant(row: Mapping[str, Any], base: str) -> str:
    """A darker colour for the target as set up."""
    return ARM_COLOURS["aligned+filtered" if row["name"] == base else "aligned"]


def appearance(table: pd.DataFrame) -> str:
    """One panel per quantity: mean and deviation of every set, the target test's as a band."""
    quantities = [name for name in table.columns if name != "set" and table[name].notna().any()]
    columns = min(5, len(quantities))
    rows = -(-len(quantities) // columns)
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(rows, columns, figsize=(9.6, 1.75 * rows), squeeze=False)
        names = [name for name in SETS if name != "target test" and name in set(table["set"])]
        for axis, quantity in zip(axes.flat, quantities, strict=False):
            values = table.groupby("set")[quantity]
            mean, std = values.mean(), values.std()
            goal, spread = mean["target test"], std["target test"]
            axis.axvspan(goal - spread, goal + spread, color=SETS["target test"][0], alpha=0.18, lw=0)
            axis.axvline(goal, color=SETS["target test"][0], lw=1)
            for height, name in enumerate(reversed(names)):
                axis.errorbar(mean[name], height, xerr=std[name], fmt="o", color=SETS[name][0], ms=4, lw=1.2)
            shown = axis in axes[:, 0]
            axis.set(title=quantity.replace("_", " "), ylim=(-0.6, len(names) - 0.4), yticks=range(len(names)),
                     yticklabels=list(reversed(names)) if shown else [""] * len(names))
            axis.title.set_fontsize(9)
        for axis in axes.flat[len(quantities):]:
            axis.set_axis_off()
        figure.tight_layout()
        return as_svg(figure)


def losses(curves: dict[str, pd.DataFrame]) -> str:
    """Training losses over steps, one panel per network; thin: as logged, thick: running mean.

    Args:
        curves: title -> rows (step, value).
    """
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(9.6, 2.1 * rows), squeeze=False)
        for axis, (title, curve) in zip(axes.flat, curves.items(), strict=False):
            smooth = curve["value"].rolling(max(1, len(curve) // 15), min_periods=1, center=True).mean()
            axis.plot(curve["step"], curve["value"], color="#c3d3e6", lw=0.8)
            axis.plot(curve["step"], smooth, color="#00589c", lw=1.6)
            axis.set(title=title, xlabel="step", ylabel="loss")
        for axis in list(axes.flat)[len(curves):]:
            axis.set_visible(False)
        figure.tight_layout()
        return as_svg(figure)


def mask_strip(masks: np.ndarray) -> str:
    """A row of masks in flat colours, uint8 [N, H, W]."""
    palette = np.array([_rgb(colour) for colour in FILL], np.uint8)
    labels = np.minimum(masks, len(FILL) - 1)
    return _strip([_enlarge(palette[each], Image.Resampling.NEAREST) for each in labels])


def image_strip(images: np.ndarray, masks: np.ndarray | None, task: Task, refused: np.ndarray | None = None, columns: int = 0) -> str:
    """A row of images, uint8 [N, H, W, 3], with the outlines of their masks; refused ones get a red frame.

    ``columns`` leaves room for so many tiles where there are fewer.
    """
    tiles = [_enlarge(np.asarray(image), Image.Resampling.BICUBIC) for image in images]
    if masks is not None:
        tiles = [_outlined(tile, mask, task) for tile, mask in zip(tiles, masks, strict=True)]
    for i in () if refused is None else np.flatnonzero(refused):
        for edge in (np.s_[:4], np.s_[-4:], np.s_[:, :4], np.s_[:, -4:]):
            tiles[i][edge] = _rgb("#c8102e")
    return _strip(tiles, columns)


def _outlined(tile: np.ndarray, mask: np.ndarray, task: Task) -> np.ndarray:
    """Draw each region's outline, light on a dark casing, so that it shows on any tissue."""
    for number, region in enumerate(regions(mask[None], task)[0]):
        smooth = _enlarge(region.astype(np.uint8) * 255, Image.Resampling.BICUBIC) > 127
        line = smooth & ~binary_erosion(smooth, iterations=2)
        casing = binary_dilation(line) & ~line
        tile[casing] //= 2
        tile[line] = _rgb(CLASS_COLOURS[number % len(CLASS_COLOURS)])
    return tile


def _strip(tiles: list[np.ndarray], columns: int = 0) -> str:
    """Tiles [TILE, TILE, 3] side by side on white, as a JPEG data URI."""
    sheet = np.full((TILE, max(columns, len(tiles), LEAST_COLUMNS) * (TILE + GAP) - GAP, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        sheet[:, i * (TILE + GAP):i * (TILE + GAP) + TILE] = tile
    stream = io.BytesIO()
    Image.fromarray(sheet).save(stream, "JPEG", quality=90, subsampling=0)
    return _uri("image/jpeg", stream.getvalue())


def _enlarge(array: np.ndarray, how: Image.Resampling) -> np.ndarray:
    return np.array(Image.fromarray(np.ascontiguousarray(array)).resize((TILE, TILE), how))


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def as_svg(figure: Figure) -> str:
    """The finished figure as a data URI of an SVG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    plt.close(figure)
    return _uri("image/svg+xml", stream.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
