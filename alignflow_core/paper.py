"""The paper's tables and figures (arXiv 2604.02868, section 4) from finished runs: CSV, LaTeX, pictures and one page of all.

No stage: it computes nothing that the runs do not hold, and can be made again at any time.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from alignflow_core import figures, paper_figures
from alignflow_core.alignment_steps import rewarded_steps, rewardless_steps
from alignflow_core.artifact import read_json
from alignflow_core.config import COLOUR, Align, Project, in_order, load_project
from alignflow_core.errors import InputError
from alignflow_core.metrics.comparison import compare
from alignflow_core.metrics.statistics import bca_intervals, bootstrap_means, group_means
from alignflow_core.pairs import read_array, read_pairs
from alignflow_core.runner import provenance_file
from alignflow_core.seeding import derive_seed
from alignflow_core.stages import artifact_dir

OURS = "aligned+filtered"
COUNT = "count"  # variants of other numbers of references are named TARGET-countN
MEAN, MEAN_SEGMENTER = "mean of targets", "mean of segmenters"
STARS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))
GRID_ROWS = 2
COUNTED_GRADIENTS = ("sparse", "last_k")  # those of ``align.k`` network calls


@dataclass(frozen=True)
class Runs:
    """Finished runs that differ in their seed alone.

    Attributes:
        roots: their folders; pictures are those of the first.
        project: configuration of the first.
        targets: targets that are no variants.
        rivals: target -> its variants that align otherwise, by the name they have in the tables.
        counts: target -> its variants with other numbers of references, by that number.
    """

    roots: tuple[Path, ...]
    project: Project
    targets: tuple[str, ...]
    rivals: dict[str, dict[str, str]]
    counts: dict[str, dict[int, str]]

    def read(self, target: str, file: str) -> pd.DataFrame:
        """A table of ``evaluate``, of all runs."""
        frames = [pd.read_parquet(root / artifact_dir("evaluate", target) / file).assign(run=i) for i, root in enumerate(self.roots)]
        return pd.concat(frames, ignore_index=True)


def open_runs(roots: Sequence[Path]) -> Runs:
    """Sort the targets of finished runs.

    Raises:
        InputError: a target is not evaluated yet.
    """
    project = load_project(roots[0] / "params.yaml")
    missing = [f"{root}: target {target} is not evaluated yet; finish the run" for root in roots for target in project.targets
               if not (root / artifact_dir("evaluate", target) / "paired.parquet").exists()]
    if missing:
        raise InputError(*missing)
    rivals: dict[str, dict[str, str]] = {name: {} for name, target in project.targets.items() if target.variant_of is None}
    counts: dict[str, dict[int, str]] = {name: {} for name in rivals}
    for name, target in project.targets.items():
        if target.variant_of is not None:
            word = name.removeprefix(f"{target.variant_of}-")
            if word.removeprefix(COUNT).isdecimal():
                counts[target.variant_of][int(word.removeprefix(COUNT))] = name
            else:
                rivals[target.variant_of][word] = name
    return Runs(tuple(roots), project, tuple(rivals), rivals, counts)


def write(roots: Sequence[Path], out: Path) -> Path:
    """Write every table and figure below ``out``; returns the page that shows them all."""
    runs = open_runs(roots)
    out.mkdir(parents=True, exist_ok=True)
    tables = {"downstream": downstream(runs), "images": image_distances(runs), "paired": likeness(runs), "references": reference_counts(runs),
              "terms": terms(runs), "stage-two": alignment_terms(runs)}
    for name, table in tables.items():
        table.to_csv(out / f"{name}.csv", index=False, float_format="%.6g")
    shown = {name: table for name, table in {"downstream": downstream_page(tables["downstream"]), "images": wide(tables["images"]),
                                             "paired": wide(tables["paired"]), "references": counts_page(tables["references"]),
                                             "terms": tables["terms"], "stage-two": tables["stage-two"]}.items() if len(table)}
    for name, table in shown.items():
        (out / f"{name}.tex").write_text(table.to_latex(index=False, escape=True), encoding="utf-8")
    pictures = {f"t-SNE {target}": figures.feature_map(features(runs, target)) for target in runs.targets}
    if len(tables["references"]):
        pictures["Number of references"] = paper_figures.reference_curve(tables["references"])
    pictures["One mask, every painter"] = grid(runs)
    for title, uri in pictures.items():
        (out / f"{title.lower().replace(' ', '-').replace(',', '')}.svg").write_bytes(paper_figures.svg_bytes(uri))
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.get_template("paper_template.html").render(
        tables={name: table.to_html(index=False, border=0) for name, table in shown.items()}, pictures=pictures, project=runs.project,
        ours=OURS, seeds=len(runs.roots), hours=sum(map(hours, runs.roots)))
    (out / "index.html").write_text(page, encoding="utf-8")
    return out / "index.html"


def methods(runs: Runs, target: str, file: str, column: str, chosen: dict[str, str]) -> pd.DataFrame:
    """A table of a target with those of its rivals under it; ``chosen``: what of a rival is taken -> suffix of its method's name."""
    frames = [runs.read(target, file)]
    for word, variant in runs.rivals[target].items():
        table = runs.read(variant, file)
        frames += [table[table[column] == name].assign(**{column: word + suffix, "target": target}) for name, suffix in chosen.items()]
    return pd.concat(frames, ignore_index=True)


def downstream(runs: Runs) -> pd.DataFrame:
    """One row per target (several: and their mean), segmenter (and their mean), method and metric: mean, interval, difference to ours, p.

    Ours is that of equal augmentation. A mean of segmenters is taken image by image: what they share is the painter.
    """
    values = pd.concat([methods(runs, t, "metrics.parquet", "arm", {OURS: "", OURS + COLOUR: COLOUR}) for t in runs.targets], ignore_index=True)
    values = values[values["metric"].isin(["dice", "iou"])]
    if values["segmenter"].nunique() > 1:
        values = pd.concat([values, values.assign(segmenter=MEAN_SEGMENTER)], ignore_index=True)
    baselines = tuple(arm for arm in (OURS, OURS + COLOUR) if arm in set(values["arm"]))
    own = np.where(values["arm"].str.endswith(COLOUR) & (OURS + COLOUR in baselines), OURS + COLOUR, baselines[0])
    tables = []
    for baseline in baselines:  # each augmentation is a family of tests of its own
        settings: Any = dataclasses.replace(runs.project.evaluate, baselines=(baseline,))
        alike = values[own == baseline]
        tables.append(compare(alike, settings, runs.project.seed))
        if len(runs.targets) > 1:
            tables += [mean_of_targets(part, baseline, settings, runs.project.seed).assign(segmenter=part["segmenter"].iloc[0],
                                                                                           metric=part["metric"].iloc[0])
                       for _, part in alike.groupby(["segmenter", "metric"], sort=False)]
    return pd.concat(tables, ignore_index=True)


def mean_of_targets(values: pd.DataFrame, baseline: str, settings: Any, seed: int) -> pd.DataFrame:
    """Mean over targets of each arm, and its difference to the baseline, with percentile intervals: units are drawn within each target."""
    units = {}
    for target, part in values.groupby("target", sort=False):
        images = part.groupby(["group", "case_id", "arm"], sort=False)["value"].mean().unstack("arm", sort=False)
        units[target] = (group_means(images.to_numpy(), images.index.get_level_values("group").to_numpy()), list(images.columns))
    arms = [arm for arm in in_order(values["arm"]) if all(arm in columns for _, columns in units.values())]
    point, drawn = np.zeros(len(arms)), np.zeros((settings.bootstrap, len(arms)))
    for target, (matrix, columns) in units.items():
        rng = np.random.Generator(np.random.PCG64(derive_seed(seed, "paper", target)))
        chosen = matrix[:, [columns.index(arm) for arm in arms]]
        point += chosen.mean(0) / len(units)
        drawn += bootstrap_means(chosen, settings.bootstrap, rng) / len(units)
    tails = [(1 - settings.level) / 2, (1 + settings.level) / 2]
    base, rows = arms.index(baseline), []
    for i, arm in enumerate(arms):
        low, high = np.quantile(drawn[:, i], tails)
        apart = np.quantile(drawn[:, i] - drawn[:, base], tails) if i != base else (np.nan, np.nan)
        rows.append((MEAN, arm, baseline, sum(len(matrix) for matrix, _ in units.values()), point[i], low, high,
                     point[i] - point[base] if i != base else np.nan, *apart))
    return pd.DataFrame(rows, columns=["target", "arm", "baseline", "n", "mean", "ci_low", "ci_high", "difference", "diff_ci_low", "diff_ci_high"])


def downstream_page(table: pd.DataFrame) -> pd.DataFrame:
    """Methods by row, targets by column: ``.861 [.850, .872] -.021**``; ``mean`` rows say * where the interval of the difference excludes 0."""
    words = table["metric"].map({"dice": "Dice", "iou": "IoU"})
    cells = table.assign(cell=[_cell(row) for row in table.to_dict("records")], column=table["target"] + " " + words)
    page = cells.pivot_table(index=["segmenter", "arm"], columns="column", values="cell", aggfunc="first", sort=False)
    return page[list(dict.fromkeys(cells["column"]))].reset_index().rename(columns={"arm": "method"}).rename_axis(columns=None)


def _cell(row: dict[Any, Any]) -> str:
    text = f"{row['mean']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
    if pd.isna(row["difference"]):
        return text
    if row["target"] == MEAN:
        star = "*" if row["diff_ci_low"] > 0 or row["diff_ci_high"] < 0 else ""
    else:
        star = next((star for limit, star in STARS if row["p_adjusted"] < limit), "")
    return f"{text} {row['difference']:+.3f}{star}"


def image_distances(runs: Runs) -> pd.DataFrame:
    """One row per target, method and measure between sets: value, interval, n, and what real scores against real.

    Of several runs the means: an interval so made is at least as wide as that of the mean value.
    """
    tables = [methods(runs, target, "distances.parquet", "set", {"aligned": ""}) for target in runs.targets]
    keys = ["target", "set", "metric"]
    return pd.concat(tables, ignore_index=True).groupby(keys, sort=False)[["value", "ci_low", "ci_high", "n", "floor"]].mean().reset_index()


def likeness(runs: Runs) -> pd.DataFrame:
    """One row per target, method and image-by-image measure: mean over held-out images with interval (patients or sequences are the units)."""
    rows = []
    for target in runs.targets:
        table = methods(runs, target, "paired.parquet", "set", {"aligned": ""})
        for (name, metric), part in table.groupby(["set", "metric"], sort=False):
            units = part.groupby("group", sort=False)["value"].mean().to_numpy()[:, None]
            rng = np.random.Generator(np.random.PCG64(derive_seed(runs.project.seed, "paper", target, metric)))
            low, high = bca_intervals(units, runs.project.evaluate.level, runs.project.evaluate.bootstrap, rng)
            rows.append((target, name, metric, units.mean(), low[0], high[0], part["case_id"].nunique()))
    return pd.DataFrame(rows, columns=["target", "set", "metric", "value", "ci_low", "ci_high", "n"])


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """Methods by row, n and the measures by column, with intervals; below a target's methods its floors, where a table has them."""
    if "floor" in table:
        table = pd.concat([each for _, part in table.groupby("target", sort=False) for each in (part, _floors(part))], ignore_index=True)
    cells = table.assign(cell=[f"{r['value']:.3g} [{r['ci_low']:.3g}, {r['ci_high']:.3g}]" if pd.notna(r["ci_low"]) else f"{r['value']:.3g}"
                               for r in table.to_dict("records")])
    page = cells.pivot_table(index=["target", "set"], columns="metric", values="cell", aggfunc="first", sort=False)
    n = table.groupby(["target", "set"], sort=False)["n"].first().loc[page.index]
    page.insert(0, "n", ["–" if pd.isna(each) else f"{each:.0f}" for each in n])
    return page.reset_index().rename(columns={"set": "method"}).rename_axis(columns=None)


def _floors(table: pd.DataFrame) -> pd.DataFrame:
    """What halves of a target's real test images score against each other, as a method of its own."""
    found = table.groupby(["target", "metric"], sort=False)["floor"].first().rename("value").reset_index()
    return found.assign(set="real against real", ci_low=np.nan, ci_high=np.nan, n=np.nan)


def reference_counts(runs: Runs) -> pd.DataFrame:
    """Dice of ours against the number of references: one row per target and number, with interval; empty without such variants."""
    frames = []
    for target, counts in runs.counts.items():
        # a set of one's own of the same number gives way to the one drawn as the others are
        for count, variant in ({n_references(runs, target): target} | counts if counts else {}).items():
            values = runs.read(variant, "metrics.parquet")
            values = values[(values["metric"] == "dice") & (values["segmenter"] == values["segmenter"].iloc[0])]
            arms = [arm for arm in (*paper_figures.WITHOUT_REFERENCES, OURS, OURS + COLOUR) if arm in set(values["arm"])]
            settings: Any = dataclasses.replace(runs.project.evaluate, baselines=("stage1",))
            table = compare(values[values["arm"].isin(arms)], settings, runs.project.seed)
            frames.append(table.assign(target=target, n_references=count)[["target", "n_references", "arm", "mean", "ci_low", "ci_high",
                                                                           "difference", "diff_ci_low", "diff_ci_high"]])
    return pd.concat(frames, ignore_index=True).sort_values(["target", "arm", "n_references"]) if frames else pd.DataFrame()


def counts_page(table: pd.DataFrame) -> pd.DataFrame:
    """Arms by row with their Dice and, where they are not stage 1 itself, its difference to that."""
    if table.empty:
        return table
    cells = [f"{r['difference']:+.3f} [{r['diff_ci_low']:+.3f}, {r['diff_ci_high']:+.3f}]" if pd.notna(r["difference"]) else "–"
             for r in table.to_dict("records")]
    means = [f"{r['mean']:.3f} [{r['ci_low']:.3f}, {r['ci_high']:.3f}]" for r in table.to_dict("records")]
    return table[["target", "arm", "n_references"]].assign(Dice=means, **{"minus stage1": cells})


def n_references(runs: Runs, target: str) -> int:
    """How many references a target really has."""
    return int(read_json(runs.roots[0] / artifact_dir("references", target) / "metrics.json")["n_references"])


def features(runs: Runs, target: str) -> pd.DataFrame:
    """Descriptors of every set of a target, its rivals' among them."""
    table = methods(runs, target, "features.parquet", "set", {"aligned": ""})
    return table[table["run"] == 0].drop(columns=["run", "target"], errors="ignore")


def grid(runs: Runs) -> str:
    """Rows: held-out masks of each target; columns: mask, real image, every painter."""
    root, rows = runs.roots[0], []
    for target in runs.targets:
        folder = root / artifact_dir("sample_paired", target)
        test = read_pairs(root / artifact_dir("data", runs.project.targets[target].domain), "test")
        cases = pd.read_parquet(folder / "manifest.parquet")["case_id"].tolist()
        for number in np.linspace(0, len(cases) - 1, min(GRID_ROWS, len(cases))).round().astype(int):
            row = test.ids.index(cases[number])
            painted = {file.stem: read_array(file)[number] for file in sorted(folder.glob("*.npy")) if file.stem not in ("stage1", "aligned")}
            rivals = {word: read_array(root / artifact_dir("sample_paired", variant) / "aligned.npy")[number]
                      for word, variant in runs.rivals[target].items()}
            own = {name: read_array(folder / f"{name}.npy")[number] for name in ("stage1", "aligned")}
            rows.append((target, {"mask": paper_figures.coloured(test.labels[row]), "real": test.images[row], **painted, **rivals, **own}))
    return paper_figures.picture_grid(rows)


def terms(runs: Runs) -> pd.DataFrame:
    """On what terms each painter was trained and sampled: parameters, images seen, network calls, hours."""
    root = runs.roots[0]
    ours = read_json(root / artifact_dir("image_flow", None) / "metrics.json")
    rows = [("stage1", "flow", "concat", ours["parameters"], ours["parameters"], ours["parameters"], ours["n_images"],
             read_json(root / artifact_dir("sample_stage1", None) / "metrics.json")["nfe"], _hours(root, "image_flow", None))]
    for name, comparator in runs.project.comparators.items():
        numbers = read_json(root / artifact_dir("comparator", name) / "metrics.json")
        rows.append((name, comparator.process, comparator.conditioner, numbers["trunk_parameters"], numbers["parameters"],
                     numbers["trained_parameters"], numbers["n_images"],
                     read_json(root / artifact_dir("sample_comparator", name) / "metrics.json")["nfe"],
                     _hours(root, "comparator", name) + (_hours(root, "comparator_base", comparator.base) if comparator.base else 0)))
    table = pd.DataFrame(rows, columns=["painter", "process", "conditioner", "parameters of the trunk", "parameters", "trained after the base",
                                        "images seen, base included", "network calls an image", "hours, base included"])
    steps = runs.project.segment.training.steps
    return table.assign(**{"steps of each segmenter": steps}).astype(dict.fromkeys(table.columns[3:8], "int64"))


def alignment_terms(runs: Runs) -> pd.DataFrame:
    """What stage 2 of each target and of its rivals was: reward, gradient, data, steps, hours."""
    root, rows = runs.roots[0], []
    for target in runs.targets:
        for method, name in {OURS: target, **runs.rivals[target]}.items():
            settings = runs.project.targets[name].align
            steps = int(read_json(root / artifact_dir("align", name) / "metrics.json")["steps"])
            rows.append((target, method, runs.project.targets[name].painter or "stage1", settings.reward if settings.rho else "none",
                         _gradient(settings), settings.denoise,
                         "all" if settings.adapter == "all" else f"{settings.adapter} of rank {settings.lora_rank}", settings.regions,
                         settings.rounds if settings.regions == "pseudo" else 1, rewardless_steps(settings), rewarded_steps(settings), steps,
                         _hours(root, "align", name)))
    return pd.DataFrame(rows, columns=["target", "method", "painter", "reward", "gradient", "denoising loss on", "weights", "regions", "rounds",
                                       "steps before the reward", "steps after that", "steps done", "hours"])


def _gradient(settings: Align) -> str:
    """How the reward's gradient reaches the weights, in words."""
    if not settings.rho:
        return "none"
    return settings.gradient + (f", {settings.k} of {settings.n_steps}" if settings.gradient in COUNTED_GRADIENTS else f", {settings.n_steps} steps")


def _hours(root: Path, stage: str, key: str | None) -> float:
    return round(float(read_json(provenance_file(root, stage, key))["seconds"]) / 3600, 3)


def hours(root: Path) -> float:
    """Of all stages of a run, one after the other."""
    project = load_project(root / "params.yaml")
    return sum(_hours(root, stage.name, key) for stage, key in project.graph.nodes() if provenance_file(root, stage.name, key).exists())
