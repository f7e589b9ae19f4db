"""Stage 2: raise a differentiable reward for one target, the denoising loss kept in (arXiv 2604.02868, stage 2).

Each step minimises ``L_fm(source pairs) - lambda * r(samples, references)``. lambda balances the two gradients'
norms before the first step, ``|lambda g_r| = rho |g_fm|``, and stays: distances differ by orders of magnitude.
Our choice: three quarters of L_fm are taken in the target's domain, on source pairs in the references' colours
(``reward/recolour.py``), and the first steps are of L_fm alone: they cost a fifth, and the reward starts near its goal.

Steps are shared by rounds. A round labels the references with the present segmenter, describes them region by region, and
tunes the painter; the segmenter is then retrained on pairs of the tuned painter, which look more like the target's.

A reference set may be a file of moments alone (``reference_moments.py``): then there is one round, no recolouring, and nobody can say whether
samples copy references.

With ``privacy.epsilon`` the references reach the weights through noised gradients alone (``alignment_private.py``).
"""

from pathlib import Path
from typing import Any

from alignflow_core.alignment import Alignment
from alignflow_core.alignment_private import PrivateAlignment


def run(config: Any, inputs: dict[str, Path], out_dir: Path, context: Any) -> dict[str, float]:
    """Tune the stage-1 painter towards the reference set; write the weights of the best held-out reward that kept every gate.

    Writes ``weights.safetensors``, ``config.json``, ``gates.parquet`` (one row per look at the fixed probe set) and
    ``verdict.json`` (why each round ended and which weights were kept).

    Raises:
        InputError: ``align.regions: labels`` without labels, an encoder without its weights, or moments of another kit.
    """
    kind = Alignment if config.align.privacy.epsilon is None else PrivateAlignment
    return kind(config, inputs, context).run(out_dir)
