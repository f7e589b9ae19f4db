"""Asset checks: what must hold for an artifact to be trusted, read from its files after every build.

A blocking check is about what would make everything after it wrong: leakage, a network that diverged, arrays that do not
belong together, weights that the gates refuse. It stops its own run, and :func:`refused_input` stops every later one.
The others (too few kept, pairs that look copied, unusual areas, masks poorly obeyed) are a matter of judgement and warn:
the tables and the report, which are downstream, are where a person judges.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from alignflow_core.artifact import read_json
from alignflow_core.config import STAGE_ARMS, Project, Task, load_project
from alignflow_core.runner import provenance_file
from alignflow_core.stages import STAGES, Stage, artifact_dir, node_id

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

LEAST_KEPT = 0.2
MOMENTS_FILE = "moments.safetensors"  # as alignflow_core.reference_moments names it; that module would bring torch into the process
LEAST_AGREEMENT = 0.5  # Dice; a mask that is not found again is no label
AREA_QUANTILES = (0.05, 0.95)
WARN, ERROR = dg.AssetCheckSeverity.WARN, dg.AssetCheckSeverity.ERROR


@dataclass(frozen=True)
class Check:
    """A named question to the artifact of ``(root, key)``; a failed ``blocking`` one stops what is downstream."""

    name: str
    description: str
    function: Callable[[Path, str | None], dg.AssetCheckResult]
    blocking: bool = False

    def __call__(self, root: Path, key: str | None) -> dg.AssetCheckResult:
        """The result under the check's name. Files that cannot be read fail it rather than lose the artifact's record."""
        try:
            return self.function(root, key)._replace(check_name=self.name)
        except Exception as error:
            return dg.AssetCheckResult(passed=False, check_name=self.name, severity=ERROR if self.blocking else WARN,
                                       metadata={"cannot_be_checked": f"{type(error).__name__}: {error}"})


def finite_losses(stage: str) -> Check:
    """Check of a trained network's curves."""
    def function(root: Path, key: str | None) -> dg.AssetCheckResult:
        import numpy as np
        import pandas as pd

        folder = root / artifact_dir(stage, key)
        curves, trained = pd.read_parquet(folder / "curves.parquet"), folder / "segmenters.parquet"
        wrong = curves[~np.isfinite(curves["value"])]
        nothing_to_train = trained.exists() and pd.read_parquet(trained).empty  # a target may want none of the arms
        return dg.AssetCheckResult(passed=(len(curves) > 0 or nothing_to_train) and wrong.empty, metadata={
            "points": len(curves), "not_finite": len(wrong), "first_step": int(wrong["step"].min()) if len(wrong) else None})

    return Check("finite_losses", "Every logged point of training is a finite number, and there are some.", function, blocking=True)


def as_many_masks_as_images(stage: str, labelled: bool = True) -> Check:
    """Check that rows of images, masks and manifest belong together; ``labelled`` sets have masks, of domains those that say so."""
    def function(root: Path, key: str | None) -> dg.AssetCheckResult:
        import numpy as np
        import pandas as pd

        folder = root / artifact_dir(stage, key)
        shapes = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False).shape
                  for name in ("images", "masks") if (folder / f"{name}.npy").exists()}
        rows = len(pd.read_parquet(folder / "manifest.parquet"))
        moments_alone = (folder / MOMENTS_FILE).exists()
        needed = labelled and (stage != "data" or load_project(root / "params.yaml").domains[str(key)].labelled)
        complete = "images" in shapes and ("masks" in shapes or not needed)
        alike = len({shape[:3] for shape in shapes.values()}) == 1 and {shape[0] for shape in shapes.values()} == {rows}
        told = {"moments_alone": True} if moments_alone else {}
        return dg.AssetCheckResult(passed=(rows > 0 or moments_alone) and complete and alike, metadata={
            "rows": rows, **told, **{name: " x ".join(map(str, shape)) for name, shape in shapes.items()}})

    return Check("as_many_masks_as_images", "Images, masks and manifest have the same rows, and images and masks the same size.", function,
                 blocking=True)


def splits_disjoint(root: Path, key: str | None) -> dg.AssetCheckResult:
    """No patient and no file's content is in two of the splits train, val and test."""
    table = _manifest(root, "data", key)
    shared = {name: int((table.groupby(column)["split"].nunique() > 1).sum()) for name, column in
              (("groups_in_two_splits", "group"), ("contents_in_two_splits", "image_sha256"))}
    return dg.AssetCheckResult(passed=not any(shared.values()), metadata={
        "images": len(table), **shared, **{f"n_{split}": int(count) for split, count in table["split"].value_counts().items()}})


def references_disjoint(root: Path, key: str | None) -> dg.AssetCheckResult:
    """No reference shares a patient or a file's content with the target's test set."""
    domain = load_project(root / "params.yaml").targets[str(key)].domain
    references, splits = _manifest(root, "references", key), _manifest(root, "data", domain)
    test = splits[splits["split"] == "test"]
    groups = references["group"].isin(test["group"])
    hashes = references["image_sha256"].isin(test["image_sha256"])
    unseen = {"not_checkable": "the references are moments alone"} if not len(references) else {}
    return dg.AssetCheckResult(passed=not hashes.any() and not groups.any(), metadata={
        "references": len(references), **unseen, "test_images": len(test), "same_content": int(hashes.sum()), "same_group": int(groups.sum())})


def classes_present(root: Path, key: str | None) -> dg.AssetCheckResult:
    """Every class that training masks show is in some synthetic mask."""
    real, synthetic = (area > 0 for area in _areas(root))
    task = load_project(root / "params.yaml").task
    missing = [name for c, name in enumerate(task.classes) if real[:, c].any() and not synthetic[:, c].any()]
    shares = {f"{kind}_{name}": float(shown[:, c].mean()) for kind, shown in (("real", real), ("synthetic", synthetic))
              for c, name in enumerate(task.classes)}
    return dg.AssetCheckResult(passed=not missing, metadata={"missing": ", ".join(missing), **shares})


def class_areas(root: Path, key: str | None) -> dg.AssetCheckResult:
    """The median area of every class in synthetic masks lies between the 5 % and 95 % quantiles of training masks."""
    import numpy as np

    real, synthetic = _areas(root)
    low, high = np.quantile(real, AREA_QUANTILES, axis=0)
    median = np.median(synthetic, axis=0)
    names = load_project(root / "params.yaml").task.classes
    metadata = {f"{name}_{what}": float(values[c]) for c, name in enumerate(names) for what, values in
                (("median", median), ("low", low), ("high", high))}
    return dg.AssetCheckResult(passed=bool(((low <= median) & (median <= high)).all()), severity=WARN, metadata=metadata)


def gates(root: Path, key: str | None) -> dg.AssetCheckResult:
    """The weights that alignment ended with kept every gate; only a warning where ``align.gates.hold`` is off."""
    import pandas as pd

    looks = pd.read_parquet(root / artifact_dir("align", key) / "gates.parquet")
    chosen = looks[looks["best"]]
    broken = "; ".join(each for each in chosen["failed"] if each)
    return dg.AssetCheckResult(passed=len(chosen) == 1 and not broken, severity=_gates_severity(root, key), metadata={
        "broken": broken, "looks": len(looks), "looks_refused": int((looks["failed"] != "").sum())})


def _ratio(name: str, limit: str) -> Callable[[Path, str | None], dg.AssetCheckResult]:
    """Question whether a ratio of aligned to stage-1 samples is at least its gate."""
    def function(root: Path, key: str | None) -> dg.AssetCheckResult:
        ratio = read_json(root / artifact_dir("align", key) / "metrics.json")[name]
        least = getattr(load_project(root / "params.yaml").targets[str(key)].align.gates, limit)
        return dg.AssetCheckResult(passed=ratio >= least, severity=_gates_severity(root, key), metadata={name: ratio, "least": least})

    return function


def _gates_severity(root: Path, key: str | None) -> dg.AssetCheckSeverity:
    return ERROR if load_project(root / "params.yaml").targets[str(key)].align.gates.hold else WARN


def kept_fraction(root: Path, key: str | None) -> dg.AssetCheckResult:
    """Filtering leaves enough to train on. (Where it leaves nothing the stage itself fails.)"""
    kept = read_json(root / artifact_dir("filter", key) / "metrics.json")["kept_fraction"]
    return dg.AssetCheckResult(passed=kept >= LEAST_KEPT, severity=WARN, metadata={"kept": kept, "least": LEAST_KEPT})


def mask_agreement(root: Path, key: str | None) -> dg.AssetCheckResult:
    """A judge that never saw a pair finds its mask again: median Dice over the set."""
    agreement = _manifest(root, "filter", key)["agreement"].median()
    return dg.AssetCheckResult(passed=bool(agreement >= LEAST_AGREEMENT), severity=WARN, metadata={
        "median_dice": float(agreement), "least": LEAST_AGREEMENT})


def no_copies(root: Path, key: str | None) -> dg.AssetCheckResult:
    """Not more kept pairs look copied than as many unseen real images would by chance.

    It warns: what is downstream of it is the report, which shows the copies. Near copies of references are kept
    out of training and export where they are found, in filtering.
    """
    import pandas as pd

    folder = root / artifact_dir("privacy", key)
    numbers, table = read_json(folder / "metrics.json"), pd.read_parquet(folder / "copying.parquet")
    flagged = table[table["kept"]].groupby("bank")["flagged"].sum()
    limits = {str(bank): numbers.get(f"copy_chance_limit_{bank}", math.nan) for bank in flagged.index}  # absent where too few real images calibrate
    above = [bank for bank, limit in limits.items() if flagged[bank] > limit]
    metadata = {f"flagged_{bank}": int(count) for bank, count in flagged.items()}
    metadata |= {f"limit_{bank}": limit for bank, limit in limits.items() if math.isfinite(limit)}
    return dg.AssetCheckResult(passed=not above, severity=WARN, metadata=metadata)


def painted_pairs_teach(root: Path, key: str | None) -> dg.AssetCheckResult:
    """With pairs of stage 1 a segmenter does not clearly lose Dice on the source's own test images, where nothing has to be bridged."""
    import pandas as pd

    table = pd.read_parquet(root / artifact_dir("compare", key) / "source_test.parquet")
    rows = table[table["arm"] == "stage1"].drop_duplicates("segmenter")
    return dg.AssetCheckResult(passed=not rows["harmed"].any(), severity=WARN, metadata={
        f"difference_{segmenter}": float(difference) for segmenter, difference in zip(rows["segmenter"], rows["difference"], strict=True)})


def scores_in_range(root: Path, key: str | None) -> dg.AssetCheckResult:
    """Every mean Dice is a number between 0 and 1; there is one unless the target's images have no labels."""
    numbers = read_json(root / artifact_dir("evaluate", key) / "metrics.json")
    dice = {name: value for name, value in numbers.items() if name.rpartition("/")[2].startswith("dice_")}  # segformer/dice_source
    project = load_project(root / "params.yaml")
    labelled = project.domains[project.targets[str(key)].domain].labelled
    passed = (bool(dice) or not labelled) and all(math.isfinite(value) and 0 <= value <= 1 for value in dice.values())
    return dg.AssetCheckResult(passed=passed, metadata=dict(dice))


def _manifest(root: Path, stage: str, key: str | None) -> "pd.DataFrame":
    import pandas as pd

    return pd.read_parquet(root / artifact_dir(stage, key) / "manifest.parquet")


def _areas(root: Path) -> "tuple[np.ndarray, np.ndarray]":
    """Share of the image that each class covers, [N, C] of the source's training masks and of the synthetic masks."""
    import numpy as np

    project = load_project(root / "params.yaml")
    folders = root / artifact_dir("data", project.source), root / artifact_dir("sample_masks", None)
    real, synthetic = (np.load(folder / "masks.npy", mmap_mode="r", allow_pickle=False) for folder in folders)
    train = (_manifest(root, "data", project.source)["split"] == "train").to_numpy()
    return _class_areas(real[train], project.task), _class_areas(synthetic, project.task)


def _class_areas(masks: "np.ndarray", task: Task) -> "np.ndarray":
    """As ``alignflow_core.masks.regions`` reads classes; that module would bring torch into the process."""
    import numpy as np

    numbers = range(1, len(task.classes) + 1)
    return np.stack([((masks >= k) if task.nested else (masks == k)).mean((1, 2)) for k in numbers], axis=1)


def _plain(function: Callable[[Path, str | None], dg.AssetCheckResult], blocking: bool = False) -> Check:
    """A check named and described by its function."""
    return Check(function.__name__, " ".join(str(function.__doc__).split()), function, blocking)


CHECKS: dict[str, tuple[Check, ...]] = {
    "data": (_plain(splits_disjoint, blocking=True), as_many_masks_as_images("data")),
    "references": (_plain(references_disjoint, blocking=True), as_many_masks_as_images("references", labelled=False)),
    "mask_flow": (finite_losses("mask_flow"),),
    "image_flow": (finite_losses("image_flow"),),
    "sample_masks": (_plain(classes_present, blocking=True), _plain(class_areas)),
    "sample_stage1": (as_many_masks_as_images("sample_stage1"),),
    **{stage: (finite_losses(stage),) for stage in STAGE_ARMS},
    "labeller": (finite_losses("labeller"),),
    "align": (
        finite_losses("align"), _plain(gates, blocking=True),
        Check("diversity", "Samples of one mask differ as much as stage 1's do, up to align.gates.diversity.", _ratio("diversity_ratio", "diversity"),
              blocking=True),
        Check("mask_agreement", "Samples follow their mask as well as stage 1's do, up to align.gates.agreement.",
              _ratio("agreement_ratio", "agreement"), blocking=True)),
    "sample_aligned": (as_many_masks_as_images("sample_aligned"),),
    "filter": (_plain(kept_fraction), _plain(mask_agreement)),
    "privacy": (_plain(no_copies),),
    "evaluate": (_plain(scores_in_range, blocking=True),),
    "compare": (_plain(painted_pairs_teach),),
}


def evaluations(root: Path, stage: Stage, key: str | None) -> Iterator[dg.AssetCheckEvaluation]:
    """The results of a stage's checks as Dagster records them of an artifact that was built without it."""
    for check in CHECKS.get(stage.name, ()):
        result = check(root, key)
        yield dg.AssetCheckEvaluation(asset_key=dg.AssetKey(stage.asset), check_name=check.name, passed=result.passed, metadata=result.metadata,
                                      severity=result.severity, blocking=check.blocking, partition=key)


def refused_input(project: Project, root: Path, stage: str, key: str | None) -> str | None:
    """The first blocking check that an input fails, in words.

    Dagster's own blocking ends with the run, and an artifact that failed lies on disk all the same.
    """
    return next(_refusals(project, root, stage, key), None)


def _refusals(project: Project, root: Path, stage: str, key: str | None) -> Iterator[str]:
    for node in dict.fromkeys(project.graph.inputs(STAGES[stage], key).values()):
        if not provenance_file(root, *node).exists():
            continue  # the runner says that it is missing
        for check in CHECKS.get(node[0], ()):
            result = check(root, node[1]) if check.blocking else None
            if result and not result.passed and result.severity == ERROR:
                yield (f"{node_id(*node)} failed its check {check.name} ({_facts(result.metadata)}); {check.description} "
                       "Mend what it is made from and build it again")


def _facts(metadata: Any) -> str:
    return ", ".join(f"{name}: {value.value}" for name, value in metadata.items() if value.value not in (None, "", 0))
