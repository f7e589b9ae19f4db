"""What a person wants to see of an artifact in Dagster: its numbers, where it lies, curves, tables, a few synthetic images.

Real images and masks never go in: Dagster's records are a place that training images must not leak to. Nor do synthetic images
painted from a real mask, those that filtering has refused as near copies, or columns that may hold names of patients.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from alignflow_core.artifact import read_json
from alignflow_core.config import STAGE_ARMS
from alignflow_core.runner import provenance_file
from alignflow_core.stages import artifact_dir
from pipelines.versions import Versions

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

TABLES = {
    "data": "manifest.parquet", "references": "manifest.parquet", "align": "gates.parquet", "filter": "manifest.parquet",
    **dict.fromkeys(STAGE_ARMS, "segmenters.parquet"),
    "evaluate": "distances.parquet", "compare": "comparison.parquet",
}
SHARED_COLUMNS = {"data": ["case_id", "split", "width", "height"], "references": ["case_id", "role", "labelled", "width", "height"]}
N_ROWS, N_IMAGES, SIDE = 20, 8, 96
N_LINES, N_POINTS = 8, 200  # of one plot
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c")
OUTLINES = ((255, 221, 0), (0, 229, 255), (255, 64, 255), (64, 255, 64))  # classes 1, 2, …
WIDTH, HEIGHT, LEGEND = 560, 180, 230


def metadata(root: Path, stage: str, key: str | None, run: str | None = None) -> dict[str, Any]:
    """Dagster metadata of a built artifact; ``run`` is the id of its run in MLflow."""
    folder = root / artifact_dir(stage, key)
    provenance = read_json(provenance_file(root, stage, key))
    found: dict[str, Any] = {
        "path": dg.MetadataValue.path(str(folder)), "content": provenance["content"], "fingerprint": provenance["fingerprint"],
        **_dvc(root, stage, key), "seconds": provenance["seconds"], "seed": provenance["seed"], "profile": provenance["profile"],
    }
    if run is not None:
        found |= _run_page(root, run)
    if stage in TABLES and (folder / TABLES[stage]).exists():
        found["table"] = _table(_read(folder / TABLES[stage], SHARED_COLUMNS.get(stage)))
    curves = _curves(folder / "curves.parquet")
    if curves:
        found["curves"] = dg.MetadataValue.md("\n\n".join(_picture(svg.encode(), "svg+xml", "curves") for svg in curves))
    found |= _particulars(root, stage, key, folder)
    return found | {name: value for name, value in read_json(folder / "metrics.json").items() if math.isfinite(value)}


def _particulars(root: Path, stage: str, key: str | None, folder: Path) -> dict[str, Any]:
    """What only some stages have."""
    if stage == "sample_masks" and (folder / "masks.npy").exists():
        rows = _drawn(folder)
        return {"masks": _grid(None, _array(folder / "masks.npy"), rows)} if rows else {}
    if stage == "sample_stage1" and (folder / "images.npy").exists():
        rows = _drawn(folder)
        return {"images": _painted(folder, rows)} if rows else {}
    if stage == "filter" and (folder / "manifest.parquet").exists():
        return _filtered(_read(folder / "manifest.parquet"), root / artifact_dir("sample_aligned", key))
    if stage == "align" and (folder / "verdict.json").exists():
        import pandas as pd

        rounds = pd.DataFrame(read_json(folder / "verdict.json")["rounds"])
        return {"rounds": _table(rounds.assign(refused=rounds["refused"].map(", ".join)))}
    if stage == "evaluate" and (folder / "metrics.parquet").exists():
        values = _read(folder / "metrics.parquet")
        means = values.pivot_table(index=["segmenter", "arm"], columns="metric", values="value", aggfunc="mean", sort=False)
        return {"arms": _table(means.round(4).reset_index())}
    if stage == "report" and (folder / "index.html").exists():
        return {"page": dg.MetadataValue.path(str(folder / "index.html"))}
    return {}


def _filtered(verdicts: "pd.DataFrame", painted: Path) -> dict[str, Any]:
    """How many pairs are kept and why others are not, and some of both."""
    kept = verdicts["kept"].to_numpy(bool)
    reasons = verdicts["reason"][~kept].value_counts()
    found: dict[str, Any] = {"pairs": len(kept), "kept": int(kept.sum()), "reasons": dict(reasons.items())}
    if (painted / "images.npy").exists() and len(_array(painted / "images.npy")) == len(kept):
        refused = ~kept & (verdicts["reason"] != "near copy of a reference").to_numpy()
        drawn = set(_drawn(painted, len(kept)))
        rows = {name: [row for row in part.nonzero()[0].tolist() if row in drawn] for name, part in (("kept", kept), ("refused", refused))}
        found |= {f"images_{name}": _painted(painted, chosen) for name, chosen in rows.items() if chosen}
    return found


def _drawn(folder: Path, most: int = N_IMAGES) -> list[int]:
    """First rows whose mask is no training mask; all where the manifest does not say."""
    table = _read(folder / "manifest.parquet") if (folder / "manifest.parquet").exists() else None
    if table is None or "origin" not in table:
        return list(range(most))
    return [int(row) for row in (table["origin"] != "real").to_numpy().nonzero()[0][:most]]


def _run_page(root: Path, run: str) -> dict[str, Any]:
    """Where ``alignflow ui`` shows a run, if the tracker can be asked."""
    from pipelines import tracking, ui

    try:
        experiment = tracking.client(root).get_run(run).info.experiment_id
    except Exception:  # whatever a database may raise
        return {}
    return {"mlflow": dg.MetadataValue.url(f"http://{ui.HOST}:{ui.last_mlflow_port(root)}/#/experiments/{experiment}/runs/{run}")}


def _dvc(root: Path, stage: str, key: str | None) -> dict[str, Any]:
    """Where DVC keeps the artifact and the hash it has there, where ``dvc.lock`` speaks of the artifact as it lies here."""
    path = artifact_dir(stage, key).as_posix()
    md5 = Versions(root).md5((stage, key), "outs", path)
    return {"dvc_path": path, "dvc_md5": md5} if md5 else {}


def _read(file: Path, columns: list[str] | None = None) -> "pd.DataFrame":
    import pandas as pd

    return pd.read_parquet(file, columns=columns)


def _array(file: Path) -> "np.ndarray":
    import numpy as np

    return np.load(file, mmap_mode="r", allow_pickle=False)


def _table(table: "pd.DataFrame") -> dg.TableMetadataValue:
    """The first rows of a table; NaN, which JSON lacks, becomes empty."""
    table = table.head(N_ROWS)
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    schema = dg.TableSchema([dg.TableColumn(str(name)) for name in table.columns]) if table.empty else None  # else read off the rows
    return dg.MetadataValue.table([dg.TableRecord({str(name): _plain(value) for name, value in row.items()}) for row in rows], schema)


def _plain(value: Any) -> str | float | int | bool | None:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return value if value is None or isinstance(value, str | float | int | bool) else str(value)


def _curves(file: Path) -> list[str]:
    """One plot for each kind of curve a stage has logged, such as loss, reward, ratio."""
    if not file.exists():
        return []
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for metric, points in _read(file).groupby("metric", sort=False):
        kind = str(metric).rpartition("/")[2].rpartition("_")[2]  # "source/0/loss" -> loss, "held_out_reward" -> reward
        kept = points.iloc[:: max(1, len(points) // N_POINTS)]
        line = [(float(step), float(value)) for step, value in zip(kept["step"], kept["value"], strict=True) if math.isfinite(value)]
        if line:
            found.setdefault(kind, {})[str(metric)] = line
    return [plot(dict(list(lines.items())[:N_LINES])) for kind, lines in found.items() if kind != "norm"]


def plot(lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Lines through points (step, value) as SVG, with the ends of both axes and a legend. Loading matplotlib takes seconds, this does not."""
    xs, ys = ([point[axis] for line in lines.values() for point in line] for axis in (0, 1))
    (left, right), (low, high) = (min(xs), max(xs)), (min(ys), max(ys))

    def place(x: float, y: float) -> str:
        return (f"{60 + (WIDTH - LEGEND - 60) * (x - left) / (right - left or 1):.1f},"
                f"{HEIGHT - 22 - (HEIGHT - 34) * (y - low) / (high - low or 1):.1f}")

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="11">',
             '<rect width="100%" height="100%" fill="white"/>',
             f'<path d="M60 12V{HEIGHT - 22}H{WIDTH - LEGEND}" stroke="#999" fill="none"/>',
             f'<text x="54" y="18" text-anchor="end">{high:.4g}</text><text x="54" y="{HEIGHT - 20}" text-anchor="end">{low:.4g}</text>',
             f'<text x="60" y="{HEIGHT - 6}">{left:.0f}</text><text x="{WIDTH - LEGEND}" y="{HEIGHT - 6}" text-anchor="end">step {right:.0f}</text>']
    for number, (name, line) in enumerate(lines.items()):
        colour, y = COLOURS[number % len(COLOURS)], 20 + 15 * number
        dot = "" if len(line) > 1 else f'<circle cx="{place(*line[0]).replace(",", chr(34) + " cy=" + chr(34))}" r="2" fill="{colour}"/>'
        parts += [f'<polyline points="{" ".join(place(*point) for point in line)}" fill="none" stroke="{colour}" stroke-width="1.5"/>{dot}',
                  f'<text x="{WIDTH - LEGEND + 10}" y="{y}" fill="{colour}">{escape(name[-36:])}</text>']
    return "".join([*parts, "</svg>"])


def _painted(folder: Path, rows: Sequence[int]) -> dg.MarkdownMetadataValue:
    masks = folder / "masks.npy"
    return _grid(_array(folder / "images.npy"), _array(masks) if masks.exists() else None, rows)


def _grid(images: "np.ndarray | None", masks: "np.ndarray | None", rows: Sequence[int]) -> dg.MarkdownMetadataValue:
    """Some synthetic images side by side, below them the same with the outlines of their masks; or masks alone, by class."""
    import numpy as np
    from PIL import Image

    known = masks if images is None else images
    assert known is not None
    chosen = [row for row in rows if row < len(known)][:N_IMAGES]

    def enlarged(array: "np.ndarray", smooth: bool) -> "np.ndarray":
        how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
        return np.asarray(Image.fromarray(np.ascontiguousarray(array)).resize((SIDE, SIDE), how))

    large = None if masks is None else [enlarged(masks[row], smooth=False) for row in chosen]
    if images is None:
        assert large is not None
        shades = np.array([(0, 0, 0), *OUTLINES], np.uint8)
        bands = [[shades[np.minimum(mask, len(OUTLINES))] for mask in large]]
    else:
        bands = [[enlarged(images[row], smooth=True) for row in chosen]]
        if large is not None:
            bands.append([outlined(image, mask) for image, mask in zip(bands[0], large, strict=True)])
    kind = "png" if images is None else "jpeg"  # what looks like noise would take half a megabyte as PNG
    stream = io.BytesIO()
    Image.fromarray(np.concatenate([np.concatenate(band, axis=1) for band in bands])).save(stream, kind, quality=88, subsampling=0)
    return dg.MetadataValue.md(_picture(stream.getvalue(), kind, "synthetic images"))


def outlined(image: "np.ndarray", mask: "np.ndarray") -> "np.ndarray":
    """An image [H, W, 3] with the pixels of each class that touch another class or background in the class's colour."""
    import numpy as np

    around = np.pad(mask, 1, mode="edge")
    edge = np.any([around[1 + dy:around.shape[0] - 1 + dy, 1 + dx:around.shape[1] - 1 + dx] < mask
                   for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0))], axis=0)
    drawn = image.copy()
    drawn[edge] = np.array(OUTLINES, np.uint8)[np.minimum(mask[edge], len(OUTLINES)) - 1]
    return drawn


def _picture(content: bytes, kind: str, name: str) -> str:
    """Markdown with the picture inside: Dagster has no image kind, and shows those of addresses that begin with ``data:``."""
    return f"![{name}](data:image/{kind};base64,{base64.b64encode(content).decode()})"
