"""Oldest versions: compared by numbers, held at the start of a stage, the same in every place that names them; and the bill of materials."""

import json
import re
import time
import tomllib
from pathlib import Path

import pytest
from toy_project import REPOSITORY

from alignflow_core import floors
from alignflow_core.errors import InputError
from alignflow_core.runner import run_stage
from pipelines import doctor
from pipelines.sbom import bill


@pytest.mark.parametrize(("installed", "floor", "old"), [
    ("2.13.0+cpu", "2.11", False), ("2.9.1", "2.11", True), ("1.4.0rc3", "1.3.7", False), ("13.0.0", "13.0", False), ("0.7.99", "0.8", True)])
def test_by_numbers(installed: str, floor: str, old: bool) -> None:
    assert floors.below(installed, floor) == old


def test_a_stage_refuses_an_old_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "version", lambda name: "12.3" if name == "pillow" else "99")
    floors.refuse_old_packages.cache_clear()
    with pytest.raises(InputError, match=r"pillow 12\.3: older than 13\.0.*'pillow>=13\.0'"):
        run_stage(tmp_path, "data", "amber")
    monkeypatch.setattr(doctor, "version", lambda name: "12.3")
    found = {each.subject: each.remedy for each in doctor.examine(tmp_path)}
    assert "older than 13.0" in found["pillow"] and found["pandas"] == ""


def test_the_installed_ones_pass_and_quickly() -> None:
    floors.refuse_old_packages.cache_clear()
    started = time.process_time()
    floors.refuse_old_packages()
    assert time.process_time() - started < 0.25  # 0.05 s on an idle machine


def test_one_list_of_floors() -> None:
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    asked = {match[1]: match[2] for each in declared if (match := re.match(r"([\w-]+)>=([\w.]+)", each))}
    assert all(not floors.below(asked[name], floor) for name, floor in floors.FLOORS.items()), "what is installed keeps the floors"
    told = dict(re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|$", (REPOSITORY / "SECURITY.md").read_text(), re.MULTILINE))
    assert told == floors.FLOORS


def test_bill_of_materials() -> None:
    found = bill(REPOSITORY / "requirements.lock")
    names = {each["name"]: each for each in found["components"]}
    assert found["bomFormat"] == "CycloneDX" and {"pillow", "mlflow", "safetensors", "torch"} <= names.keys()
    assert names["pillow"]["purl"] == f"pkg:pypi/pillow@{names['pillow']['version']}" and len(names["pillow"]["hashes"][0]["content"]) == 64
    lines = (REPOSITORY / "requirements.lock").read_text().splitlines()
    assert len(found["components"]) == sum("==" in line and not line.startswith((" ", "#")) for line in lines) + 1
    assert len({each["bom-ref"] for each in found["components"]}) == len(found["components"])
    assert json.dumps(bill(REPOSITORY / "requirements.lock")) == json.dumps(found)


@pytest.mark.parametrize("content", [None, "# empty\n"])
def test_a_lock_that_is_none(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "requirements.lock").write_text(content)
    with pytest.raises(InputError, match="make lock"):
        bill(tmp_path / "requirements.lock")
