"""Pictures that only the paper's page has; the others are those of ``figures.py``."""

import base64

import numpy as np
import pandas as pd

from alignflow_core.figures import FILL, STYLE, as_svg, colour_of, plt

WITHOUT_REFERENCES = ("source", "stage1")


def coloured(mask: np.ndarray) -> np.ndarray:
    """Class numbers uint8 [H, W] in flat colours, uint8 [H, W, 3]."""
    palette = np.array([[int(colour[i:i + 2], 16) for i in (1, 3, 5)] for colour in FILL], np.uint8)
    found: np.ndarray = palette[np.minimum(mask, len(FILL) - 1)]
    return found


def picture_grid(rows: list[tuple[str, dict[str, np.ndarray]]]) -> str:
    """One row per mask, one column per picture, as a data URI; rows and columns are labelled.

    Args:
        rows: label and pictures uint8 [H, W, 3] by column title.
    """
    titles = list(dict.fromkeys(title for _, pictures in rows for title in pictures))
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(len(rows), len(titles), figsize=(1.15 * len(titles), 1.2 * len(rows) + 0.5), squeeze=False)
        for line, (label, pictures) in zip(axes, rows, strict=True):
            for axis, title in zip(line, titles, strict=True):
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
                if title in pictures:
                    axis.imshow(pictures[title], interpolation="nearest")
            line[0].set_ylabel(label)
        for axis, title in zip(axes[0], titles, strict=True):
            axis.set_title(title.replace("-", "-\n", 1), fontsize=7.5, loc="center", fontweight="normal")
        figure.tight_layout(pad=0.3)
        return as_svg(figure)


def reference_curve(table: pd.DataFrame) -> str:
    """Dice against the number of references, one panel per target, with intervals; arms that see no references are lines in bands.

    Args:
        table: target, n_references, arm, mean, ci_low, ci_high.
    """
    targets = list(dict.fromkeys(table["target"]))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(targets), figsize=(3.6 * len(targets), 2.9), squeeze=False)
        for axis, target in zip(axes[0], targets, strict=True):
            own = table[table["target"] == target]
            curves = [arm for arm in dict.fromkeys(own["arm"]) if arm not in WITHOUT_REFERENCES]
            for arm in dict.fromkeys(own["arm"]):
                part, colour = own[own["arm"] == arm].sort_values("n_references"), colour_of(arm)
                if arm in curves:  # side by side, or one interval would hide another
                    at = part["n_references"] * 1.08 ** (curves.index(arm) - (len(curves) - 1) / 2)
                    reach = (part["mean"] - part["ci_low"], part["ci_high"] - part["mean"])
                    axis.errorbar(at, part["mean"], reach, color=colour, fmt="o-", ms=4, lw=1.4, capsize=2, label=arm)
                else:
                    axis.axhline(part["mean"].iloc[0], color=colour, lw=1.4, ls="--", label=arm)
                    axis.axhspan(part["ci_low"].iloc[0], part["ci_high"].iloc[0], color=colour, alpha=0.12, lw=0)
            counts = sorted(set(own["n_references"]))
            axis.set(title=target, xscale="log", xticks=counts, xticklabels=counts, xlabel="references", ylabel="Dice")
            axis.minorticks_off()
        figure.tight_layout(rect=(0, 0.14, 1, 1))
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=2 * len(targets), fontsize=7)
        return as_svg(figure)


def svg_bytes(uri: str) -> bytes:
    """The file that a data URI holds."""
    return base64.b64decode(uri.partition(",")[2])
