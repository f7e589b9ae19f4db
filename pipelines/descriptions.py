"""What Dagster says of each asset beyond the registry's one sentence: its place in the paper, what is in it, kinds."""

from alignflow_core.stages import Stage

PAPER = "[arXiv 2604.02868](https://arxiv.org/abs/2604.02868)"

# stage -> (where in the paper, what else is worth knowing); a stage without an entry is described by the registry alone
ABOUT: dict[str, tuple[str, str]] = {
    "data": ("Settings: source and target domains.",
             "Holds `images.npy`, `masks.npy` and a manifest with the split, the patient group and the SHA-256 of every file."),
    "references": ("Settings: the few reference images of a target.",
                   "Most of them are aligned to; the last ones only steer when alignment stops. Labels are used where an arm says so."),
    "mask_flow": ("Mask synthesis: a second flow matching model.",
                  "One channel a class; nested classes are nested channels. Its weights are the average over training."),
    "image_flow": ("Stage 1: denoising loss on the source alone.",
                   "The mask is given as signed distance and regions beside the noise. All targets start from these weights."),
    "labeller": ("Not in the paper.",
                 "Stage 2 compares images region by region; this segmenter finds the regions of unlabelled references, and is retrained on "
                 "aligned pairs between rounds."),
    "align": ("Stage 2: alignment loss and denoising loss together.",
              "`gates.parquet` is what was seen at every look at a fixed set of samples, `verdict.json` why each round ended. "
              "The weights are those of the best reward on held-out references that kept every gate."),
    "sample_masks": ("Mask synthesis and its post-processing.",
                     "Real training masks, drawn ones or both in turn; implausible ones and near copies of training masks are refused."),
    "sample_stage1": ("Synthesis before alignment.", "Image *i* comes from the same mask and noise as image *i* after alignment."),
    "sample_aligned": ("Synthesis after alignment.", "Image *i* comes from the same mask and noise as image *i* of stage 1; its seed is its own. "
                       "Each is painted at one of `sample.strengths`, those of real masks from one of `sample.starts` on, which the manifest names."),
    "sample_paired": ("Image metrics, and pictures of one mask by every painter.",
                      "Row *i* of every array is the painter's image of the same held-out mask. Nothing is trained on these."),
    "comparator_base": ("Comparators.", "Trained without masks; ControlNets and T2I-Adapter add to it frozen, Siamese-Diffusion trains its decoder."),
    "comparator": ("Comparators.", "Same trunk, batch and number of images seen as stage 1; the checkpoint holds the base too."),
    "sample_comparator": ("Comparators.", "Image *i* comes from the same mask and noise as image *i* of stage 1, by the comparator's own sampler."),
    "segment_comparator": ("Comparators.", "Trained as the arm `stage1` is, on the comparator's pairs."),
    "filter": ("Not in the paper, which keeps all pairs.",
               "Every pair with its scores, and if it is refused the first reason. What is exported are the pairs kept here."),
    "privacy": ("Not in the paper.", "Every aligned image's nearest real image, with a threshold read off real images; the loss of images that were "
                                     "and were not learned from. Images are named by their case ids."),
    "segment_source": ("Downstream use: segmenters without a target.", "One network per arm and seed, all with the same number of optimiser steps."),
    "segment_stage1": ("Downstream use: segmenters with source-like pairs.", "One network per arm and seed, chosen on *source* validation."),
    "segment_baselines": ("Downstream use: what alignment has to beat.",
                          "One network per arm and seed, chosen on *source* validation; only the oracle may look at target labels."),
    "segment_aligned": ("Downstream use: segmenters with aligned pairs.", "One network per seed, chosen on *source* validation."),
    "segment_filtered": ("Downstream use: segmenters with the pairs that were kept.", "One network per arm and seed, chosen on *source* validation."),
    "evaluate": ("Tables of Dice and IoU, distances between image sets.",
                 "Every value per image, class, arm and seed; distances beside that between two halves of the real target."),
    "compare": ("Not in the paper.", "Bootstrap intervals over patients, paired differences, signed-rank tests adjusted over all arms and targets."),
    "report": ("Figures.", "`index.html` needs nothing besides itself. It shows references, so it stays on this machine."),
}
NETWORKS, ARRAYS, TABLES, PAGE = {"pytorch", "dvc", "mlflow"}, {"numpy", "parquet", "dvc"}, {"pandas", "parquet", "mlflow"}, {"html", "dvc"}
KINDS = {"data": ARRAYS, "references": ARRAYS, "sample_masks": ARRAYS, "sample_stage1": ARRAYS, "sample_aligned": ARRAYS,
         "sample_comparator": ARRAYS, "sample_paired": ARRAYS, "filter": TABLES,
         "privacy": TABLES, "evaluate": TABLES, "compare": TABLES, "report": PAGE}  # Dagster shows at most three; the other stages train networks


def description(stage: Stage) -> str:
    """Markdown: what the artifact is, where in the paper, what computes it."""
    place, more = ABOUT.get(stage.name, ("", ""))
    file = f"alignflow_core/{stage.function.partition(':')[0]}.py"
    paper = f"**{place}** ({PAPER})" if place else ""
    return "\n\n".join(part for part in (f"{stage.description} {more}".strip(), paper, f"Computed by `{file}`, stage `{stage.name}`.") if part)


def kinds(stage: Stage) -> set[str]:
    """What the artifact consists of."""
    return KINDS.get(stage.name, NETWORKS)
