"""The registry: every stage of the method, what it reads and where it writes.

Standard library only, so that orchestrators can read the graph without importing torch.
``dvc.yaml`` is written from this table and the Dagster assets are made from it.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from alignflow_core.painters.registry import CONDITIONERS, OBJECTIVES, PROCESSES
from alignflow_core.reward.registry import DISTANCES, ENCODERS

PACKAGE_DIR = Path(__file__).parent

# Modules that carry values or run stages but decide nothing about their content: the values
# reach a stage's fingerprint through its params, so a change here makes no artifact stale.
PLUMBING = frozenset({"__init__", "__main__", "registry", "reward.registry", "painters.registry", "config", "validation", "stages", "runner",
                      "artifact", "checkpoint", "state", "errors", "devices"})


@dataclass(frozen=True)
class Stage:
    """One unit of work: a function, the artifacts it reads, the one folder it writes.

    Attributes:
        name: stage, DVC stage, artifact folder and (mostly) file word.
        asset: the noun shown in Dagster.
        scope: ``"project"`` (built once), ``"domain"``, ``"base"`` (a process that comparators add to a trained painter of), ``"comparator"`` or
            ``"target"`` (built per key).
        function: ``module:function`` inside ``alignflow_core``; called as
            ``function(config, inputs, out_dir, context) -> dict[str, float]``.
        inputs: stage names; the suffix says which of its folders is meant:
            ``data:source`` the source domain, ``data:target`` the target's own domain,
            ``comparator_base:own`` that of the comparator, if it has one; ``image_flow:painter`` what the target aligns: stage 1 or a
            comparator; ``evaluate:all`` one per key (fan-in). No suffix: the same key, or the project's only one.
        params: dotted keys of params.yaml; ``{key}`` is the stage's own key.
        raw: dotted keys of params.yaml that name a raw folder read by the stage, or where the last word is ``file`` a raw file (may be
            null there; at most one of a stage's is not).
        chosen: dotted key of params.yaml -> the registry that turns its value into ``module:object``; the stage depends on the
            file of that module, not on those of the other choices, and on whatever any of them imports.
        gpu: wants the accelerator when there is one.
        group: heading in the Dagster asset graph.
        description: one sentence for people.
    """

    name: str
    asset: str
    scope: str
    function: str
    inputs: tuple[str, ...]
    params: tuple[str, ...]
    raw: tuple[str, ...]
    gpu: bool
    group: str
    description: str
    chosen: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("data", "domain_splits", "domain", "data:run_data", (), ("seed", "task", "data", "domains.{key}", "source"),
              ("domains.{key}.dir",), False, "1_data",
              "Raw folder of one domain, checked, resized, split by patient and hashed."),
        Stage("references", "reference_set", "target", "data:run_references", ("data:source", "data:target"),
              ("task", "data", "targets.{key}.domain", "targets.{key}.references"),
              ("targets.{key}.references.dir", "targets.{key}.references.file"), False, "1_data",
              "The few images of the target that the method may see, disjoint from its test set, as is the source; or what moments say of them."),
        Stage("mask_flow", "mask_flow_checkpoint", "project", "mask_flow:run", ("data:source",),
              ("seed", "machine", "task", "mask_flow"), (), True, "2_stage_one",
              "Flow over signed distance maps that draws new masks."),
        Stage("image_flow", "image_flow_checkpoint", "project", "image_flow:run", ("data:source",),
              ("seed", "machine", "task", "image_flow"), (), True, "2_stage_one",
              "Stage 1: flow that paints a source image from a mask."),
        Stage("sample_masks", "synthetic_masks", "project", "sample:run_masks", ("mask_flow", "data:source"),
              ("seed", "machine", "task", "sample"), (), True, "4_synthesis",
              "Fresh plausible masks, shared by all targets."),
        Stage("sample_stage1", "stage1_images", "project", "sample:run_stage1", ("image_flow", "sample_masks"),
              ("seed", "machine", "task", "sample"), (), True, "4_synthesis",
              "Source-like images painted by stage 1 from the synthetic masks."),
        Stage("segment_source", "source_segmenters", "project", "segment:run_source", ("data:source",),
              ("seed", "machine", "task", "segment"), (), True, "5_downstream",
              "Segmenters trained on real source pairs alone, without and with strong colour augmentation."),
        Stage("segment_stage1", "stage1_segmenters", "project", "segment:run_stage1", ("data:source", "sample_stage1"),
              ("seed", "machine", "task", "segment"), (), True, "5_downstream",
              "Segmenters trained on source pairs and stage 1's, without and with strong colour augmentation."),
        Stage("comparator_base", "comparator_base_checkpoint", "base", "comparator_base:run", ("data:source",),
              ("seed", "machine", "task", "image_flow", "comparator_base"), (), True, "2_stage_one",
              "Unconditional painter of one generative process, which comparators freeze (Siamese-Diffusion but for its decoder) and add to."),
        Stage("comparator", "comparator_checkpoint", "comparator", "comparator:run", ("data:source", "comparator_base:own"),
              ("seed", "machine", "task", "image_flow", "comparators.{key}", "comparator_base"), (), True, "2_stage_one",
              "A painter to compare with, trained on the source on equal terms.",
              {"comparators.{key}.process": PROCESSES, "comparators.{key}.conditioner": CONDITIONERS, "comparators.{key}.objective": OBJECTIVES}),
        Stage("sample_comparator", "comparator_images", "comparator", "sample:run_comparator", ("comparator", "sample_masks"),
              ("seed", "machine", "task", "sample", "comparators.{key}"), (), True, "4_synthesis",
              "Source-like images painted by a comparator from the synthetic masks.",
              {"comparators.{key}.process": PROCESSES, "comparators.{key}.conditioner": CONDITIONERS}),
        Stage("segment_comparator", "comparator_segmenters", "comparator", "segment:run_comparator", ("data:source", "sample_comparator"),
              ("seed", "machine", "task", "segment"), (), True, "5_downstream",
              "Segmenters trained on source pairs and a comparator's."),
        Stage("labeller", "source_labeller", "project", "labeller:run", ("data:source",),
              ("seed", "machine", "task", "labeller"), (), True, "3_stage_two",
              "Segmenter of the source under strong colour augmentation that finds the references' regions."),
        Stage("align", "aligned_checkpoint", "target", "align:run", ("image_flow:painter", "labeller", "data:source", "references"),
              ("seed", "machine", "task", "image_flow", "targets.{key}.align", "sample.guidance_scale"), (), True, "3_stage_two",
              "Stage 2: the painter tuned by a differentiable reward towards the reference set.",
              {"targets.{key}.align.reward": DISTANCES, "targets.{key}.align.encoder": ENCODERS}),
        Stage("sample_aligned", "synthetic_images", "target", "sample:run_aligned", ("align", "image_flow:painter", "sample_masks", "data:source"),
              ("seed", "machine", "task", "sample"), (), True, "4_synthesis",
              "Target-like images painted by stage 2 from the synthetic masks."),
        Stage("sample_paired", "paired_images", "target", "sample:run_paired",
              # the images of comparators for what draws them, which their checkpoints do not tell
              ("data:target", "image_flow", "comparator:all", "sample_comparator:all", "align"),
              ("seed", "machine", "task", "sample", "targets.{key}.variant_of"), (), True, "4_synthesis",
              "Held-out masks of the target painted by every painter, to be compared with their real images; never trained on."),
        Stage("filter", "filtered_pairs", "target", "filtering:run",
              ("sample_aligned", "data:source", "references"),
              ("seed", "machine", "task", "filter", "segment.network", "segment.training"), (), True, "4_synthesis",
              "Which synthetic pairs are plausible, novel and true to their mask."),
        Stage("privacy", "privacy_audit", "target", "privacy:run",
              ("data:source", "data:target", "references", "sample_aligned", "filter", "image_flow:painter", "align"),
              ("seed", "machine", "task", "evaluate.copy_quantile"), (), True, "6_results",
              "Whether aligned images are copies of what the painter was given, and whether one can tell what that was."),
        Stage("segment_baselines", "baseline_segmenters", "target", "segment:run_baselines", ("data:source", "data:target", "references"),
              ("seed", "machine", "task", "segment", "targets.{key}.arms", "targets.{key}.synthetic_share"), (), True, "5_downstream",
              "Segmenters that use the target without a painter: source pairs recoloured after the references, their labels, the oracle."),
        Stage("segment_aligned", "aligned_segmenters", "target", "segment:run_aligned", ("data:source", "sample_aligned"),
              ("seed", "machine", "task", "segment", "targets.{key}.arms", "targets.{key}.synthetic_share"), (), True, "5_downstream",
              "Segmenters trained on source pairs and all aligned ones."),
        Stage("segment_filtered", "filtered_segmenters", "target", "segment:run_filtered", ("data:source", "sample_aligned", "filter"),
              ("seed", "machine", "task", "segment", "targets.{key}.arms", "targets.{key}.synthetic_share"), (), True, "5_downstream",
              "Segmenters trained on source pairs and the aligned ones that were kept, without and with strong colour augmentation."),
        Stage("evaluate", "metrics", "target", "evaluate:run",
              ("data:source", "data:target", "references", "sample_stage1", "sample_aligned", "filter",
               "segment_source", "segment_stage1", "segment_baselines", "segment_aligned", "segment_filtered",
               "sample_comparator:all", "segment_comparator:all", "sample_paired"),
              ("seed", "machine", "task", "evaluate.lpips_weights", "targets.{key}.variant_of"), (), True, "6_results",
              "Every arm on the target's held-out test images; image distances."),
        Stage("compare", "comparison", "project", "compare:run", ("evaluate:all",), ("seed", "evaluate"), (), False,
              "6_results", "Paired intervals and tests over all targets and arms."),
        Stage("report", "report", "project", "report:run",
              ("compare", "evaluate:all", "privacy:all", "data:source", "references:all", "sample_masks", "sample_stage1",
               "sample_aligned:all", "align:all", "filter:all", "image_flow", "mask_flow"),
              ("task", "report", "targets"), (), False, "6_results", "One self-contained page of tables and figures."),
    )
}


@dataclass(frozen=True)
class Graph:
    """The registry laid over one project: its domains, source, targets and comparators.

    Args:
        domains: domain names, the source among them.
        source: name of the source domain.
        targets: target name -> name of its domain.
        comparators: comparator name -> process of the base it adds to, if any.
        painters: target name -> comparator whose painter it aligns, ``None`` or absent for stage 1.
    """

    domains: tuple[str, ...]
    source: str
    targets: dict[str, str]
    comparators: Mapping[str, str | None] = field(default_factory=dict)
    painters: Mapping[str, str | None] = field(default_factory=dict)

    def keys(self, stage: Stage) -> tuple[str | None, ...]:
        """Keys a stage is built for; ``(None,)`` for a project-wide stage, ``()`` for one that this project does without."""
        return (None,) if stage.scope == "project" else self.names(stage.scope)

    def stages(self) -> list[Stage]:
        """The stages that this project has keys for, in building order."""
        return [stage for stage in STAGES.values() if self.keys(stage)]

    def names(self, scope: str) -> tuple[str, ...]:
        """Names of all domains, bases, comparators or targets."""
        bases = dict.fromkeys(base for base in self.comparators.values() if base is not None)
        return {"domain": self.domains, "base": tuple(bases), "comparator": tuple(self.comparators), "target": tuple(self.targets)}[scope]

    def inputs(self, stage: Stage, key: str | None) -> dict[str, tuple[str, str | None]]:
        """Input name as the stage function sees it -> (stage name, key).

        Names: ``"data:source"``, ``"align"``; fan-ins are spelled ``"evaluate:<key>"``. What comes from a comparator as from stage 1 has one name.
        """
        found: dict[str, tuple[str, str | None]] = {}
        for spec in stage.inputs:
            name, _, which = spec.partition(":")
            if which == "all":
                found |= {f"{name}:{each}": (name, each) for each in self.keys(STAGES[name])}
            elif which == "source":
                found[spec] = (name, self.source)
            elif which == "target":
                found[spec] = (name, self.targets[str(key)])
            elif which == "painter":
                painter = self.painters.get(str(key))
                found[name] = (name, None) if painter is None else ("comparator", painter)
            elif which == "own":
                found |= {} if self.comparators[str(key)] is None else {name: (name, self.comparators[str(key)])}
            else:
                found[spec] = (name, key if STAGES[name].scope == stage.scope else None)
        return found

    def nodes(self) -> Iterator[tuple[Stage, str | None]]:
        """Every (stage, key), each after all of its inputs."""
        for stage in STAGES.values():
            for key in self.keys(stage):
                yield stage, key


def node_id(stage: str, key: str | None) -> str:
    """``"align@zeiss"`` as DVC and the logs spell it, or ``"image_flow"``."""
    return stage if key is None else f"{stage}@{key}"


def artifact_dir(stage: str, key: str | None) -> Path:
    """Folder of an artifact relative to the project root: ``artifacts/align/zeiss``."""
    return Path("artifacts", stage, *([] if key is None else [key]))


@cache
def source_files(stage_name: str) -> tuple[str, ...]:
    """Files of the package whose change can change the stage's result, relative to the package.

    Follows imports from the stage's own module and from all that ``chosen`` could name, leaving out :data:`PLUMBING`. The file that is
    chosen comes on top.
    """
    stage = STAGES[stage_name]
    choices = {entry.partition(":")[0] for registry in stage.chosen.values() for entry in registry.values()}
    return tuple(sorted(_reached(stage.function.partition(":")[0]).union(*(_reached(module) - {_file(module)} for module in choices))))


def _file(module: str) -> str:
    """``reward.statconv`` -> ``reward/statconv.py``, or of a package its ``__init__.py``."""
    path = module.replace(".", "/")
    return f"{path}.py" if (PACKAGE_DIR / f"{path}.py").exists() else f"{path}/__init__.py"


@cache
def _reached(first: str) -> frozenset[str]:
    """Files that a module is made of: its own and those it imports, relative to the package."""
    found: set[str] = set()

    def visit(module: str) -> None:
        name = _file(module)
        path = PACKAGE_DIR / name
        if name in found or module in PLUMBING or not path.exists():
            return
        found.add(name)
        template = path.with_name(f"{path.stem}_template.html")  # a page's words and layout count as its code
        if template.exists():
            found.add(template.relative_to(PACKAGE_DIR).as_posix())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                imported = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for full in imported:
                inner = full.removeprefix("alignflow_core.")
                if inner != full and ((PACKAGE_DIR / (inner.replace(".", "/") + ".py")).exists()
                                      or (PACKAGE_DIR / inner.replace(".", "/")).is_dir()):
                    visit(inner)

    visit(first)
    return frozenset(found)
