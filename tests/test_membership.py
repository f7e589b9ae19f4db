"""The membership attack: known areas and intervals, and a network that has learned its images by heart is found out."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from alignflow_core.config import ImageFlow, Network, Task
from alignflow_core.flow.loss import flow_matching_loss
from alignflow_core.masks import condition
from alignflow_core.membership import membership
from alignflow_core.metrics.membership import attack, auc_interval
from alignflow_core.networks import velocity_unet
from alignflow_core.pairs import Pairs, to_unit
from alignflow_core.seeding import generator


def test_area_is_that_of_scikit_learn_and_ties_count_half() -> None:
    rng = np.random.default_rng(0)
    members, others = rng.normal(0.5, 1, 40).round(1), rng.normal(0, 1, 70).round(1)
    found = attack(members, others)
    assert found.auc == pytest.approx(roc_auc_score([1] * 40 + [0] * 70, np.concatenate([members, others])))
    assert found.low < found.auc < found.high and found.found == (members > others.max()).mean()
    assert attack(np.arange(10.0), np.linspace(-1, 8.5, 200)).found == pytest.approx(0.1), "one per cent of 200 may lie above"


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Two normal laws one deviation apart: AUC .760 (Φ(1 / √2))."""
    rng = np.random.default_rng(1)
    covered = [low <= 0.7602 <= high for low, high in (
        (lambda a: (a.low, a.high))(attack(rng.normal(1, 1, 12), rng.normal(0, 1, 50))) for _ in range(400))]
    assert 0.92 <= np.mean(covered) <= 0.99


def test_interval_at_the_ends() -> None:
    low, high = auc_interval(1.0, 10, 64)
    assert high == 1 and 0.7 < low < 0.99, "ten images prove nothing perfectly"
    low, high = auc_interval(0.0, 10, 64)
    assert low == 0 and 0.01 < high < 0.3
    assert auc_interval(0.5, 20, 20)[0] == pytest.approx(1 - auc_interval(0.5, 20, 20)[1])


def pairs(n: int, seed: int, split: list[str]) -> Pairs:
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, 16, 16), np.uint8)
    masks[:, 4:12, 4:12] = 1
    ids = tuple(f"{seed}-{i}" for i in range(n))
    return Pairs(rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8), masks, ids, pd.DataFrame({"case_id": ids, "split": split, "role": "align"}))


def test_a_network_that_knows_its_images_by_heart_is_found_out(tmp_path: Path) -> None:
    """Images of noise can only be learned by heart; the references were given to nobody."""
    task, network = Task(), Network((16, 32), (False, False))
    source = pairs(24, 0, ["train"] * 12 + ["test"] * 12)
    images, cond = to_unit(source.images[:12]), condition(source.labels[:12], task, 8.0)
    model = velocity_unet.build(3, 2, network, 0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(250):
        loss = flow_matching_loss(model, images, cond, ImageFlow().times, generator(0, "heart", step))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for folder in ("image_flow", "align"):
        velocity_unet.save(tmp_path / folder, model.state_dict(), 3, 2, network, clip=8.0)
    inputs = {name: tmp_path / name for name in ("image_flow", "align")}
    references = pairs(14, 1, ["train"] * 14)
    references.table.loc[10:, "role"] = "held_out"  # which only say when to stop
    table, found = membership(inputs, source, references, pairs(20, 2, ["test"] * 20), task, 0, torch.device("cpu"))
    assert found["source_stage1"].low > 0.7 and found["source_aligned"].auc == found["source_stage1"].auc
    assert found["references"].low <= 0.5 <= found["references"].high
    assert found["references"].n_members == 10
    again, _ = membership(inputs, source, references, pairs(20, 2, ["test"] * 20), task, 0, torch.device("cpu"))
    pd.testing.assert_frame_equal(table, again)
