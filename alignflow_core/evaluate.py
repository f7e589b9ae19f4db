"""Every arm on the target's held-out test images; distances between image sets; copy check; does stage 1 obey its masks.

Writes ``metrics.parquet`` (one value per image, class, arm and seed), ``distances.parquet`` (each with its
number of images and the real-against-real floor), ``copying.parquet``, ``membership.parquet``, ``features.parquet`` (for the map of the sets)
and ``appearance.parquet`` (colour, contrast, sharpness and noise of every image, by set).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

from alignflow_core import audit
from alignflow_core.config import Task
from alignflow_core.devices import prepare
from alignflow_core.membership import membership
from alignflow_core.membership import numbers as membership_numbers
from alignflow_core.metrics.appearance import appearance
from alignflow_core.metrics.distribution import real_floor, set_distances
from alignflow_core.metrics.features import FeatureSpace
from alignflow_core.metrics.overlap import overlap, ratio_error
from alignflow_core.networks.segmenters import load_segmenter, predict
from alignflow_core.pairs import Pairs, read_pairs
from alignflow_core.runner import Context
from alignflow_core.seeding import derive_seed

MAP_SIZE = 200  # images of one set in features.parquet


@dataclass(frozen=True)
class Measured:
    """The pairs that this stage reads, each loaded once."""

    source: Pairs
    test: Pairs
    references: Pairs
    stage1: Pairs
    aligned: Pairs
    kept: np.ndarray


def run(config: SimpleNamespace, inputs: Mapping[str, Path], out_dir: Path, context: Context) -> dict[str, float]:
    """Measure one target.

    Returns:
        Means over images, classes and seeds (``dice_<arm>``, ``iou_<arm>`` …), ``kid_<set>``, the copy rates and
        ``obey_ratio``: Dice of the ``source`` segmenter on stage-1 images against their masks over its Dice on real source test images.
    """
    device = prepare(config.machine)
    data = Measured(
        read_pairs(inputs["data:source"]), read_pairs(inputs["data:target"], "test"), read_pairs(inputs["references"]),
        read_pairs(inputs["sample_stage1"]), read_pairs(inputs["sample_aligned"]),
        pd.read_parquet(inputs["filter"] / "manifest.parquet")["kept"].to_numpy(bool),
    )
    target = str(context.key)
    table = _arm_table(config, inputs, data.test, target, device, context)
    table.to_parquet(out_dir / "metrics.parquet", index=False)
    distances, features = _image_distances(data, target, config.seed)
    distances.to_parquet(out_dir / "distances.parquet", index=False)
    features.to_parquet(out_dir / "features.parquet", index=False)
    looks = _looks(data, config.task)
    looks.to_parquet(out_dir / "appearance.parquet", index=False)
    copies, copy_numbers = _copies(data, config.evaluate.copy_quantile)
    copies.to_parquet(out_dir / "copying.parquet", index=False)
    seen, attacks = membership(inputs, data.source, data.references, data.test, config.task, config.seed, device)
    seen.to_parquet(out_dir / "membership.parquet", index=False)
    means = table.groupby(["metric", "arm"])["value"].mean().reset_index()
    numbers = {f"{row['metric']}_{metric_name(row['arm'])}": float(row["value"]) for row in means.to_dict("records")}
    kid = distances[distances["metric"] == "kid"]
    numbers |= {f"kid_{metric_name(name)}": float(value) for name, value in zip(kid["set"], kid["value"], strict=True)}
    numbers |= copy_numbers | membership_numbers(attacks) | _obedience(config.task, inputs["segment_source"], data, device)
    return {name: value for name, value in numbers.items() if np.isfinite(value)}


def metric_name(arm: str) -> str:
    """An arm as part of a metric's name: trackers refuse ``+``."""
    return arm.replace("+", "_plus_")


def _arm_table(config: SimpleNamespace, inputs: Mapping[str, Path], test: Pairs, target: str, device: torch.device, context: Context) -> pd.DataFrame:
    """One row per test image, class, metric, arm and segmenter seed."""
    rows = [row | {"root": inputs[stage]} for stage in ("segment_source", "segment_target")
            for row in pd.read_parquet(inputs[stage] / "segmenters.parquet").to_dict("records")]
    frames = []
    for done, row in enumerate(rows, start=1):
        predicted = predict(load_segmenter(row["root"] / row["folder"], device), test.images, config.task, device)
        frame = _image_table(predicted, test, config.task)
        frames.append(frame.assign(target=target, arm=row["arm"], generator_seed=config.seed, segmenter_seed=row["segmenter_seed"]))
        context.progress(done, len(rows), row["arm"])
    columns = ["target", "arm", "generator_seed", "segmenter_seed", "case_id", "group", "class", "metric", "value"]
    return pd.concat(frames, ignore_index=True)[columns]


def _image_table(predicted: np.ndarray, test: Pairs, task: Task) -> pd.DataFrame:
    """Long table of one prediction: case_id, group, class, metric, value."""
    identity = {"case_id": test.ids, "group": test.table["group"].astype(str).to_numpy()}
    frames = [pd.DataFrame({**identity, "class": name, "metric": metric, "value": values[:, c]})
              for metric, values in overlap(predicted, test.labels, task).items() for c, name in enumerate(task.classes)]
    if task.classes == ("disc", "cup"):
        error = ratio_error(predicted, test.labels, task)
        frames.append(pd.DataFrame({**identity, "class": "cup", "metric": "cdr_error", "value": error}).dropna())
    return pd.concat(frames, ignore_index=True)


def _obedience(task: Task, segmenters: Path, data: Measured, device: torch.device) -> dict[str, float]:
    """Dice of the ``source`` segmenter on real source test images and on stage-1 images against the masks they were painted from."""
    table = pd.read_parquet(segmenters / "segmenters.parquet")
    first = table[table["arm"] == "source"].sort_values("segmenter_seed").head(1)
    if first.empty:
        return {}
    model = load_segmenter(segmenters / first["folder"].iloc[0], device)
    real = data.source.select((data.source.table["split"] == "test").to_numpy())
    sets = {"real": real, "stage1": data.stage1}
    dice = {name: overlap(predict(model, pairs.images, task, device), pairs.labels, task)["dice"].mean(0) for name, pairs in sets.items()}
    numbers = {f"obey_{name}_{each}": float(value) for name, values in dice.items() for each, value in zip(task.classes, values, strict=True)}
    numbers |= {f"obey_{name}": float(values.mean()) for name, values in dice.items()}
    return numbers | {"obey_ratio": numbers["obey_stage1"] / max(numbers["obey_real"], 1e-9)}


def _image_distances(data: Measured, target: str, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Distances of every image set to the real target test images, and the vectors of the map."""
    training = data.source.images[(data.source.table["split"] == "train").to_numpy()]
    space = FeatureSpace.fit(training)
    vectors = {"source": space(training), "references": space(data.references.images), "target test": space(data.test.images),
               "stage1": space(data.stage1.images), "aligned": space(data.aligned.images)}
    ids = {"source": np.array(data.source.ids)[(data.source.table["split"] == "train").to_numpy()], "references": data.references.ids,
           "target test": data.test.ids, "stage1": data.stage1.ids, "aligned": data.aligned.ids}
    rng = np.random.Generator(np.random.PCG64(derive_seed(seed, "evaluate", target, "floor")))
    real, floor = vectors["target test"], real_floor(vectors["target test"], rng)
    compared = {name: vectors[name] for name in ("source", "references", "stage1", "aligned")} | {"aligned+filtered": vectors["aligned"][data.kept]}
    rows = []
    for name, found in compared.items():
        measured = set_distances(found, real)
        error = measured.pop("kid_error")
        rows += [(target, name, metric, len(found), len(real), value, floor[metric], error if metric == "kid" else np.nan)
                 for metric, value in measured.items()]
    distances = pd.DataFrame(rows, columns=["target", "set", "metric", "n", "n_reference", "value", "floor", "error"])
    return distances, pd.concat([_map_rows(name, ids[name], found) for name, found in vectors.items()], ignore_index=True)


def _map_rows(name: str, ids: object, vectors: np.ndarray) -> pd.DataFrame:
    """At most MAP_SIZE evenly spaced members of a set: set, id, f0, f1, …"""
    chosen = np.unique(np.linspace(0, len(vectors) - 1, min(MAP_SIZE, len(vectors))).round().astype(int)) if len(vectors) else np.empty(0, int)
    frame = pd.DataFrame(vectors[chosen].astype(np.float32), columns=[f"f{i}" for i in range(vectors.shape[1])])
    frame.insert(0, "id", np.asarray(ids, dtype=object)[chosen].astype(str))
    frame.insert(0, "set", name)
    return frame


def _looks(data: Measured, task: Task) -> pd.DataFrame:
    """Appearance of at most MAP_SIZE images of each set: set, then one column per quantity."""
    frames = []
    for name, pairs in {"source": data.source, "stage1": data.stage1, "aligned": data.aligned, "references": data.references,
                        "target test": data.test}.items():
        chosen = np.unique(np.linspace(0, len(pairs) - 1, min(MAP_SIZE, len(pairs))).round().astype(int))
        frames.append(appearance(pairs.images[chosen], None if pairs.masks is None else pairs.masks[chosen], task).assign(set=name))
    return pd.concat(frames, ignore_index=True)


def _copies(data: Measured, quantile: float) -> tuple[pd.DataFrame, dict[str, float]]:
    """Copy audit of all aligned images, those that were not kept too."""
    known = audit.banks(data.source, data.references, data.test)
    checks = audit.check(data.aligned.images, known, quantile)
    table = audit.table(data.aligned.ids, checks, known)
    table.insert(1, "kept", np.tile(data.kept, len(checks)))
    numbers: dict[str, float] = {}
    for name, found in checks.items():
        numbers |= {f"copy_flagged_{name}": float(found.flagged.mean()), f"copy_flagged_kept_{name}": _share(found.flagged[data.kept]),
                    f"copy_calibration_{name}": float(found.n_calibration), f"copy_false_flag_rate_{name}": found.false_flag_rate,
                    f"copy_chance_limit_{name}": found.chance(int(data.kept.sum()))}
    either = np.any([found.flagged for found in checks.values()], axis=0)
    return table, numbers | {"copy_flagged_fraction": _share(either[data.kept])}


def _share(flags: np.ndarray) -> float:
    """Share of true values; 0 of none."""
    return float(flags.mean()) if len(flags) else 0.0
