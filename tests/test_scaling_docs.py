"""The snippets of docs/scaling.md are what they say they are."""

import re
import subprocess

import pytest
import yaml
from toy_project import REPOSITORY

from alignflow_core.stages import STAGES

TEXT = (REPOSITORY / "docs" / "scaling.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def snippets(language: str) -> list[str]:
    return [code for name, code in SNIPPETS if name == language]


def test_yaml_loads_and_says_what_it_is_for() -> None:
    job, dagster, workspace = map(yaml.safe_load, snippets("yaml"))
    pod = job["spec"]["template"]["spec"]
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert pod["containers"][0]["command"][:4] == ["python", "-m", "alignflow_core", "stage"]
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert dagster["run_launcher"]["class"] == "K8sRunLauncher"
    named = yaml.safe_load((REPOSITORY / "workspace.yaml").read_text())["load_from"][0]["python_module"]
    assert workspace["load_from"][0]["python_module"] == named | {"module_name": "pipelines.ray_cluster"}


@pytest.mark.parametrize("code", [code for code in snippets("bash") if "[--target" not in code])
def test_shell_parses(code: str) -> None:
    subprocess.run(["bash", "-n"], input=code, text=True, check=True, capture_output=True)


def test_python_compiles() -> None:
    for code in snippets("python"):
        compile(code, "docs/scaling.md", "exec")


def test_stages_exist() -> None:
    named = set(re.findall(r"alignflow_core stage (\w+)", TEXT)) - {"NAME"} | set(re.findall(r"\b(\w+)@zeiss", TEXT))
    looped = re.search(r"for stage in ([\w ]+);", TEXT)
    assert looped and named | set(looped[1].split()) <= set(STAGES)
