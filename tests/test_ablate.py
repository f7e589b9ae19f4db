"""Variants of targets: what they change, what they leave, and what is refused."""

from pathlib import Path

import pytest
import yaml

from alignflow_core.config import load_project
from alignflow_core.errors import InputError
from pipelines.ablate import ARMS, write_variants
from pipelines.cli import main
from pipelines.compose import write_params


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_params(tmp_path / "params.yaml", ["profile=smoke"])
    return tmp_path


def test_variants_differ_in_one_axis_and_share_the_rest(root: Path) -> None:
    before = load_project(root / "params.yaml")
    added = write_variants(root, ["amber"], ["reward=skl,mmd", "references.count=1,5", "align.rho=0.1", "align.gates.hold=false"])
    assert added == ["amber-skl", "amber-mmd", "amber-count1", "amber-count5", "amber-rho0_1", "amber-hold-false"]
    after = load_project(root / "params.yaml")
    assert after.targets["amber"] == before.targets["amber"] and after.targets["violet"] == before.targets["violet"]
    skl, few = after.targets["amber-skl"], after.targets["amber-count1"]
    assert (skl.align.reward, skl.align.rho, skl.arms, skl.variant_of) == ("skl", before.targets["amber"].align.rho, tuple(ARMS), "amber")
    assert (few.references.count, few.references.dir) == (1, None) and few.align == before.targets["amber"].align
    assert write_variants(root, ["amber"], ["references.seed=1,2"]) == ["amber-seed1", "amber-seed2"]
    drawn = load_project(root / "params.yaml").targets["amber-seed2"].references
    assert (drawn.seed, drawn.dir, drawn.count) == (2, None, before.targets["amber"].references.count), "other images, not another order of the same"
    after = load_project(root / "params.yaml")
    assert after.targets["amber-rho0_1"].align.rho == 0.1 and after.targets["amber-hold-false"].align.gates.hold is False
    assert write_variants(root, ["amber"], ["reward=skl"]) == [], "what is there already stays"
    assert load_project(root / "params.yaml") == after


def test_a_grid_has_every_combination(root: Path) -> None:
    added = write_variants(root, ["amber"], ["reward=frechet,skl", "align.regions=none,pseudo"], grid=True)
    assert added == [f"amber-{reward}-regions-{regions}" for reward in ("frechet", "skl") for regions in ("none", "pseudo")]


@pytest.mark.parametrize(("axis", "said"), [
    ("reward", "not KEY=VALUE,VALUE"), ("reward=frechit", "did you mean 'frechet'"), ("profile=cpu", "not a target's own"),
    ("align.rho=[1", "is no value of YAML"),
    ("align.rhoo=1", "align.rhoo: unknown key"), ("align.rho=fast", "must be float"), ("references.count=0", "must be at least 1"),
])
def test_a_wrong_axis_is_refused_and_nothing_written(root: Path, axis: str, said: str) -> None:
    text = (root / "params.yaml").read_text()
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        write_variants(root, ["amber"], [axis])
    assert (root / "params.yaml").read_text() == text


def test_two_variants_of_one_name_are_refused(root: Path) -> None:
    text = (root / "params.yaml").read_text()
    with pytest.raises(InputError, match="would be named amber-lr"):
        write_variants(root, ["amber"], ["align.training.lr=1e-4,3e-4", "align.relabel.lr=1e-4,3e-4"])
    assert (root / "params.yaml").read_text() == text
    assert len(write_variants(root, ["amber", "amber"], ["align.rho=0.1,0.1"])) == 1, "the same one asked for twice is one"


@pytest.mark.parametrize(("targets", "said"), [(1, "targets: must be dict"), ({"a": 1}, "targets.a: must be a section, got 1")])
def test_wrong_targets_are_the_file_s_fault(root: Path, targets: object, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = root / "params.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"targets": targets}))
    assert main(["ablate", "--root", str(root), "reward=skl"]) == 2
    assert f"{file}: {said}" in capsys.readouterr().err


def test_command_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", "--root", str(root), "--target", "ambr", "reward=skl"]) == 2
    assert "did you mean 'amber'" in capsys.readouterr().err
    (root / "dvc.yaml").write_text("")
    assert main(["ablate", "--root", str(root), "reward=skl"]) == 0
    assert capsys.readouterr().out.split() == ["target", "amber-skl", "target", "violet-skl"]
    assert "amber-skl" in yaml.safe_load((root / "dvc.yaml").read_text())["stages"]["align"]["foreach"]
