"""The walls of the house: who may import whom, and what nobody may call."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignflow_core.networks.registry import ARCHITECTURES
from alignflow_core.stages import STAGES

REPOSITORY = Path(__file__).parents[1]
CORE = sorted((REPOSITORY / "alignflow_core").rglob("*.py"))
EDGE = sorted((REPOSITORY / "pipelines").rglob("*.py"))
STAGE_MODULES = {stage.function.partition(":")[0] for stage in STAGES.values()}


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything a file imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of(file: Path) -> set[str]:
    return set(imported(ast.parse(file.read_text(encoding="utf-8"))))


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(REPOSITORY / "alignflow_core").with_suffix("").parts)


@pytest.mark.parametrize("file", CORE, ids=module_of)
def test_core_knows_no_orchestrator_and_only_the_runner_starts_stages(file: Path) -> None:
    names = imports_of(file)
    roots = {name.split(".")[0] for name in names}
    assert not roots & {"pipelines", "dagster", "mlflow", "dvc", "hydra", "omegaconf"}
    stages = {name.split(".")[1] for name in names if name.startswith("alignflow_core.")} & STAGE_MODULES
    assert not stages - {module_of(file)}, "stages meet through artifacts; what two of them need is a module of its own"


def test_the_registry_needs_only_the_standard_library() -> None:
    own = {f"alignflow_core.networks.{name}" for name in ARCHITECTURES}  # these for mypy's eyes alone
    for file in ("stages.py", "registry.py", "reward/registry.py", "reward/__init__.py", "painters/registry.py", "painters/__init__.py",
                 "networks/registry.py", "networks/__init__.py"):
        names = {name for name in imports_of(REPOSITORY / "alignflow_core" / file) - own if ".registry." not in name}
        assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_private_dagster_api_has_one_user() -> None:
    users = {file.name for file in EDGE if any(name.startswith("dagster._") for name in imports_of(file))}
    assert users <= {"plan.py"}


def test_no_grab_bag_modules() -> None:
    assert not {file.stem for file in CORE + EDGE} & {"utils", "helpers", "common", "misc", "manager"}


@pytest.mark.parametrize(("module", "heavy"), [
    ("alignflow_core", ["numpy", "yaml", "torch"]),
    ("alignflow_core.stages", ["numpy", "yaml", "torch"]),
    ("pipelines.cli", ["numpy", "yaml", "torch", "dagster", "hydra", "mlflow", "pandas"]),
    ("pipelines.definitions", ["torch", "monai", "mlflow", "hydra", "matplotlib"]),
])
def test_light_imports(module: str, heavy: list[str]) -> None:
    code = f"import sys, {module}; print(*sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
BANNED_CALLS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system", "os.popen", "pd.read_pickle",
                "pandas.read_pickle"}
BANNED_KEYWORDS = {"shell", "allow_pickle", "trust_remote_code"}  # when True


def offences(tree: ast.AST) -> Iterator[str]:
    """Ways of running what a file or a person has written."""
    yield from (name for name in imported(tree) if name.split(".")[0] in BANNED_MODULES)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in BANNED_CALLS:
                yield ast.unparse(node)
            for keyword in node.keywords:
                if keyword.arg in BANNED_KEYWORDS and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False):
                    yield ast.unparse(node)


@pytest.mark.parametrize("file", [*CORE, *EDGE, *sorted((REPOSITORY / "benchmarks").rglob("*.py"))],
                         ids=lambda file: file.relative_to(REPOSITORY).as_posix())
def test_nothing_runs_what_it_reads(file: Path) -> None:
    assert not list(offences(ast.parse(file.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("code", ["import pickle", "from joblib import load", "torch.load('x')", "eval('1')", "yaml.load(s, Loader=L)",
                                  "subprocess.run('ls', shell=True)", "np.load(f, allow_pickle=flag)"])
def test_offences_are_seen(code: str) -> None:
    assert list(offences(ast.parse(code)))
