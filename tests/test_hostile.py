"""Whatever is handed in, the answer is one clear error or a correct read: folders, fuzzed files, bombs, checkpoints, configurations, names."""

import io
import json
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from stopwatch import timed

from alignflow_core.artifact import file_hash, tree_hash
from alignflow_core.config import Task, load_project
from alignflow_core.errors import InputError
from alignflow_core.networks import velocity_unet
from alignflow_core.readers import Picture, ReadError, read_image, read_mask
from pipelines.cli import main

Record = Callable[[str, tuple[str, str]], None]
Spoil = Callable[[Path, random.Random], str]  # spoils a folder, returns the name that the error must hold
LIMIT = 2.0  # seconds for one answer
LABELS = ["task.values={0:0,255:1}", "task.classes=[organ]"]


def pixels(rng: random.Random, size: tuple[int, int] = (24, 20), channels: int = 3) -> np.ndarray:
    shape = (size[1], size[0], channels) if channels > 1 else size[::-1]
    return np.random.default_rng(rng.randrange(2**32)).integers(0, 256, shape, np.uint8)


def save(array: np.ndarray, file: Path, **options: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file, **options)


def mask(size: tuple[int, int] = (24, 20)) -> np.ndarray:
    found = np.zeros(size[::-1], np.uint8)
    found[5:12, 4:14] = 255
    return found


def folder_of_pairs(root: Path, rng: random.Random) -> Path:
    for number in range(4):
        save(pixels(rng), root / f"images/a{number}.png")
        save(mask(), root / f"masks/a{number}.png")
    return root


def victim(folder: Path, rng: random.Random, part: str = "images") -> Path:
    return folder / part / f"a{rng.randrange(4)}.png"


def rewritten(file: Path, content: bytes) -> str:
    file.write_bytes(content)
    return file.name


def truncated(folder: Path, rng: random.Random) -> str:
    file = victim(folder, rng, rng.choice(["images", "masks"]))
    content = file.read_bytes()
    return rewritten(file, content[:rng.randrange(1, int(len(content) * 0.7))])


def flipped(folder: Path, rng: random.Random) -> str:
    """In the compressed pixels, which PNG guards by a checksum."""
    file = victim(folder, rng)
    content = bytearray(file.read_bytes())
    start = content.index(b"IDAT") + 6
    content[rng.randrange(start, len(content) - 20)] ^= 1 << rng.randrange(8)
    return rewritten(file, bytes(content))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb(side: int, colour: int = 0, depth: int = 8) -> bytes:
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def replaced(folder: Path, rng: random.Random, make: Callable[[Path], object], part: str = "images", suffix: str = ".png") -> str:
    file = victim(folder, rng, part)
    file.unlink()
    file = file.with_suffix(suffix)
    make(file)
    return file.name


def outside(folder: Path, rng: random.Random) -> str:
    elsewhere = folder.parent / f"{folder.name}-elsewhere.png"
    save(pixels(rng), elsewhere)
    return replaced(folder, rng, lambda file: file.symlink_to(elsewhere if rng.random() < 0.5 else Path("..", "..", elsewhere.name)))


def other_size(folder: Path, rng: random.Random) -> str:
    file = victim(folder, rng, "masks")
    save(mask((rng.randrange(15, 24), rng.randrange(25, 40))), file)
    return file.name


def unknown_label(folder: Path, rng: random.Random) -> str:
    file = victim(folder, rng, "masks")
    save(np.where(mask() > 0, np.uint8(rng.randrange(1, 255)), np.uint8(0)), file)
    return file.name


def case_collision(folder: Path, rng: random.Random) -> str:
    name = f"a{rng.randrange(4)}"
    save(pixels(rng), folder / f"images/{name.upper()}.bmp")
    return name.upper()


def emptied(folder: Path, rng: random.Random) -> str:
    for file in (folder / "images").iterdir():
        file.unlink()
    return "images"


def groups(folder: Path, rng: random.Random) -> str:
    lines = ["a0,p\n../../etc/passwd,q\n", "a0,nan\na0,p\n", "nobody,p\n", "a1,\n", "a2,p\na2,q\n", "../a1,p\n", "/etc/shadow,p\n", "a9,p\n",
             "a1.png,p\n", "a3, \n"]
    (folder / "groups.csv").write_text("stem,patient\n" + lines[rng.randrange(len(lines))])
    return "groups.csv"


def same_stem(folder: Path, rng: random.Random) -> str:
    file = victim(folder, rng)
    save(pixels(rng), file.with_suffix(rng.choice([".jpg", ".bmp", ".tif"])))
    return file.stem


def animated(folder: Path, rng: random.Random) -> str:
    frames = [Image.fromarray(pixels(rng, channels=1)) for _ in range(rng.randrange(2, 5))]
    suffix = rng.choice([".gif", ".tif"])
    return replaced(folder, rng, lambda file: frames[0].save(file, save_all=True, append_images=frames[1:]), suffix=suffix)


def written(content: Callable[[random.Random], bytes]) -> Spoil:
    """An image replaced by other bytes."""
    return lambda folder, rng: replaced(folder, rng, lambda file: file.write_bytes(content(rng)))


def as_mask(make: Callable[[random.Random], Image.Image], suffix: str = ".png") -> Spoil:
    """A mask replaced by another picture."""
    return lambda folder, rng: replaced(folder, rng, lambda file: make(rng).save(file), "masks", suffix)


KINDS: dict[str, Spoil] = {
    "truncated": truncated,
    "bit flipped": flipped,
    "bomb": written(lambda r: bomb(r.randrange(9000, 60000), r.choice([0, 2, 3, 6]))),
    "wrong type behind the suffix": written(lambda r: r.choice([b"%PDF-1.4", b"PK\3\4", b"GIF8x", b"\x7fELF"]) + r.randbytes(300)),
    "pipe": lambda d, r: replaced(d, r, os.mkfifo),
    "link out of the root": outside,
    "16 bit mask of unknown labels": as_mask(lambda r: Image.fromarray(np.full((20, 24), r.randrange(300, 60000), np.uint16))),
    "coloured mask": as_mask(lambda r: Image.fromarray(pixels(r))),
    "CMYK mask": as_mask(lambda r: Image.fromarray(pixels(r)).convert("CMYK"), ".tif"),
    "palette mask of unknown labels": as_mask(lambda r: Image.fromarray(pixels(r, channels=1) % 9 + 1).convert("P")),
    "animated": animated,
    "mask of another size": other_size,
    "unknown label": unknown_label,
    "floating point mask": as_mask(lambda r: Image.fromarray(np.full((20, 24), r.random(), np.float32)), ".tif"),
    "missing partner": lambda d, r: (file := victim(d, r, r.choice(["images", "masks"])), file.unlink())[0].name,
    "duplicate id": same_stem,
    "case collision": case_collision,
    "empty folder": emptied,
    "groups that name what is not there": groups,
    "empty file": lambda d, r: rewritten(victim(d, r, r.choice(["images", "masks"])), b""),
}


@pytest.fixture(scope="module")
def labels_task() -> Task:
    return Task("labels", "labels", ("organ",), values={0: 0, 255: 1})


def answered(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> str | None:
    """What is wrong with the answer of ``alignflow check`` to a spoiled folder; ``None`` where it is as it must be."""
    def check() -> tuple[int, str]:
        code = main(["check", str(folder), "--task", "labels", *LABELS])
        return code, capsys.readouterr().err

    before = sorted(str(file) for file in folder.rglob("*"))
    (code, said), seconds = timed(check, LIMIT)
    lines = said.strip().splitlines()
    if code != 2:
        return f"exit code {code}"
    if "Traceback" in said or not lines or not all(line.startswith("error: ") and "; " in line for line in lines):
        return f"no clear error: {said[:200]}"
    if not any(name in line for line in lines):
        return f"{name} is not named: {said[:200]}"
    return "something was written" if sorted(str(file) for file in folder.rglob("*")) != before else f"{seconds:.1f} s" if seconds > LIMIT else None


def test_two_hundred_malformed_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str], record_property: Record) -> None:
    whole = folder_of_pairs(tmp_path / "whole", random.Random(0))
    assert main(["check", str(whole), "--task", "labels", *LABELS]) == 0
    capsys.readouterr()
    wrong = []
    for kind, spoil in KINDS.items():
        for number in range(10):
            rng, folder = random.Random(f"{kind}{number}"), tmp_path / f"spoiled{number}"
            folder_of_pairs(folder, rng)
            name = spoil(folder, rng)
            problem = answered(folder, name, capsys)
            wrong += [f"{kind} {number}: {problem}"] if problem else []
            shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)
    record_property("figure", ("200 malformed inputs of 20 kinds", "200/200: file, cause, remedy, exit code 2, nothing written"))


def other_stems(folder: Path, problems: list[str], ignored: tuple[str, ...] = ()) -> dict[str, Path]:
    """As the reader's, but for the rule that names may not differ in case alone."""
    return {file.stem: file for file in sorted(folder.iterdir()) if (folder.parent / "masks" / f"{file.stem}.png").exists()}


RULES: dict[str, tuple[str, object, object]] = {  # kind -> what a reader without the rule that catches it has in its place
    "bomb": ("alignflow_core.readers._decode", None, lambda data, size: (Image.new("L", (24, 20)), 24, 20)),
    "link out of the root": ("is_relative_to", Path, lambda self, other: True),
    "unknown label": ("alignflow_core.readers._classes", None, lambda values, task: (values > 0).astype(np.uint8)),
    "case collision": ("alignflow_core.folders._by_stem", None, other_stems),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_reader_without_its_rule_fails_the_same_test(rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(f"{rule}0")
    folder = folder_of_pairs(tmp_path / "spoiled", rng)
    name = KINDS[rule](folder, rng)
    assert answered(folder, name, capsys) is None
    place, owner, without = RULES[rule]
    monkeypatch.setattr(*((place,) if owner is None else (owner, place)), without)
    assert answered(folder, name, capsys) is not None


def encodings(rng: random.Random) -> list[bytes]:
    found = []
    for suffix, channels in (("png", 3), ("jpeg", 3), ("tiff", 3), ("bmp", 3), ("gif", 1), ("png", 1)):
        stream = io.BytesIO()
        Image.fromarray(pixels(rng, (16, 12), channels)).save(stream, suffix)
        found.append(stream.getvalue())
    return found


def answer_of(read: Callable[[], Picture]) -> Picture | ReadError:
    try:
        return read()
    except ReadError as error:
        return error


def fuzz(count: int, folder: Path, task: Task) -> float:
    """Read mutated images and masks; longest time of one. Anything but a picture or a :class:`ReadError` is raised."""
    rng, longest, told = random.Random(7), 0.0, [""]
    seeds, file = encodings(rng), folder / "x.png"
    for number in range(count):
        content = bytearray(rng.choice(seeds))
        for _ in range(rng.randrange(1, 12)):
            place = rng.randrange(len(content))
            how = rng.randrange(4)
            if how == 0:
                content[place] ^= 1 << rng.randrange(8)
            elif how == 1:
                content[place:place + 4] = struct.pack(">I", rng.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, rng.randrange(2**32)]))
            elif how == 2:
                del content[place:place + rng.randrange(1, 40)]
            else:
                content[place:place] = rng.randbytes(rng.randrange(1, 20))
            if not content:
                content = bytearray(b"x")
        file.write_bytes(bytes(content))
        read = partial(read_image, file, folder, 32 if number % 2 else None) if number % 3 else partial(read_mask, file, folder, task)
        found, seconds = timed(partial(answer_of, read), LIMIT)
        if isinstance(found, ReadError):
            told.append(str(found))
        else:
            assert found.pixels.dtype == np.uint8 and found.pixels.ndim == (3 if number % 3 else 2)
        longest = max(longest, seconds)
    assert len(told) > count // 4 and all(told[1:]) and not any("\n" in line for line in told)
    return longest


@pytest.mark.parametrize("count", [1500, pytest.param(20_000, marks=pytest.mark.nightly)])
def test_fuzzed_images_and_masks(count: int, tmp_path: Path, labels_task: Task, record_property: Record) -> None:
    longest = fuzz(count, tmp_path, labels_task)
    assert longest <= LIMIT
    record_property("figure", ("fuzzed images and masks", f"{count}: our error or a picture, longest {longest:.2f} s"))


BOMBS = {**{f"PNG {side} colour {colour}": bomb(side, colour) for side in (9000, 30000, 2**31 - 1) for colour in (0, 2)},
         "TIFF of 10^10 pixels": b"II*\0\x08\0\0\0\x02\0\0\1\4\0\1\0\0\0\xa0\x86\1\0\1\1\4\0\1\0\0\0\xa0\x86\1\0\0\0\0\0",
         "BMP of 10^10 pixels": b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 10**5, 10**5, 1, 24, 0, 0, 1, 1, 0, 0),
         "GIF 65535": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0" + struct.pack("<HH", 65535, 65535) + b"\0\2\0;",
         "PNG whose text unpacks to 50 MiB": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
         + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50 * 2**20))) + chunk(b"IDAT", zlib.compress(bytes(72))) + chunk(b"IEND", b""),
         "PNG whose colour profile unpacks to 50 MiB": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
         + chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(50 * 2**20))) + chunk(b"IDAT", zlib.compress(bytes(72))) + chunk(b"IEND", b""),
         "PNG with more pixels than it says": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
         + chunk(b"IDAT", zlib.compress(bytes(200 * 2**20))) + chunk(b"IEND", b"")}


def test_bombs_cost_neither_time_nor_memory(tmp_path: Path, record_property: Record) -> None:
    import resource

    before, harmless = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for content in BOMBS.values():
        file = tmp_path / "x.png"
        file.write_bytes(content)
        found, seconds = timed(partial(answer_of, partial(read_image, file, tmp_path, 32)), LIMIT)
        harmless += isinstance(found, ReadError) or found.width <= 8  # small pixels beside hidden data, which is never unpacked
        assert seconds <= LIMIT
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert harmless == len(BOMBS) == 12 and grown < 300
    record_property("figure", ("bombs", f"{harmless}/12 harmless, {grown:.0f} MiB"))


def hostile_checkpoints(folder: Path, canary: Path) -> dict[str, Callable[[], None]]:
    """Name -> what spoils a checkpoint folder whose recorded hash is right, so that the reader itself must refuse."""
    file, config = folder / "weights.safetensors", folder / "config.json"
    weights, facts = file.read_bytes(), json.loads(config.read_text())

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {canary}",)

    import pickle  # what an attacker writes; nothing here reads it

    def put(content: bytes) -> None:
        file.write_bytes(content)
        config.write_text(json.dumps(facts | {"weights_sha256": file_hash(file)}))

    def header(values: object) -> None:
        body = json.dumps(values).encode()
        put(struct.pack("<Q", len(body)) + body)

    def tensors(found: dict[str, torch.Tensor]) -> None:
        save_file(found, file)
        put(file.read_bytes())

    def say(**changes: object) -> None:
        config.write_text(json.dumps(facts | changes))

    return {
        "pickle": lambda: put(pickle.dumps(Evil())), "torch file": lambda: torch.save({"w": Evil()}, file) or put(file.read_bytes()),
        "archive": lambda: put(b"PK\3\4" + bytes(200)), "no header": lambda: put(b""), "huge header": lambda: put(struct.pack("<Q", 2**62) + b"{}"),
        "offsets beyond the end": lambda: header({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        "unknown type": lambda: header({"w": {"dtype": "EVIL", "shape": [1], "data_offsets": [0, 4]}}),
        "tensors of other names": lambda: tensors({"w": torch.zeros(3)}),
        "one tensor of another shape": lambda: tensors({"unet.conv_in.conv.weight": torch.zeros(1)}),
        "hash of something else": lambda: file.write_bytes(weights + b"x"), "no weights": file.unlink,
        "broken config": lambda: config.write_text("{"), "config that names code": lambda: say(conditioner=f"os:system touch {canary}"),
        "huge network": lambda: say(network=facts["network"] | {"channels": [2**40, 2**40]}),
        "config of another kind": lambda: config.write_text("[]"),
    }


def test_hostile_checkpoints_are_refused(tmp_path: Path, record_property: Record) -> None:
    from alignflow_core.config import Network

    network, canary, folder, refused = Network(channels=(8, 16), attention=(False, False), head_channels=8), tmp_path / "canary", tmp_path / "net", 0
    model = velocity_unet.build(3, 2, network, seed=0)
    velocity_unet.save(folder, model.state_dict(), 3, 2, network)
    velocity_unet.load(folder)
    for name in list(hostile_checkpoints(folder, canary)):
        shutil.rmtree(folder, ignore_errors=True)
        velocity_unet.save(folder, model.state_dict(), 3, 2, network)
        hostile_checkpoints(folder, canary)[name]()
        with pytest.raises(InputError) as caught:
            velocity_unet.load(folder)
        assert str(folder) in str(caught.value), name
        refused += 1
    assert refused == 15 and not canary.exists()
    record_property("figure", ("hostile checkpoints", f"{refused}/15 refused, canary never made"))


def hostile_configs(canary: Path) -> list[str]:
    """Texts of ``params.yaml`` that name code, unknown keys, wrong types, impossible values."""
    whole = {"source": "a", "domains": {"a": {"dir": "a"}, "b": {"dir": "b"}}, "targets": {"b": {"domain": "b"}}}
    changes: list[dict[str, object]] = [
        {"_target_": "os.system"}, {"machine": {"_target_": "os.system", "command": f"touch {canary}"}}, {"machine": {"threads": "2; rm"}},
        {"seed": "x"}, {"seed": [1]}, {"machine": {"device": "evil"}}, {"task": {"kind": "binary", "classes": "x"}}, {"data": {"size": -3}},
        {"data": {"size": 1e9}}, {"targets": {"../b": {"domain": "b"}}}, {"domains": {"a/../../x": {"dir": "a"}}}, {"source": "../a"},
        {"image_flow": {"training": {"lr": "nan"}}}, {"image_flow": {"training": {"lr": float("inf")}}},
        {"image_flow": {"network": {"channels": ["8"]}}},
        {"targets": {"b": {"domain": "b", "align": {"reward": "__import__('os').system"}}}}, {"segment": {"arms": ["evil"]}},
        {"comparators": {"x": {"conditioner": "os:system"}}}, {"evaluate": {"bootstrap": None}}, {"report": 3}, {"targets": []}, {"unknown": {}},
    ]
    texts = [yaml.safe_dump(whole | change) for change in changes]
    return [*texts, f"!!python/object/apply:os.system ['touch {canary}']", "a: &a [*a]\nsource: [", "- 1\n- 2\n"]


def test_hostile_configurations_are_refused(tmp_path: Path, record_property: Record) -> None:
    canary, file, refused = tmp_path / "canary", tmp_path / "params.yaml", 0
    for text in hostile_configs(canary):
        file.write_text(text)
        with pytest.raises(InputError) as caught:
            load_project(file)
        assert str(file) in str(caught.value), text
        refused += 1
    assert refused == 25 and not canary.exists()
    record_property("figure", ("hostile configurations", f"{refused}/25 refused, canary never made"))


def test_paths_stay_inside(tmp_path: Path, capsys: pytest.CaptureFixture[str], record_property: Record) -> None:
    """Names of targets and runs that would lead elsewhere: nothing outside the project appears."""
    (tmp_path / "inside").mkdir()
    before, refused = tree_hash(tmp_path), 0
    names = ["../x", "..", "/x", "a/b", "a\\b", "", " ", ".", "-x", "a\n", "a\0b", "~", "$HOME", "%00", "a" * 64, "x;y", "x|y", "x`y`", "é/..", "a:b"]
    for name in names:
        for command in (["run", "--source", str(tmp_path), "--target", f"{name}={tmp_path}", "--references", "5", "--task", "binary",
                         "--out", str(tmp_path / "inside" / "run")],
                        ["init", "--root", str(tmp_path / "inside" / "p"), "--source", "a", "--target", name, "--task", "binary"]):
            try:
                code: object = main(command)
            except SystemExit as usage:  # a name that looks like an option
                code = usage.code
            assert code == 2, (name, command[0])
            assert "Traceback" not in capsys.readouterr().err
            refused += 1
    assert tree_hash(tmp_path) == before and refused == 40
    record_property("figure", ("paths in names", f"{refused}/40 refused, nothing written"))
