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


BANNED_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "runpy", "torch.package", "torch.hub",
                  "monai.bundle", "monai.fl", "monai.auto3dseg", "monai.apps.nnunet", "mlflow.pyfunc", "mlflow.pytorch", "mlflow.sklearn",
                  "mlflow.transformers", "hydra.utils.instantiate", "hydra.utils.call", "hydra.utils.get_object"}
BANNED_CALLS = {"torch.load", "torch.save", "torch.jit.load", "torch.export.load", "yaml.load", "yaml.load_all", "yaml.unsafe_load",
                "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all", "eval", "exec", "compile", "__import__", "os.system", "os.popen",
                "subprocess.getoutput", "subprocess.getstatusoutput", "shutil.unpack_archive", "pandas.read_pickle",
                "hydra.utils.instantiate", "hydra.utils.call", "hydra.utils.get_object"}
BANNED_ATTRIBUTES = {"extractall", "to_pickle", "CheckpointLoader", "CheckpointSaver", "PersistentDataset", "CacheNTransDataset", "LMDBDataset",
                     "UnsafeLoader", "FullLoader", "unsafe_load"}  # of whatever object
BANNED_KEYWORDS = {"shell", "allow_pickle", "trust_remote_code"}  # unless plainly False


def aliases(tree: ast.AST) -> dict[str, str]:
    """What a name stands for after ``import numpy as np`` or ``from torch import load as read``."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def banned(module: str) -> bool:
    return any(module == each or module.startswith(f"{each}.") for each in BANNED_MODULES)


def offences(tree: ast.AST) -> Iterator[str]:
    """Ways of running what a file or a person has written."""
    known = aliases(tree)
    yield from (name for name in imported(tree) if banned(name) or name in BANNED_CALLS or name.rpartition(".")[2] in BANNED_ATTRIBUTES)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            first, dot, rest = ast.unparse(node).partition(".")
            name = known.get(first, first) + dot + rest
            if (name in BANNED_CALLS and dot) or (dot and banned(name)) or (isinstance(node, ast.Attribute) and node.attr in BANNED_ATTRIBUTES):
                yield name
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if known.get(function, function) in BANNED_CALLS:
                yield ast.unparse(node)
            for keyword in node.keywords:
                if keyword.arg in BANNED_KEYWORDS and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False):
                    yield ast.unparse(node)


@pytest.mark.parametrize("file", [*CORE, *EDGE, *sorted((REPOSITORY / "benchmarks").rglob("*.py"))],
                         ids=lambda file: file.relative_to(REPOSITORY).as_posix())
def test_nothing_runs_what_it_reads(file: Path) -> None:
    assert not list(offences(ast.parse(file.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("code", [
    "import pickle", "from joblib import load", "import torch\ntorch.load('x')", "import torch as t\nt.load('x')", "from torch import load",
    "from torch import load as read\nread('x')", "import torch\nread = torch.load", "import torch\ntorch.jit.load('x')",
    "from torch import jit\njit.load('x')",
    "import torch\ntorch.hub.load('a', 'b')", "eval('1')", "exec('1')", "__import__('x')", "import yaml\nyaml.load(s, Loader=L)",
    "from yaml import FullLoader", "import subprocess\nsubprocess.run('ls', shell=True)", "import subprocess\nsubprocess.run('ls', shell=flag)",
    "import os\nos.system('ls')", "import numpy as np\nnp.load(f, allow_pickle=True)", "import numpy as np\nnp.load(f, allow_pickle=flag)",
    "archive.extractall('x')", "import shutil\nshutil.unpack_archive('x')", "import pandas as pd\npd.read_pickle('x')", "table.to_pickle('x')",
    "import monai.bundle", "from monai.bundle import ConfigParser", "import monai\nmonai.bundle.load('x')", "from monai.apps import nnunet",
    "from monai.handlers import CheckpointLoader", "import monai\nmonai.data.PersistentDataset(x, y, z)", "from monai.fl.client import x",
    "import mlflow\nmlflow.pytorch.load_model('x')", "import mlflow.pyfunc", "from hydra.utils import instantiate",
    "import hydra\nhydra.utils.instantiate(config)", "AutoModel.from_pretrained('x', trust_remote_code=True)",
])
def test_offences_are_seen(code: str) -> None:
    assert list(offences(ast.parse(code)))


@pytest.mark.parametrize("code", [
    "import numpy as np\nnp.load(f, allow_pickle=False)", "import yaml\nyaml.safe_load(s)", "import json\njson.load(f)", "model.eval()",
    "re.compile('x')", "from safetensors.torch import load_file",
    "import subprocess\nsubprocess.run(['ls'], shell=False)", "from monai.networks.nets import UNet",
])
def test_what_is_harmless_passes(code: str) -> None:
    assert not list(offences(ast.parse(code)))
