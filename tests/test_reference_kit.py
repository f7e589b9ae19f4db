"""Images that stay at home: a kit measures them, a file of moments aligns as they would."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from safetensors.numpy import load_file, save_file

from alignflow_core import align, data, reference_moments
from alignflow_core.artifact import file_hashes, read_json, write_json
from alignflow_core.checkpoint import load_tensors
from alignflow_core.config import Align, Data, References, Target, Task, build_project, load_project
from alignflow_core.errors import InputError
from alignflow_core.pairs import read_pairs, to_unit
from alignflow_core.reference_instrument import refuse_other_instrument
from alignflow_core.reference_kit import FORMAT, apply_kit, write_kit
from alignflow_core.reference_moments import MOMENTS_FILE, ReferenceMoments, read_moments, write_moments
from alignflow_core.reference_roles import in_drawn_order, roles
from alignflow_core.registry import load
from alignflow_core.reward.encoders import Standardised
from alignflow_core.reward.moments import Moments, describe, moments, shrunk
from alignflow_core.reward.registry import DISTANCES, FROM_MOMENTS
from alignflow_core.reward.statconv import StatConv
from alignflow_core.runner import Context, run_stage
from alignflow_core.stages import STAGES, artifact_dir
from pipelines.cli import main
from pipelines.compose import compose, write_params
from pipelines.plan import plan

PARTS = {"align": 4, "held_out": 2}
MOMENTS_OK = {"rounds": 1, "recolour": False}


# ---- distances and configuration


@pytest.mark.parametrize("name", DISTANCES)
def test_the_named_distances_and_no_others_do_without_features(name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(9, 6, generator=draw), 1 + 2 * torch.randn(7, 6, generator=draw)
    distance = load(DISTANCES, name)
    from_images = describe(theirs, 10.0)
    from_moments = shrunk(moments(theirs), theirs[:0], 10.0)
    try:
        same = bool(torch.equal(distance(ours, from_images, 1.0), distance(ours, from_moments, 1.0)))
    except (RuntimeError, IndexError):
        same = False
    assert same == (name in FROM_MOMENTS)


@pytest.mark.parametrize(("changed", "words"), [
    ({"reward": "mmd"}, "align.reward: references.file holds moments and no images, 'mmd' compares with each of them; choose one of frechet"),
    ({"encoder": "ssl"}, "a reference kit cannot hold 'ssl'; choose one of statconv, flow"),
    ({"regions": "labels"}, "set align.regions=pseudo or none"),
    ({"denoise": "references"}, "set align.denoise=source"), ({"recolour": True}, "set align.recolour=false"), ({"rounds": 2}, "set align.rounds=1"),
])
def test_what_needs_images_is_refused_with_a_file_of_moments(changed: dict[str, object], words: str) -> None:
    fine = References(file="north.safetensors")
    Target("north", fine, Align(**MOMENTS_OK))
    with pytest.raises(InputError, match=words):
        Target("north", fine, Align(**MOMENTS_OK | changed))


def test_one_kind_of_references_and_no_area_matching() -> None:
    with pytest.raises(InputError, match="dir and file are both given"):
        References(dir="a", file="b")
    params = compose(["profile=smoke"])
    params["filter"]["match_areas"] = True
    params["targets"]["amber"]["references"] |= {"dir": None, "file": "amber.safetensors"}
    params["targets"]["amber"]["align"] |= MOMENTS_OK
    with pytest.raises(InputError, match=r"targets\.amber\.references\.file holds moments alone; set filter\.match_areas=false"):
        build_project(params)


def test_roles_are_the_rule_of_stage_references() -> None:
    for n, held_out in zip((1, 2, 3, 5, 6, 10), (0, 0, 1, 2, 2, 3), strict=True):
        assert roles([str(i) for i in range(n)], 0.3) == ["align"] * (n - held_out) + ["held_out"] * held_out
    assert roles(list("abcd"), 0.0) == ["align"] * 4
    assert sorted(in_drawn_order(["a", "b", "c"], 0)) == [0, 1, 2]
    assert in_drawn_order(["a", "b", "c"], 0) == in_drawn_order(["a", "b", "c"], 0)


@pytest.mark.parametrize(("groups", "held_out"), [
    ("aabbcd", "cd"), ("abcdeeee", "cd"), ("abcaaa", "bc"), ("aaab", "b"), ("aaabbb", "b"), ("abb", "a"), ("aaaa", ""), ("ab", "")])
def test_nobody_is_aligned_to_and_held_out(groups: str, held_out: str) -> None:
    assert roles(list(groups), 0.3) == ["held_out" if group in held_out else "align" for group in groups]
    assert "align" in roles(list(groups), 0.9)


# ---- a project, its kit, its file


@pytest.fixture(scope="module")
def built(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smoke project with source, stage 1 and labeller built."""
    root = tmp_path_factory.mktemp("built")
    shutil.copytree(phantom_root / "data", root / "data")
    write_params(root / "params.yaml", ["profile=smoke", "align.rounds=1", "align.recolour=false", "align.gates.copying=0"])
    for node in (("data", "standard"), ("data", "amber"), ("image_flow", None), ("labeller", None)):
        run_stage(root, *node, quiet=True)
    return root


@pytest.fixture(scope="module")
def kit(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kit") / "kit"
    write_kit(load_project(built / "params.yaml"), built, "amber", out)
    return out


@pytest.fixture(scope="module")
def images(built: Path) -> Path:
    return built / "data/references/amber"


@pytest.fixture(scope="module")
def file(kit: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hospital") / "amber.safetensors"
    apply_kit(kit, images, out)
    return out


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    """A file of moments of nothing real; what is refused needs no kit."""
    sets = {role: [Moments(n, torch.arange(4.0), torch.ones(4)), None, Moments(1, torch.zeros(4), torch.zeros(4))] for role, n in PARTS.items()}
    write_moments(tmp_path / "made_up.safetensors", ReferenceMoments({"size": 24}, PARTS, sets, [torch.ones(4)] * 3))
    return tmp_path / "made_up.safetensors"


@pytest.fixture
def bare_kit(tmp_path: Path) -> Path:
    """A kit whose files hold nothing: what is refused before they are read."""
    kit = tmp_path / "bare"
    (kit / "labeller").mkdir(parents=True)
    for name in ("encoder.safetensors", "labeller/weights.safetensors", "labeller/config.json", "README.txt"):
        (kit / name).write_text(json.dumps({"weights_sha256": name}))
    instrument = {"encoder": "statconv", "size": 24, "task": dataclasses.asdict(Task()), "regions": "none", "labeller": None, "stage1": None}
    write_json(kit / "kit.json", {"format": FORMAT, "instrument": instrument, "threads": 1, "split": {"seed": 0, "held_out_fraction": 0.3},
                                  "files": file_hashes(kit)})
    return kit


def few(images: Path, n: int, to: Path) -> Path:
    to.mkdir()
    for each in sorted((images / "images").iterdir())[:n]:
        shutil.copyfile(each, to / each.name)
    return to


def test_moments_are_those_computed_by_hand(built: Path, kit: Path, images: Path, file: Path) -> None:
    found = read_moments(file)
    source = read_pairs(built / artifact_dir("data", "standard"), "train")
    unit = to_unit(source.images)
    shown = to_unit(np.stack([np.asarray(Image.open(each).convert("RGB").resize(source.images.shape[1:3], Image.Resampling.LANCZOS, reducing_gap=2.0))
                              for each in sorted((images / "images").iterdir())]))
    order = in_drawn_order([each.stem for each in sorted((images / "images").iterdir())], 0)
    features = Standardised(StatConv(), unit, unit[:, :0])(shown[order], shown[order][:, :0])[0].double()
    assert found.n_images == {"align": 4, "held_out": 2}
    for role, rows in (("align", features[:4]), ("held_out", features[4:])):
        whole = found.sets[role][0]
        assert whole is not None and whole.count == len(rows)
        assert torch.allclose(whole.mean.double(), rows.mean(0), atol=1e-4)
        assert torch.allclose(whole.variance.double(), ((rows - rows.mean(0)) ** 2).sum(0) / (len(rows) - 1), atol=1e-3, rtol=1e-4)


def test_kit_and_file_hold_no_image_and_no_name(built: Path, kit: Path, images: Path, file: Path) -> None:
    size = load_project(built / "params.yaml").data.size
    tensors = load_file(file)
    assert all(value.ndim == 1 and value.size < size * size for value in tensors.values())
    stems = [each.stem for folder in (images, built / "data/source/standard") for each in (folder / "images").iterdir()]
    for each in (file, *(path for path in kit.rglob("*") if path.is_file())):
        content = each.read_bytes()
        assert not [stem for stem in stems if stem.encode() in content], each
        assert str(built).encode() not in content
    assert {path.name for path in kit.iterdir()} == {"kit.json", "encoder.safetensors", "labeller", "README.txt"}
    assert sum(path.stat().st_size for path in kit.rglob("*")) < 2 * 2**20
    assert "alignflow reference-moments KIT IMAGES" in (kit / "README.txt").read_text()


def test_the_same_images_give_the_same_bytes(kit: Path, images: Path, file: Path, tmp_path: Path) -> None:
    apply_kit(kit, images, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_fewer_than_five_different_images_are_refused(kit: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    four = few(images, 4, tmp_path / "four")
    shutil.copyfile(next(four.iterdir()), four / "copy.png")  # a copy is no fifth image
    assert main(["reference-moments", str(kit), str(four), "--out", str(tmp_path / "m.safetensors")]) == 2
    assert "has 4 different images" in capsys.readouterr().err
    assert not (tmp_path / "m.safetensors").exists()
    five = few(images, 5, tmp_path / "five")
    assert main(["reference-moments", str(kit), str(five), "--out", str(tmp_path / "m.safetensors")]) == 0
    told = capsys.readouterr().out
    assert "3 images aligned to: mean and variance of features of whole image (3)" in told and "say much about" in told
    assert main(["reference-moments", str(kit), str(five), "--out", str(tmp_path / "m.safetensors")]) == 2  # nothing is overwritten


def test_every_bad_image_is_named(kit: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = few(images, 6, tmp_path / "images")
    for name in ("bad1.png", "bad2.png"):
        (folder / name).write_bytes(b"no picture")
    assert main(["reference-moments", str(kit), str(folder), "--out", str(tmp_path / "m.safetensors")]) == 2
    told = capsys.readouterr().err
    assert "bad1.png" in told and "bad2.png" in told and "Traceback" not in told


@pytest.mark.parametrize("name", ["encoder.safetensors", "labeller/weights.safetensors", "labeller/config.json", "README.txt"])
def test_an_altered_kit_is_refused(bare_kit: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray((bare_kit / name).read_bytes())
    content[-3] ^= 1
    (bare_kit / name).write_bytes(content)
    assert main(["reference-moments", str(bare_kit), str(tmp_path), "--out", str(tmp_path / "m.safetensors")]) == 2
    assert f"{name}: missing or not what kit.json records" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "words"), [
    ({"format": 9}, "is no reference kit of format"), ({"files": []}, "is no reference kit of format"),
    ({"files": {"../x": hashlib.sha256().hexdigest()}}, "../x: missing or not what kit.json records"),
    ({"files": {}}, "encoder.safetensors: missing or not what kit.json"),
    ({"files": {"stage1/config.json": "0"}}, "stage1/config.json: missing or not what kit.json"),
    ({"split": {"seed": 0, "held_out_fraction": 5.0}}, "must lie in [0.0, 0.9]"), ({"threads": "many"}, "cannot be used (invalid literal"),
    ({"split": {}, "instrument": {}}, "cannot be used ('task')"), ({"instrument": {"encoder": "os:system"}}, "unknown encoder \"os:system\""),
    ({"instrument": {"labeller": "0"}}, "labeller is not the network that kit.json names"),
    ({"instrument": {"task": {"kind": "x", "values": {}}}}, "task.kind: unknown value 'x'"),
], ids=lambda value: value if isinstance(value, str) else None)
def test_a_kit_of_nonsense_is_refused(bare_kit: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    facts = read_json(bare_kit / "kit.json")
    (tmp_path / "x").touch()  # even of the right content no file elsewhere is looked at
    if change.get("instrument"):
        change = {"instrument": facts["instrument"] | change["instrument"]}
    write_json(bare_kit / "kit.json", facts | change)
    with pytest.raises(InputError) as caught:
        apply_kit(bare_kit, tmp_path, tmp_path / "m.safetensors")
    assert words in str(caught.value)


def test_a_folder_that_is_no_kit(tmp_path: Path) -> None:
    for content in ("{", "[]", None):
        if content:
            (tmp_path / "kit.json").write_text(content)
        else:
            (tmp_path / "kit.json").unlink()
        with pytest.raises(InputError, match=r"kit\.json: not readable|is no reference kit"):
            apply_kit(tmp_path, tmp_path, tmp_path / "m.safetensors")


def test_moments_are_written_to_a_new_file(bare_kit: Path, made_up: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists; remove it or give a new file"):
        apply_kit(bare_kit, tmp_path, made_up)
    with pytest.raises(InputError, match=r"give a new file that ends in \.safetensors"):
        apply_kit(bare_kit, tmp_path, tmp_path / "m.csv")


def test_a_kit_whose_encoder_sees_otherwise_here_is_refused(kit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignflow_core.reward.statconv.StatConv.__init__.__defaults__", (16, 7))
    with pytest.raises(InputError, match="other features here than where the kit was made"):
        apply_kit(kit, images, tmp_path / "m.safetensors")


def spoiled(file: Path, to: Path, kind: str) -> Path:
    """A copy of a file of moments, damaged, or edited by somebody who does not know of the checksum."""
    tensors, data = load_file(file), bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    facts = json.loads(data[8:8 + length])["__metadata__"]
    if kind == "edited":
        save_file(tensors | {"align/0/mean": tensors["align/0/mean"] + 1}, to, facts)
    elif kind == "no facts":
        save_file(tensors, to)
    else:
        data[-1] ^= kind == "flipped"
        to.write_bytes({"cut": data[:len(data) // 2], "empty": b"", "json": b"\xff" * 64}.get(kind, data))
    return to


@pytest.mark.parametrize("kind", ["flipped", "cut", "empty", "json", "edited", "no facts"])
def test_a_damaged_or_edited_file_is_refused(made_up: Path, tmp_path: Path, kind: str) -> None:
    assert read_moments(made_up).n_images == PARTS
    with pytest.raises(InputError, match=r"is no intact file of reference moments"):
        read_moments(spoiled(made_up, tmp_path / "m.safetensors", kind))


def test_a_file_of_too_many_bytes_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").touch()
    os.truncate(tmp_path / "m.safetensors", reference_moments.MAX_BYTES + 1)
    with pytest.raises(InputError, match="has 64 MiB, moments have less than 64"):
        read_moments(tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"gone\.safetensors: cannot be opened"):
        read_moments(tmp_path / "gone.safetensors")


def whole_image(**values: object) -> Callable[[ReferenceMoments], ReferenceMoments]:
    """The aligning part's moments of whole images with these values."""
    def change(known: ReferenceMoments) -> ReferenceMoments:
        first, *others = known.sets["align"]
        return dataclasses.replace(known, sets=known.sets | {"align": [dataclasses.replace(first, **values), *others]})  # type: ignore[type-var]

    return change


def of_images(**n_images: object) -> Callable[[ReferenceMoments], ReferenceMoments]:
    return lambda known: dataclasses.replace(known, n_images=n_images)  # type: ignore[arg-type]


IMPOSSIBLE: dict[str, tuple[Callable[[ReferenceMoments], ReferenceMoments], str]] = {
    "fewer than five": (lambda known: dataclasses.replace(known, n_images={"align": 4}, sets={"align": known.sets["align"]}), "is of fewer than 5"),
    "no aligning part": (of_images(held_out=6), "its numbers of images"),
    "a part of no images": (of_images(align=5, held_out=0), "its numbers of images"),
    "half an image": (of_images(align=5.5), "its numbers of images"), "an unknown part": (of_images(align=4, test=2), "its numbers of images"),
    "more images than measured": (of_images(align=5, held_out=2), "lacks the moments of whole images"),
    "no whole image": (lambda known: dataclasses.replace(known, sets=known.sets | {"align": [None, *known.sets["align"][1:]]}), "lacks the moments"),
    "negative variance": (whole_image(variance=-torch.ones(4)), "are not those of a set of images"),
    "other length": (whole_image(mean=torch.zeros(3)), "are not those of a set of images"),
    "other length of variances": (whole_image(variance=torch.ones(3)), "are not those of a set of images"),
    "count of none": (whole_image(count=0), "are not those of a set of images"),
    "count of more": (whole_image(count=5), "are not those of a set of images"),
    "NaN": (whole_image(mean=torch.full((4,), torch.nan)), "holds numbers that are not finite"),
    "moments of no set": (lambda known: dataclasses.replace(known, probe=known.probe[:2]), "holds other tensors than moments"),
    "pixels": (whole_image(mean=torch.zeros(2, 2)), "holds other tensors than moments"),
    "doubles": (whole_image(mean=torch.zeros(4, dtype=torch.float64)), "holds other tensors than moments"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_file_of_impossible_numbers_is_refused(name: str, made_up: Path, tmp_path: Path) -> None:
    change, words = IMPOSSIBLE[name]
    write_moments(tmp_path / "m.safetensors", change(read_moments(made_up)))
    with pytest.raises(InputError, match=f"is no intact file of reference moments .*{words}"):
        read_moments(tmp_path / "m.safetensors")


def test_a_file_of_another_format_is_refused(made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = read_moments(made_up)
    with monkeypatch.context() as patch:
        patch.setattr(reference_moments, "FORMAT", "alignflow reference moments 2")
        write_moments(tmp_path / "m.safetensors", known)
    with pytest.raises(InputError, match="format is not 'alignflow reference moments 1'"):
        read_moments(tmp_path / "m.safetensors")


def test_moments_of_another_size(made_up: Path, tmp_path: Path) -> None:
    config = SimpleNamespace(references=References(file=made_up.name), target_domain="amber", data=Data(size=64))
    pd.DataFrame({"split": [], "image_sha256": []}).to_parquet(tmp_path / "manifest.parquet")
    with pytest.raises(InputError, match=r"was measured at 24 pixels, data\.size is 64"):
        data.run_references(config, {"data:source": tmp_path, "data:target": tmp_path}, tmp_path, SimpleNamespace(root=tmp_path, key="amber"))


def test_moments_of_another_instrument(made_up: Path) -> None:
    known = read_moments(made_up)
    refuse_other_instrument(known, {"size": 24}, known.probe, "file")
    with pytest.raises(InputError, match=r"was measured with another kit \(other size\)"):
        refuse_other_instrument(known, {"size": 32}, known.probe, "file")
    for probe in ([value + 1 for value in known.probe], known.probe[:2], [value[:2] for value in known.probe]):
        with pytest.raises(InputError, match="gives other features than this run's"):
            refuse_other_instrument(known, {"size": 24}, probe, "file")


# ---- aligning


def aligned(root: Path, out: Path, references: Path, **settings: object) -> Path:
    """Stage 2 for amber with the references of a folder; the rest as the project has it."""
    project = load_project(root / "params.yaml")
    target = project.targets["amber"]
    config = SimpleNamespace(seed=project.seed, machine=project.machine, task=project.task, image_flow=project.image_flow, sample=project.sample,
                             align=dataclasses.replace(target.align, **settings))
    inputs = {name: root / artifact_dir(*node) for name, node in project.graph.inputs(STAGES["align"], "amber").items()} | {"references": references}
    (out / "work").mkdir(parents=True)
    align.run(config, inputs, out, Context("amber", root, out / "work", lambda metrics, step: None, lambda done, total, note: None))
    return out


def referenced(root: Path, out: Path, **given: object) -> Path:
    """Stage ``references`` for amber with these settings."""
    project = load_project(root / "params.yaml")
    config = SimpleNamespace(references=References(**given), target_domain="amber", task=project.task, data=project.data)  # type: ignore[arg-type]
    out.mkdir()
    inputs = {name: root / artifact_dir(*node) for name, node in project.graph.inputs(STAGES["references"], "amber").items()}
    numbers = data.run_references(config, inputs, out,
                                  Context("amber", root, out, lambda metrics, step: None, lambda done, total, note: None))
    (out / "metrics.json").write_text(json.dumps(numbers))
    return out


UNSURE = {"confidence": 0.34}  # of three classes: the few steps of profile smoke leave the labeller sure of nothing


@pytest.mark.parametrize("settings", [UNSURE, UNSURE | {"encoder": "flow", "reward": "skl"}, {"regions": "none", "reward": "gaussian_skl"}], ids=str)
def test_aligning_from_moments_is_aligning_from_the_images(built: Path, images: Path, tmp_path: Path, settings: dict[str, object]) -> None:
    project = load_project(built / "params.yaml")
    target = dataclasses.replace(project.targets["amber"], align=dataclasses.replace(project.targets["amber"].align, **settings))
    write_kit(dataclasses.replace(project, targets=project.targets | {"amber": target}), built, "amber", tmp_path / "kit")
    known = apply_kit(tmp_path / "kit", images, tmp_path / "m.safetensors")
    assert all(each is not None for each in known.sets["align"][:2])  # the background, where regions are compared
    from_images = aligned(built, tmp_path / "images", referenced(built, tmp_path / "refs", dir=str(images)), **settings)
    from_file = aligned(built, tmp_path / "file", referenced(built, tmp_path / "none", file=str(tmp_path / "m.safetensors")), **settings)
    one, other = load_tensors(from_images / "weights.safetensors"), load_tensors(from_file / "weights.safetensors")
    assert max(float((one[name] - other[name]).abs().max()) for name in one) <= 1e-6
    start = load_tensors(built / artifact_dir("image_flow", None) / "weights.safetensors")
    assert max(float((one[name] - start[name]).abs().max()) for name in one if name in start and one[name].shape == start[name].shape) > 1e-4
    looks = [pd.read_parquet(folder / "gates.parquet") for folder in (from_images, from_file)]
    assert looks[0].drop(columns="copy_ratio").equals(looks[1].drop(columns="copy_ratio"))
    assert looks[1]["copy_ratio"].isna().all() and looks[0]["copy_ratio"].notna().all()
    assert read_json(from_file / "verdict.json")["copy_gate"].startswith("not measured")
    assert "copy_gate" not in read_json(from_images / "verdict.json")


def test_without_a_held_out_part_the_aligning_one_serves_twice(built: Path, images: Path, tmp_path: Path) -> None:
    project = load_project(built / "params.yaml")
    target = dataclasses.replace(project.targets["amber"], references=dataclasses.replace(project.targets["amber"].references, held_out_fraction=0.0))
    write_kit(dataclasses.replace(project, targets=project.targets | {"amber": target}), built, "amber", tmp_path / "kit")
    assert apply_kit(tmp_path / "kit", images, tmp_path / "m.safetensors").n_images == {"align": 6}
    out = aligned(built, tmp_path / "out", referenced(built, tmp_path / "none", file=str(tmp_path / "m.safetensors")))
    looks = pd.read_parquet(out / "gates.parquet")
    assert (looks["held_out_reward"] == looks["reward"]).all()


def test_moments_of_the_held_out_part_are_of_other_patients(kit: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "grouped")
    stems = sorted(each.stem for each in (images / "images").iterdir())
    (tmp_path / "grouped" / "groups.csv").write_text("stem,patient\n" + "".join(f"{stem},{n % 2}\n" for n, stem in enumerate(stems)))
    assert apply_kit(kit, tmp_path / "grouped", tmp_path / "m.safetensors").n_images == {"align": 3, "held_out": 3}


def test_stage_references_of_a_file_has_no_rows(built: Path, file: Path, tmp_path: Path) -> None:
    out = referenced(built, tmp_path / "none", file=str(file))
    pairs = read_pairs(out)
    assert len(pairs) == 0 and pairs.masks is None and pairs.images.shape[1:] == read_pairs(built / artifact_dir("data", "amber")).images.shape[1:]
    assert read_json(out / "metrics.json") == {"n_references": 6.0, "n_align": 4.0, "n_held_out": 2.0, "labelled": 0.0}
    assert (out / MOMENTS_FILE).read_bytes() == file.read_bytes()


def test_moments_of_another_kit_are_refused(built: Path, file: Path, tmp_path: Path) -> None:
    known = read_moments(file)
    other = dataclasses.replace(known, instrument=dict(known.instrument) | {"labeller": "0" * 64, "confidence": 0.7})
    write_moments(tmp_path / "other.safetensors", other)
    with pytest.raises(InputError, match=r"was measured with another kit \(other confidence, labeller\)"):
        aligned(built, tmp_path / "a", referenced(built, tmp_path / "refs", file=str(tmp_path / "other.safetensors")))
    write_moments(tmp_path / "probe.safetensors", dataclasses.replace(known, probe=[value + 1 for value in known.probe]))
    with pytest.raises(InputError, match="its kit's encoder gives other features than this run's"):
        aligned(built, tmp_path / "b", referenced(built, tmp_path / "refs2", file=str(tmp_path / "probe.safetensors")))
    write_moments(tmp_path / "size.safetensors", dataclasses.replace(known, instrument=dict(known.instrument) | {"size": 99}))
    with pytest.raises(InputError, match="was measured at 99 pixels"):
        referenced(built, tmp_path / "refs3", file=str(tmp_path / "size.safetensors"))


# ---- the whole way


def run_arguments(root: Path, references: Path, out: Path, *overrides: str) -> list[str]:
    return ["run", "--source", str(root / "data/source/standard"), "--target", f"amber={root / 'data/target/amber'}", "--references", str(references),
            "--task", "refuge", "--out", str(out), "--quiet", "profile=smoke", *overrides]


def told_by_audit(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    main(["audit", str(run)])
    return capsys.readouterr().out


def test_run_from_a_file_of_moments_to_the_report(phantom_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run with images, make a kit of it, apply it, run with the file alone."""
    from pipelines import checks, preview

    images, out = phantom_root / "data/references/amber", tmp_path / "run"
    params: dict[str, object] = {"source": "standard", "domains": {name: {"dir": str(phantom_root / f"data/{kind}/{name}")}
                                                for name, kind in (("standard", "source"), ("amber", "target"))}}
    params |= {"targets": {"amber": {"domain": "amber", "references": {"count": 6}}}}
    write_params(out / "params.yaml", ["task=refuge", "profile=smoke"], params)
    assert main(["reference-kit", str(out), "--out", str(tmp_path / "kit"), "--quiet"]) == 0
    assert main(["reference-moments", str(tmp_path / "kit"), str(images), "--out", str(tmp_path / "amber.safetensors")]) == 0
    capsys.readouterr()
    assert main(run_arguments(phantom_root, tmp_path / "amber.safetensors", out)) == 0
    told = capsys.readouterr()
    assert "not recorded" not in told.err
    page = Path(told.out.removeprefix("report: ").strip()).read_text(encoding="utf-8")
    for words in ("6 unlabelled references (2 of them held out to decide when to stop), known by a file of moments alone", "Copy gate not measured",
                  "Not against the references", "nobody here can say whether images copy them"):
        assert words in page
    assert "References of amber" not in page
    target = load_project(out / "params.yaml").targets["amber"]
    assert (target.align.rounds, target.align.recolour, target.align.rho, target.references.dir) == (1, False, 3.0, None)
    arms = set(pd.read_parquet(out / "artifacts/evaluate/amber/metrics.parquet")["arm"])
    assert not arms & {"reinhard", "fourier", "references-labelled"} and {"source", "stage1", "aligned", "aligned+filtered", "oracle"} <= arms
    copies = pd.read_parquet(out / "artifacts/privacy/amber/copying.parquet")
    assert set(copies["bank"]) == {"source"}
    for stage, own in checks.CHECKS.items():
        for key in load_project(out / "params.yaml").graph.keys(STAGES[stage]):
            results = {check.name: check(out, key) for check in own}
            assert not [name for name, result in results.items() if "cannot_be_checked" in result.metadata]
            if stage in ("references", "align"):
                assert all(result.passed for name, result in results.items() if name != "diversity"), stage
    assert preview.metadata(out, "references", "amber")["n_references"] == 6
    assert "references: a file of moments, no images here" in told_by_audit(out, capsys)
    assert plan(out) == []
    (tmp_path / "amber.safetensors").write_bytes((tmp_path / "amber.safetensors").read_bytes() + b"\0")
    assert ("references@amber", "1 reference file replaced") in plan(out)
    (tmp_path / "amber.safetensors").unlink()
    assert "raw file" in dict(plan(out))["references@amber"] and "is missing" in dict(plan(out))["references@amber"]


def test_what_run_refuses_about_files_of_moments(phantom_root: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(run_arguments(phantom_root, file, tmp_path / "a", "align.rounds=3")) == 2
    assert "set align.rounds=1" in capsys.readouterr().err
    assert main(run_arguments(phantom_root, tmp_path / "none.safetensors", tmp_path / "b")) == 2
    assert "none.safetensors" in capsys.readouterr().err
    two = ["--target", f"dim={phantom_root / 'data/target/dim'}"]
    assert main([*run_arguments(phantom_root, file, tmp_path / "c"), *two]) == 2
    assert "is one file, there are 2 targets; give a folder with NAME.safetensors for each" in capsys.readouterr().err
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    assert main(run_arguments(phantom_root, tmp_path / "bad.safetensors", tmp_path / "d")) == 2
    assert "is no intact file of reference moments" in capsys.readouterr().err
    assert not [name for name in "abcd" if (tmp_path / name).exists()]


def test_several_targets_may_mix_files_and_folders(phantom_root: Path, file: Path, tmp_path: Path) -> None:
    from pipelines.local import Folders, prepare_run

    given = tmp_path / "given"
    shutil.copytree(phantom_root / "data/references/dim", given / "dim")
    shutil.copyfile(file, given / "amber.safetensors")
    targets = {name: phantom_root / "data/target" / name for name in ("amber", "dim")}
    prepare_run(Folders(phantom_root / "data/source/standard", targets, str(given)), "refuge", tmp_path / "out", ["profile=smoke", "align.rho=1"])
    project = load_project(tmp_path / "out/params.yaml")
    assert (project.targets["amber"].references.file, project.targets["amber"].align.recolour) == (str(given / "amber.safetensors"), False)
    assert project.targets["amber"].align.rho == 1.0  # what is asked for counts
    assert (project.targets["dim"].references.dir, project.targets["dim"].align.recolour) == (str(given / "dim"), True)


def test_target_add_takes_a_file(smoke_root: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines import dvcfile

    assert main(["target", "add", "north", "--references", str(file), "--like", "amber", "--root", str(smoke_root)]) == 0
    added = load_project(smoke_root / "params.yaml").targets["north"]
    assert (added.references.file, added.references.dir, added.align.rounds, added.align.recolour) == (str(file), None, 1, False)
    entries = yaml.safe_load(dvcfile.render(load_project(smoke_root / "params.yaml"), smoke_root))["stages"]["references"]["foreach"]
    assert entries["north"]["raw"] == str(file) and entries["amber"]["raw"] == "data/references/amber"
    assert main(["target", "list", "--root", str(smoke_root)]) == 0
    assert f"references {file}" in capsys.readouterr().out


@pytest.mark.parametrize(("overrides", "words"), [(["encoder=ssl"], "align.encoder 'ssl' cannot travel in a kit"),
                                                  (["align.regions=labels"], "needs masks at the hospital")], ids=["encoder", "regions"])
def test_what_cannot_travel_makes_no_kit(tmp_path: Path, overrides: list[str], words: str) -> None:
    write_params(tmp_path / "params.yaml", ["profile=smoke", *overrides])
    with pytest.raises(InputError, match=words):
        write_kit(load_project(tmp_path / "params.yaml"), tmp_path, "amber", tmp_path / "kit")
    assert not (tmp_path / "kit").exists()


def test_a_kit_is_written_to_a_new_folder(bare_kit: Path, tmp_path: Path) -> None:
    write_params(tmp_path / "params.yaml", ["profile=smoke"])
    with pytest.raises(InputError, match="bare: exists"):
        write_kit(load_project(tmp_path / "params.yaml"), tmp_path, "amber", bare_kit)
