"""Nothing lost: kills, crashes, damage, a full disk, rivals for one folder, numbers that are none. Each test prints the figure it reached.

Children are forked from a process that has torch loaded, so that a kill costs milliseconds. Checks are functions that count failures: each
is also shown a broken variant, which it must catch.
"""

import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from alignflow_core import runner, state
from alignflow_core.artifact import exclusive, publish, read_json, write_json
from alignflow_core.checkpoint import load_network, rebuilt, save_network
from alignflow_core.config import Training
from alignflow_core.errors import InputError, StageError
from alignflow_core.flow.train import train
from alignflow_core.reference_moments import ReferenceMoments, write_moments
from alignflow_core.reward.moments import Moments
from alignflow_core.runner import run_stage, told_limits
from alignflow_core.seeding import generator
from alignflow_core.stages import STAGES
from alignflow_core.state import load_state, save_state, states

STEPS = 60
TRAINING = Training(steps=STEPS, batch=2, lr=0.01, warm_up=3, save_every=4, log_every=20)
STATE = "state.safetensors"
Record = Callable[[str, tuple[str, str]], None]


def network() -> nn.Module:
    """About a hundred thousand parameters on 32 x 32 pixels."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 48, 3, 2), nn.SiLU(), nn.Conv2d(48, 96, 3, 2), nn.SiLU(), nn.Conv2d(96, 64, 3, 2), nn.Flatten(), nn.Linear(576, 4))
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def training(folder: Path, act: Callable[[int, nn.Module, torch.Tensor], torch.Tensor | None] = lambda i, m, x: None,
             settings: Training = TRAINING) -> None:
    """Train to the end from what the folder holds; ``act`` may put another input in the place of a step's."""
    model = network()

    def step(i: int) -> dict[str, float]:
        x = torch.randn(settings.batch, 3, 32, 32, generator=generator("batch", i))
        changed = act(i, model, x)
        loss = (model(x if changed is None else changed) - x.mean((1, 2, 3))[:, None]).square().mean()
        loss.backward()
        return {"loss": loss.item()}

    train(model, step, settings, folder / STATE, lambda *_: None, lambda *_: None)


def forked(work: Callable[[], Any]) -> int:
    """Pid of a child that does the work; it exits with 0, or with 3 for bad input and 4 for any other error."""
    pid = os.fork()
    if pid:
        return pid
    code = 4
    try:
        torch.set_num_threads(1)
        work()
        code = 0
    except InputError:
        code = 3
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os._exit(code)


def waited(pid: int) -> int:
    """Exit code of a child, minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_until_done(work: Callable[[], Any], kills: int, longest: float, seed: int = 0) -> int:
    """SIGKILL the work at random moments, at least so often, then let it end; the kills that hit."""
    draw, hit = random.Random(seed), 0
    while hit < kills:
        pid = forked(work)
        time.sleep(draw.uniform(0.005, longest))
        os.kill(pid, signal.SIGKILL)
        code = waited(pid)
        if code == 0:
            break
        assert code == -signal.SIGKILL, "a child may only die of the kill"
        hit += 1
    assert waited(forked(work)) == 0
    return hit


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """An uninterrupted training."""
    folder = tmp_path / "whole"
    folder.mkdir()
    assert waited(forked(lambda: training(folder))) == 0
    return folder


def folder_of(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    return folder


def same(a: Path, b: Path) -> bool:
    """Whether the last states of two folders are equal byte by byte: weights, average, moments, counters."""
    last, other = states(a / STATE), states(b / STATE)
    return bool(last and other) and last[0].name == other[0].name and last[0].read_bytes() == other[0].read_bytes()


def test_fifty_kills_of_a_training(tmp_path: Path, whole: Path, record_property: Record) -> None:
    folder, hit = folder_of(tmp_path, "killed"), 0
    while hit < 50:  # a training that came to its end begins anew
        for file in folder.iterdir():
            file.unlink()
        hit += killed_until_done(lambda: training(folder), 50 - hit, 0.25, seed=hit)
        assert same(folder, whole)
    assert not list(folder.glob(".*part*")) and len(states(folder / STATE)) <= 2
    record_property("figure", ("SIGKILL in training, then resumed", f"{hit} kills, byte-equal, 0 corrupt"))


CRASHING = ("fsync", "replace", "unlink")
SHORT = Training(steps=5, batch=2, lr=0.01, warm_up=3, save_every=1, log_every=20)


def crashed_at(number: int, before: bool, folder: Path, save: Callable[..., None] = save_state) -> bool:
    """Train in a child that dies before or after its ``number``-th fsync, rename or removal; whether it came so far."""
    def work() -> None:
        calls = [0]

        def dying(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                calls[0] += 1
                if calls[0] == number and before:
                    os._exit(9)
                found = original(*arguments, **named)
                if calls[0] == number:
                    os._exit(9)
                return found

            return call

        for name in CRASHING:
            setattr(os, name, dying(getattr(os, name)))
        from alignflow_core.flow import train as loop

        loop.save_state = save
        training(folder, settings=SHORT)

    return waited(forked(work)) == 9


def crash_points(tmp_path: Path, save: Callable[..., None]) -> tuple[int, int]:
    """Points of a crash, and those after which resuming does not give the uninterrupted state."""
    reference = folder_of(tmp_path, "reference")
    assert waited(forked(lambda: training(reference, settings=SHORT))) == 0
    points = bad = 0
    for number in range(1, 200):
        reached = []
        for before in (True, False):
            folder = folder_of(tmp_path, f"{number}-{before}")
            reached.append(crashed_at(number, before, folder, save))
            if reached[-1]:
                points += 1
                bad += waited(forked(lambda folder=folder: training(folder, settings=SHORT))) != 0 or not same(folder, reference)
            shutil.rmtree(folder)
        if not any(reached):
            break
    return points, bad


def test_a_crash_at_every_point_of_a_save(tmp_path: Path, record_property: Record) -> None:
    points, bad = crash_points(tmp_path, save_state)
    assert points > 20 and bad == 0
    record_property("figure", ("crash at each fsync, rename, removal of a save", f"{points}/{points} recover"))


def in_place(file: Path, step: int, tensors: dict[str, torch.Tensor]) -> None:
    """The broken variant: one file, written where it lies under a name that promises what it will hold."""
    content = state.to_bytes({name: value.detach().contiguous() for name, value in tensors.items()})
    for old in states(file):
        old.unlink()
    with file.with_name(f"{file.stem}.{step:09d}.{state.digest(content)}.safetensors").open("wb", buffering=0) as stream:
        for start in range(0, len(content), 65536):
            stream.write(content[start:start + 65536])
            os.fsync(stream.fileno())


def test_writing_in_place_fails_the_same_test(tmp_path: Path) -> None:
    reference = folder_of(tmp_path, "reference")
    assert waited(forked(lambda: training(reference, settings=SHORT))) == 0
    lost = []
    for number in (2, 9, 10):
        folder = folder_of(tmp_path, f"broken{number}")
        assert crashed_at(number, True, folder, in_place)
        lost.append(not load_state(folder / STATE))
    assert any(lost), "a crash in the middle of an overwritten file leaves nothing to go on from"


def early_names(folder: Path, write: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, fsync: Callable[[int], None] = os.fsync) -> list[str]:
    """What a loss of power could leave half: files that had their name before all of their bytes were forced to the disk."""
    on_disk: dict[int, int] = {}  # inode -> bytes
    named: set[int] = set()
    real = os.fsync

    def recording(descriptor: int) -> None:
        fsync(descriptor)
        if fsync is real:
            on_disk[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    def renaming(rename: Callable[..., None]) -> Callable[..., None]:
        def call(source: Any, target: Any, **options: Any) -> None:
            files = [file.stat() for file in (Path(source), *Path(source).rglob("*")) if file.is_file()]
            if Path(source) != Path(target):
                named.update(file.st_ino for file in files if on_disk.get(file.st_ino) == file.st_size)
            rename(source, target, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", recording)
        for name in ("replace", "rename"):
            patch.setattr(os, name, renaming(getattr(os, name)))
        write()
    return [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and file.stat().st_ino not in named]


def made_up_moments(file: Path) -> None:
    one = Moments(5, torch.zeros(3), torch.ones(3))
    write_moments(file, ReferenceMoments({}, {"align": 5}, {"align": [one]}, [torch.zeros(3)]))


def unfinished(folder: Path) -> Path:
    """What a stage leaves for :func:`publish`."""
    part = folder / ".part"
    (part / "more").mkdir(parents=True)
    (part / "images.npy").write_bytes(b"pixels")
    (part / "more" / "table").write_bytes(b"rows")
    return part


WRITERS: dict[str, Callable[[Path], Any]] = {
    "save_state": lambda folder: training(folder, settings=SHORT),
    "save_network": lambda folder: save_network(folder / "net", {"weight": torch.arange(300.0)}, {"channels": 3}),
    "write_json": lambda folder: write_json(folder / "metrics.json", {"dice": 1.0}),
    "write_moments": lambda folder: made_up_moments(folder / "moments.safetensors"),
    "publish": lambda folder: publish(unfinished(folder), folder / "artifact"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_bytes_are_on_the_disk_before_a_file_gets_its_name(writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = folder_of(tmp_path, "a"), folder_of(tmp_path, "b")
    assert early_names(a, lambda: WRITERS[writer](a), monkeypatch) == []
    assert any(file.is_file() for file in a.rglob("*"))
    assert early_names(b, lambda: WRITERS[writer](b), monkeypatch, lambda descriptor: None), "without fsync the same check fails"


@pytest.mark.parametrize("writer", ["save_state", "publish"])
def test_a_name_lasts_through_a_loss_of_power(writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is forced to the disk after the last rename in it."""
    events: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(str(os.fstat(descriptor).st_ino)) or fsync(descriptor))
    monkeypatch.setattr(os, "replace", lambda *arguments: events.append("rename") or replace(*arguments))
    monkeypatch.setattr(os, "rename", lambda *arguments: events.append("rename") or rename(*arguments))
    WRITERS[writer](tmp_path)
    assert str(tmp_path.stat().st_ino) in events[len(events) - events[::-1].index("rename"):]


def test_what_a_killed_publication_left_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "artifact"
    publish(unfinished(tmp_path), out)

    def killed(*_: object, **__: object) -> None:
        raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda folder, **_: killed() if folder.exists() else None)
        with pytest.raises(SystemExit):
            publish(unfinished(tmp_path), out)
    assert [each.name for each in tmp_path.iterdir() if each != out], "the replaced folder is still there"
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    publish(unfinished(tmp_path), out)
    assert list(tmp_path.iterdir()) == [out]


def test_stopped_at_each_step(tmp_path: Path, whole: Path, record_property: Record) -> None:
    equal = 0
    for stop in range(STEPS):
        folder = folder_of(tmp_path, f"stop{stop}")
        with pytest.raises(SystemExit):
            training(folder, lambda i, m, x, stop=stop: os.kill(os.getpid(), signal.SIGTERM) if i == stop else None)
        assert waited(forked(lambda folder=folder: training(folder))) == 0
        equal += same(folder, whole)
        shutil.rmtree(folder)
    assert equal == STEPS
    record_property("figure", ("stop at each step and resume", f"{equal}/{STEPS} byte-equal"))


def damages(seed: int = 0) -> Iterator[tuple[str, Callable[[bytes], bytes | None]]]:
    """200 flipped bytes, 40 truncations, 20 files that are gone or empty."""
    draw = random.Random(seed)

    def flip(content: bytes) -> bytes:
        place = draw.randrange(len(content))
        return content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1:]

    yield from (("flip", flip) for _ in range(200))
    yield from (("cut", lambda content: content[:draw.randrange(1, len(content))]) for _ in range(40))
    yield from (("empty", lambda content: b"") for _ in range(10))
    yield from (("gone", lambda content: None) for _ in range(10))


def undetected(folder: Path) -> int:
    """Damages of the latest save after which something else than the save before it is read."""
    for step in (1, 2):
        save_state(folder / STATE, step, {"weight": torch.full((400,), float(step)), "done": torch.tensor([step])})
    latest, before = (file.read_bytes() for file in states(folder / STATE))
    names, bad = [file.name for file in states(folder / STATE)], 0
    for _, damage in damages():
        content = damage(latest)
        (folder / names[0]).unlink(missing_ok=True)
        if content is not None:
            (folder / names[0]).write_bytes(content)
        (folder / names[1]).write_bytes(before)
        try:
            bad += int(load_state(folder / STATE)["done"][0]) != 1
        except (InputError, KeyError):
            bad += 1
    return bad


def test_damaged_states_fall_back_to_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str], record_property: Record,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    assert undetected(folder_of(tmp_path, "a")) == 0
    said = capsys.readouterr().err
    assert said.count("damaged, its bytes are not those that were saved; the state before it is taken") == 250  # those that are gone need no word
    monkeypatch.setattr(state, "digest", lambda content: "0" * 32)
    assert undetected(folder_of(tmp_path, "b")) > 150, "without the hash the same check fails"
    record_property("figure", ("damaged training state", "260/260 detected, falls back to the one before"))


def test_damaged_networks_are_refused(tmp_path: Path, record_property: Record) -> None:
    save_network(tmp_path / "net", {"weight": torch.arange(300.0)}, {"channels": 3})
    file = tmp_path / "net" / "weights.safetensors"
    whole, refused = file.read_bytes(), 0
    for _, damage in damages(1):
        content = damage(whole)
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(InputError, match=r"weights\.safetensors"):
            load_network(tmp_path / "net")
        refused += 1
    record_property("figure", ("damaged network of an artifact", f"{refused}/260 refused, named"))


def test_a_network_is_laid_out_before_it_gets_memory(tmp_path: Path) -> None:
    """A config from elsewhere can name a network of any size."""
    devices: list[str] = []

    def build(config: dict[str, Any]) -> nn.Module:
        devices.append(torch.empty(0).device.type)
        return nn.Linear(config["channels"], 1)

    save_network(tmp_path, nn.Linear(3, 1).state_dict(), {"channels": 3})
    rebuilt(tmp_path, build)
    assert devices == ["meta", "cpu"]
    save_network(tmp_path, nn.Linear(3, 1).state_dict(), {"channels": 30})
    with pytest.raises(InputError, match="its weights are those of another network"):
        rebuilt(tmp_path, build)
    assert devices[2:] == ["meta"], "it gets no memory"


def test_what_a_killed_save_left_goes(tmp_path: Path) -> None:
    save_state(tmp_path / STATE, 1, {"weight": torch.zeros(3)})
    name = states(tmp_path / STATE)[0].name
    (tmp_path / f".{name}.part77").write_bytes(b"half")
    (tmp_path / f".other.{name}.part77").write_bytes(b"of another state")
    assert load_state(tmp_path / STATE)["weight"].tolist() == [0, 0, 0]
    assert sorted(file.name for file in tmp_path.iterdir()) == [f".other.{name}.part77", name]


@pytest.fixture
def checked_data(smoke_root: Path) -> Path:
    """A project whose stage ``data`` is built for amber."""
    assert run_stage(smoke_root, "data", "amber", quiet=True)
    return smoke_root


def test_an_altered_artifact_is_built_again(checked_data: Path) -> None:
    file = checked_data / "artifacts/data/amber/images.npy"
    content = file.read_bytes()
    assert not run_stage(checked_data, "data", "amber", quiet=True)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert run_stage(checked_data, "data", "amber", quiet=True) and file.read_bytes() == content


def test_work_begun_with_other_settings_is_not_taken_up(checked_data: Path) -> None:
    work = checked_data / ".alignflow/work/data@amber"
    work.mkdir(parents=True)
    (work / "fingerprint").write_text("of other settings")
    (work / "curves.jsonl").write_text('{"step": 7, "loss": 1.0}\n')
    assert run_stage(checked_data, "data", "amber", quiet=True, force=True)
    assert not len(pd.read_parquet(checked_data / "artifacts/data/amber/curves.parquet"))


class Full:
    """A file on a disk with so many bytes left."""

    def __init__(self, stream: Any, left: int) -> None:
        self.stream, self.left = stream, left

    def __enter__(self) -> "Full":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def write(self, content: bytes) -> None:
        self.stream.write(content[:self.left])
        if len(content) > self.left:
            raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return int(self.stream.fileno())


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record) -> None:
    tensors = {"weight": torch.arange(5000.0)}
    save_state(tmp_path / STATE, 1, tensors)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    size = len(next(iter(before.values())))
    original = Path.open
    for level in range(20):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", lambda self, *a, level=level, **k: Full(original(self, *a, **k), size * level // 20))
            with pytest.raises(StageError) as caught:
                save_state(tmp_path / STATE, 2, tensors)
        assert str(tmp_path) in str(caught.value) and "MiB" in str(caught.value) and "free some" in str(caught.value)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    record_property("figure", ("disk full at 20 fill levels", "20/20: state intact, path and size named"))


def test_a_disk_that_is_full_at_the_end_of_a_stage_is_told_too(smoke_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "publish", full)
        with pytest.raises(StageError, match="no space left on the disk; free some and run the same command"):
            run_stage(smoke_root, "data", "amber", quiet=True)
    assert not list((smoke_root / "artifacts").rglob("*amber*"))
    assert run_stage(smoke_root, "data", "amber", quiet=True)


def test_what_cannot_be_written_as_json_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "metrics.json", {"dice": 1.0, "why": object()})
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(InputError, match=r"MiB are needed to save the work and 0\.0 MiB are free"):
        training(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("error", "words"), [
    (MemoryError(), "lower align.training.batch"), (RuntimeError("CUDA out of memory. Tried to allocate"), "lower align.training.batch"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "lower align.training.batch"),
    (OSError(errno.ENOSPC, "full"), "no space left"),
])
def test_what_runs_out_is_named_with_the_setting_to_lower(error: Exception, words: str, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=words), told_limits(STAGES["align"], tmp_path / "x"):
        raise error


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), told_limits(STAGES["align"], tmp_path / "x"):
        raise RuntimeError("shapes do not fit")


def test_twenty_processes_on_one_folder(tmp_path: Path, record_property: Record) -> None:
    lock, gate = tmp_path / "node.lock", tmp_path / "gate"

    def work(number: int) -> None:
        started = time.monotonic()
        try:
            with exclusive(lock):
                while not gate.exists():
                    time.sleep(0.01)
        except InputError as error:
            (tmp_path / f"told{number}").write_text(f"{time.monotonic() - started:.3f} {error}")
            raise

    children = [forked(lambda number=number: work(number)) for number in range(20)]
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob("told*"))) < 19 and time.monotonic() < deadline:
        time.sleep(0.02)
    gate.touch()
    assert sorted(waited(child) for child in children) == [0] + [3] * 19
    told = [file.read_text().partition(" ") for file in tmp_path.glob("told*")]
    longest = max(float(seconds) for seconds, _, _ in told)
    assert all(f"pid {word}" in text for _, _, text in told for word in [text.partition("pid ")[2].partition(" ")[0]]) and longest <= 2
    assert all(os.uname().nodename in text for _, _, text in told)
    holder = forked(lambda: exclusive(lock).__enter__() or time.sleep(60))
    time.sleep(0.3)
    os.kill(holder, signal.SIGKILL)
    waited(holder)
    with exclusive(lock):
        pass
    record_property("figure", ("20 processes on one folder", f"1 runs, 19 told pid and host in {longest:.2f} s at most; no lock after a kill"))


def test_sigterm(tmp_path: Path, record_property: Record) -> None:
    draw, slowest, hit = random.Random(0), 0.0, 0
    slow = Training(steps=100_000, batch=2, save_every=1000, log_every=1000)
    for number in range(20):
        folder = folder_of(tmp_path, str(number))
        child = forked(lambda folder=folder: training(folder, lambda i, m, x: (folder / "begun").touch(), slow))
        while not (folder / "begun").exists():
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.1))
        started = time.monotonic()
        os.kill(child, signal.SIGTERM)
        assert waited(child) == 143
        slowest = max(slowest, time.monotonic() - started)
        hit += int(load_state(folder / STATE)["done"][0]) > 0
    assert hit == 20 and slowest <= 10
    record_property("figure", ("SIGTERM", f"{hit}/20 saved and gone, slowest {slowest:.2f} s"))


def test_numbers_that_are_none_stop_before_they_are_saved(tmp_path: Path, record_property: Record) -> None:
    stopped = 0
    for place in ("input", "weights", "gradient", "loss"):
        for value in (float("nan"), float("inf")):
            for at in (0, 3, 4, 9, 17):
                folder = folder_of(tmp_path, f"{place}{value}{at}")

                def act(i: int, model: nn.Module, x: torch.Tensor, place: str = place, value: float = value, at: int = at) -> torch.Tensor | None:
                    if i != at:
                        return None
                    if place == "weights":
                        model[0].weight.data[0, 0, 0, 0] = value  # type: ignore[index, union-attr]
                    elif place == "gradient":
                        model[6].weight.register_hook(lambda gradient: gradient * value)  # type: ignore[index, union-attr]
                    elif place == "loss":
                        model[6].bias.data += value  # type: ignore[index, union-attr]
                    return x * value if place == "input" else None

                with pytest.raises(StageError, match=f"step {at}:"):
                    training(folder, act)
                kept = load_state(folder / STATE)
                assert (int(kept["done"][0]) if kept else 0) == at - at % TRAINING.save_every
                assert all(tensor.isfinite().all() for tensor in kept.values() if tensor.is_floating_point())
                stopped += 1
    record_property("figure", ("NaN or Inf in loss, gradient, input, weights", f"{stopped}/40 named by step, none saved, last good state kept"))


@pytest.fixture(scope="module")
def stage_one(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of profile ``smoke`` with 200 pairs to paint, built up to stage 2."""
    from pipelines.compose import write_params

    root = tmp_path_factory.mktemp("kills") / "project"
    shutil.copytree(phantom_root / "data", root / "data")
    write_params(root / "params.yaml", ["profile=smoke", "sample.n_pairs=200", "sample.n_steps=6", "align.training.steps=12", "align.rounds=2"])
    torch.set_num_threads(1)
    for name, key in (("data", "standard"), ("data", "amber"), ("references", "amber"), ("mask_flow", None), ("image_flow", None),
                      ("sample_masks", None), ("labeller", None)):
        run_stage(root, name, key, quiet=True)
    return root


@pytest.mark.parametrize(("name", "key", "row"), [
    ("sample_stage1", None, "SIGKILL in the generation of 200 pairs"), ("align", "amber", "SIGKILL in alignment"),
])
def test_ten_kills_of_a_stage(name: str, key: str | None, row: str, stage_one: Path, tmp_path: Path, record_property: Record) -> None:
    contents, hit = [], 0
    for kills in (0, 10):
        root = tmp_path / str(kills)
        shutil.copytree(stage_one, root)
        started = time.monotonic()
        if not kills:
            assert waited(forked(lambda root=root: run_stage(root, name, key, quiet=True))) == 0
            seconds = time.monotonic() - started
        while hit < kills:
            hit += killed_until_done(lambda root=root: run_stage(root, name, key, quiet=True), kills - hit, seconds * 0.7, seed=hit)
            if hit < kills:
                shutil.rmtree(root / "artifacts" / name)
        folder = root / "artifacts" / name / (key or "")
        contents.append(read_json(folder.with_name(folder.name + ".json"))["content"])
        assert not list((root / "artifacts").rglob(".*part*"))
    assert contents[0] == contents[1]
    record_property("figure", (row, f"{hit} kills, the same bytes"))
