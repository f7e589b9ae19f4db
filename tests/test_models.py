"""The model registry: one version per content, as plain files; the champion changes only where the paired interval lies above 0."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from toy_project import copied

from alignflow_core.artifact import file_hash, read_json, write_json
from alignflow_core.config import build_project, load_project
from alignflow_core.runner import provenance_file
from alignflow_core.stages import artifact_dir
from pipelines import models, tracking

N = 12
ARMS = ("stage1", "aligned", "aligned+filtered")
FILES = {"aligned-amber": {"weights.safetensors", "config.json"}, "image-flow": {"weights.safetensors", "config.json"},
         "segmenter-amber": {f"seed{k}/{name}" for k in (0, 1) for name in ("weights.safetensors", "config.json")}}


def give_network(folder: Path, content: str) -> None:
    """Files as ``save_network`` names them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.safetensors").write_text(content)
    write_json(folder / "config.json", {"weights_sha256": file_hash(folder / "weights.safetensors")})


def give_networks(root: Path, content: str) -> None:
    give_network(root / artifact_dir("image_flow", None), content)
    for target in ("amber", "dim"):
        give_network(root / artifact_dir("align", target), content + target)
        for seed in (0, 1):
            give_network(root / artifact_dir("segment_filtered", target) / "aligned+filtered" / f"seed{seed}", f"{content}{target}{seed}")


def give_images(root: Path, domain: str, seed: int) -> None:
    """Test images of one domain, two to a patient whose name must stay here."""
    draw = np.random.default_rng(seed)
    folder = root / artifact_dir("data", domain)
    np.save(folder / "images.npy", draw.integers(256, size=(N, 4, 4, 3), dtype=np.uint8))
    np.save(folder / "masks.npy", draw.integers(2, size=(N, 4, 4), dtype=np.uint8))
    pd.DataFrame({"case_id": [f"{domain}{i}" for i in range(N)], "split": "test", "group": [f"Doe {i // 2}" for i in range(N)]}).to_parquet(
        folder / "manifest.parquet")


def give_values(root: Path, target: str, gain: np.ndarray, hd95: float = 3.0) -> None:
    """``metrics.parquet``: two classes and two segmenter seeds, whose mean Dice is ``.5 + gain`` for every arm."""
    rows = [(arm, "unet", seed, f"{target}{i}", f"Doe {i // 2}", name, "dice", 0.5 + gain[i] + shift)
            for arm in ARMS for seed in (0, 1) for i in range(N) for name, shift in (("cup", -0.1), ("disc", 0.1))]
    rows += [("aligned", "unet", 0, f"{target}0", "Doe 0", "cup", "hd95", hd95)]
    pd.DataFrame(rows, columns=["arm", "segmenter", "segmenter_seed", "case_id", "group", "class", "metric", "value"]).to_parquet(
        root / artifact_dir("evaluate", target) / "metrics.parquet")


@pytest.fixture
def root(built_toy: Path, tmp_path: Path) -> Path:
    """A toy project whose networks are files and whose evaluations have values."""
    root = copied(built_toy, tmp_path)
    for seed, target in enumerate(("amber", "dim")):
        give_images(root, target, seed)
        give_values(root, target, np.zeros(N))
    give_networks(root, "first")
    return root


def register(root: Path, stage: str = "evaluate", key: str | None = "amber") -> None:
    """Without the runs of all other stages."""
    store, project = tracking.client(root), load_project(root / "params.yaml")
    experiment = tracking.experiment_id(store, root, project)
    models.register(store, root, project, (stage, key), lambda stage, key: str(store.create_run(experiment, run_name=stage).info.run_id))


def champion(root: Path, name: str) -> str:
    return str(tracking.client(root).get_model_version_by_alias(name, models.CHAMPION).version)


def versions(root: Path, name: str) -> dict:
    return {str(each.version): each for each in tracking.client(root).search_model_versions(f"name = '{name}'")}


def test_versions_are_plain_files_and_each_content_is_one(root: Path) -> None:
    assert tracking.record(root, "evaluate", "amber") == tracking.record(root, "evaluate", "amber")
    tracking.record(root, "compare", None)
    for name, files in FILES.items():
        (version,) = versions(root, name).values()
        assert champion(root, name) == "1" and version.tags["dice"] == "0.5000"
        folder = Path(version.source.removeprefix("file://"))
        found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
        assert {file for file in found if not file.startswith("measured/")} == files and len(found) == len(files) + 1
        run = tracking.client(root).get_run(version.run_id)
        assert run.data.tags["content"] == version.tags["artifact"] and run.data.tags["node"] == version.tags["node"]
    store = tracking.client(root)
    assert {each.name for each in store.search_registered_models()} == set(FILES), "dim has not been recorded"
    assert versions(root, "image-flow")["1"].tags["n_images"] == str(2 * N), "the test images of both targets"


def test_versions_of_a_copied_project_are_its_own(root: Path, tmp_path: Path) -> None:
    register(root)
    copy = copied(root, tmp_path / "elsewhere")
    assert {each.source.rpartition("/mlruns/")[0] for each in versions(copy, "segmenter-amber").values()} == {copy.as_uri()}


def test_values_kept_with_a_version_name_nobody(root: Path) -> None:
    register(root)
    file = next((root / "mlruns").rglob("*.parquet"))
    table = pd.read_parquet(file)
    assert list(table.columns) == ["case", "group", "dice"] and len(table) == N
    assert table["case"].str.fullmatch("[0-9a-f]{16}").all() and table["case"].is_unique
    assert sorted(table["group"].value_counts()) == [2] * (N // 2) and set(table["group"]) == set(range(N // 2))
    assert table["dice"].to_numpy() == pytest.approx(0.5)
    assert b"Doe" not in file.read_bytes() and b"amber" not in file.read_bytes()


@pytest.mark.parametrize(("gain", "moves"), [
    (np.full(N, 0.02), True),
    (np.full(N, -0.02), False),
    (np.zeros(N), False),
    (np.repeat([0.3, -0.3, 0.3, -0.3, 0.3, -0.2], 2), False),  # better on the whole, not surely
    (np.repeat([0.05, 0.02, 0.04, 0.03, 0.02, 0.06], 2), True),
])
def test_the_champion_changes_only_where_the_interval_lies_above_0(root: Path, gain: np.ndarray, moves: bool) -> None:
    register(root)
    give_networks(root, "second")
    give_values(root, "amber", gain)
    register(root)
    register(root)
    for name in ("aligned-amber", "segmenter-amber"):
        assert set(versions(root, name)) == {"1", "2"}
        assert champion(root, name) == ("2" if moves else "1")
        verdict = versions(root, name)["2"].tags["verdict"]
        assert f"{gain.mean():+.4f} [" in verdict and verdict.startswith("became" if moves else "did not become"), verdict


def test_compared_after_the_champion_s_artifact_is_gone(root: Path) -> None:
    register(root)
    shutil.rmtree(root / artifact_dir("evaluate", "amber"))
    (root / artifact_dir("evaluate", "amber")).mkdir()
    give_networks(root, "second")
    give_values(root, "amber", np.full(N, 0.1))
    register(root)
    assert champion(root, "segmenter-amber") == "2"


def test_not_compared_on_other_images_or_with_another_instrument(root: Path) -> None:
    register(root)
    give_networks(root, "second")
    give_values(root, "amber", np.full(N, 0.1))
    file = provenance_file(root, "segment_aligned", "amber")  # another way of training segmenters: the painter's measure is another
    provenance = read_json(file)
    provenance["params"]["segment"]["training"]["steps"] += 1
    write_json(file, provenance)
    register(root)
    assert champion(root, "segmenter-amber") == "2", "a segmenter may be trained in any way"
    assert champion(root, "aligned-amber") == "1"
    assert versions(root, "aligned-amber")["2"].tags["verdict"] == "not compared: version 1 was measured with other settings"
    give_networks(root, "first")  # the first painter again, measured as the second was: its record is complete, and the third can be compared with it
    give_values(root, "amber", np.zeros(N))
    register(root)
    assert set(versions(root, "aligned-amber")) == {"1", "2"}
    assert versions(root, "aligned-amber")["1"].tags["verdict"] == "is champion, measured again"
    give_networks(root, "third")
    give_values(root, "amber", np.full(N, 0.05))
    register(root)
    assert champion(root, "aligned-amber") == "3"
    give_networks(root, "fourth")
    give_values(root, "amber", np.full(N, 0.4))
    give_images(root, "amber", seed=7)
    register(root)
    assert champion(root, "aligned-amber") == "3" and "too few test images in common" in versions(root, "aligned-amber")["4"].tags["verdict"]


def test_pairs_are_formed_by_image_and_averaged_by_patient() -> None:
    old = pd.DataFrame({"case": [f"{i:02d}" for i in range(N)], "group": 0, "dice": np.linspace(0, 1, N)})
    new = old.iloc[::-1].assign(dice=lambda t: t["dice"] + 0.1, group=[9 - i // 2 for i in range(N)])
    units, mean, low, high = models.compared(new, old, 0.95, 500)
    assert units == N // 2 and (mean, low, high) == pytest.approx((0.1, 0.1, 0.1))
    assert models.compared(new[:10], old, 0.95, 500) is None, "five patients"


def test_nothing_of_a_network_that_is_no_longer_the_measured_one(root: Path) -> None:
    file = provenance_file(root, "align", "amber")
    write_json(file, read_json(file) | {"content": "another"})
    register(root)
    assert not tracking.client(root).search_registered_models()


@pytest.mark.nightly
def test_real_networks_come_back_from_the_registry(smoke_root: Path) -> None:
    import torch

    from alignflow_core.networks import velocity_unet
    from alignflow_core.networks.segmenters import load_segmenter
    from pipelines.local import run_all

    run_all(smoke_root, quiet=True)
    store = tracking.client(smoke_root)
    experiments = [each.experiment_id for each in store.search_experiments()]
    count = len(store.search_runs(experiments))
    run_all(smoke_root, quiet=True)
    assert len(store.search_runs(experiments)) == count
    targets = load_project(smoke_root / "params.yaml").targets
    names = {"image-flow", *(f"{kind}-{target}" for kind in ("aligned", "segmenter") for target in targets)}
    assert {each.name for each in store.search_registered_models()} == names
    for name in names:
        version = store.get_model_version_by_alias(name, models.CHAMPION)
        folder = Path(store.get_model_version_download_uri(name, version.version).removeprefix("file://"))
        if name.startswith("segmenter"):
            load_segmenter(folder / "seed0", torch.device("cpu"))
        else:
            velocity_unet.load(folder)
        values = read_json(smoke_root / artifact_dir("evaluate", name.partition("-")[2]) / "metrics.json") if name.startswith("aligned") else {}
        assert values.get("dice_aligned", float(version.tags["dice"])) == pytest.approx(float(version.tags["dice"]), abs=1e-4)
    figures = {file.name for file in (smoke_root / "mlruns").rglob("*.svg")}
    assert figures == {"dice.svg", "gates.svg"}
    assert not [file for file in (smoke_root / "mlruns").rglob("*") if file.suffix in (".npy", ".png", ".jpg", ".html")]


def test_the_first_architecture_measures() -> None:
    raw = {"source": "a", "domains": {"a": {"dir": "a"}, "b": {"dir": "b"}}, "targets": {"b": {"domain": "b"}}}
    for architectures, folder in ((["unet", "dpt"], "aligned+filtered"), (["dpt", "unet"], "dpt/aligned+filtered")):
        painter, segmenter = models.measured_by(build_project(raw | {"segment": {"architectures": architectures}}), "evaluate", "b")
        assert segmenter.folder == folder and {painter.segmenter, segmenter.segmenter} == {architectures[0]}
