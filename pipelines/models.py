"""The model registry: networks that an evaluation has measured, as versions of MLflow's registered models.

| name | network | measured by the Dice of | on |
|---|---|---|---|
| ``image-flow`` | stage 1 | arm ``stage1`` | the test images of all targets |
| ``aligned-<target>`` | stage 2 | arm ``aligned`` | those of the target |
| ``segmenter-<target>`` | arm ``aligned+filtered`` of the first architecture, a folder per segmenter seed | itself | those of the target |

A version is plain files, ``weights.safetensors`` and ``config.json``, copied to the run that built the network; each content is one version.
The alias ``champion`` belongs to the first version, and moves to another only where the interval of their paired difference, image by image and
grouped as in ``compare``, lies above 0. A champion's values are kept with its version, so that its artifact need not be.

The arms are fixed beforehand: the best of several on the test images would be chosen by what it is then praised for. A painter is judged by the
segmenters that learn from its images, the unfiltered ones, hence only against versions whose segmenters had the same settings.
"""

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignflow_core.artifact import file_hash, json_hash, read_json
from alignflow_core.config import Evaluate, Project
from alignflow_core.networks.registry import arm_folder
from alignflow_core.runner import provenance_file
from alignflow_core.stages import artifact_dir, node_id
from pipelines.lineage import of_one_piece
from pipelines.versions import NodeName

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
FOLDER = "model"  # among the artifacts of the run that built the network
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Model:
    """A registered model: where its network lies and how it is measured.

    Attributes:
        name: in the registry.
        node: stage and key whose artifact holds the network.
        folder: of the network inside that artifact; may hold one folder per segmenter seed.
        arm, segmenter: whose Dice counts; the architecture is the first of ``segment.architectures``.
        targets: whose test images count.
        instrument: nodes and sections of their params that must be equal for two measurements to be comparable.
    """

    name: str
    node: NodeName
    folder: str
    arm: str
    segmenter: str
    targets: tuple[str, ...]
    instrument: tuple[tuple[NodeName, tuple[str, ...]], ...]

    def files(self, root: Path) -> dict[str, Path]:
        """Path inside the version -> file; none where the network was not trained."""
        folder = root / artifact_dir(*self.node) / self.folder
        found = [file for weights in sorted(folder.rglob(WEIGHTS)) for file in (weights, weights.with_name("config.json"))]
        return {file.relative_to(folder).as_posix(): file for file in found}


def measured_by(project: Project, stage: str, key: str | None) -> tuple[Model, ...]:
    """Models whose measurement is complete with this artifact."""
    segmenter = project.segment.architectures[0]
    if stage == "compare":
        instrument: Any = ((("segment_stage1", None), ("task", "segment")), (("sample_stage1", None), ("sample",)))
        return (Model("image-flow", ("image_flow", None), "", "stage1", segmenter, tuple(project.targets), instrument),)
    if stage == "evaluate" and key:
        trained = ("segment_filtered", key)
        instrument = ((("segment_aligned", key), ("task", "segment", f"targets.{key}.synthetic_share")), (("sample_aligned", key), ("sample",)))
        return (Model(f"aligned-{key}", ("align", key), "", "aligned", segmenter, (key,), instrument),
                Model(f"segmenter-{key}", trained, arm_folder(segmenter, "aligned+filtered"), "aligned+filtered", segmenter, (key,),
                      ((trained, ("task",)),)))
    return ()


def register(store: "MlflowClient", root: Path, project: Project, node: NodeName, run_of: Callable[[str, str | None], str]) -> None:
    """Register what the artifact of ``node`` has measured, once; nothing where a network or its arm was not trained.

    Args:
        run_of: stage and key -> id of the run that recorded the artifact.
    """
    for model in measured_by(project, *node):
        files = model.files(root)
        if not files or not of_one_piece(root, project, node):
            continue
        measurement = f"measured/{_instrument(root, model)}.parquet"
        content = json_hash({name: file_hash(file) for name, file in files.items() if file.name == "config.json"})  # which names its weights' hash
        version = _version(store, model.name, content)
        if version is not None and _has(store, version, measurement):
            continue
        values = measure(root, project, model)
        if values.empty:
            continue
        if version is None:
            version = _add(store, root, model, files, content, run_of(*model.node))
        verdict = _judge(store, model, version, values, measurement, project.evaluate)
        _upload(store, str(version.run_id), values, measurement)
        tags = {"measured_by": f"Dice of arm {model.arm}", "dice": f"{values['dice'].mean():.4f}", "n_images": str(len(values)), "verdict": verdict}
        for name, value in tags.items():
            store.set_model_version_tag(model.name, str(version.version), name, value)


def measure(root: Path, project: Project, model: Model) -> "pd.DataFrame":
    """Dice of every test image, averaged over classes and segmenter seeds.

    Returns:
        case (hash of the image and mask as they were measured, so that only the same pixels are compared, and no name can be guessed from it),
        group (number of the patient or sequence), dice.
    """
    import pandas as pd

    frames = []
    for target in model.targets:
        table = pd.read_parquet(root / artifact_dir("evaluate", target) / "metrics.parquet")
        own = table[(table["arm"] == model.arm) & (table["segmenter"] == model.segmenter) & (table["metric"] == "dice")]
        dice = own.groupby("case_id").agg(dice=("value", "mean"), group=("group", "first"))
        domain = project.targets[target].domain
        if own.empty:  # or without labels
            continue
        pixels = _pixel_hashes(root / artifact_dir("data", domain))
        frames.append(dice.assign(case=dice.index.map(pixels), group=domain + "/" + dice["group"].astype(str)))
    if not frames:
        return pd.DataFrame({"case": [], "group": [], "dice": []})
    values = pd.concat(frames, ignore_index=True).groupby("case", as_index=False).agg(group=("group", "first"), dice=("dice", "mean"))
    return values.assign(group=values["group"].factorize()[0])


def _pixel_hashes(folder: Path) -> dict[str, str]:
    """Case id -> hash of its image and mask, of a domain's test split."""
    import hashlib

    import numpy as np
    import pandas as pd

    images, masks = (np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in ("images.npy", "masks.npy"))
    table = pd.read_parquet(folder / "manifest.parquet", columns=["case_id", "split"])
    return {case: hashlib.sha256(images[i].tobytes() + masks[i].tobytes()).hexdigest()[:16]
            for i, (case, split) in enumerate(table.itertuples(index=False)) if split == "test"}


def compared(new: "pd.DataFrame", old: "pd.DataFrame", level: float, resamples: int) -> tuple[int, float, float, float] | None:
    """Paired difference in Dice over the images that both have measured: units, mean, and its interval.

    ``None`` for fewer units (patients, sequences or images) than a signed-rank test could decide on: a bootstrap of so few is too sure of itself.
    """
    import numpy as np

    from alignflow_core.metrics.statistics import FEWEST, bca_intervals, group_means

    both = new.merge(old, on="case", suffixes=("", "_old"))
    units = group_means((both["dice"] - both["dice_old"]).to_numpy()[:, None], both["group"].to_numpy())
    if len(units) < FEWEST:
        return None
    low, high = bca_intervals(units, level, resamples, np.random.Generator(np.random.PCG64(0)))
    return len(units), float(units.mean()), float(low[0]), float(high[0])


def _judge(store: "MlflowClient", model: Model, version: "ModelVersion", values: "pd.DataFrame", measurement: str,
           settings: Evaluate) -> str:
    """Move the alias if the version has earned it; says why or why not."""
    champion = _champion(store, model.name)
    if champion is None:
        store.set_registered_model_alias(model.name, CHAMPION, str(version.version))
        return "became champion: the first version"
    if str(champion.version) == str(version.version):  # a number or its digits, as MLflow pleases
        return "is champion, measured again"
    old = _download(store, champion, measurement)
    if old is None:
        return f"not compared: version {champion.version} was measured with other settings"
    found = compared(values, old, settings.level, settings.bootstrap)
    if found is None:
        return f"not compared: too few test images in common with version {champion.version}"
    units, mean, low, high = found
    if low > 0:
        store.set_registered_model_alias(model.name, CHAMPION, str(version.version))
    return (f"{'became' if low > 0 else 'did not become'} champion: Dice {mean:+.4f} [{low:+.4f}, {high:+.4f}] against version {champion.version}, "
            f"over {units} patients, sequences or images")


def _instrument(root: Path, model: Model) -> str:
    """Hash of the settings that a measurement depends on; which arms and architectures were trained beside is none of them."""
    used: dict[str, Any] = {"arm": model.arm, "segmenter": model.segmenter}
    for node, sections in model.instrument:
        params = read_json(provenance_file(root, *node))["params"]
        used |= {name: params[name] for name in sections}
    if "segment" in used:
        used["segment"] = {name: value for name, value in used["segment"].items() if name not in ("arms", "architectures")}
    return json_hash(used)[:12]


def _version(store: "MlflowClient", name: str, content: str) -> "ModelVersion | None":
    """The version with this content."""
    found = store.search_model_versions(f"name = '{name}' and tag.content = '{content}'", max_results=1)
    return found[0] if found else None


def _champion(store: "MlflowClient", name: str) -> "ModelVersion | None":
    aliases = store.get_registered_model(name).aliases
    return store.get_model_version(name, aliases[CHAMPION]) if CHAMPION in aliases else None


def _add(store: "MlflowClient", root: Path, model: Model, files: Mapping[str, Path], content: str, run_id: str) -> "ModelVersion":
    """Copy the files to the run and make them a version."""
    if not store.search_registered_models(f"name = '{model.name}'"):
        store.create_registered_model(model.name)
    for name, file in files.items():
        store.log_artifact(run_id, str(file), f"{FOLDER}/{name}".rpartition("/")[0])
    provenance = read_json(provenance_file(root, *model.node))
    tags = {"content": content, "node": node_id(*model.node), "artifact": provenance["content"], "profile": provenance["profile"],
            "generator_seed": str(provenance["seed"])}
    source = f"{store.get_run(run_id).info.artifact_uri}/{FOLDER}"
    return store.create_model_version(model.name, source, run_id, tags=tags)


def _has(store: "MlflowClient", version: "ModelVersion", measurement: str) -> bool:
    folder, _, _ = f"{FOLDER}/{measurement}".rpartition("/")
    return any(file.path == f"{FOLDER}/{measurement}" for file in store.list_artifacts(str(version.run_id), folder))


def _upload(store: "MlflowClient", run_id: str, values: "pd.DataFrame", measurement: str) -> None:
    """Written last: it says that the version has been judged."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / os.path.basename(measurement)
        values.to_parquet(file, index=False)
        store.log_artifact(run_id, str(file), f"{FOLDER}/{measurement}".rpartition("/")[0])


def _download(store: "MlflowClient", version: "ModelVersion", measurement: str) -> "pd.DataFrame | None":
    import pandas as pd

    if not _has(store, version, measurement):
        return None
    return pd.read_parquet(store.download_artifacts(str(version.run_id), f"{FOLDER}/{measurement}"))
