"""Data and artifacts kept elsewhere: what one clone pushes, another pulls and needs not build again."""

import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy_project import calls, copied, replace_reference, run

pytestmark = pytest.mark.nightly


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of an S3-compatible store on this machine that holds a bucket."""
    server = pytest.importorskip("moto.server", reason="moto[server,s3] is not installed: no S3-compatible store to test with")
    pytest.importorskip("dvc_s3", reason="extra 's3' is not installed")
    import boto3

    for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
                        "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    store = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    try:
        host, port = store.get_host_and_port()
        boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="alignflow")
        yield f"http://{host}:{port}"
    finally:
        store.stop()


@pytest.fixture
def versioned(built_toy: Path, tmp_path: Path) -> Path:
    """A built project whose data are in DVC's cache."""
    root = copied(built_toy, tmp_path)
    run(root, "-m", "dvc", "commit", "-q", "--force", "data.dvc")
    return root


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=Ada", "-c", "user.email=ada@example.org", *arguments], cwd=root, check=True, capture_output=True)


def assert_a_second_clone_builds_nothing(root: Path, clone: Path) -> None:
    run(root, "-m", "dvc", "push", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "built")
    git(root.parent, "clone", "-q", str(root), str(clone))
    assert not (clone / "data").exists() and not (clone / "artifacts").exists()
    run(clone, "-m", "dvc", "pull", "-q")
    for folder in ("data", "artifacts"):
        ours, theirs = ({file.relative_to(each): file.read_bytes() for file in (each / folder).glob("**/*.*") if file.is_file()}
                        for each in (root, clone))
        assert ours and ours == theirs
    run(clone, "-m", "dvc", "repro", "-q")
    assert calls(clone) == Counter()
    replace_reference(clone, "dim")
    run(clone, "-m", "dvc", "repro", "-q", "align@dim")
    assert calls(clone) == Counter(["references@dim", "align@dim"])


def test_a_folder(versioned: Path, tmp_path: Path) -> None:
    run(versioned, "-m", "dvc", "remote", "add", "-q", "-d", "store", str(tmp_path / "store"))
    assert_a_second_clone_builds_nothing(versioned, tmp_path / "clone")


def test_an_s3_compatible_store(versioned: Path, tmp_path: Path, bucket: str) -> None:
    run(versioned, "-m", "dvc", "remote", "add", "-q", "-d", "store", "s3://alignflow/project")
    run(versioned, "-m", "dvc", "remote", "modify", "-q", "store", "endpointurl", bucket)
    assert_a_second_clone_builds_nothing(versioned, tmp_path / "clone")


def test_a_stage_that_ran_outside_dvc_is_taken_over(versioned: Path) -> None:
    """As torchrun, Slurm and Kubernetes run it: the one command, then ``dvc commit``."""
    replace_reference(versioned, "dim")
    run(versioned, "-m", "alignflow_core", "stage", "references", "--target", "dim", "--quiet")
    run(versioned, "-m", "dvc", "commit", "-q", "--force", "references@dim")
    calls(versioned)
    run(versioned, "-m", "dvc", "repro", "-q", "references@dim")
    assert calls(versioned) == Counter()
