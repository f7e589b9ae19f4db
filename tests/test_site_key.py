"""Opaque ids: nobody finds names by trying them without the key, and nothing but the ids depends on it."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from alignflow_core import site_key
from alignflow_core.artifact import read_json
from alignflow_core.compare import compare
from alignflow_core.config import Evaluate
from alignflow_core.data import case_id
from alignflow_core.errors import InputError
from alignflow_core.runner import provenance_file, run_stage
from pipelines.cli import main
from pipelines.plan import plan

MAKE = "from alignflow_core.site_key import pseudonym; print(pseudonym('case', 'a'))"


@pytest.fixture
def other_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the next key will be made."""
    monkeypatch.setenv(site_key.VARIABLE, str(tmp_path / "keys" / "site.key"))
    return tmp_path / "keys" / "site.key"


def test_made_once_for_its_owner_alone(other_key: Path) -> None:
    runs = [subprocess.Popen([sys.executable, "-c", MAKE], stdout=subprocess.PIPE, text=True) for _ in range(6)]
    assert len({run.communicate()[0] for run in runs}) == 1, "six at once have one key"
    assert other_key.stat().st_mode & 0o777 == 0o600 and len(bytes.fromhex(other_key.read_text().strip())) == 32
    assert [file.name for file in other_key.parent.iterdir()] == ["site.key"]


def test_same_key_same_ids_and_kinds_apart(other_key: Path) -> None:
    before = case_id("amber", "Meier_Anna"), site_key.key_check()
    site_key._key.cache_clear()
    assert (case_id("amber", "Meier_Anna"), site_key.key_check()) == before
    assert before[0] != hashlib.sha256(b"amber/Meier_Anna").hexdigest()[:16] and len(before[0]) == 16
    assert site_key.pseudonym("group", "x") != site_key.pseudonym("case", "x") and case_id("a", "b") != case_id("b", "b")
    other_key.unlink()
    site_key._key.cache_clear()
    assert case_id("amber", "Meier_Anna") != before[0], "another key, other ids"


@pytest.mark.parametrize(("content", "mode", "words"), [
    ("zz", 0o600, "no readable site key"), ("a1" * 32, 0o644, "chmod 600"), ("a1", 0o600, "at least 32")])
def test_bad_keys(content: str, mode: int, words: str, other_key: Path) -> None:
    other_key.parent.mkdir()
    other_key.write_text(content)
    other_key.chmod(mode)
    with pytest.raises(InputError, match=words):
        case_id("a", "b")


def test_another_key_changes_ids_and_nothing_else(smoke_root: Path, other_key: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    twin = shutil.copytree(smoke_root, smoke_root.with_name("twin"))
    tables = {}
    for root, key in ((smoke_root, other_key), (twin, other_key.with_name("second.key"))):
        monkeypatch.setenv(site_key.VARIABLE, str(key))
        run_stage(root, "data", "standard", quiet=True)
        for stage, name in (("data", "amber"), ("references", "amber")):
            run_stage(root, stage, name, quiet=True)
            tables[root, stage] = pd.read_parquet(root / f"artifacts/{stage}/amber/manifest.parquet")
    for stage in ("data", "references"):
        ours, theirs = tables[smoke_root, stage], tables[twin, stage]
        assert not set(ours["case_id"]) & set(theirs["case_id"])
        pd.testing.assert_frame_equal(ours.drop(columns=["case_id", "group"]), theirs.drop(columns=["case_id", "group"]))
        for array in ("images.npy", "masks.npy"):
            assert np.array_equal(np.load(smoke_root / f"artifacts/{stage}/amber" / array), np.load(twin / f"artifacts/{stage}/amber" / array))
    assert read_json(provenance_file(smoke_root, "data", "amber"))["fingerprint"] == read_json(provenance_file(twin, "data", "amber"))["fingerprint"]
    assert not run_stage(smoke_root, "data", "amber", quiet=True), "the other key makes nothing stale"
    stale = dict(plan(smoke_root))
    assert "data@amber" not in stale and "references@amber" not in stale
    (smoke_root / "data/references/amber/images/r000.png").write_bytes((smoke_root / "data/references/amber/images/r001.png").read_bytes())
    assert "under another site key" in dict(plan(smoke_root))["references@amber"]
    with pytest.raises(InputError, match="of another site key"):
        run_stage(smoke_root, "references", "amber", quiet=True)
    ids = tables[twin, "data"]["case_id"].tolist()
    assert main(["case", "--root", str(twin), ids[3]]) == 0
    assert capsys.readouterr().out == f"{ids[3]}: {twin}/data/target/amber/images/t003.png\n"
    assert main(["case", "--root", str(twin), "feed"]) == 2


def test_intervals_do_not_depend_on_ids() -> None:
    found = []
    for seed in (1, 2):
        names = [f"{value:016x}" for value in np.random.default_rng(seed).integers(0, 2**60, 30)]
        frames = [pd.DataFrame({"target": "t", "arm": arm, "segmenter": "unet", "segmenter_seed": 0, "case_id": names,
                                "group": [names[i // 2] for i in range(30)],
                                "class": "x", "metric": "dice", "value": values})
                  for arm, values in (("source", np.linspace(0, 0.5, 30) ** 2), ("aligned", np.linspace(0.1, 0.9, 30) ** 0.5))]
        found.append(compare(pd.concat(frames), Evaluate(bootstrap=50), 0))
    pd.testing.assert_frame_equal(*found)
