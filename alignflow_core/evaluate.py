"""Every arm on the target's held-out test images and on the source's; distances between image sets; does stage 1 obey its masks.

Writes ``metrics.parquet`` (one value per image, class, segmenter, arm and seed), ``source_test.parquet`` (the same of the source's test images, Dice
alone, classes averaged), ``distances.parquet`` (each with its
number of images, 95 % interval and real-against-real floor), ``features.parquet`` (for the map of the sets), ``appearance.parquet`` (colour,
contrast, sharpness and noise of every image, by set) and ``paired.parquet`` (each painter's image of a held-out mask against the real image of
that mask). What images give away of patients is asked by ``privacy.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

from alignflow_core.config import Task, in_order
from alignflow_core.devices import prepare
from alignflow_core.full_strength import at_full_strength
from alignflow_core.metrics.appearance import appearance
from alignflow_core.metrics.distribution import LEAST, SHARE_OF, real_floor, set_distances
from alignflow_core.metrics.features import FeatureSpace
from alignflow_core.metrics.jackknife import estimates
from alignflow_core.metrics.overlap import overlap, ratio_error
from alignflow_core.metrics.paired import paired
from alignflow_core.networks.registry import prefix
from alignflow_core.networks.segmenters import load_segmenter, mean_dice, predict
from alignflow_core.pairs import Pairs, read_array, read_pairs
from alignflow_core.runner import Context
from alignflow_core.seeding import derive_seed

LIKENESS = ("target", "set", "case_id", "group", "metric", "value")  # columns of paired.parquet
MAP_SIZE = 200  # images of one set in features.parquet
MOST = 1024  # images of one set that distances are taken over: time and memory of kernels grow with the square, of eigenvalues with the cube


@dataclass(frozen=True)
class Measured:
    """The pairs that this stage reads, each loaded once; no references where they are moments alone."""

    source: Pairs
    test: Pairs
    references: Pairs
    stage1: Pairs
    aligned: Pairs
    kept: np.ndarray
    comparators: Mapping[str, Pairs]

    @cached_property
    def full(self) -> np.ndarray:
        """Rows that distances and appearance are about, [len(aligned)]; row i of every painter is of the same mask and noise."""
        return at_full_strength(self.aligned.table)

    @cached_property
    def source_test(self) -> Pairs:
        """The source's own held-out test images."""
        return self.source.select((self.source.table["split"] == "test").to_numpy())

    @property
    def painted(self) -> dict[str, Pairs]:
        """Every painter's pairs of these rows, so that sets of one size are compared."""
        return {name: pairs.select(self.full) for name, pairs in {**self.comparators, "stage1": self.stage1, "aligned": self.aligned}.items()}

    @property
    def shown_references(self) -> dict[str, Pairs]:
        """The references under their name among the image sets, if there are images of them."""
        return {"references": self.references} if len(self.references) else {}


def run(config: SimpleNamespace, inputs: Mapping[str, Path], out_dir: Path, context: Context) -> dict[str, float]:
    """Measure one target.

    Returns:
        Means over images, classes and seeds (``dice_<arm>``, ``iou_<arm>`` …, on the source's test images ``source_dice_<arm>``, of the first
        segmenter architecture, ``<architecture>/dice_<arm>`` of others), ``kid_<set>`` and
        ``obey_ratio``: Dice of the ``source`` segmenter on stage-1 images against their masks over its Dice on real source test images.
    """
    device = prepare(config.machine)
    if config.variant_of:  # the comparators' arms and images are those of its base
        inputs = {name: folder for name, folder in inputs.items() if "_comparator:" not in name}
    data = Measured(
        read_pairs(inputs["data:source"]), read_pairs(inputs["data:target"], "test"), read_pairs(inputs["references"]),
        read_pairs(inputs["sample_stage1"]), read_pairs(inputs["sample_aligned"]),
        pd.read_parquet(inputs["filter"] / "manifest.parquet")["kept"].to_numpy(bool), comparators(inputs),
    )
    target = str(context.key)
    table, at_home = _arm_tables(config, inputs, data, target, device, context)
    table.to_parquet(out_dir / "metrics.parquet", index=False)
    at_home.to_parquet(out_dir / "source_test.parquet", index=False)
    distances, features = _image_distances(data, target, config.seed)
    distances.to_parquet(out_dir / "distances.parquet", index=False)
    features.to_parquet(out_dir / "features.parquet", index=False)
    likeness = _likeness(inputs["sample_paired"], data.test, target, config, context.root)
    likeness.to_parquet(out_dir / "paired.parquet", index=False)
    segmenter = _source_segmenter(inputs["segment_source"], device)
    looks = _looks(data, config.task, segmenter, device)
    looks.to_parquet(out_dir / "appearance.parquet", index=False)
    means = table.groupby(["segmenter", "metric", "arm"])["value"].mean().reset_index()
    first = next(iter([*table["segmenter"], *at_home["segmenter"]]), "")
    numbers = {f"{prefix(row['segmenter'], first)}{row['metric']}_{metric_name(row['arm'])}": float(row["value"]) for row in means.to_dict("records")}
    at_home = at_home.groupby(["segmenter", "arm"])["value"].mean().reset_index()
    numbers |= {f"{prefix(row['segmenter'], first)}source_dice_{metric_name(row['arm'])}": float(row["value"]) for row in at_home.to_dict("records")}
    kid = distances[distances["metric"] == "kid"]
    numbers |= {f"kid_{metric_name(name)}": float(value) for name, value in zip(kid["set"], kid["value"], strict=True)}
    numbers |= _obedience(config.task, segmenter, data, device) if segmenter else {}
    return {name: value for name, value in numbers.items() if np.isfinite(value)}


def comparators(inputs: Mapping[str, Path]) -> dict[str, Pairs]:
    """The pairs that each comparator painted, by its name."""
    return {name.partition(":")[2]: read_pairs(folder) for name, folder in inputs.items() if name.startswith("sample_comparator:")}


def metric_name(arm: str) -> str:
    """An arm as part of a metric's name: trackers refuse ``+``."""
    return arm.replace("+", "_plus_")


def _arm_tables(config: SimpleNamespace, inputs: Mapping[str, Path], data: Measured, target: str, device: torch.device,
                context: Context) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row per test image, class, metric, segmenter, arm and segmenter seed (none without labels); and per test image of the source, its
    mean Dice."""
    folders = [folder for name, folder in inputs.items() if name.startswith("segment_")]
    rows = [row | {"root": folder} for folder in folders for row in pd.read_parquet(folder / "segmenters.parquet").to_dict("records")]
    order = in_order(row["arm"] for row in rows)
    rows.sort(key=lambda row: order.index(row["arm"]))
    frames, at_home = [], []
    for done, row in enumerate(rows, start=1):
        model = load_segmenter(row["root"] / row["folder"], device)
        names = {"target": target, "arm": row["arm"], "generator_seed": config.seed, "segmenter": row["segmenter"],
                 "segmenter_seed": row["segmenter_seed"]}
        if data.test.masks is not None:
            frames.append(_image_table(predict(model, data.test.images, config.task, device), data.test, config.task).assign(**names))
        at_home.append(_source_table(model, data.source_test, config.task, device).assign(**names))
        context.progress(done, len(rows), row["arm"])
    columns = ["target", "arm", "generator_seed", "segmenter", "segmenter_seed", "case_id", "group", "class", "metric", "value"]
    return pd.concat(frames or [at_home[0][:0]], ignore_index=True)[columns], pd.concat(at_home, ignore_index=True)[columns]


def _source_table(model: torch.nn.Module, test: Pairs, task: Task, device: torch.device) -> pd.DataFrame:
    """Long table of the mean Dice of every test image of the source; without rows where it has none."""
    dice = mean_dice(predict(model, test.images, task, device), test.labels, task)
    return pd.DataFrame({"case_id": test.ids, "group": test.table["group"].astype(str).to_numpy(), "class": "mean", "metric": "dice", "value": dice})


def _image_table(predicted: np.ndarray, test: Pairs, task: Task) -> pd.DataFrame:
    """Long table of one prediction: case_id, group, class, metric, value."""
    identity = {"case_id": test.ids, "group": test.table["group"].astype(str).to_numpy()}
    frames = [pd.DataFrame({**identity, "class": name, "metric": metric, "value": values[:, c]})
              for metric, values in overlap(predicted, test.labels, task).items() for c, name in enumerate(task.classes)]
    if task.classes == ("disc", "cup"):
        error = ratio_error(predicted, test.labels, task)
        frames.append(pd.DataFrame({**identity, "class": "cup", "metric": "cdr_error", "value": error}).dropna())
    return pd.concat(frames, ignore_index=True)


def _source_segmenter(segmenters: Path, device: torch.device) -> torch.nn.Module | None:
    """The first segmenter of the arm ``source``, if one was asked for."""
    table = pd.read_parquet(segmenters / "segmenters.parquet")
    first = table[table["arm"] == "source"].head(1)  # rows stand by architecture, arm and seed
    return None if first.empty else load_segmenter(segmenters / first["folder"].iloc[0], device)


def _obedience(task: Task, model: torch.nn.Module, data: Measured, device: torch.device) -> dict[str, float]:
    """Dice of the ``source`` segmenter on real source test images and on stage-1 images against the masks they were painted from."""
    sets = {"real": data.source_test, "stage1": data.stage1}
    dice = {name: overlap(predict(model, pairs.images, task, device), pairs.labels, task)["dice"].mean(0) for name, pairs in sets.items()}
    numbers = {f"obey_{name}_{each}": float(value) for name, values in dice.items() for each, value in zip(task.classes, values, strict=True)}
    numbers |= {f"obey_{name}": float(values.mean()) for name, values in dice.items()}
    return numbers | {"obey_ratio": numbers["obey_stage1"] / max(numbers["obey_real"], 1e-9)}


def _image_distances(data: Measured, target: str, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Distances of every image set to the real target test images, and the vectors of the map."""
    train = data.source.select((data.source.table["split"] == "train").to_numpy())
    space = FeatureSpace.fit(train.images)
    sets = {"source": train, **data.shown_references, "target test": data.test,
            **data.painted}
    vectors = {name: space(pairs.images) for name, pairs in sets.items()}
    features = pd.concat([_map_rows(name, pairs.ids, vectors[name]) for name, pairs in sets.items()], ignore_index=True)
    groups = {name: _units(pairs) for name, pairs in sets.items()}
    kept = data.kept[data.full]
    if kept.any():
        vectors["aligned+filtered"], groups["aligned+filtered"] = vectors["aligned"][kept], groups["aligned"][kept]
    for name, found in vectors.items():
        chosen = _evenly(len(found), MOST)
        vectors[name], groups[name] = found[chosen], groups[name][chosen]
    real, real_groups = vectors.pop("target test"), groups.pop("target test")
    floor = real_floor(real, _draws(seed, target, "floor"), real_groups)
    rows = []
    for name, found in vectors.items():
        measured = estimates(set_distances, found, real, groups[name], real_groups, _draws(seed, target, name), SHARE_OF, LEAST)
        rows += [(target, name, metric, len(found), len(real), each.value, floor[metric], each.error, each.low, each.high)
                 for metric, each in measured.items()]
    columns = ["target", "set", "metric", "n", "n_reference", "value", "floor", "error", "ci_low", "ci_high"]
    return pd.DataFrame(rows, columns=columns), features


def _likeness(folder: Path, test: Pairs, target: str, config: SimpleNamespace, root: Path) -> pd.DataFrame:
    """Every painter's images of held-out masks beside the real images of these: :data:`LIKENESS`, without rows where the target has no labels."""
    ids = pd.read_parquet(folder / "manifest.parquet")["case_id"]
    place = {case: row for row, case in enumerate(test.ids)}
    real = test.select(np.array([place[case] for case in ids], dtype=int))
    weights = None if config.evaluate.lpips_weights is None else root / config.evaluate.lpips_weights
    frames = []
    for file in sorted(folder.glob("*.npy")):
        for metric, values in paired(read_array(file), real.images, weights).items():
            frames.append(pd.DataFrame({"target": target, "set": file.stem, "case_id": real.ids, "group": real.table["group"].astype(str).to_numpy(),
                                        "metric": metric, "value": values}))
    if not frames:
        return pd.DataFrame({name: pd.Series(dtype=float if name == "value" else object) for name in LIKENESS})
    return pd.concat(frames, ignore_index=True)


def _units(pairs: Pairs) -> np.ndarray:
    """What is independent of each other: patients or sequences; every synthetic image is its own unit, given the generator."""
    return (pairs.table["group"].astype(str) if "group" in pairs.table else pd.Series(pairs.ids, dtype=object)).to_numpy()


def _draws(seed: int, target: str, purpose: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(derive_seed(seed, "evaluate", target, purpose)))


def _evenly(n: int, most: int) -> np.ndarray:
    """Rows of at most ``most`` evenly spaced members of a set of n; all of a smaller one."""
    return np.unique(np.linspace(0, n - 1, min(most, n)).round().astype(int))


def _map_rows(name: str, ids: object, vectors: np.ndarray) -> pd.DataFrame:
    """At most MAP_SIZE evenly spaced members of a set: set, id, f0, f1, …"""
    chosen = _evenly(len(vectors), MAP_SIZE)
    frame = pd.DataFrame(vectors[chosen].astype(np.float32), columns=[f"f{i}" for i in range(vectors.shape[1])])
    frame.insert(0, "id", np.asarray(ids, dtype=object)[chosen].astype(str))
    frame.insert(0, "set", name)
    return frame


def _looks(data: Measured, task: Task, segmenter: torch.nn.Module | None, device: torch.device) -> pd.DataFrame:
    """Appearance of at most MAP_SIZE images of each set: set, then one column per quantity.

    Where images have no masks, contrast is that of the regions which ``segmenter`` finds (unknown without it).
    """
    frames = []
    own = {name: data.painted[name] for name in ("stage1", "aligned")}
    for name, pairs in {"source": data.source, **own, **data.shown_references, "target test": data.test}.items():
        chosen = _evenly(len(pairs), MAP_SIZE)
        if pairs.masks is None:
            masks = predict(segmenter, pairs.images[chosen], task, device) if segmenter else None
        else:
            masks = pairs.masks[chosen]
        frames.append(appearance(pairs.images[chosen], masks, task).assign(set=name))
    return pd.concat(frames, ignore_index=True)
