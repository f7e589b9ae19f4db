"""What images say beside their pixels, and what their files are called, is in nothing that a run writes."""

import base64
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image, PngImagePlugin
from toy_project import environment, run

from alignflow_core.config import load_project
from alignflow_core.data import case_id
from alignflow_core.runner import provenance_file, run_stage
from pipelines import preview
from pipelines.cli import main
from pipelines.local import Folders, prepare_run

SLOT, NAME, PLACE = "GEHEIM4711", "Meier_Anna", "Haus_Krause"  # in metadata, in file names and groups, in the folder above them
XMP = f"<x:xmpmeta xmlns:x='adobe:ns:meta/'>{SLOT}</x:xmpmeta>".encode()


def save_marked(image: Image.Image, file: Path) -> None:
    """Write a picture with the marker in every slot that its format has."""
    exif = Image.Exif()
    for tag in (0x010E, 0x013B, 0x8298, 0x9C9D):  # description, artist, copyright, author as Windows writes it
        exif[tag] = SLOT if tag != 0x9C9D else SLOT.encode("utf-16-le")
    profile = b"\0" * 36 + b"acsp" + SLOT.encode() * 4
    if file.suffix == ".png":
        text = PngImagePlugin.PngInfo()
        text.add_text("Comment", SLOT)
        text.add_text("Author", SLOT, zip=True)
        text.add_itxt("XML:com.adobe.xmp", XMP.decode())
        image.save(file, pnginfo=text, exif=exif, icc_profile=profile)
    elif file.suffix == ".jpg":
        image.save(file, quality=98, exif=exif, xmp=XMP, comment=SLOT, icc_profile=profile)
    elif file.suffix == ".tif":
        image.save(file, exif=exif, icc_profile=profile, description=SLOT, artist=SLOT, software=SLOT)
    else:
        image.quantize(64).save(file, comment=SLOT.encode())
    assert SLOT.encode() in file.read_bytes(), file.suffix


@pytest.fixture
def marked(phantom_root: Path, tmp_path: Path) -> Path:
    """Source, target and references of the phantom under names of people, with a marker in every slot."""
    root = tmp_path / PLACE
    for domain, given in (("standard", "source/standard"), ("amber", "target/amber"), ("references", "references/amber")):
        for part in ("images", "masks"):
            (root / domain / part).mkdir(parents=True)
        for number, file in enumerate(sorted((phantom_root / "data" / given / "images").iterdir())):
            stem, suffix = f"{NAME}_{domain}{number:02d}", (".png", ".jpg", ".tif", ".gif")[number % 4]
            save_marked(Image.open(file), root / domain / "images" / f"{stem}{suffix}")
            save_marked(Image.open(file.parents[1] / "masks" / file.name), root / domain / "masks" / f"{stem}.png")
        rows = "".join(f"{file.stem},{NAME}_{domain}_{number}\n" for number, file in enumerate(sorted((root / domain / "images").iterdir())))
        (root / domain / "groups.csv").write_text(f"stem,patient\n{rows}")
    return root


def texts(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file below a folder as bytes, tables as text, pictures inside pages decoded; file names too."""
    for file in sorted(folder.rglob("*")):
        yield f"name of {file.relative_to(folder)}", str(file.relative_to(folder)).encode()
        if not file.is_file():
            continue
        content = file.read_bytes()
        yield str(file.relative_to(folder)), content
        if file.suffix == ".parquet":
            yield f"{file.name} parsed", pd.read_parquet(file).to_csv().encode()
        for encoded in re.findall(rb"base64,([A-Za-z0-9+/=]{16,})", content):
            yield f"{file.name} inside", base64.b64decode(encoded)


def spellings(word: str) -> tuple[bytes, ...]:
    """A word as text of one and of two bytes a letter."""
    return word.encode(), word.encode("utf-16-le"), word.lower().encode()


def leaks(folder: Path, *words: str, aside: tuple[str, ...] = ()) -> list[str]:
    return [f"{word} in {where}" for where, content in texts(folder) for word in words
            if where not in aside and any(spelling in content for spelling in spellings(word))]


def test_the_stages_that_read_raw_folders_write_pixels_and_hashes(marked: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    prepare_run(Folders(marked / "standard", {"amber": marked / "amber"}, str(marked / "references")), "refuge", out, ["profile=smoke"])
    for stage, key in (("data", "standard"), ("data", "amber"), ("references", "amber")):
        run_stage(out, stage, key, quiet=True)
        assert not [word for word in (SLOT, NAME, PLACE) if word in json.dumps(str(preview.metadata(out, stage, key)["table"]))]
    assert leaks(out, SLOT, NAME) == []
    assert case_id("amber", f"{NAME}_amber00") in set(pd.read_parquet(out / "artifacts/data/amber/manifest.parquet")["case_id"])
    (out / "artifacts" / "planted.txt").write_text(f"... {NAME}_amber00 ...")
    assert leaks(out, SLOT, NAME) == [f"{NAME} in artifacts/planted.txt"], "the search finds what is there"


@pytest.mark.nightly
def test_files_that_are_refused_are_named_on_the_terminal_alone(smoke_root: Path) -> None:
    amber = smoke_root / "data" / "target" / "amber"
    for number in range(2):
        (amber / "images" / f"{NAME}_{number}.png").write_text("no picture")
    (amber / "groups.csv").write_text(f"stem,patient\n{NAME}_9,{NAME}\n")
    subprocess.run(["git", "init", "-q"], cwd=smoke_root, check=True)
    run(smoke_root, "-m", "dvc", "init", "-q")
    run(smoke_root, "-m", "pipelines.dvcfile")
    done = subprocess.run([sys.executable, "-m", "pipelines.cli", "materialize", "key:domain_splits", "--jobs", "2"], cwd=smoke_root,
                          env=environment(smoke_root), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2, done.stderr
    told = [line for line in done.stderr.splitlines() if NAME in line]
    assert all(line.startswith("error: data@amber: ") for line in told) and len(told) == len(set(told)) == 5, done.stderr
    dagster = smoke_root / ".alignflow" / "dagster"
    assert leaks(dagster, "told on a terminal only"), "the search finds what Dagster was told"
    assert leaks(smoke_root / ".alignflow", NAME) == [] and (smoke_root / "mlflow.db").exists()
    assert not any(spelling in (smoke_root / "mlflow.db").read_bytes() for spelling in spellings(NAME))


@pytest.mark.nightly
def test_nothing_of_a_whole_run_names_or_describes_anybody(marked: Path, tmp_path: Path) -> None:
    out, pairs = tmp_path / "run", tmp_path / "pairs"
    arguments = ["run", "--source", str(marked / "standard"), "--target", f"amber={marked / 'amber'}", "--references", str(marked / "references"),
                 "--task", "refuge", "--out", str(out), "--quiet", "profile=smoke"]
    assert main(arguments) == 0
    assert main(["export", str(out), "--out", str(pairs), "--on-copy", "keep", "--accept-copies"]) == 0
    nodes = list(load_project(out / "params.yaml").graph.nodes())
    dagster = " ".join(str(preview.metadata(out, stage.name, key)) for stage, key in nodes)
    assert SLOT not in dagster and NAME not in dagster and PLACE not in dagster.replace(str(out), "")
    assert leaks(out, SLOT, NAME) == [] and leaks(pairs, SLOT, NAME, PLACE) == []
    paths = {"params.yaml", *(str(provenance_file(out, stage.name, key).relative_to(out)) for stage, key in nodes)}
    assert leaks(out, PLACE, aside=tuple(paths)) == [], "folders are named in the settings and their record alone"
    written = [file for folder in (out, pairs) for file in folder.rglob("*") if file.suffix in (".png", ".jpg", ".jpeg", ".tif", ".gif")]
    assert written and not [file for file in written if Image.open(file).info or Image.open(file).getexif()]
    assert (out / "mlflow.db").exists() and not [file for file in (out / "mlruns").rglob("*") if file.suffix in (".png", ".jpg", ".npy")]
