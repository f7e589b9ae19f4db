"""Shared by all tests: one thread a worker, a small copy of the built-in data, a project that runs in seconds."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from toy_project import built_toy as built_toy  # a session's worth of set-up, shared by the tests of DVC, Dagster and MLflow

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")  # read when torch and numpy are loaded: two pytest workers share two cores

_key = Path(tempfile.gettempdir()) / f"alignflow-test-{os.getuid()}.key"  # one for all workers and all they start; the user's own stays untouched
_part = _key.with_suffix(f".{os.getpid()}")
_part.touch(mode=0o600)
_part.write_text("a1" * 32)
_part.replace(_key)
os.environ["ALIGNFLOW_SITE_KEY_FILE"] = str(_key)


@pytest.fixture(scope="session")
def phantom_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``data/`` as ``alignflow phantom`` writes it, fewer and smaller (40 px). Copy it before changing it."""
    from alignflow_core import phantom

    root = tmp_path_factory.mktemp("phantom")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom, "N_SOURCE", 28)
        patch.setattr(phantom, "N_TARGET", 20)
        patch.setattr(phantom, "N_REFERENCES", 6)
        phantom.write_phantom(root, size=40)
    return root


@pytest.fixture
def smoke_root(phantom_root: Path, tmp_path: Path) -> Path:
    """A project of profile ``smoke``: its own copy of the small phantom, and ``params.yaml``."""
    from pipelines.compose import write_params

    root = tmp_path / "project"
    shutil.copytree(phantom_root / "data", root / "data")
    write_params(root / "params.yaml", ["profile=smoke"])
    return root


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the tests of reliability have reached, as ``docs/reliability.md`` shows it; recorded by ``record_property("figure", (row, text))``."""
    figures = {row: text for report in terminalreporter.stats.get("passed", []) for name, (row, text) in
               ((name, value) for name, value in getattr(report, "user_properties", []) if name == "figure")}
    if figures:
        terminalreporter.section("reliability: figures reached")
        for row, text in sorted(figures.items()):
            terminalreporter.write_line(f"{row:52} {text}")
