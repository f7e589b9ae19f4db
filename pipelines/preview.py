"""What a person wants to see of an artifact in Dagster: its numbers, the head of its table, a few synthetic images.

Real images never go in: Dagster's records are a place that training images must not leak to.
Nor do columns that may hold names of patients.
"""

import base64
import io
import math
from pathlib import Path
from typing import Any

import dagster as dg

from alignflow_core.artifact import read_json
from alignflow_core.runner import provenance_file
from alignflow_core.stages import artifact_dir

TABLES = {
    "data": "manifest.parquet", "references": "manifest.parquet", "align": "gates.parquet", "filter": "manifest.parquet",
    "segment_source": "segmenters.parquet", "segment_target": "segmenters.parquet", "evaluate": "distances.parquet",
    "compare": "comparison.parquet",
}
SHARED_COLUMNS = {"data": ["case_id", "split", "width", "height"], "references": ["case_id", "role", "labelled", "width", "height"]}
PAINTED = ("sample_stage1", "sample_aligned")
N_ROWS, N_IMAGES, SIDE = 20, 8, 96


def metadata(root: Path, stage: str, key: str | None) -> dict[str, Any]:
    """Dagster metadata of a built artifact."""
    folder = root / artifact_dir(stage, key)
    provenance = read_json(provenance_file(root, stage, key))
    found: dict[str, Any] = {
        "path": dg.MetadataValue.path(str(folder)), "seconds": provenance["seconds"], "seed": provenance["seed"],
        "profile": provenance["profile"],
        **{name: value for name, value in read_json(folder / "metrics.json").items() if math.isfinite(value)},
    }
    if stage in TABLES and (folder / TABLES[stage]).exists():
        found["table"] = _table(folder / TABLES[stage], SHARED_COLUMNS.get(stage))
    if stage in PAINTED and (folder / "images.npy").exists():
        found["images"] = _grid(folder / "images.npy")
    if stage == "report" and (folder / "index.html").exists():
        found["page"] = dg.MetadataValue.path(str(folder / "index.html"))
    return found


def _table(file: Path, columns: list[str] | None) -> dg.TableMetadataValue:
    """The first rows of a table; NaN, which JSON lacks, becomes empty."""
    import pandas as pd

    table = pd.read_parquet(file, columns=columns).head(N_ROWS)
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return dg.MetadataValue.table([dg.TableRecord({str(name): _plain(value) for name, value in row.items()}) for row in rows])


def _plain(value: Any) -> str | float | int | bool | None:
    value = value.item() if hasattr(value, "item") else value
    return value if value is None or isinstance(value, str | float | int | bool) else str(value)


def _grid(file: Path) -> dg.MarkdownMetadataValue:
    """The first synthetic images side by side as a PNG inside Markdown (Dagster has no image kind), well under 300 KB."""
    import numpy as np
    from PIL import Image

    images = np.load(file, mmap_mode="r", allow_pickle=False)[:N_IMAGES]
    tiles = [np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((SIDE, SIDE))) for image in images]
    stream = io.BytesIO()
    Image.fromarray(np.concatenate(tiles, axis=1)).save(stream, "PNG")
    return dg.MetadataValue.md(f"![synthetic images](data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()})")
