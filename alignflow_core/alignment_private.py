"""Stage 2 with a privacy budget: the references reach the weights through noised gradients alone (``reward/private.py``, docs/privacy.md).

Nothing else may depend on them: the gates do not look at them, no reward is told, and the weights kept are the last that kept
the gates, not the best.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from alignflow_core.alignment import Alignment
from alignflow_core.alignment_steps import rewarded_steps
from alignflow_core.artifact import tree_hash
from alignflow_core.devices import autocast
from alignflow_core.reward.gradient import sparse_each
from alignflow_core.reward.moments import Moments
from alignflow_core.reward.objective import Known, steadied
from alignflow_core.reward.private import PrivateSum, salt

PRIVATE_GATES = "not measured: with a privacy budget no gate may look at the references"


class PrivateAlignment(Alignment):
    """Alignment that keeps ``align.privacy.epsilon`` (:class:`~alignflow_core.config.Align` refuses settings that would leak)."""

    def __init__(self, config: Any, inputs: dict[str, Path], context: Any) -> None:
        super().__init__(config, inputs, context)
        self.private = PrivateSum(self.settings.privacy, rewarded_steps(self.settings), self._salt())

    def _salt(self) -> str:
        """New whenever anything that the weights depend on is.

        What the references are, which of them are aligned to and how they are labelled counts above all: of two runs with the same noise the
        difference would show what differs.
        """
        said = repr((self.settings, self.flow, self.task, self.config.machine, self.config.seed, self.context.key,
                     self.config.sample.guidance_scale)).encode()  # under which samples are rolled out
        masks = () if self.references.masks is None else (self.references.masks,)
        images = [each.tobytes() for each in (self.source.images, self.source.labels, self.references.images, self.aligning, *masks)]
        networks = [(self.inputs[name] / "weights.safetensors").read_bytes() for name in ("image_flow", "labeller")]
        weights = self.settings.encoder_weights
        encoder = () if weights is None or weights.startswith("hub:") else (tree_hash(self.context.root / weights).encode(),)
        return salt(said, *images, *networks, *encoder)

    def _describe(self) -> tuple[Known, Known]:
        """Also what would be known if all looked like the first reference, like the second, and so on: nothing of one depends on another."""
        found = super()._describe()
        images, regions, _ = self.colours
        alone = [self.objective.encoder(x, r) for x, r in zip(images.split(1), regions.split(1), strict=True)]
        self.each = [self.objective.known([Moments(len(images), f[0], torch.ones_like(f[0])) if len(f) else None for f in features])
                     for features in alone]
        return found

    def _pull(self, draw: torch.Generator, weight: float, known: Known, past: list[Tensor], step: int) -> tuple[dict[str, float], list[Tensor]]:
        """Noised mean of the gradients of one reward per reference, each of norm ``weight``; says nothing of the rewards."""
        rows, x0 = self._masks_and_noise(draw)
        kept: list[Tensor] = []

        def rewards(x1: Tensor) -> list[Tensor]:
            with torch.autocast(self.device.type, enabled=False):  # moments are of single precision, as those of the references are
                features = self._features(x1.float(), self.labels[rows])
                kept[:] = [f.detach() for f in features]
                joined = steadied(features, past)
                return [-self.objective(joined, one) for one in self.each]

        parameters = [p for p in self.painter.parameters() if p.requires_grad]
        with autocast(self.config.machine, self.device):
            gradients = sparse_each(self._as_painted(self.painter), x0, self.cond[rows], self.times, rewards,
                                    self.settings.k, draw, parameters)
            self.private.add(parameters, gradients, len(self.each), weight, step)
        return {}, kept

    def _reward_norm(self, draw: torch.Generator, known: Known) -> float:
        """Every reference's gradient is brought to the norm asked for: no look at it."""
        return 1.0

    def _best(self, looks: Tensor) -> int:
        """The last row that kept every gate: to choose by reward would be to look at the references."""
        return self._kept(looks)[-1]

    def _patience(self) -> float:
        return math.inf

    def _rewards(self, features: list[Tensor], held_out: Known, known: Known) -> dict[str, float]:
        return {"held_out_reward": math.nan, "reward": math.nan}

    def _closeness(self, pictures: np.ndarray) -> float:
        return math.nan

    def _why_no_copy_gate(self) -> str | None:
        return PRIVATE_GATES

    def _rewards_told(self) -> tuple[str, ...]:
        return ()

    def _gained(self, before: Mapping[str, float], chosen: "pd.Series[Any]", promise: dict[str, Any]) -> dict[str, float]:
        return {"epsilon": promise["privacy"]["epsilon"]}

    def _promise(self) -> dict[str, Any]:
        return {"privacy": self.private.spent(int(self.aligning.sum()))}
