"""``alignflow paper``: every comparator, rival of stage 2 and segmenter on equal terms, and the paper's tables and figures of them.

The comparators are stages of the same graph, the rivals are variants of each target: what they share is built once, and the same command
continues where it stopped.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignflow_core.config import ARMS, Project, build_project, read_params
from alignflow_core.errors import InputError
from pipelines import local
from pipelines.compose import merged, recompose, rewrite_params, write_params

# Three draws of every arm as it is, and every arm: a rival with colour augmentation has ours with it beside it.
SETTINGS = ("comparators=paper", "segment.architectures=[unet,segformer,dpt]", "segment.seeds=1", f"segment.arms=[{','.join(ARMS)}]")
RIVAL_ARMS = ["aligned+filtered", "aligned+filtered+colour"]
PLAIN = {"regions": "none", "recolour": False, "rounds": 1}  # without what is ours
RIVALS: dict[str, dict[str, Any]] = {
    # AlignProp (arXiv 2310.03739): the reward alone, through steps truncated at random, into low-rank adapters.
    "alignprop": {"align": PLAIN | {"gradient": "random_k", "adapter": "lora", "lora_rank": 8, "denoise": "none"}},
    # ReFL (arXiv 2304.05977): the reward of a one-step estimate beside the pre-training loss.
    "refl": {"align": PLAIN | {"gradient": "one_step"}},
    # arXiv 2604.02868 read literally: softmax-mean SKL, the gradient of the last step.
    "skl-last-step": {"align": PLAIN | {"reward": "skl", "gradient": "last_k", "k": 1, "rho": 3.0}},
    # What a few images without masks give a denoising loss.
    "finetuned": {"align": PLAIN | {"rho": 0.0, "denoise": "references"}},
    # Our stage 2 on another painter.
    "controlnet-flow-aligned": {"painter": "controlnet-flow"},
}
COUNTS = (1, 5, 20)


def build(folders: local.Folders | None, task: str, out: Path, overrides: Sequence[str], seeds: int = 1, counts: Sequence[int] = COUNTS,
          quiet: bool = False, jobs: int | None = None) -> Path:
    """Build all runs and write ``out/paper``; returns its page.

    Args:
        folders: raw folders, ``None`` for the built-in data (task ``phantom``).
        seeds: runs with generator seeds 0, 1, …, each in ``out/seed<N>``.
        counts: numbers of references of the curve, for the first target.
        jobs: as for ``local.run_all``.

    Raises:
        InputError: bad folders or settings; nothing is built then.
    """
    from alignflow_core.paper import write

    if seeds < 1:
        raise InputError(f"--seeds {seeds}: give at least 1")
    roots = [out / f"seed{seed}" for seed in range(seeds)]
    for seed, root in enumerate(roots):
        prepare(folders, task, root, [*overrides, f"seed={seed}"], counts)
    for root in roots:
        local.run_all(root, quiet, jobs)
    return write(roots, out / "paper")


def prepare(folders: local.Folders | None, task: str, root: Path, overrides: Sequence[str], counts: Sequence[int]) -> None:
    """Write ``params.yaml`` of one run with its comparators and rivals, and the built-in data where they are asked for.

    Raises:
        InputError: bad folders or settings, arms that the tables need are left out, or a target has no labels; nothing is written then.
    """
    def lacking(project: Project) -> list[str]:
        needed = ["aligned+filtered", *(["stage1"] if counts else [])]
        missing = [arm for arm in needed if arm not in project.segment.arms]
        problems = [f"segment.arms: the paper's tables compare with {' and '.join(missing)}; add what is missing"] if missing else []
        return problems + [f"domains.{name}.labelled: the paper's tables measure on the target's masks; build it by 'alignflow run', or leave it out"
                           for name in dict.fromkeys(target.domain for target in project.targets.values()) if not project.domains[name].labelled]

    settings, file = [*SETTINGS, *overrides], root / "params.yaml"
    if folders is not None:
        local.prepare_run(folders, task, root, settings, lacking)
    elif task != "phantom":
        raise InputError(f"--task {task}: needs data; give --source DIR and --target NAME=DIR, or --task phantom for the built-in data")
    else:
        profile = [] if any(override.startswith("profile=") for override in overrides) else ["profile=cpu"]
        composed = ["task=phantom", *profile, *settings]
        if problems := lacking(build_project(recompose(file, composed))):
            raise InputError(*problems)
        write_params(file, composed)
        local.write_builtin_data(root)
    params = read_params(file)
    rewrite_params(file, params | {"targets": with_rivals(params["targets"], params["comparators"], counts)}, str(file))


def is_count(variant: str, base: str) -> bool:
    """Whether a variant is one of the curve over the number of references."""
    return variant.startswith(f"{base}-count") and variant.removeprefix(f"{base}-count").isdecimal()


def with_rivals(targets: dict[str, Any], comparators: dict[str, Any], counts: Sequence[int]) -> dict[str, Any]:
    """Targets and their variants: every rival whose painter there is, and for the first target other numbers of references."""
    found = dict(targets)
    bases = {name: target for name, target in targets.items() if target.get("variant_of") is None}
    for number, (name, target) in enumerate(bases.items()):
        changes = {word: change for word, change in RIVALS.items() if change.get("painter") is None or change["painter"] in comparators}
        if not number:
            changes |= {f"count{count}": {"references": {"count": count, "dir": None, "file": None}} for count in counts
                        if count != target["references"]["count"] or target["references"].get("dir") or target["references"].get("file")}
            for word in [word for word in found if is_count(word, name) and word.removeprefix(f"{name}-") not in changes]:
                del found[word]  # of an earlier call with other counts
        found |= {f"{name}-{word}": merged(merged(target, {"arms": RIVAL_ARMS, "variant_of": name}), change)
                  for word, change in changes.items()}
    return found
