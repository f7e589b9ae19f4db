"""Bad input: every problem is named with its file, and nothing is written."""

import errno
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from alignflow_core import runner
from alignflow_core.artifact import tree_hash
from alignflow_core.config import Task
from alignflow_core.data import case_id, check_folder
from alignflow_core.errors import InputError
from alignflow_core.readers import MAX_BYTES, ReadError, read_bytes, read_image, read_mask
from alignflow_core.runner import run_stage

LABELS = Task("labels", "labels", ("organ",), values={0: 0, 255: 1})


def save(value: int, file: Path, size: tuple[int, int] = (24, 20)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size[::-1], value, np.uint8)).save(file)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight fine pairs, ``a0`` to ``a7``."""
    root = tmp_path / "raw"
    for n in range(8):
        save(10 * n, root / f"images/a{n}.png")
        save(255, root / f"masks/a{n}.png")
    return root


def problems(folder: Path, task: Task = LABELS, labelled: bool = True) -> list[str]:
    with pytest.raises(InputError) as caught:
        check_folder(folder, task, labelled)
    return list(caught.value.problems)


def _bomb(file: Path, side: int) -> None:
    """A PNG of a few bytes that claims ``side`` by ``side`` pixels."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def _replace(file: Path, make: Callable[[Path], None]) -> None:
    file.unlink()
    make(file)


def _truncate(folder: Path) -> None:
    file = folder / "images/a1.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 24, 3), np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:800])


def _animate(folder: Path) -> None:
    (folder / "images/a1.png").unlink()
    frames = [Image.new("L", (24, 20), value) for value in (0, 90)]
    frames[0].save(folder / "images/a1.gif", save_all=True, append_images=frames[1:])


def _floats(folder: Path) -> None:
    (folder / "images/a1.png").unlink()
    Image.fromarray(np.ones((20, 24), np.float32)).save(folder / "images/a1.tif")


def _wide(folder: Path, value: int) -> None:
    (folder / "images/a1.png").unlink()
    Image.fromarray(np.full((20, 24), value, np.int32)).save(folder / "images/a1.tif")


def _pages(folder: Path) -> None:
    (folder / "images/a1.png").unlink()
    Image.new("L", (24, 20)).save(folder / "images/a1.tif", save_all=True, append_images=[Image.new("L", (24, 20), 90)])


def _link_out(folder: Path) -> None:
    outside = folder.parent / "outside.png"
    save(1, outside)
    _replace(folder / "images/a1.png", lambda file: file.symlink_to(outside))


def _groups_out(folder: Path) -> None:
    (folder.parent / "outside.csv").write_text("stem,patient\na1,x\n")
    (folder / "groups.csv").symlink_to(folder.parent / "outside.csv")


def _two_group_files(folder: Path) -> None:
    for name in ("groups.csv", "sequences.csv"):
        (folder / name).write_text("stem,patient\na1,x\n")


def _too_many_bytes(folder: Path) -> None:
    os.truncate(folder / "images/a1.png", MAX_BYTES + 1)  # takes no space on the disk


def _circle(folder: Path) -> None:
    _replace(folder / "images/a1.png", lambda file: file.symlink_to(file))


CASES: dict[str, tuple[Callable[[Path], Any], str, str]] = {  # what is done, the file named, the cause named
    "no mask": (lambda d: (d / "masks/a1.png").unlink(), "images/a1.png", "has no mask"),
    "no image": (lambda d: (d / "images/a1.png").unlink(), "masks/a1.png", "has no image"),
    "other size": (lambda d: save(255, d / "masks/a1.png", (20, 24)), "masks/a1.png", "is 20x24, its image a1.png is 24x20"),
    "unknown label": (lambda d: save(37, d / "masks/a1.png"), "masks/a1.png", "unknown label values 37"),
    "truncated PNG": (_truncate, "images/a1.png", "cannot be decoded"),
    "empty file": (lambda d: (d / "images/a1.png").write_bytes(b""), "images/a1.png", "is not a JPEG, PNG"),
    "text behind .png": (lambda d: (d / "images/a1.png").write_text("hello"), "images/a1.png", "is not a JPEG, PNG"),
    "other suffix": (lambda d: (d / "images/notes.txt").write_text("hello"), "images/notes.txt", "is not an image file"),
    "other format": (lambda d: Image.new("RGB", (24, 20)).save(d / "images/a1.png", "PPM"), "images/a1.png", "is not a JPEG, PNG"),
    "folder among images": (lambda d: (d / "images/more").mkdir(), "images/more", "is not an image file"),
    "folder named as an image": (lambda d: _replace(d / "images/a1.png", Path.mkdir), "images/a1.png", "cannot be opened (Is a directory)"),
    "too many bytes": (_too_many_bytes, "images/a1.png", "has 256 MiB, the limit is 256"),
    "pipe": (lambda d: _replace(d / "images/a1.png", os.mkfifo), "images/a1.png", "is not a regular file"),
    "link out of the folder": (_link_out, "images/a1.png", "leads out of the data folder"),
    "link to nothing": (lambda d: _replace(d / "masks/a1.png", lambda f: f.symlink_to(f.with_name("gone"))), "masks/a1.png", "cannot be opened"),
    "link to itself": (_circle, "images/a1.png", "cannot be opened"),
    "animation": (_animate, "images/a1.gif", "2 frames"),
    "values below 0": (lambda d: _wide(d, -1), "images/a1.tif", "holds values outside 0..65535"),
    "values above 65535": (lambda d: _wide(d, 65536), "images/a1.tif", "holds values outside 0..65535"),
    "floating point": (_floats, "images/a1.tif", "floating point pixels"),
    "pages": (_pages, "images/a1.tif", "2 frames or pages"),
    "same stem twice": (lambda d: save(1, d / "images/a1.bmp"), "images/a1.png", "has the stem of a1.bmp"),
    "large": (lambda d: _bomb(d / "images/a1.png", 9000), "images/a1.png", "more than 64 million pixels"),
    "bomb": (lambda d: _bomb(d / "images/a1.png", 40000), "images/a1.png", "more than 64 million pixels"),
    "group of an unknown stem": (lambda d: (d / "groups.csv").write_text("stem,p\na1.png,1\n"), "groups.csv", "no image has the stem 'a1.png'"),
    "no group": (lambda d: (d / "groups.csv").write_text("stem,p\na1,\n"), "groups.csv", "no group for stem 'a1'"),
    "two groups": (lambda d: (d / "groups.csv").write_text("stem,p\na1,x\na1,y\n"), "groups.csv", "in group 'x' and in 'y'"),
    "two group files": (_two_group_files, "sequences.csv", "two group files in one folder"),
    "groups of another folder": (_groups_out, "groups.csv", "leads out of the data folder"),
    "groups that are gone": (lambda d: (d / "groups.csv").symlink_to("gone"), "groups.csv", "cannot be opened"),
    "groups that are a folder": (lambda d: (d / "groups.csv").mkdir(), "groups.csv", "cannot be opened (Is a directory)"),
    "groups of other capitals": (lambda d: (d / "Groups.CSV").write_text("stem,p\na1,\n"), "Groups.CSV", "no group for stem 'a1'"),
    "quote without end": (lambda d: (d / "groups.csv").write_text('stem,p\na1,"x\n'), "groups.csv", "not readable as CSV"),
    "empty groups": (lambda d: (d / "groups.csv").touch(), "groups.csv", "header 'stem,group'"),
    "empty line before the header": (lambda d: (d / "groups.csv").write_text("\nstem,p\na1,x\n"), "groups.csv", "header 'stem,group'"),
    "one column": (lambda d: (d / "groups.csv").write_text("stem\na1\n"), "groups.csv", "header 'stem,group'"),
    "semicolons": (lambda d: (d / "groups.csv").write_text("stem;p\na1;x\n"), "groups.csv", "header 'stem,group'"),
    "no header": (lambda d: (d / "groups.csv").write_text("a1,x\n"), "groups.csv", "header 'stem,group'"),
    "binary groups": (lambda d: (d / "groups.csv").write_bytes(b"\xff\xfe\x00stem"), "groups.csv", "not readable as CSV"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_problem_names_file_and_cause(name: str, folder: Path) -> None:
    spoil, file, cause = CASES[name]
    spoil(folder)
    found = problems(folder)
    assert len(found) == 1 and found[0].startswith(str(folder / file)) and cause in found[0], found


def test_stems_that_differ_in_case_alone(folder: Path) -> None:
    save(1, folder / "images/A1.bmp")
    found = problems(folder)
    assert len(found) == 2 and "A1.bmp: has no mask" in found[0] and "a1.png: has the stem of A1.bmp" in found[1]


def test_truncated_jpeg(folder: Path) -> None:
    (folder / "images/a1.png").unlink()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 240, 3), np.uint8)).save(folder / "images/a1.jpg")
    (folder / "images/a1.jpg").write_bytes((folder / "images/a1.jpg").read_bytes()[:9000])
    assert any("a1.jpg: cannot be decoded" in problem for problem in problems(folder))


def test_all_problems_are_listed_together(folder: Path) -> None:
    (folder / "masks/a0.png").unlink()
    (folder / "images/a1.png").write_text("hello")
    save(37, folder / "masks/a2.png")
    save(255, folder / "masks/a3.png", (5, 5))
    (folder / "groups.csv").write_text("stem,p\nnobody,1\n")
    found = problems(folder)
    assert [any(part in problem for problem in found) for part in ("a0.png", "a1.png", "a2.png", "a3.png", "groups.csv")] == [True] * 5
    assert len(found) == 5


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    assert problems(tmp_path / "nowhere") == [f"{tmp_path}/nowhere: no such folder; create it or correct the path"]
    (tmp_path / "x").mkdir()
    assert [p.split(":")[0] for p in problems(tmp_path / "x")] == [str(tmp_path / "x/images"), str(tmp_path / "x/masks")]
    (tmp_path / "x/images").mkdir()
    (tmp_path / "x/masks").mkdir()
    assert "holds no image" in problems(tmp_path / "x")[0]


def test_a_pipe_does_not_hang_the_check(folder: Path) -> None:
    def too_late(*_: object) -> None:
        raise AssertionError("the check waits for somebody who writes into the pipe")

    _replace(folder / "images/a1.png", os.mkfifo)
    signal.signal(signal.SIGALRM, too_late)
    signal.alarm(2)
    try:
        assert "is not a regular file" in problems(folder)[0]
    finally:
        signal.alarm(0)


def test_a_file_that_hides_its_size_is_read_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.stat().st_size:
        pytest.skip("needs /proc, whose files say that they hold nothing")
    monkeypatch.setattr("alignflow_core.readers.MAX_BYTES", 100)
    assert len(read_bytes(maps, maps.parent)) <= 101


def test_links_may_lead_to_other_data_of_the_project(folder: Path) -> None:
    (folder.parent / "refs").mkdir()
    (folder.parent / "refs/new.png").symlink_to(folder / "images/a1.png")
    assert check_folder(folder.parent / "refs", LABELS, labelled=False, root=folder.parent).cases[0].stem == "new"
    with pytest.raises(InputError, match="leads out of the data folder"):
        check_folder(folder.parent / "refs", LABELS, labelled=False)
    with pytest.raises(InputError, match="leads out of the data folder"):
        check_folder(folder.parent / "refs", LABELS, labelled=False, root=folder)  # a folder beside the project is its own root


def test_references_beside_their_masks_and_groups(folder: Path) -> None:
    for file in (folder / "images").iterdir():
        file.rename(folder / file.name)
    (folder / "images").rmdir()
    (folder / "groups.csv").write_text("stem,patient\na1,x\n")
    listing = check_folder(folder, LABELS, labelled=False)
    assert listing.labelled and [case.image_file for case in listing.cases] == [f"a{n}.png" for n in range(8)] and listing.cases[1].group == "x"


def test_groups_as_spreadsheets_write_them(folder: Path) -> None:
    (folder / "groups.csv").write_bytes("\ufeffstem,patient\r\na1, Anna \r\n\r\n ,\r\na2,Anna\r\n".encode())
    groups = [case.group for case in check_folder(folder, LABELS).cases]
    assert groups[1:3] == ["Anna", "Anna"] and len(set(groups)) == 7


def test_a_camera_s_preview_is_no_second_frame(tmp_path: Path) -> None:
    picture, preview = Image.new("RGB", (24, 20), (9, 9, 9)), Image.new("RGB", (8, 6))
    picture.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[preview])
    assert read_image(tmp_path / "a.jpg", tmp_path).pixels.shape == (20, 24, 3)


def test_label_masks_of_one_bit_and_wide_binary_ones(tmp_path: Path) -> None:
    Image.fromarray(np.array([[False, True]])).save(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png", tmp_path, LABELS).pixels.tolist() == [[0, 1]]
    assert read_mask(tmp_path / "a.png", tmp_path, Task("labels", "labels", ("organ",), values={0: 0, 1: 1})).pixels.tolist() == [[0, 1]]
    Image.fromarray(np.array([[0, 70000]], np.int32)).save(tmp_path / "wide.tif")
    with pytest.raises(ReadError, match=r"outside 0\.\.65535"):
        read_mask(tmp_path / "wide.tif", tmp_path, Task())


def test_a_file_that_is_no_picture_is_not_decoded_by_others(tmp_path: Path) -> None:
    """PostScript would start a program that interprets it."""
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(ReadError, match="is not a JPEG, PNG"):
        read_image(tmp_path / "a.png", tmp_path)


def test_masks_without_any_foreground_are_kept_unless_all_are(folder: Path) -> None:
    save(0, folder / "masks/a1.png")
    assert check_folder(folder, LABELS).empty_masks == ("masks/a1.png",)
    for n in range(8):
        save(1, folder / f"masks/a{n}.png")
    assert "no mask has any foreground" in problems(folder, Task())[0]


def test_hidden_files_are_ignored_and_coloured_label_masks_refused(folder: Path) -> None:
    (folder / "images/.DS_Store").write_text("x")
    (folder / "images/Thumbs.db").write_text("x")
    assert len(check_folder(folder, LABELS).cases) == 8
    Image.new("RGB", (24, 20), (255, 0, 0)).save(folder / "masks/a1.png")
    assert "coloured mask" in problems(folder)[0]


@pytest.fixture
def project(folder: Path) -> Path:
    """A project whose domains ``here``, which is built, and ``there`` are the folder and one like it, with references in ``refs``."""
    root = folder.parent
    for name in ("here", "there"):
        shutil.copytree(folder, root / name)
    for number, file in enumerate(sorted((root / "there/images").iterdir())):
        save(10 * number + 5, file)
    save(201, root / "refs/new.png")
    (root / "params.yaml").write_text(yaml.safe_dump({
        "source": "here", "domains": {"here": {"dir": "here"}, "there": {"dir": "there"}}, "data": {"size": 24},
        "targets": {"there": {"domain": "there", "references": {"dir": "refs"}}, "many": {"domain": "there", "references": {"count": 50}}}}))
    run_stage(root, "data", "here", quiet=True)
    return root


def _stems(root: Path, split: str) -> list[str]:
    table = pd.read_parquet(root / "artifacts/data/there/manifest.parquet")
    stems = {case_id("there", file.stem): file.stem for file in (root / "there/images").iterdir()}
    return sorted(stems[case] for case in table.loc[table["split"] == split, "case_id"])


def test_references_that_are_test_images_stop_the_run(project: Path) -> None:
    run_stage(project, "data", "there", quiet=True)
    first, second = _stems(project, "test")[:2]
    shutil.copy(project / f"there/images/{first}.png", project / "refs/renamed.png")  # by content
    save(202, project / f"refs/{second}.png")  # by patient
    with pytest.raises(InputError) as caught:
        run_stage(project, "references", "there", quiet=True)
    found = sorted(caught.value.problems)
    assert len(found) == 2 and f"{second}.png: belongs to the patient" in found[0]
    assert f"renamed.png: is the test image {case_id('there', first)}" in found[1]
    assert not (project / "artifacts/references").exists() or not any((project / "artifacts/references").iterdir())
    (project / "refs/renamed.png").unlink()
    (project / "refs/groups.csv").write_text(f"stem,patient\n{second},somebody else\n")
    assert run_stage(project, "references", "there", quiet=True)


@pytest.mark.parametrize(("theirs", "ours", "leaks"),
                         [("test", "train", True), ("test", "val", True), ("test", "test", False), ("train", "train", False)])
def test_test_images_that_the_source_learns_from_stop_the_run(project: Path, theirs: str, ours: str, leaks: bool) -> None:
    """An image that two hospitals' folders share, as public sets do, under two names."""
    run_stage(project, "data", "there", quiet=True)
    stem = _stems(project, theirs)[0]
    for name in ("images", "masks"):
        shutil.copy(project / f"there/{name}/{stem}.png", project / f"here/{name}/b0.png")
    run_stage(project, "data", "here", quiet=True)
    file = project / "artifacts/data/here/manifest.parquet"
    table = pd.read_parquet(file)
    table.assign(split=table["split"].mask(table["case_id"] == case_id("here", "b0"), ours)).to_parquet(file)
    if not leaks:
        assert run_stage(project, "references", "there", quiet=True)
        return
    with pytest.raises(InputError) as caught:
        run_stage(project, "references", "there", quiet=True)
    told, = caught.value.problems
    assert f"there: its test image {case_id('there', stem)} is also the image {case_id('here', 'b0')} of the source 'here'" in told
    assert not (project / "artifacts/references/there").exists()


def test_training_images_of_the_domain_may_be_references(project: Path) -> None:
    run_stage(project, "data", "there", quiet=True)
    stem = _stems(project, "train")[0]
    shutil.copy(project / f"there/images/{stem}.png", project / f"refs/{stem}.png")
    assert run_stage(project, "references", "there", quiet=True)


def test_every_file_is_read_once(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is what was checked and hashed, whatever happens to the file meanwhile."""
    opened: list[str] = []

    def read(file: Path, root: Path) -> bytes:
        opened.append(file.name)
        return read_bytes(file, root)

    monkeypatch.setattr("alignflow_core.readers.read_bytes", read)
    run_stage(project, "data", "there", quiet=True)
    assert len(opened) == 2 * len(list((project / "there/images").iterdir()))
    opened.clear()
    run_stage(project, "references", "there", quiet=True)
    assert sorted(opened) == sorted(file.name for file in (project / "refs").glob("*.png"))


def test_references_of_a_folder_are_in_a_drawn_order(project: Path) -> None:
    for number in range(4):
        save(210 + number, project / f"refs/more{number}.png")
    names = sorted((project / "refs").glob("*.png"))
    for number, file in enumerate(names):  # each mask has foreground of its own size
        (project / "refs/masks").mkdir(exist_ok=True)
        mask = np.where(np.arange(20)[:, None] < 4 * number + 4, 255, 0).astype(np.uint8)
        Image.fromarray(np.broadcast_to(mask, (20, 24)).copy()).save(project / "refs/masks" / file.name)
    run_stage(project, "data", "there", quiet=True)
    run_stage(project, "references", "there", quiet=True)
    written, masks = (np.load(project / f"artifacts/references/there/{name}.npy") for name in ("images", "masks"))
    table = pd.read_parquet(project / "artifacts/references/there/manifest.parquet")
    by_name = [read_image(file, project, written.shape[1]) for file in names]
    pictures = {each.sha256: each.pixels for each in by_name}
    assert list(table["image_sha256"]) != list(pictures) and len(table) == len(pictures) == 5
    for row, sha256 in zip(written, table["image_sha256"], strict=True):
        assert (row == pictures[sha256]).all()
    assert masks.any((2,)).sum(1).argsort().tolist() == [list(table["image_sha256"]).index(sha256) for sha256 in pictures]


def test_more_references_than_training_images(project: Path) -> None:
    run_stage(project, "data", "there", quiet=True)
    with pytest.raises(InputError, match=r"targets.many.references.count: 50 wanted, the training split of 'there' has 3"):
        run_stage(project, "references", "many", quiet=True)


def test_command_exits_2_and_writes_nothing(project: Path) -> None:
    (project / "there/masks/a0.png").unlink()
    (project / "there/images/a1.png").write_text("hello")
    done = subprocess.run([sys.executable, "-m", "alignflow_core", "stage", "data", "--domain", "there", "--root", str(project)],
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 2 and "a0.png: has no mask" in done.stderr and "a1.png: is not a JPEG" in done.stderr
    assert sorted(file.name for file in (project / "artifacts").glob("*/*")) == ["here", "here.json"]


def test_a_locked_folder_and_a_lost_input_are_no_tracebacks(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(runner, "listed", locked)
        with pytest.raises(InputError, match=r"there: Permission denied; give a place that you may"):
            run_stage(project, "data", "there", quiet=True)
    run_stage(project, "data", "there", quiet=True)
    shutil.rmtree(project / "artifacts/data/there")
    with pytest.raises(InputError, match=r"artifacts/data/there: no such folder, though it was built; run stage data@there again"):
        run_stage(project, "references", "there", quiet=True)


def test_names_that_cannot_be_written_are_told(folder: Path) -> None:
    """A name in Latin 1, as old archives hold them, and one with a line break; spaces of any width and accents are fine."""
    for part in ("images", "masks"):
        (folder / part / "a3.png").rename(folder / part / "Sch\u00f6n 3.04\u202fPM\u00a0\u3000.png")
    check_folder(folder, LABELS)
    os.rename(folder / "images/a1.png", os.fsencode(folder / "images") + b"/caf\xe9.png")
    (folder / "images/a2.png").rename(folder / "images/a\n2.png")
    found = [problem for problem in problems(folder) if "cannot be written" in problem]
    assert len(found) == 2 and "a\\n2.png: has a name" in found[0] and "caf\\udce9.png" in found[1] and all(problem.isascii() for problem in found)
    assert len(tree_hash(folder)) == 64


def test_what_a_link_to_a_folder_leads_to_is_seen(tmp_path: Path) -> None:
    for version in "12":
        (tmp_path / version).mkdir()
        (tmp_path / version / "a.png").write_bytes(version.encode())
    clinic = tmp_path / "clinic"
    clinic.mkdir()
    seen = set()
    for version in "12":
        (clinic / "images").unlink(missing_ok=True)
        (clinic / "images").symlink_to(tmp_path / version)
        seen.add(tree_hash(clinic))
    (tmp_path / "2" / "again").symlink_to(clinic)  # round in a circle
    assert len(seen) == 2 and tree_hash(clinic) in seen
