"""Hydra groups -> params.yaml."""

from pathlib import Path

import pytest
import yaml

from alignflow_core.config import ARMS, build_project, load_project
from alignflow_core.errors import InputError
from pipelines.compose import compose, merged, options, render, write_params

REPOSITORY = Path(__file__).parents[1]
LAYOUT = {"source": "here", "domains": {"here": {"dir": "/h"}, "there": {"dir": "/t"}}, "targets": {"there": {"domain": "there"}}}


def test_committed_params_are_the_composed_ones() -> None:
    assert (REPOSITORY / "params.yaml").read_text(encoding="utf-8") == render(compose()), "run 'alignflow compose'"


@pytest.mark.parametrize("profile", options("profile"))
@pytest.mark.parametrize("task", options("task"))
def test_every_profile_and_task_is_valid_and_survives_yaml(profile: str, task: str) -> None:
    params = compose([f"profile={profile}", f"task={task}"], None if task == "phantom" else LAYOUT)
    assert yaml.safe_load(render(params)) == params
    project = build_project(params)
    assert project.profile == profile
    assert project.task.name == task


def test_demo_has_two_targets_and_cpu_all_of_them_with_every_arm() -> None:
    assert set(compose()["targets"]) == {"amber", "violet"}
    assert set(compose()["domains"]) == {"standard", "amber", "violet"}
    cpu = build_project(compose(["profile=cpu"]))
    assert set(cpu.targets) == {"amber", "dim", "violet"}
    assert cpu.segment.arms == ARMS


def test_defaults_of_targets_and_their_own_values() -> None:
    params = compose(["reward=skl", "align.rho=2", "targets.amber.align.rho=1e-3", "references.count=5", "targets.violet.references.seed=7"])
    amber, violet = params["targets"]["amber"], params["targets"]["violet"]
    assert (amber["align"]["rho"], violet["align"]["rho"]) == (0.001, 2.0)
    assert amber["align"]["reward"] == violet["align"]["reward"] == "skl"
    assert (amber["references"]["count"], amber["references"]["seed"], violet["references"]["seed"]) == (5, 0, 7)
    assert amber["references"]["dir"] == "data/references/amber"
    assert "align" not in params
    assert "references" not in params


def test_a_null_target_is_left_out_with_its_domain() -> None:
    params = compose(["targets.violet=null"])
    assert set(params["targets"]) == {"amber"}
    assert set(params["domains"]) == {"standard", "amber"}


def test_layout_of_ones_own() -> None:
    """Even a target called like one that the profile leaves out is kept."""
    layout = merged(LAYOUT, {"domains": {"dim": {"dir": "/d"}}, "targets": {"dim": {"domain": "dim"}}})
    params = compose(["task=refuge", "profile=demo", "targets.there.align.k=1"], layout)
    assert set(params["targets"]) == {"there", "dim"}
    assert params["domains"] == {name: domain | {"labelled": True} for name, domain in layout["domains"].items()}
    assert (params["targets"]["there"]["align"]["k"], params["targets"]["dim"]["align"]["k"]) == (1, 2)


@pytest.mark.parametrize(("override", "words"), [
    ("align.rhoo=1", ["align.rhoo", "did you mean 'rho'"]),
    ("sede=1", ["sede", "did you mean 'seed'"]),
    ("image_flow.training.step=1", ["image_flow.training.step", "did you mean 'steps'"]),
    ("targets.amberr.align.rho=1", ["targets.amberr.domain", "missing"]),
    ("profile=cpux", ["profile=cpux", "did you mean 'cpu'"]),
    ("reward=frechit", ["unknown reward 'frechit'", "frechet"]),
    ("sample.solver=rk4", ["sample.solver", "euler"]),
    ("seed=one", ["seed", "must be int"]),
    ("seed=[1", ["seed=[1", "quote"]),
    ("seed", ["'seed'", "key=value"]),
    ("align=3", ["align", "must be a section"]),
    ("segment.arms=[source,alined]", ["alined", "did you mean 'aligned'"]),
    ("task=binary", ["brings no data", "alignflow run"]),
    ("targets=1", ["targets: must be a section, got 1"]),
    ("domains=1", ["domains: must be a section, got 1"]),
    ("references=3", ["references: must be a section, got 3"]),
    ("source=[1]", ["source: must be str, got [1]"]),
    ("targets.amber.domain=[1]", ["targets.amber.domain: must be str"]),
    ("hydra.run.dir=1", ["hydra.run.dir=1: unknown key"]),
    ("hydra=1", ["hydra=1: unknown key"]),
])
def test_bad_overrides_name_the_key_and_the_nearest_valid_one(override: str, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        compose([override])
    assert len(caught.value.problems) == 1
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_all_problems_are_listed() -> None:
    with pytest.raises(InputError) as caught:
        compose(["sede=1", "align.rhoo=1", "targets.amber.align.kk=2"])
    assert {problem.split(": ")[1] for problem in caught.value.problems} == {"sede", "align.rhoo", "targets.amber.align.kk"}


def test_wrong_configuration_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        write_params(tmp_path / "params.yaml", ["align.k=100"])
    assert not list(tmp_path.iterdir())
    write_params(tmp_path / "params.yaml", ["align.k=1"])
    assert load_project(tmp_path / "params.yaml").targets["amber"].align.k == 1
    assert [file.name for file in tmp_path.iterdir()] == ["params.yaml"]
