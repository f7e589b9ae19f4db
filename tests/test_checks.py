"""Asset checks with known answers: each passes on a sound artifact and fails on one that is wrong in just that way."""

from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd
import pytest
import yaml

from alignflow_core.artifact import write_json
from alignflow_core.config import load_project
from alignflow_core.errors import InputError, StageError
from alignflow_core.stages import STAGES
from pipelines import assets, checks, freshness, lane
from pipelines.checks import CHECKS, Check
from pipelines.resources import StageRunner, TransientStageError

ERROR, WARN = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project of two nested classes without any artifact."""
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({
        "source": "standard", "task": {"kind": "refuge", "classes": ["disc", "cup"], "nested": True},
        "domains": {name: {"dir": name} for name in ("standard", "amber")}, "targets": {"amber": {"domain": "amber"}}}))
    return tmp_path


def folder_of(root: Path, node: str) -> Path:
    folder = root / "artifacts" / node
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_table(root: Path, node: str, name: str, **columns: Any) -> None:
    pd.DataFrame(columns).to_parquet(folder_of(root, node) / f"{name}.parquet")


def check_named(stage: str, name: str) -> Check:
    return next(check for check in CHECKS[stage] if check.name == name)


def says(check: Check, root: Path, key: str | None = "amber") -> bool:
    return check(root, key).passed


@pytest.mark.parametrize(("groups", "hashes", "passed"), [
    (["p1", "p1", "p2", "p3"], ["a", "b", "c", "d"], True),
    (["p1", "p2", "p1", "p3"], ["a", "b", "c", "d"], False),
    (["p1", "p1", "p2", "p3"], ["a", "b", "c", "a"], False),
    (["p1", "p1", "p2", "p3"], ["a", "a", "c", "d"], True),  # twice within one split tells a test nothing
])
def test_splits_disjoint(root: Path, groups: list[str], hashes: list[str], passed: bool) -> None:
    write_table(root, "data/amber", "manifest", group=groups, image_sha256=hashes, split=["train", "train", "val", "test"])
    assert says(check_named("data", "splits_disjoint"), root) is passed


@pytest.mark.parametrize(("images", "masks", "rows", "passed"), [
    ((3, 8, 8, 3), (3, 8, 8), 3, True), ((3, 8, 8, 3), (2, 8, 8), 3, False), ((3, 8, 8, 3), (3, 4, 4), 3, False),
    ((3, 8, 8, 3), (3, 8, 8), 4, False), ((3, 8, 8, 3), None, 3, False), ((0, 8, 8, 3), (0, 8, 8), 0, False),
])
def test_as_many_masks_as_images(root: Path, images: tuple[int, ...], masks: tuple[int, ...] | None, rows: int, passed: bool) -> None:
    folder = folder_of(root, "sample_aligned/amber")
    np.save(folder / "images.npy", np.zeros(images, np.uint8))
    if masks is not None:
        np.save(folder / "masks.npy", np.zeros(masks, np.uint8))
    write_table(root, "sample_aligned/amber", "manifest", pair_id=list(map(str, range(rows))))
    assert says(check_named("sample_aligned", "as_many_masks_as_images"), root) is passed


def test_references_need_no_masks(root: Path) -> None:
    np.save(folder_of(root, "references/amber") / "images.npy", np.zeros((3, 8, 8, 3), np.uint8))
    write_table(root, "references/amber", "manifest", case_id=["a", "b", "c"])
    assert says(check_named("references", "as_many_masks_as_images"), root)


@pytest.mark.parametrize(("values", "trained", "passed"), [
    ([1.0, 0.5], 1, True), ([1.0, float("nan")], 1, False), ([float("inf")], 1, False), ([], 1, False), ([], 0, True)])
def test_finite_losses_of_segmenters(root: Path, values: list[float], trained: int, passed: bool) -> None:
    steps = pd.Series(range(len(values)), dtype=int)
    write_table(root, "segment_baselines/amber", "curves", step=steps, metric="loss", value=np.array(values, float))
    write_table(root, "segment_baselines/amber", "segmenters", arm=["oracle"] * trained)
    assert says(check_named("segment_baselines", "finite_losses"), root) is passed


def square(side: int, cup: int) -> np.ndarray:
    """A disc of side x side pixels of 10 x 10, a cup in its corner."""
    mask = np.zeros((10, 10), np.uint8)
    mask[:side, :side] = 1
    mask[:cup, :cup] = 2
    return mask


def write_masks(root: Path, real: list[np.ndarray], synthetic: list[np.ndarray]) -> None:
    # what is not in the training split must not count: a mask full of cup
    np.save(folder_of(root, "data/standard") / "masks.npy", np.stack([*real, np.full((10, 10), 2, np.uint8)]))
    write_table(root, "data/standard", "manifest", split=["train"] * len(real) + ["test"])
    np.save(folder_of(root, "sample_masks") / "masks.npy", np.stack(synthetic))


@pytest.mark.parametrize(("synthetic", "present", "areas"), [
    ([square(5, 2), square(6, 3)], True, True),
    ([square(5, 0), square(6, 0)], False, False),
    ([square(9, 2), square(9, 2)], True, False),   # discs larger than any in training
    ([square(6, 5), square(6, 5)], True, False),   # cups
    ([square(5, 2), square(5, 2), square(9, 9)], True, True),  # one unusual mask is not the set
])
def test_classes_of_synthetic_masks(root: Path, synthetic: list[np.ndarray], present: bool, areas: bool) -> None:
    write_masks(root, [square(4, 1), square(5, 2), square(6, 3), square(7, 3)], synthetic)
    assert says(check_named("sample_masks", "classes_present"), root, None) is present
    assert says(check_named("sample_masks", "class_areas"), root, None) is areas


def test_areas_are_those_of_the_method(root: Path) -> None:
    from alignflow_core.masks import regions

    masks = np.stack([square(7, 3), square(4, 0)])
    task = load_project(root / "params.yaml").task
    assert (checks._class_areas(masks, task) == regions(masks, task).mean((2, 3))).all()
    assert checks._class_areas(masks, task)[0].tolist() == [0.49, 0.09]


@pytest.mark.parametrize(("failed", "best", "passed"), [
    (["", "", "diversity ratio 0.71 < 0.8"], 1, True), (["", "", "diversity ratio 0.71 < 0.8"], 2, False), (["", ""], None, False)])
def test_gates(root: Path, failed: list[str], best: int | None, passed: bool) -> None:
    write_table(root, "align/amber", "gates", step=list(range(len(failed))), failed=failed, best=[row == best for row in range(len(failed))])
    assert says(check_named("align", "gates"), root) is passed


@pytest.mark.parametrize(("name", "metric", "limit"), [("diversity", "diversity_ratio", 0.8), ("mask_agreement", "agreement_ratio", 0.75)])
def test_ratios_against_the_gates_of_the_target(root: Path, name: str, metric: str, limit: float) -> None:
    file = folder_of(root, "align/amber") / "metrics.json"
    for value, passed in ((limit, True), (limit - 0.01, False)):
        write_json(file, {metric: value})
        result = check_named("align", name)(root, "amber")
        assert (result.passed, result.severity) == (passed, ERROR)
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["targets"]["amber"]["align"] = {"gates": {"hold": False}}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    assert check_named("align", name)(root, "amber").severity == WARN, "who lets go of the gates is only warned"


@pytest.mark.parametrize(("agreement", "passed"), [([0.1, 0.6, 0.7], True), ([0.1, 0.4, 0.9], False)])
def test_mask_agreement_of_filtered_pairs(root: Path, agreement: list[float], passed: bool) -> None:
    write_table(root, "filter/amber", "manifest", pair_id=list("abc"), agreement=agreement)
    assert says(check_named("filter", "mask_agreement"), root) is passed


@pytest.mark.parametrize(("kept", "passed"), [(0.2, True), (0.19, False)])
def test_kept_fraction(root: Path, kept: float, passed: bool) -> None:
    write_json(folder_of(root, "filter/amber") / "metrics.json", {"kept_fraction": kept})
    assert says(check_named("filter", "kept_fraction"), root) is passed


@pytest.mark.parametrize(("metrics", "passed"), [({"dice_source": 0.0, "dice_oracle": 1.0}, True), ({"dice_source": 1.01}, False), ({}, False)])
def test_scores_in_range(root: Path, metrics: dict[str, float], passed: bool) -> None:
    write_json(folder_of(root, "evaluate/amber") / "metrics.json", metrics)
    assert says(check_named("evaluate", "scores_in_range"), root) is passed


@pytest.mark.parametrize(("arms", "harmed", "passed"), [
    (["source", "stage1", "aligned"], [False, False, True], True), (["source", "stage1"], [False, True], False), (["source"], [False], True)])
def test_painted_pairs_teach(root: Path, arms: list[str], harmed: list[bool], passed: bool) -> None:
    write_table(root, "compare", "source_test", arm=arms, segmenter="unet", difference=0.0, harmed=harmed)
    assert says(check_named("compare", "painted_pairs_teach"), root, None) is passed


def test_results_are_fresh_by_content(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def passed(stale: list[tuple[str, str]]) -> list[bool]:
        return [freshness.up_to_date(stale, stage).passed for stage in freshness.RESULTS]

    assert passed([]) == [True, True]
    assert passed([("references@amber", "1 reference image replaced")]) == [False, False]
    assert passed([("report", "code changed")]) == [True, False], "the comparison does not rest on the report"
    moved = "data@amber", "domains.amber.dir changed from data/amber to /data/ward 7/Doe_Jane; raw folder /data/ward 7/Doe_Jane is missing"
    told = {cause: freshness.up_to_date([("data@amber", cause)], "report").metadata["first"].value for cause in (moved[1], "1 image added")}
    assert "Doe" not in str(told[moved[1]]) and told["1 image added"] == "data@amber: 1 image added"

    monkeypatch.setattr(freshness, "plan", lambda root: [("report", "code changed")])
    sensor = freshness.freshness_sensor(root, lambda root: "s")
    with dg.build_sensor_context() as context:
        assert isinstance(sensor(context), dg.SkipReason), "no results yet"
    write_json(root / "artifacts" / "report.json", {})
    with dg.build_sensor_context() as context:
        seen = sensor(context)
    assert isinstance(seen, dg.SensorResult)
    assert [(each.asset_key.path, each.passed) for each in seen.asset_events] == [(["report"], False)]
    with dg.build_sensor_context(cursor=seen.cursor) as context:
        assert isinstance(sensor(context), dg.SkipReason), "nothing was touched since"


def test_a_missing_file_fails_a_check_and_not_the_run(root: Path) -> None:
    for check in CHECKS["filter"] + CHECKS["align"]:
        result = check(root, "amber")
        assert not result.passed and result.check_name == check.name and result.severity == (ERROR if check.blocking else WARN)
        assert "FileNotFoundError" in str(result.metadata["cannot_be_checked"].value) or "not readable" in str(
            result.metadata["cannot_be_checked"].value)


def test_what_blocks() -> None:
    blocking = {(stage, check.name) for stage, each in CHECKS.items() for check in each if check.blocking}
    warning = {(stage, check.name) for stage, each in CHECKS.items() for check in each} - blocking
    assert warning == {("sample_masks", "class_areas"), ("filter", "kept_fraction"), ("filter", "mask_agreement"), ("privacy", "no_copies"),
                       ("compare", "painted_pairs_teach")}
    assert {stage for stage, name in blocking if name == "finite_losses"} == {
        "mask_flow", "image_flow", "labeller", "align", "segment_source", "segment_stage1", "segment_baselines", "segment_aligned",
        "segment_filtered"}


def test_a_refused_input_stops_whatever_reads_it(root: Path) -> None:
    project = load_project(root / "params.yaml")
    assert checks.refused_input(project, root, "mask_flow", None) is None, "what is missing is not refused; the runner names it"
    folder = folder_of(root, "data/standard")
    np.save(folder / "images.npy", np.zeros((2, 8, 8, 3), np.uint8))
    np.save(folder / "masks.npy", np.zeros((2, 8, 8), np.uint8))
    write_json(root / "artifacts" / "data" / "standard.json", {})
    for groups, refused in ((["p1", "p2"], False), (["p1", "p1"], True)):
        write_table(root, "data/standard", "manifest", group=groups, image_sha256=["a", "b"], split=["train", "test"])
        words = checks.refused_input(project, root, "mask_flow", None)
        assert (words is not None) is refused
    assert str(words).startswith("data@standard failed its check splits_disjoint (images: 2, groups_in_two_splits: 1")


class Runner(StageRunner):
    """A runner whose stages raise what they are told to."""

    def build(self, stage: str, key: str | None) -> None:
        with (Path(self.root) / "tries.txt").open("a") as stream:
            stream.write("x")
        raise {"killed": TransientStageError("was killed"), "refused": StageError("all refused; loosen it"),
               "bad": InputError("a.png: broken; replace it", "b.png: empty; remove it"), "bug": ValueError("7")}[self.mode]


@pytest.mark.parametrize(("mode", "tries", "kind", "message"), [
    ("killed", 2, StageError, "mask_flow: was killed"), ("refused", 1, StageError, "mask_flow: all refused; loosen it"),
    ("bad", 1, InputError, "mask_flow: a.png: broken; replace it\nmask_flow: b.png: empty; remove it"),
    ("bug", 1, StageError, "mask_flow: ValueError: 7"),
])
def test_what_is_tried_again_and_how_it_comes_out(root: Path, monkeypatch: pytest.MonkeyPatch, mode: str, tries: int, kind: type[Exception],
                                                  message: str) -> None:
    monkeypatch.setattr(assets, "RETRY_SECONDS", 0)
    project = load_project(root / "params.yaml")

    @dg.asset(name=STAGES["mask_flow"].asset)
    def failing() -> None:
        assets.build(project, Runner(root=str(root), mode=mode), "mask_flow", None)

    result = dg.materialize([failing], raise_on_error=False)
    assert len((root / "tries.txt").read_text()) == tries
    error = lane.failure(result, [(STAGES["mask_flow"], None)])
    assert type(error) is kind and str(error).strip() == message
    said = next(event.step_failure_data.user_failure_data for event in result.get_step_failure_events())
    if mode == "bad":
        assert said is not None and said.description == "a.png: broken; replace it (and 1 more)"
        assert said.metadata["remedy"].value == "replace it; remove it"


@pytest.mark.parametrize("mode", ["bad", "bug"])
def test_of_stages_that_read_raw_files_dagster_is_told_no_name(root: Path, mode: str) -> None:
    project = load_project(root / "params.yaml")

    @dg.asset(name=STAGES["data"].asset)
    def failing() -> None:
        assets.build(project, Runner(root=str(root), mode=mode), "data", "amber")

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([failing], instance=instance, raise_on_error=False)
        record = "".join(map(repr, instance.all_logs(result.run_id)))
    assert "python -m alignflow_core stage data --domain amber" in record
    assert not any(words in record for words in ("a.png", "b.png", "ValueError"))
    whole = {"bad": "data@amber: a.png: broken; replace it\ndata@amber: b.png: empty; remove it", "bug": "data@amber: ValueError: 7"}
    assert str(lane.failure(result, [(STAGES["data"], "amber")])) == whole[mode]
