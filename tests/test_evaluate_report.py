"""privacy, evaluate, compare and report on a small made-up project: two cameras, discs with cups, real segmenter files."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from alignflow_core import compare, evaluate, privacy, report
from alignflow_core.artifact import tree_hash, write_json
from alignflow_core.config import Align, Evaluate, Gates, Machine, Network, References, Report, SegmenterNetwork, Target, Task
from alignflow_core.errors import InputError
from alignflow_core.full_strength import at_full_strength
from alignflow_core.metrics import comparison
from alignflow_core.metrics.appearance import appearance
from alignflow_core.metrics.overlap import overlap
from alignflow_core.metrics.statistics import holm
from alignflow_core.networks import velocity_unet
from alignflow_core.networks.registry import arm_folder
from alignflow_core.networks.segmenters import build_segmenter, load_segmenter, predict, save_segmenter
from alignflow_core.pairs import Pairs, read_pairs, write_pairs
from alignflow_core.runner import Context
from alignflow_core.segmenter_fit import COLUMNS
from alignflow_core.stages import source_files

TASK = Task(name="fundus", kind="refuge", classes=("disc", "cup"), nested=True)
SOURCE, AMBER = (150, 80, 40), (170, 120, 30)
TRAINED = {"segment_source": ("source",), "segment_stage1": ("stage1",), "segment_baselines/amber": ("oracle",),
           "segment_aligned/amber": ("aligned",), "segment_filtered/amber": ("aligned+filtered",)}
CONFIG = SimpleNamespace(seed=0, machine=Machine(device="cpu", threads=1), task=TASK, evaluate=Evaluate(bootstrap=200), report=Report(examples=3),
                         variant_of=None, targets={"amber": Target("amber")})


def paint(n: int, colour: tuple[int, int, int], seed: int, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Tissue with a brighter disc and a still brighter cup: images and class numbers."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    images, masks = np.empty((n, size, size, 3), np.uint8), np.zeros((n, size, size), np.uint8)
    for i in range(n):
        distance = np.hypot(y - rng.uniform(12, 20), x - rng.uniform(12, 20))
        radius = rng.uniform(6, 9)
        masks[i] = (distance < radius).astype(np.uint8) + (distance < radius * rng.uniform(0.4, 0.7))
        image = np.array(colour) * (1 + 0.25 * masks[i][..., None]) + rng.normal(0, 6, (size, size, 3))
        images[i] = image.clip(0, 255)
    return images, masks


def write(folder: Path, images: np.ndarray, masks: np.ndarray | None, **columns: object) -> None:
    folder.mkdir(parents=True)
    table = pd.DataFrame(columns)
    write_pairs(folder, Pairs(images, masks, tuple(table.iloc[:, 0]), table))


SEGMENTERS = ("unet", "segformer")


def write_segmenters(folder: Path, arms: tuple[str, ...], seeds: int = 2) -> None:
    rows = []
    for name in SEGMENTERS:
        for arm in arms:
            for seed in range(seeds):
                network = SegmenterNetwork((8, 16), architecture=name)
                where = f"{arm_folder(name, arm)}/seed{seed}"
                save_segmenter(folder / where, build_segmenter(2, network, seed).state_dict(), 2, network, TASK, arm=arm)
                rows.append((name, arm, seed, where, 0.5, 10, 40, 0, 1000))
    pd.DataFrame(rows, columns=list(COLUMNS)).to_parquet(folder / "segmenters.parquet")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts of everything upstream of evaluate for the target ``amber``."""
    root = tmp_path_factory.mktemp("project")
    art = root / "artifacts"
    for domain, colour, seed in (("standard", SOURCE, 1), ("amber-clinic", AMBER, 2)):
        ids = [f"{domain[:2]}{i:04x}" for i in range(40)]
        write(art / "data" / domain, *paint(40, colour, seed), case_id=ids, stem=[f"secret_{i}" for i in ids], domain=domain,
              group=[f"patient{i // 2}" for i in range(40)], split=["train"] * 16 + ["val"] * 8 + ["test"] * 16)
    write(art / "references" / "amber", paint(7, AMBER, 3)[0], None, case_id=[f"ref{i}" for i in range(7)], stem=[f"secret_r{i}" for i in range(7)],
          role=["align"] * 5 + ["held_out"] * 2)
    pairs = {"pair_id": [f"pair{i:06d}" for i in range(20)], "mask_id": [f"mask{i:06d}" for i in range(20)], "origin": "real"}
    _, masks = paint(20, AMBER, 4)
    aligned = paint(20, AMBER, 4)[0]
    aligned[5] = paint(7, AMBER, 3)[0][2]  # a planted copy of a reference
    write(art / "sample_stage1", paint(20, SOURCE, 4)[0], masks, **pairs)
    write(art / "sample_aligned" / "amber", aligned, masks, **pairs)
    (art / "filter" / "amber").mkdir(parents=True)
    reasons = ["implausible image" if i % 5 == 1 else "" for i in range(20)]
    filtered = pd.DataFrame({"pair_id": pairs["pair_id"], "kept": [not reason for reason in reasons], "reason": reasons})
    filtered.to_parquet(art / "filter" / "amber" / "manifest.parquet")
    for stage, arms in TRAINED.items():
        write_segmenters(art / stage, arms)
    (art / "sample_masks").mkdir()
    real = np.load(art / "data" / "amber-clinic" / "images.npy")[[30, 25]]  # rows of the test split, in an order of their own
    (art / "sample_paired" / "amber").mkdir(parents=True)
    np.save(art / "sample_paired" / "amber" / "stage1.npy", 255 - real)
    np.save(art / "sample_paired" / "amber" / "aligned.npy", real)
    pd.DataFrame({"case_id": ["am001e", "am0019"]}).to_parquet(art / "sample_paired" / "amber" / "manifest.parquet")
    curve = pd.DataFrame({"step": range(30), "metric": "loss", "value": np.linspace(1, 0.2, 30)})
    network = Network((8, 16), (False, False), head_channels=8)
    for stage, domain in (("image_flow", velocity_unet.SOURCE), ("align/amber", velocity_unet.TARGET)):
        velocity_unet.save(art / stage, velocity_unet.build(3, 4, network, domain).state_dict(), 3, 4, network, domain=domain, clip=8.0)
    for stage in ("image_flow", "mask_flow", "align/amber"):
        (art / stage).mkdir(parents=True, exist_ok=True)
        curve.to_parquet(art / stage / "curves.parquet")
    looks = pd.DataFrame({"step": [0, 20, 40], "round": 0, "held_out_reward": [-3.0, -1.0, -1.2], "reward": [-3.0, -0.9, -1.0],
                          "diversity_ratio": [1, 0.95, 0.7], "velocity_ratio": [1, 1.02, 1.05], "agreement_ratio": [1, 0.9, 0.9],
                          "copy_ratio": [1, 1.1, 1.0], "failed": ["", "", "diversity ratio 0.70 < 0.8"], "best": [False, True, False]})
    looks.to_parquet(art / "align" / "amber" / "gates.parquet")
    write_json(art / "align" / "amber" / "metrics.json", {"best_step": 20.0})
    verdict = {"round": 0, "best_step": 20, "ended_at": 40, "ended_because": "all steps are done", "refused": ["diversity ratio 0.70 < 0.8"]}
    write_json(art / "align" / "amber" / "verdict.json", {"rounds": [verdict]})
    return root


def context(root: Path, key: str | None) -> Context:
    return Context(key, root, root, lambda metrics, step: None, lambda done, total, note: None)


def build(root: Path, stage: str, function: Callable[..., dict[str, float]], key: str | None, inputs: dict[str, str]) -> Path:
    """Run one stage as the runner would, with metrics and provenance."""
    folder = root / "artifacts" / stage / (key or "")
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: root / "artifacts" / where for name, where in inputs.items()}
    write_json(folder / "metrics.json", function(CONFIG, paths, folder, context(root, key)))
    write_json(folder.with_name(folder.name + ".json"), {
        "stage": stage, "key": key, "content": tree_hash(folder), "fingerprint": "f" * 64, "seconds": 1.5,
        "inputs": {name: tree_hash(path) for name, path in paths.items()}, "profile": "smoke", "seed": 0, "versions": {"torch": "2"}})
    return folder


EVALUATE_INPUTS = {
    "data:source": "data/standard", "data:target": "data/amber-clinic", "references": "references/amber", "sample_stage1": "sample_stage1",
    "sample_aligned": "sample_aligned/amber", "filter": "filter/amber",
    **{folder.partition("/")[0]: folder for folder in TRAINED},
    "sample_paired": "sample_paired/amber",
}
PRIVACY_INPUTS = {
    "data:source": "data/standard", "data:target": "data/amber-clinic", "references": "references/amber", "sample_aligned": "sample_aligned/amber",
    "filter": "filter/amber", "image_flow": "image_flow", "align": "align/amber",
}
REPORT_INPUTS = {
    "compare": "compare", "evaluate:amber": "evaluate/amber", "privacy:amber": "privacy/amber", "data:source": "data/standard",
    "references:amber": "references/amber",
    "sample_masks": "sample_masks", "sample_stage1": "sample_stage1", "sample_aligned:amber": "sample_aligned/amber",
    "align:amber": "align/amber", "filter:amber": "filter/amber", "image_flow": "image_flow", "mask_flow": "mask_flow",
}


@pytest.fixture(scope="module")
def evaluated(project: Path) -> Path:
    return build(project, "evaluate", evaluate.run, "amber", EVALUATE_INPUTS)


@pytest.fixture(scope="module")
def audited(project: Path) -> Path:
    return build(project, "privacy", privacy.run, "amber", PRIVACY_INPUTS)


@pytest.fixture(scope="module")
def compared(project: Path, evaluated: Path, audited: Path) -> Path:
    return build(project, "compare", compare.run, None, {"evaluate:amber": "evaluate/amber"})


def test_evaluate_writes_a_value_per_image_class_segmenter_arm_and_seed(evaluated: Path):
    table = pd.read_parquet(evaluated / "metrics.parquet")
    assert list(table.columns) == ["target", "arm", "generator_seed", "segmenter", "segmenter_seed", "case_id", "group", "class", "metric", "value"]
    dice = table[table["metric"] == "dice"]
    assert len(dice) == 16 * 2 * 5 * 2 * 2 and dice["value"].between(0, 1).all()
    assert set(table["metric"]) == {"dice", "iou", "hd95", "cdr_error"}
    assert set(table.loc[table["metric"] == "cdr_error", "class"]) == {"cup"}


def test_segmenters_are_tried_on_the_source_s_own_test_images(project: Path, evaluated: Path):
    table = pd.read_parquet(evaluated / "source_test.parquet")
    assert list(table.columns) == list(pd.read_parquet(evaluated / "metrics.parquet").columns)
    assert len(table) == 16 * 5 * 2 * 2 and set(table["metric"]) == {"dice"} and table["value"].between(0, 1).all()
    source = read_pairs(project / "artifacts/data/standard", "test")
    assert set(table["case_id"]) == set(source.ids)
    model = load_segmenter(project / "artifacts/segment_stage1/stage1/seed1", torch.device("cpu"))
    own = table.query("segmenter == 'unet' and arm == 'stage1' and segmenter_seed == 1").set_index("case_id")["value"]
    dice = overlap(predict(model, source.images, TASK, torch.device("cpu")), source.labels, TASK)["dice"].mean(1)
    assert own[list(source.ids)].tolist() == pytest.approx(dice.tolist())
    assert pd.read_json(evaluated / "metrics.json", typ="series")["source_dice_stage1"] == pytest.approx(
        table.query("segmenter == 'unet' and arm == 'stage1'")["value"].mean())


def test_who_loses_at_home_is_said_to_be_harmed(tmp_path: Path):
    rng = np.random.default_rng(3)
    base = rng.uniform(0.6, 0.8, 40)
    values = long_table({"source": base, "stage1": base - 0.05 + rng.normal(0, 0.02, 40), "aligned": base - 0.01 + rng.normal(0, 0.02, 40),
                         "oracle": base - 0.03 + rng.normal(0, 0.3, 40)})
    values["value"] -= (values["segmenter_seed"] - 0.5) * 0.08  # what is left of a training's luck is .01 up or down
    for file in ("metrics", "source_test"):
        values.to_parquet(tmp_path / f"{file}.parquet")
    compare.run(CONFIG, {"evaluate:t": tmp_path}, tmp_path, context(tmp_path, None))
    found = pd.read_parquet(tmp_path / "source_test.parquet").set_index("arm")
    assert found["harmed"].to_dict() == {"source": False, "stage1": True, "aligned": False, "oracle": False}, "neither little nor doubtful loss"
    assert found.loc["stage1", "difference"] == pytest.approx(-0.05, abs=0.01) and set(found["baseline"]) == {"source"}
    lucky = values.copy()
    lucky.loc[(lucky["arm"] == "stage1") & (lucky["segmenter_seed"] == 1), "value"] += 0.05
    lucky.to_parquet(tmp_path / "source_test.parquet")
    compare.run(CONFIG, {"evaluate:t": tmp_path}, tmp_path, context(tmp_path, None))
    found = pd.read_parquet(tmp_path / "source_test.parquet").set_index("arm")
    assert found.loc["stage1", "diff_ci_high"] < 0 and not found["harmed"].any(), "one of its segmenters is as good as one of source's"
    values[values["arm"] != "source"].to_parquet(tmp_path / "source_test.parquet")
    compare.run(CONFIG, {"evaluate:t": tmp_path}, tmp_path, context(tmp_path, None))
    assert pd.read_parquet(tmp_path / "source_test.parquet").empty, "nothing to compare with"


def test_report_warns_where_painted_pairs_do_not_teach(project: Path, compared: Path, tmp_path: Path):
    page = (build(project, "report", report.run, None, REPORT_INPUTS) / "index.html").read_text()
    assert "On the source's own test images" in page
    shutil.copytree(project, tmp_path / "project")
    file = tmp_path / "project/artifacts/compare/source_test.parquet"
    table = pd.read_parquet(file)
    for harmed in (False, True):
        table.assign(harmed=harmed & (table["arm"] == "stage1")).to_parquet(file)
        page = (build(tmp_path / "project", "report", report.run, None, REPORT_INPUTS) / "index.html").read_text()
        assert ("do not teach" in page) is harmed
    table[:0].to_parquet(file)
    page = (build(tmp_path / "project", "report", report.run, None, REPORT_INPUTS) / "index.html").read_text()
    assert "On the source's own test images" not in page


def test_evaluate_measures_images_with_their_n_and_floor(evaluated: Path):
    distances = pd.read_parquet(evaluated / "distances.parquet").set_index(["metric", "set"])
    assert distances.loc[("kid", "aligned"), ["n", "n_reference"]].tolist() == [20, 16]
    assert distances.loc[("kid", "aligned+filtered"), "n"] == 16
    kid = distances.loc["kid"]
    assert kid.loc["aligned", "value"] < kid.loc["stage1", "value"] / 3
    assert kid["floor"].nunique() == 1 and abs(kid["floor"].iloc[0]) < kid.loc["stage1", "value"]
    assert set(distances.index.levels[0]) == set(report.DISTANCE_METRICS)
    inside = distances.dropna(subset="ci_low")
    assert (inside["ci_low"] < inside["ci_high"]).all() and inside["value"].between(inside["ci_low"] - 1e-9, inside["ci_high"] + 1e-9).all()
    assert distances["ci_low"].notna().groupby("set").mean()[["source", "stage1", "aligned"]].min() > 0.8
    features = pd.read_parquet(evaluated / "features.parquet")
    assert features["set"].value_counts().to_dict() == {"source": 16, "references": 7, "target test": 16, "stage1": 20, "aligned": 20}


def test_contrast_of_references_without_masks_is_that_of_the_regions_found_in_them(project: Path, evaluated: Path, compared: Path) -> None:
    art = project / "artifacts"
    segmenter = load_segmenter(art / "segment_source" / arm_folder("unet", "source") / "seed0", torch.device("cpu"))
    images = read_pairs(art / "references" / "amber").images
    expected = appearance(images, predict(segmenter, images, TASK, torch.device("cpu")), TASK)
    found = pd.read_parquet(evaluated / "appearance.parquet").query("set == 'references'")
    assert np.array_equal(found["contrast_disc"], expected["contrast_disc"], equal_nan=True)
    page = (build(project, "report", report.run, None, REPORT_INPUTS) / "index.html").read_text()
    assert "the segmenter of real source images finds" in page


def test_distances_are_of_the_pairs_painted_at_full_strength(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project, tmp_path / "project")
    file = tmp_path / "project/artifacts/sample_aligned/amber/manifest.parquet"
    pd.read_parquet(file).assign(strength=[0.5, 1.0] * 10).to_parquet(file)
    out = build(tmp_path / "project", "evaluate", evaluate.run, "amber", EVALUATE_INPUTS)
    distances = pd.read_parquet(out / "distances.parquet").set_index(["metric", "set"])
    assert distances.loc[("kid", "aligned"), "n"] == 10 and distances.loc[("kid", "aligned+filtered"), "n"] == 8
    assert distances.loc[("kid", "stage1"), "n"] == 10
    assert pd.read_parquet(out / "appearance.parquet")["set"].value_counts()[["stage1", "aligned"]].tolist() == [10, 10]
    audit = build(tmp_path / "project", "privacy", privacy.run, "amber", PRIVACY_INPUTS)
    assert len(pd.read_parquet(audit / "copying.parquet")["pair_id"].unique()) == 20
    build(tmp_path / "project", "compare", compare.run, None, {"evaluate:amber": "evaluate/amber"})
    page = (build(tmp_path / "project", "report", report.run, None, REPORT_INPUTS) / "index.html").read_text()
    assert "painted at strengths 0.5, 1 (0 is stage 1" in page and "the masks painted at 1," in page and "noised to time" not in page
    pd.read_parquet(file).assign(start=[0.0, 0.0, 0.3, 0.5] * 5).to_parquet(file)
    page = (build(tmp_path / "project", "report", report.run, None, REPORT_INPUTS) / "index.html").read_text()
    assert "noised to time 0.3, 0.5 of 1" in page and "distances are of those painted from noise" in page


def test_full_strength_is_that_of_1_and_of_all_where_there_is_none() -> None:
    table = pd.DataFrame({"strength": [0.5, 1.0, 1.5]})
    assert at_full_strength(table).tolist() == [False, True, False]
    started = pd.DataFrame({"strength": [1.0, 1.0, 0.5, 1.5], "start": [0.5, 0.0, 0.0, 0.5]})
    assert at_full_strength(started).tolist() == [False, True, False, False]
    assert at_full_strength(started[started["start"] > 0]).tolist() == [True, False], "where none is from noise, those of strength 1"
    assert at_full_strength(table[table["strength"] != 1]).all() and at_full_strength(table[["strength"]].rename(columns={"strength": "x"})).all()


def test_evaluate_compares_painted_masks_with_their_own_real_images(evaluated: Path) -> None:
    means = pd.read_parquet(evaluated / "paired.parquet").groupby(["set", "metric"])["value"].mean()
    assert means["aligned", "ssim"] == pytest.approx(1) and means["aligned", "lpips_standin"] == 0 and np.isinf(means["aligned", "psnr"])
    assert means["stage1", "ssim"] < 0.5


def test_privacy_finds_the_planted_copy(audited: Path):
    copies = pd.read_parquet(audited / "copying.parquet")
    row = copies[(copies["pair_id"] == "pair000005") & (copies["bank"] == "references")].iloc[0]
    assert row["flagged"] and row["nearest"] == "ref2" and row["distance"] == pytest.approx(0, abs=0.02)
    assert pd.read_json(audited / "metrics.json", typ="series")["copy_flagged_fraction"] >= 1 / 16


def test_evaluate_numbers_are_fit_for_a_tracker(evaluated: Path):
    numbers = pd.read_json(evaluated / "metrics.json", typ="series")
    assert {"dice_aligned_plus_filtered", "iou_source", "segformer/dice_source", "obey_ratio", "obey_real_disc", "kid_aligned"} <= set(numbers.index)
    assert all(re.fullmatch(r"[\w\-. /]+", name) for name in numbers.index) and np.isfinite(numbers).all()


def test_privacy_asks_who_was_given(audited: Path):
    numbers = pd.read_json(audited / "metrics.json", typ="series")
    assert all(re.fullmatch(r"[\w\-. /]+", name) for name in numbers.index)
    for name, members, others in (("source_stage1", 16, 24), ("source_aligned", 16, 24), ("references", 5, 16)):  # of seven two are held out
        assert (numbers[f"membership_members_{name}"], numbers[f"membership_others_{name}"]) == (members, others)
        assert 0 <= numbers[f"membership_low_{name}"] <= numbers[f"membership_auc_{name}"] <= numbers[f"membership_high_{name}"] <= 1
    assert list(pd.read_parquet(audited / "membership.parquet").columns) == ["set", "case_id", "member", "score"]


def test_compare_has_the_contract(compared: Path):
    table = pd.read_parquet(compared / "comparison.parquet")
    assert list(table.columns) == comparison.COLUMNS
    assert set(table["n"]) == {8}  # patients, not images
    assert len(table) == 4 * 2 * 5 * 2  # metrics x baselines x arms x segmenters
    assert table["segmenter"].drop_duplicates().tolist() == list(SEGMENTERS)
    own = table[table["arm"] == table["baseline"]]
    assert own["difference"].isna().all() and own["mean"].notna().all()
    assert len(pd.read_csv(compared / "comparison.csv")) == len(table)
    assert set(pd.read_parquet(compared / "per_class.parquet")["class"]) == {"disc", "cup"}


def long_table(arms: dict[str, np.ndarray], segmenter: str = "unet") -> pd.DataFrame:
    frames = []
    for arm, values in arms.items():
        ids = [f"c{i:03d}" for i in range(len(values))]
        frames += [pd.DataFrame({"target": "t", "arm": arm, "segmenter": segmenter, "segmenter_seed": seed, "case_id": ids, "group": ids,
                                 "class": "x", "metric": "dice", "value": values + (seed - 0.5) * 0.1}) for seed in (0, 1)]
    return pd.concat(frames)


def test_compare_known_difference_and_gap():
    rng = np.random.default_rng(0)
    base = rng.uniform(0.3, 0.5, 60)
    arms = {"source": base, "aligned": base + 0.2 + rng.normal(0, 0.02, 60), "oracle": base + 0.4}
    table = comparison.compare(long_table(arms), Evaluate(bootstrap=500), 0)
    row = table.set_index(["arm", "baseline"]).loc[("aligned", "source")]
    assert row["difference"] == pytest.approx(0.2, abs=0.01) and row["diff_ci_low"] > 0.19 and row["diff_ci_high"] < 0.21
    assert row["p_value"] < 1e-6 and row["p_adjusted"] >= row["p_value"]
    gap = comparison.gap_closed(table).set_index("arm")["gap_closed"]
    assert gap[["source", "aligned", "oracle"]].tolist() == pytest.approx([0, 0.5, 1], abs=0.02)
    again = comparison.compare(long_table({"source": base, "aligned": base}), Evaluate(bootstrap=50), 0).set_index(["arm", "baseline"])
    assert again.loc[("aligned", "source"), "p_value"] == 1.0 and again.loc[("aligned", "source"), "diff_ci_high"] == 0.0


def test_each_segmenter_is_compared_by_itself():
    rng = np.random.default_rng(1)
    base = rng.uniform(0.3, 0.5, 30)
    arms = {"source": base, "aligned": base + 0.2 + rng.normal(0, 0.02, 30), "oracle": base + 0.4}
    alone = comparison.compare(long_table(arms), Evaluate(bootstrap=200), 0)
    other = long_table({name: 0.5 * values for name, values in arms.items()}, "dpt")
    both = comparison.compare(pd.concat([long_table(arms), other]), Evaluate(bootstrap=200), 0)
    pd.testing.assert_frame_equal(both[both["segmenter"] == "unet"].reset_index(drop=True), alone)
    halved = both[both["segmenter"] == "dpt"].set_index(["arm", "baseline"]).loc[("aligned", "source")]
    assert halved["difference"] == pytest.approx(0.1, abs=0.01)
    gap = comparison.gap_closed(both).set_index(["segmenter", "arm"])["gap_closed"]
    assert gap["unet", "aligned"] == pytest.approx(gap["dpt", "aligned"])


def test_report_has_every_segmenter_and_their_mean(project: Path, compared: Path):
    table = pd.read_parquet(compared / "comparison.parquet")
    (block,) = report._by_segmenter(table, ["amber"])
    assert list(block["groups"]) == [*SEGMENTERS, "mean"]
    by_arm = {name: dict(rows) for name, rows in block["groups"].items()}
    for arm in [arm for arms in TRAINED.values() for arm in arms]:
        dice = [by_arm[name][arm][0] for name in SEGMENTERS]
        assert by_arm["mean"][arm][0] == pytest.approx(sum(dice) / 2) and dice[0] != dice[1]
    assert report._by_segmenter(table[table["segmenter"] == "unet"], ["amber"]) == []
    page = (build(project, "report", report.run, None, REPORT_INPUTS) / "index.html").read_text()
    assert "By segmenter" in page and "architectures unet, segformer" in page
    dice = table.query("segmenter == 'unet' and arm == 'aligned' and metric == 'dice'")["mean"].iloc[0]
    assert f">{dice:.3f}<" in page.partition("By segmenter")[0], "the main tables are about the first"


def test_what_variants_share_with_their_base_is_one_test():
    rng = np.random.default_rng(2)
    base = rng.uniform(0.3, 0.5, 20)
    arms = {"source": base, "stage1": base + rng.normal(0.01, 0.02, 20), "aligned": base + rng.normal(0.02, 0.02, 20)}
    alone = comparison.compare(long_table(arms), Evaluate(bootstrap=50), 0)
    twins = [long_table(arms).assign(target=f"t-variant{i}") for i in range(8)]  # as far as one knows, the same networks
    both = comparison.compare(pd.concat([long_table(arms), *twins]), Evaluate(bootstrap=50), 0)
    assert both.loc[both["target"] == "t", "p_adjusted"].tolist() == pytest.approx(alone["p_adjusted"].tolist(), nan_ok=True)
    other = long_table(arms | {"aligned": base + rng.normal(0.02, 0.02, 20)}).assign(target="t-other")  # another network is another test
    both = comparison.compare(pd.concat([long_table(arms), other]), Evaluate(bootstrap=50), 0)
    versus = both[(both["baseline"] == "source") & (both["arm"] != "source")].set_index(["target", "arm"])
    p = versus["p_value"][[("t", "stage1"), ("t", "aligned"), ("t-other", "aligned")]]
    assert versus["p_adjusted"][p.index].tolist() == pytest.approx(holm(p.to_numpy()).tolist())
    assert versus["p_adjusted"]["t-other", "stage1"] == versus["p_adjusted"]["t", "stage1"]


def test_compare_without_any_baseline_says_so():
    with pytest.raises(InputError, match=r"evaluate\.baselines"):
        comparison.compare(long_table({"aligned": np.ones(8)}), Evaluate(), 0)
    other = long_table({"aligned": np.ones(8)}).assign(target="poor")
    with pytest.raises(InputError, match="none of source, stage1 was trained for poor; name one that was, such as aligned"):
        comparison.compare(pd.concat([long_table({"source": np.ones(8), "aligned": np.ones(8)}), other]), Evaluate(), 0)


def test_report_is_one_self_contained_page(project: Path, compared: Path):
    folder = build(project, "report", report.run, None, REPORT_INPUTS)
    page = (folder / "index.html").read_text()
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert "http" not in re.sub(r"data:[^\"]*", "", page) and "@import" not in page and "<script" not in page
    for words in ("id=\"summary\"", "Target amber", "Synthetic is not anonymous", "Copy check", "real against real", "pair000005", "Holm",
                  "CMMD", "Vendi", "jackknife intervals", "Can one tell which images the generator was given"):
        assert words in page
    assert "secret_" not in page  # file names stay at home
    assert all(f'id="{link[1:]}"' in page for link in links if link.startswith("#"))
    assert "evaluate" in page and "1.5" in page  # provenance, with seconds


def test_ablations_say_what_was_changed_and_by_how_much(project: Path, compared: Path):
    comparison = pd.read_parquet(compared / "comparison.parquet").query("segmenter == 'unet'")
    base = comparison[comparison["target"] == "amber"]
    lower = base.assign(target="amber-skl", mean=base["mean"] - 0.1, difference=base["difference"] - 0.1)
    targets = {"amber": Target("amber"), "amber-skl": Target("amber", References(count=5), Align(reward="skl"), variant_of="amber")}
    inputs = {f"{stage}:{name}": project / "artifacts" / stage / "amber" for stage in ("evaluate", "privacy", "align", "references")
              for name in targets}
    (found,) = report._ablations(["amber"], SimpleNamespace(targets=targets), inputs, pd.concat([comparison, lower]))
    first, second = found["rows"]
    assert first["changed"] == "as set up" and second["changed"] == "references.count 10 → 5, align.reward frechet → skl"
    assert first["mean"] - second["mean"] == pytest.approx(0.1)
    assert found["name"] == "references.count, align.reward" and found["figure"].startswith("data:image/svg")
    assert report._ablations(["amber"], SimpleNamespace(targets={"amber": targets["amber"]}), inputs, comparison) == []
    for left, against in (("baseline != 'stage1'", "source"), ("baseline not in ('stage1', 'source')", None)):  # arms that nobody asked for
        found = report._ablations(["amber"], SimpleNamespace(targets=targets), inputs, pd.concat([comparison, lower]).query(left))
        assert [each["against"] for each in found] == ([against] if against else [])


def test_report_where_no_aligned_arm_was_asked_for(project: Path, compared: Path, monkeypatch: pytest.MonkeyPatch):
    table = pd.read_parquet(compared / "comparison.parquet")
    table = table[(table["segmenter"] == "unet") & (table["target"] == "amber")]
    assert report._headline(table[table["arm"] == "source"], {}, {}) == {}
    monkeypatch.setattr(report, "_headline", lambda *_: {})
    assert "Target amber" in (build(project, "report", report.run, None, REPORT_INPUTS) / "index.html").read_text()


def test_report_where_the_source_has_no_test_images(project: Path, compared: Path, tmp_path: Path):
    shutil.copytree(project, tmp_path / "project")
    file = tmp_path / "project" / "artifacts" / "evaluate" / "amber" / "metrics.json"
    numbers = {name: value for name, value in json.loads(file.read_text()).items() if not re.match("obey_(real|ratio)", name)}
    assert any(name.startswith("obey_stage1") for name in numbers)
    file.write_text(json.dumps(numbers))
    page = (build(tmp_path / "project", "report", report.run, None, REPORT_INPUTS) / "index.html").read_text()
    assert "Target amber" in page and "Stage 1 obeys its masks" not in page


def test_report_says_where_gates_were_told_not_to_hold(project: Path, compared: Path, monkeypatch: pytest.MonkeyPatch):
    page = (build(project, "report", report.run, None, REPORT_INPUTS) / "index.html").read_text()
    assert "among the looks that kept every limit" in page
    loose = Target("amber", align=Align(gates=Gates(hold=False)))
    monkeypatch.setattr(CONFIG, "targets", {"amber": loose})
    page = (build(project, "report", report.run, None, REPORT_INPUTS) / "index.html").read_text()
    assert "told not to hold" in page and "kept every limit" not in page


def test_report_escapes_names(project: Path, compared: Path):
    template = report._environment().from_string("{{ name }}")
    assert template.render(name="<b>") == "&lt;b&gt;"


def test_template_belongs_to_the_stage():
    assert {"report_template.html", "figures.py"} <= set(source_files("report"))
