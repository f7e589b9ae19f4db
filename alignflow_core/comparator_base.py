"""Unconditional painters of one generative process, which comparators freeze (or all but its decoder) and add to; a process has one."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignflow_core.config import ImageFlow
from alignflow_core.networks import velocity_unet
from alignflow_core.painter_fit import fit
from alignflow_core.seeding import derive_seed

if TYPE_CHECKING:  # what the key names: so that a base depends on these files (``stages.source_files`` follows imports)
    from alignflow_core.painters import denoise, diffusion, flow  # noqa: F401


def run(config: Any, inputs: dict[str, Path], out_dir: Path, context: Any) -> dict[str, float]:
    """Train the unconditional painter of the process ``context.key`` for ``comparator_base.share`` of stage 1's steps."""
    settings: ImageFlow = config.image_flow
    steps = round(settings.training.steps * config.comparator_base.share)
    network = velocity_unet.build(3, 0, settings.network, derive_seed(config.seed, "comparator_base", "weights"))
    numbers, weights = fit(network, str(context.key), "denoise", steps, config, inputs, context)
    velocity_unet.save(out_dir, weights, 3, 0, settings.network, domain=velocity_unet.SOURCE, process=context.key)
    return numbers
