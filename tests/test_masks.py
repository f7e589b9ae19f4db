"""Regions, signed distance maps and back."""

import numpy as np
import pytest
import torch

from alignflow_core.config import Task
from alignflow_core.masks import condition, from_regions, region_dice, regions, signed_distance
from alignflow_core.sample import clean

NESTED = Task(name="refuge", kind="refuge", classes=("disc", "cup"), nested=True)
FLAT = Task(name="labels", kind="labels", classes=("liver", "tumour"), values={0: 0, 1: 1, 2: 2})


def disc(radius: float, size: int = 32, centre: tuple[float, float] = (16, 16)) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2


def eye() -> np.ndarray:
    return (disc(10).astype(np.uint8) + disc(5))[None]


def test_nested_regions_contain_each_other_and_flat_ones_do_not() -> None:
    inside = regions(eye(), NESTED)
    assert (inside[:, 0] >= inside[:, 1]).all() and inside[0, 0].sum() == disc(10).sum()
    assert not (regions(eye(), FLAT)[:, 0] & regions(eye(), FLAT)[:, 1]).any()


@pytest.mark.parametrize("task", [NESTED, FLAT])
def test_masks_survive_the_round_trip(task: Task) -> None:
    assert (from_regions(signed_distance(eye(), task, clip=8).numpy(), task) == eye()).all()


def test_a_cup_outside_its_disc_is_cut() -> None:
    scores = np.stack([disc(5), disc(9)])[None] * 2.0 - 1
    assert (from_regions(scores, NESTED)[0] == 2 * disc(5)).all()


def test_signed_distance_of_a_disc_is_its_radius_minus_the_distance() -> None:
    found = signed_distance(disc(10)[None].astype(np.uint8), Task(), clip=100)[0, 0] * 100
    y, x = np.mgrid[:32, :32]
    assert np.abs(found.numpy() - (10 - np.hypot(y - 16, x - 16))).max() < 1.0


def test_empty_and_full_regions_are_flat() -> None:
    assert (signed_distance(np.zeros((1, 8, 8), np.uint8), Task(), 4) == -1).all()
    assert (signed_distance(np.ones((1, 8, 8), np.uint8), Task(), 4) == 1).all()


def test_condition_has_distances_and_regions() -> None:
    cond = condition(eye(), NESTED, clip=8)
    assert cond.shape == (1, 4, 32, 32) and set(cond[:, 2:].unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(cond[:, :2] > 0, cond[:, 2:] > 0)


def test_clean_fills_holes_and_drops_specks() -> None:
    mask = disc(10).astype(np.uint8)
    mask[16, 16] = 0
    mask[1, 1] = 1
    assert (clean(mask, Task()) == disc(10)).all()


def test_clean_leaves_what_another_class_fills() -> None:
    """A ventricle inside its muscle, a hole through both walls of the muscle, and a speck of the ventricle in the muscle."""
    heart = np.zeros((32, 32), np.uint8)
    heart[disc(12)], heart[disc(6)] = 1, 2
    torn = heart.copy()
    torn[16, 25], torn[16, 7] = 0, 2
    assert (clean(torn, FLAT) == heart).all()


def test_a_region_that_both_lack_is_not_one_that_was_found() -> None:
    a, b = np.zeros((3, 4, 8, 8), bool), np.zeros((3, 4, 8, 8), bool)
    a[0, 0, :4] = b[0, 0, 2:6] = True  # half of it, and three classes that neither has
    a[1, 1] = True
    assert region_dice(a, b).tolist() == [0.5, 0.0, 1.0]
    assert region_dice(a[:1], b).tolist() == [0.5, 0.0, 0.0]
