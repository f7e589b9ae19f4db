"""``alignflow paper``: one command, every table and figure with every method, no empty cell."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from alignflow_core import paper
from alignflow_core.alignment_steps import rewarded_steps
from alignflow_core.artifact import write_json
from alignflow_core.config import ARMS, Align, Evaluate, Training, load_project
from alignflow_core.paper import MEAN, MEAN_SEGMENTER, downstream, downstream_page, mean_of_targets, reference_counts, wide
from pipelines.ablate import write_variants
from pipelines.cli import main
from pipelines.compose import options
from pipelines.paper import RIVALS, prepare, with_rivals

PAINTERS = {"t2i-adapter", "controlnet-diffusion", "controlnet-flow", "siamese-diffusion"}


def long_table(means: dict[str, dict[str, float]], n: int = 40) -> pd.DataFrame:
    """Values of arms by target, each image with its own level that all arms share."""
    rows = []
    for number, (target, arms) in enumerate(means.items()):
        level = np.random.default_rng(number).normal(0, 0.05, n)
        rows += [(target, arm, f"{target}{i}", f"{target}{i}", mean + level[i]) for arm, mean in arms.items() for i in range(n)]
    table = pd.DataFrame(rows, columns=["target", "arm", "case_id", "group", "value"])
    return table.assign(segmenter="unet", metric="iou", generator_seed=0, segmenter_seed=0, **{"class": "disc"})


def test_mean_of_targets_weighs_targets_alike_and_pairs_images() -> None:
    values = pd.concat([long_table({"a": {"source": 0.5, "ours": 0.7}}, n=10), long_table({"b": {"source": 0.6, "ours": 0.6}}, n=90)])
    table = mean_of_targets(values, "ours", Evaluate(bootstrap=400), seed=0).set_index("arm")
    by_target = values.groupby(["target", "arm"])["value"].mean()
    assert table.loc["source", "mean"] == pytest.approx((by_target["a", "source"] + by_target["b", "source"]) / 2)
    assert table.loc["source", "difference"] == pytest.approx(-0.1)
    assert table.loc["source", "diff_ci_low"] == pytest.approx(-0.1), "every image differs by the same: paired, the interval is a point"
    assert table.loc["source", "ci_low"] < table.loc["source", "mean"] < table.loc["source", "ci_high"]
    assert set(table["target"]) == {MEAN}


def test_segmenters_are_averaged_image_by_image_and_augmentations_compared_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = {"source": 0.5, "stage1": 0.6, "aligned+filtered": 0.7, "source+colour": 0.6, "aligned+filtered+colour": 0.9}
    unet = long_table({"a": arms}, n=30)
    dpt = unet.assign(segmenter="dpt", value=unet["value"] + np.where(unet["arm"] == "source", 0.1, 0.0))
    monkeypatch.setattr(paper, "methods", lambda *names: pd.concat([unet, dpt], ignore_index=True))
    settings = SimpleNamespace(evaluate=Evaluate(bootstrap=200), seed=0)
    table = downstream(SimpleNamespace(targets=("a",), project=settings)).query("target == 'a'").set_index(["segmenter", "arm"])
    assert {segmenter: table.loc[(segmenter, "source"), "difference"] for segmenter in ("unet", "dpt", MEAN_SEGMENTER)} == \
        pytest.approx({"unet": -0.2, "dpt": -0.1, MEAN_SEGMENTER: -0.15})
    assert table.loc[(MEAN_SEGMENTER, "source+colour"), "baseline"] == "aligned+filtered+colour"
    assert table.loc[("unet", "source+colour"), "difference"] == pytest.approx(-0.3)
    plain = table.loc["unet"].loc[["source", "stage1"]]
    assert plain["p_adjusted"].min() == pytest.approx(2 * plain["p_value"].min()), "two tests without augmentation, not three"


def test_stars_say_whether_the_interval_excludes_0() -> None:
    row = {"segmenter": "unet", "arm": "source", "target": MEAN, "metric": "iou", "mean": 0.5, "ci_low": 0.4, "ci_high": 0.6, "difference": -0.1,
           "p_adjusted": np.nan}
    sure, unsure = (downstream_page(pd.DataFrame([row | {"diff_ci_low": -0.2, "diff_ci_high": high}])).iloc[0, -1] for high in (-0.01, 0.01))
    assert sure == "0.500 [0.400, 0.600] -0.100*" and unsure == "0.500 [0.400, 0.600] -0.100"


def test_measures_stand_beside_their_n_and_their_floor() -> None:
    table = pd.DataFrame([(target, method, metric, 0.5, 0.4, 0.6, n, floor) for target in "ba" for method, n in (("source", 30), ("aligned", 20))
                          for metric, floor in (("kid", 0.01), ("fid", 5.0))],
                         columns=["target", "set", "metric", "value", "ci_low", "ci_high", "n", "floor"])
    page = wide(table)
    assert page.to_numpy().tolist() == [
        [target, *row] for target in "ba" for row in (["source", "30", *["0.5 [0.4, 0.6]"] * 2], ["aligned", "20", *["0.5 [0.4, 0.6]"] * 2],
                                                      ["real against real", "–", "0.01", "5"])]
    assert wide(table.drop(columns="floor"))["method"].tolist() == ["source", "aligned"] * 2


def test_rivals_are_variants_and_counts_belong_to_the_first_target() -> None:
    target = {"domain": "x", "references": {"count": 10, "dir": "refs"},
              "align": {"reward": "frechet", "recolour": True, "recolour_steps": 100, "rho": 0.3, "training": {"steps": 40}}}
    short = Training(steps=40)
    found = with_rivals({"a": target, "b": target}, {"controlnet-flow": {}}, [1, 10])
    assert set(found) == {"a", "b", "a-count1", "a-count10", *(f"{name}-{word}" for name in "ab" for word in RIVALS)}
    assert found["a-count1"]["references"] == {"count": 1, "dir": None, "file": None}
    assert found["b-alignprop"]["variant_of"] == "b" and found["b-alignprop"]["align"]["denoise"] == "none"
    assert "a-controlnet-flow-aligned" not in with_rivals({"a": target}, {}, [])
    drawn = target | {"references": {"count": 10}}
    assert "a-count10" not in with_rivals({"a": drawn}, {}, [10]), "it is the target itself"
    again = {name for name in with_rivals(found, {"controlnet-flow": {}}, [5]) if "count" in name}
    assert again == {"a-count5"}, "others of an earlier call are taken back"
    steps = {word: rewarded_steps(Align(**(found[f"b-{word}"]["align"] | {"training": short}))) for word in RIVALS}
    assert steps == {"alignprop": 60, "refl": 60, "skl-last-step": 60, "finetuned": 140, "controlnet-flow-aligned": 40}, "the time of ours"


def test_the_curve_shows_the_drawn_set_where_a_given_one_is_as_large(tmp_path: Path) -> None:
    """Its points are sets that were drawn alike; the base's own number stands beside them where no drawn set has it."""
    (tmp_path / "artifacts/references/t").mkdir(parents=True)
    write_json(tmp_path / "artifacts/references/t/metrics.json", {"n_references": 5})
    read: list[str] = []

    def values(variant: str, file: str) -> pd.DataFrame:
        read.append(variant)
        return long_table({variant: {"stage1": 0.5, "aligned+filtered": 0.6}}, 8).assign(metric="dice")

    project = SimpleNamespace(evaluate=Evaluate(bootstrap=50), seed=0)
    for counts, variants in (({1: "t-count1", 5: "t-count5"}, {"t-count1", "t-count5"}), ({1: "t-count1"}, {"t-count1", "t"})):
        read.clear()
        found = reference_counts(SimpleNamespace(counts={"t": counts}, roots=[tmp_path], read=values, project=project))  # type: ignore[arg-type]
        assert set(read) == variants and set(found["n_references"]) == {1, 5}


def test_every_arm_is_built_in_every_profile_unless_others_are_asked_for(tmp_path: Path) -> None:
    for profile in options("profile"):
        (tmp_path / profile / "data").mkdir(parents=True)  # so that the phantom is not drawn
        prepare(None, "phantom", tmp_path / profile, [f"profile={profile}"], [])
        assert load_project(tmp_path / profile / "params.yaml").segment.arms == ARMS
    prepare(None, "phantom", tmp_path / "demo", ["profile=demo", "segment.arms=[source,aligned+filtered]"], [])
    assert load_project(tmp_path / "demo" / "params.yaml").segment.arms == ("source", "aligned+filtered")


def test_the_same_command_again_keeps_rivals_and_variants(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    prepare(None, "phantom", tmp_path, ["profile=smoke"], [2])
    write_variants(tmp_path, ["amber"], ["align.rho=0.5"])
    before = load_project(tmp_path / "params.yaml")
    prepare(None, "phantom", tmp_path, ["profile=smoke"], [2])
    assert load_project(tmp_path / "params.yaml") == before, "nor are there rivals of rivals"


@pytest.mark.parametrize(("arguments", "words"), [
    (["--task", "phantom", "segment.arms=[stage1,aligned]"], "compare with aligned+filtered"),
    (["--task", "phantom", "--counts", "1", "segment.arms=[source,aligned+filtered]"], "compare with stage1"),
    (["--task", "phantom", "domains.amber.labelled=false"], "domains.amber.labelled: the paper's tables measure on"),
    (["--task", "refuge"], "needs data"), (["--task", "phantom", "--counts", "1,x"], "--counts"), (["--task", "phantom", "--seeds", "0"], "--seeds"),
    (["--task", "phantom", "--source", "a", "--target", "b=c"], "neither goes"),
])
def test_wrong_use_is_told(arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("masks", "option", "words"), [
    (False, [], "target: has no masks/, by which results are measured; add them, or take 'alignflow run --unlabelled t'"),
    (True, ["domains.t.labelled=false"], "domains.t.labelled: the paper's tables measure on"),
], ids=["no masks", "said to have none"])
def test_targets_of_folders_need_labels(masks: bool, option: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(6):
        picture, mask = np.full((32, 32, 3), 40 * number, np.uint8), np.zeros((32, 32), np.uint8)
        mask[8:20, 8:20] = 255
        for part in ("source/images", "source/masks", "target/images", *(["target/masks"] if masks else [])):
            (tmp_path / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask if part.endswith("masks") else picture).save(tmp_path / part / f"a{number}.png")
    folders = ["--source", str(tmp_path / "source"), "--target", f"t={tmp_path / 'target'}", "--references", "3"]
    assert main(["paper", "--task", "binary", *folders, "--out", str(tmp_path / "out"), *option]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.nightly
def test_paper_on_the_phantom(tmp_path: Path) -> None:
    """Profile smoke: its numbers mean nothing, its tables are whole."""
    out = tmp_path / "paper"
    command = ["paper", "--task", "phantom", "--out", str(out), "--counts", "2", "--quiet", "profile=smoke"]
    assert main(command) == 0
    downstream = pd.read_csv(out / "paper/downstream.csv")
    methods = PAINTERS | set(RIVALS) | {"source", "stage1", "reinhard", "fourier", "aligned", "aligned+filtered", "references-labelled", "oracle"}
    for target in ("amber", "violet", MEAN):
        for segmenter in ("unet", "segformer", "dpt", MEAN_SEGMENTER):
            own = downstream[(downstream["target"] == target) & (downstream["segmenter"] == segmenter)]
            assert methods <= set(own["arm"]) and {f"{name}+colour" for name in PAINTERS | set(RIVALS)} <= set(own["arm"])
            assert own[["mean", "ci_low", "ci_high"]].notna().all(None)
    for name in ("images", "paired"):
        table = pd.read_csv(out / f"paper/{name}.csv")
        assert PAINTERS | set(RIVALS) | {"stage1", "aligned"} <= set(table["set"])
    terms = pd.read_csv(out / "paper/terms.csv").set_index("painter")
    assert terms["images seen, base included"].nunique() == 1
    assert (terms["parameters of the trunk"] / terms.loc["stage1", "parameters of the trunk"] - 1).abs().max() <= 0.1
    assert set(pd.read_csv(out / "paper/references.csv")["n_references"]) == {2, 10}
    page = (out / "paper/index.html").read_text(encoding="utf-8")
    assert not re.search(r"<td>\s*(nan|NaN)?\s*</td>", page), "no empty cell"
    assert page.count("data:image/svg") == 4 and len(list((out / "paper").glob("*.tex"))) == 6
    alignments = pd.read_csv(out / "paper/stage-two.csv")
    assert set(alignments["method"]) == {"aligned+filtered", *RIVALS} and (alignments["steps done"] > 0).all()
