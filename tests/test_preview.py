"""What Dagster shows: definitions that load light, and metadata with pictures but without real images or names."""

import base64
import hashlib
import io
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from toy_project import REPOSITORY, run, write_project

from alignflow_core.artifact import write_json
from alignflow_core.stages import STAGES
from pipelines import assets, descriptions, preview
from pipelines.checks import CHECKS

LOADED = """
import sys
from pathlib import Path
from pipelines.definitions import build_definitions

definitions = build_definitions(Path("."))
definitions.get_repository_def().get_all_jobs()
print(*sorted({"torch", "monai", "mlflow", "matplotlib", "pandas", "numpy"} & set(sys.modules)))
print(len(definitions.resolve_asset_graph().asset_check_keys))
"""


def test_the_code_location_loads_without_heavy_packages(smoke_root: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LOADED], cwd=smoke_root, env={"PYTHONPATH": str(REPOSITORY), "PATH": ""}, capture_output=True,
                          text=True, check=True)
    assert done.stdout.split() == ["27"], "checks and no package"


def test_every_asset_is_described_owned_and_of_a_kind(smoke_root: Path) -> None:
    from pipelines.compose import write_params
    from pipelines.definitions import build_definitions

    write_params(smoke_root / "params.yaml", ["profile=smoke", "comparators=paper"])
    graph = build_definitions(smoke_root).resolve_asset_graph()
    for stage in STAGES.values():
        node = graph.get(dg.AssetKey(stage.asset))
        file = stage.function.partition(":")[0]
        assert f"alignflow_core/{file}.py" in str(node.description) and "arxiv.org/abs/2604.02868" in str(node.description)
        assert (REPOSITORY / "alignflow_core" / f"{file}.py").exists()
        assert node.owners == ["team:alignflow"] and 1 <= len(node.kinds) <= 3
        assert node.group_name == stage.group
    assert descriptions.ABOUT.keys() == STAGES.keys()
    groups = [stage.group for stage in STAGES.values() if stage.name != "labeller"]
    assert min(stage.group for stage in STAGES.values()) == groups[0] > assets.INPUTS_GROUP, "sorted by name the groups are in the paper's order"


def built(root: Path, node: str, metrics: dict[str, float], **arrays: np.ndarray) -> Path:
    """The folder of an artifact with its metrics, arrays and provenance."""
    folder = root / "artifacts" / node
    write_json(folder / "metrics.json", metrics)
    write_json(folder.with_name(f"{folder.name}.json"), {"content": "c0", "fingerprint": "f0", "seconds": 1.5, "seed": 0, "profile": "smoke"})
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def picture(value: Any) -> np.ndarray:
    """Pixels of the picture inside Markdown."""
    content = re.fullmatch(r"!\[.*\]\(data:image/(?:png|jpeg);base64,(.*)\)", value.md_str)
    assert content is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content[1]))).convert("RGB")).astype(int)


def test_an_image_grid_with_outlines(tmp_path: Path) -> None:
    masks = np.zeros((3, 32, 32), np.uint8)
    masks[:, 8:24, 8:24] = 1
    built(tmp_path, "sample_stage1", {"n_images": 3}, images=np.full((3, 32, 32, 3), 128, np.uint8), masks=masks)
    pixels = picture(preview.metadata(tmp_path, "sample_stage1", None)["images"])
    side = preview.SIDE
    assert pixels.shape == (2 * side, 3 * side, 3)
    assert (abs(pixels[:side] - 128) < 8).all(), "above, the images as they are"
    yellow = pixels[side:, :, 0] - pixels[side:, :, 2] > 150
    rows, columns = np.nonzero(yellow[:, :side])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (24, 71, 24, 71), "below, the border of the square, three times as large"
    assert not yellow[30:66, 30:66].any()


def test_noise_at_its_worst_is_small_enough(tmp_path: Path) -> None:
    noise = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (9, 64, 64, 3)).astype(np.uint8)
    masks = np.zeros((9, 64, 64), np.uint8)
    built(tmp_path, "sample_stage1", {}, images=noise, masks=masks)
    assert len(preview.metadata(tmp_path, "sample_stage1", None)["images"].md_str) < 300_000


def test_outlines_know_classes() -> None:
    mask = np.zeros((7, 7), np.uint8)
    mask[1:6, 1:6] = 1
    mask[3, 3] = 2
    drawn = preview.outlined(np.zeros((7, 7, 3), np.uint8), mask)
    assert tuple(drawn[3, 3]) == preview.OUTLINES[1] and tuple(drawn[1, 4]) == preview.OUTLINES[0]
    assert not drawn[0].any() and not drawn[2, 2].any() and (drawn.any(2).sum(), drawn[3].any(1).sum()) == (17, 3)


def test_a_plot_runs_between_its_ends() -> None:
    svg = preview.plot({"loss": [(0, 4.0), (5, 2.0), (10, 0.0)], "a<b": [(10, 1.0)]})
    points = [tuple(map(float, point.split(","))) for point in re.findall(r'points="([^"]*)"', svg)[0].split()]
    assert points == [(60, 12), (195, 85), (330, 158)]
    assert "a&lt;b" in svg and "<circle" in svg and ">4<" in svg and "step 10<" in svg


def test_curves_by_kind(tmp_path: Path) -> None:
    folder = built(tmp_path, "align/amber", {})
    rows = [(0, "loss", 1.0), (1, "loss", float("nan")), (0, "gradient_norm", 9.0), (0, "held_out_reward", -2.0), (0, "reward", -3.0)]
    pd.DataFrame(rows, columns=["step", "metric", "value"]).to_parquet(folder / "curves.parquet")
    drawn = preview._curves(folder / "curves.parquet")
    assert [("loss" in svg, "held_out_reward" in svg, "norm" in svg) for svg in drawn] == [(True, False, False), (False, True, False)]
    assert "data:image/svg+xml;base64," in preview.metadata(tmp_path, "align", "amber")["curves"].md_str


def test_no_real_image_and_no_name(tmp_path: Path) -> None:
    for node, stage, role in (("data/amber", "data", "split"), ("references/amber", "references", "role")):
        folder = built(tmp_path, node, {}, images=np.zeros((1, 8, 8, 3), np.uint8), masks=np.zeros((1, 8, 8), np.uint8))
        pd.DataFrame({"case_id": ["0a1b"], "stem": ["Meier_Anna"], "group": ["Meier_Anna"], "image_file": ["Meier_Anna.png"], role: ["train"],
                      "labelled": [True], "width": [8], "height": [8]}).to_parquet(folder / "manifest.parquet")
        found = preview.metadata(tmp_path, stage, "amber")
        assert "Meier" not in str(found) and "0a1b" in str(found) and "base64" not in str(found)


def test_kept_and_refused_pairs(tmp_path: Path) -> None:
    images = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (50, 100, 200)])
    built(tmp_path, "sample_aligned/amber", {}, images=images, masks=np.zeros((3, 8, 8), np.uint8))
    folder = built(tmp_path, "filter/amber", {"kept_fraction": 2 / 3})
    pd.DataFrame({"pair_id": list("abc"), "kept": [True, False, True], "reason": ["", "implausible image", ""]}).to_parquet(
        folder / "manifest.parquet")
    found = preview.metadata(tmp_path, "filter", "amber")
    assert (found["pairs"], found["kept"], found["reasons"]) == (3, 2, {"implausible image": 1})
    assert abs(picture(found["images_refused"]).mean() - 100) < 2 and abs(picture(found["images_kept"]).mean() - 125) < 2


def test_no_real_mask_and_no_near_copy(tmp_path: Path) -> None:
    images = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (50, 100, 200, 250)])
    masks = np.zeros((4, 8, 8), np.uint8)
    masks[:2] = 1
    table = pd.DataFrame({"pair_id": list("abcd"), "origin": ["real", "flow", "flow", "real"]})
    for node in ("sample_masks", "sample_stage1", "sample_aligned/amber"):
        table.to_parquet(built(tmp_path, node, {}, images=images, masks=masks) / "manifest.parquet")
    side = preview.SIDE
    assert "images" not in preview.metadata(tmp_path, "sample_aligned", "amber"), "the filter has yet to say which are copies"
    assert picture(preview.metadata(tmp_path, "sample_masks", None)["masks"]).shape[1] == 2 * side
    assert abs(picture(preview.metadata(tmp_path, "sample_stage1", None)["images"])[4, [side // 2, 3 * side // 2], 0] - [100, 200]).max() < 3
    folder = built(tmp_path, "filter/amber", {})
    reasons = ["", "", "near copy of a reference", "implausible image"]
    pd.DataFrame({"pair_id": list("abcd"), "kept": [True, True, False, False], "reason": reasons}).to_parquet(folder / "manifest.parquet")
    found = preview.metadata(tmp_path, "filter", "amber")
    assert "images_refused" not in found and abs(picture(found["images_kept"])[4, side // 2, 0] - 100) < 3
    table.assign(origin="real").to_parquet(tmp_path / "artifacts/sample_masks/manifest.parquet")
    assert "masks" not in preview.metadata(tmp_path, "sample_masks", None)


def test_the_hash_that_dvc_has(tmp_path: Path) -> None:
    built(tmp_path, "align/amber", {})
    assert "dvc_md5" not in preview.metadata(tmp_path, "align", "amber"), "built without DVC"
    recorded = hashlib.md5((tmp_path / "artifacts/align/amber.json").read_bytes(), usedforsecurity=False).hexdigest()
    outs = [{"path": "artifacts/align/amber", "md5": "77.dir"}, {"path": "artifacts/align/amber.json", "md5": recorded}]
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {"align@amber": {"outs": outs}}}))
    found = preview.metadata(tmp_path, "align", "amber")
    assert (found["dvc_path"], found["dvc_md5"], found["content"], found["fingerprint"]) == ("artifacts/align/amber", "77.dir", "c0", "f0")
    outs[1]["md5"] = "78"
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {"align@amber": {"outs": outs}}}))
    assert "dvc_md5" not in preview.metadata(tmp_path, "align", "amber"), "the lock speaks of an older artifact"
    (tmp_path / "dvc.lock").write_text("stages: [half wri")
    assert "dvc_md5" not in preview.metadata(tmp_path, "align", "amber")


def test_the_page_of_a_run_and_a_tracker_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import tracking

    client = SimpleNamespace(get_run=lambda run: SimpleNamespace(info=SimpleNamespace(experiment_id="3")))
    monkeypatch.setattr(tracking, "client", lambda root: client)
    built(tmp_path, "align/amber", {})
    assert preview.metadata(tmp_path, "align", "amber", "r7")["mlflow"].url == "http://127.0.0.1:5000/#/experiments/3/runs/r7"
    (tmp_path / ".alignflow").mkdir()
    (tmp_path / ".alignflow" / "mlflow.port").write_text("5007\n")
    assert preview.metadata(tmp_path, "align", "amber", "r7")["mlflow"].url == "http://127.0.0.1:5007/#/experiments/3/runs/r7"

    def locked(*_: object) -> str:
        raise OSError("database is locked")

    warnings: list[str] = []
    context: Any = SimpleNamespace(log=SimpleNamespace(warning=warnings.append))
    monkeypatch.setattr(tracking, "record", locked)
    assert assets.track(context, tmp_path, "align", "amber") is None
    assert "database is locked" in warnings[0]
    monkeypatch.setattr(tracking, "client", locked)
    for run_id in (None, "r7"):
        assert "mlflow" not in preview.metadata(tmp_path, "align", "amber", run_id)


SEEN = """
import json
from pathlib import Path
import dagster as dg
from pipelines.build import materialize
from pipelines.resources import dagster_home

root = Path(".").resolve()
materialize(root, mode="inline")
dagster_home(root)
with dg.DagsterInstance.get() as instance:
    def latest(asset, partition=None):
        records = instance.fetch_materializations(dg.AssetRecordsFilter(dg.AssetKey(asset), asset_partitions=partition and [partition]), limit=1)
        return records.records[0].asset_materialization.metadata

    painted, report = latest("synthetic_images", "amber"), latest("report")
    records = instance.get_event_records(dg.EventRecordsFilter(dg.DagsterEventType.ASSET_CHECK_EVALUATION))
    checks = [record.event_log_entry.dagster_event.asset_check_evaluation_data for record in records]
    print(json.dumps({"painted": sorted(painted), "page": painted["mlflow"].url, "report": sorted(report),
                      "failed": [f"{each.asset_key.path[0]} {each.check_name}" for each in checks if not each.passed],
                      "names": sorted({each.check_name for each in checks}), "n": len(checks)}))
"""


@pytest.mark.nightly
def test_a_project_built_through_dagster_shows_all_of_it(tmp_path: Path) -> None:
    import json

    root = write_project(tmp_path / "project")
    found = json.loads(run(root, "-c", SEEN).splitlines()[-1])
    assert {"images", "curves", "content", "fingerprint", "path", "mlflow", "seed"} <= set(found["painted"])
    assert re.fullmatch(r"http://127\.0\.0\.1:5000/#/experiments/\d+/runs/[0-9a-f]{32}", found["page"])
    assert "page" in found["report"] and found["failed"] == []
    assert set(found["names"]) == {check.name for each in CHECKS.values() for check in each} | {"up_to_date"}
