"""Raw folders -> checked, resized, split and hashed pairs; and the few references that the method may see."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from alignflow_core.artifact import open_array, read_json, write_json
from alignflow_core.config import Task
from alignflow_core.errors import InputError
from alignflow_core.folders import Case, Keep, check_folder, group_files
from alignflow_core.readers import Picture, resize_classes
from alignflow_core.site_key import VARIABLE, key_check, key_file, pseudonym

if TYPE_CHECKING:
    import pandas as pd

SPLITS = ("train", "val", "test")
ROW_GROUP = 1024  # rows that are written at once
KEY_FILE = "site_key.json"  # which key the ids are of
REFERENCE_COLUMNS = {"case_id": "str", "domain": "str", "group": "str", "role": "str", "labelled": "bool", "image_sha256": "str", "width": "int64",
                     "height": "int64"}


def split_groups(groups: Sequence[str], shares: tuple[float, float, float], seed: int, domain: str) -> dict[str, str]:
    """Group -> split. Whole groups, the larger first and equal ones in an order drawn by the seed, go where most is missing.

    Args:
        groups: the group of each case.
        shares: of train, val and test among the cases; a split with a share is never left empty.

    Raises:
        InputError: fewer groups than splits with a share.
    """
    from alignflow_core.seeding import derive_seed

    sizes = Counter(groups)
    wanted = [s for s, share in zip(SPLITS, shares, strict=True) if share > 0]
    if len(sizes) < len(wanted):
        raise InputError(f"{domain}: has {len(sizes)} patient or sequence group(s), splitting into {', '.join(wanted)} needs at least "
                         f"{len(wanted)}; add cases, or set a share of data.target_split to 0")
    missing = {s: share * len(groups) for s, share in zip(SPLITS, shares, strict=True) if share > 0}
    chosen: dict[str, str] = {}
    order = sorted(sizes, key=lambda group: (-sizes[group], derive_seed(seed, "split", domain, group)))
    empty = set(wanted)
    for left, group in zip(range(len(order), 0, -1), order, strict=True):
        split = max((s for s in wanted if len(empty) < left or s in empty), key=lambda s: missing[s])
        chosen[group] = split
        empty.discard(split)
        missing[split] -= sizes[group]
    return chosen


def run_data(config: Any, inputs: Mapping[str, Path], out_dir: Path, context: Any) -> dict[str, float]:
    """Stage ``data``: one domain's folder -> ``images.npy``, ``masks.npy`` (if it has masks), ``manifest.parquet`` at the working size.

    File names and groups appear as keyed hashes alone (``site_key.py``), in the order of the names.
    Every file is read once, checked, and its pixels written; memory does not grow with their number.
    """
    with _arrays(config.task, config.data.size, out_dir) as (keep, pixels):
        listing = check_folder(context.root / config.domain.dir, config.task, root=context.root, progress=context.progress,
                               size=config.data.size, keep=keep, labelled=config.domain.labelled)
    shares = config.data.source_split if context.key == config.source else config.data.target_split
    split_of = split_groups([case.group for case in listing.cases], shares, config.data.seed, context.key)
    table = _table(listing.cases, context.key)
    table.insert(3, "split", [split_of[case.group] for case in listing.cases])
    table.insert(5, "mask_sha256", [case.mask_sha256 for case in listing.cases])
    table.to_parquet(out_dir / "manifest.parquet", index=False, row_group_size=ROW_GROUP)
    write_json(out_dir / KEY_FILE, {"key_check": key_check()})
    counts = table["split"].value_counts()
    sizes = {f"n_{split}": float(counts.get(split, 0)) for split in SPLITS}
    sizes |= {"n_groups": float(table["group"].nunique()), "labelled": float(listing.labelled)}
    if not listing.labelled:
        return sizes
    return sizes | {f"area_{name}": share for name, share in _areas(pixels, config.task).items()} | {"n_empty_masks": float(len(listing.empty_masks))}


def run_references(config: Any, inputs: Mapping[str, Path], out_dir: Path, context: Any) -> dict[str, float]:
    """Stage ``references``: the target images that the method may see, in an order drawn by ``references.seed``.

    Either ``count`` images of the domain's training split (a smaller count is a subset of a larger), or a folder of their own.
    The last of them, whole patients or sequences of about ``held_out_fraction``, steer when alignment stops. Or a file of moments: then
    there are no rows, and ``moments.safetensors``.

    Raises:
        InputError: too few images; a reference that is in the test split by content or by group; a test image that is in the source's training
            or validation split; the domain's ids are of another site key; a file of moments that cannot be used.
    """
    import pandas as pd

    from alignflow_core.reference_roles import in_drawn_order, roles

    wanted, domain = config.references, config.target_domain
    _refuse_shared_images(*(pd.read_parquet(inputs[name] / "manifest.parquet") for name in ("data:source", "data:target")))
    if wanted.file is not None:
        return _moments_alone(context.root / wanted.file, config, out_dir)
    _refuse_other_key(inputs["data:target"])
    manifest = pd.read_parquet(inputs["data:target"] / "manifest.parquet")
    if wanted.dir is None:
        table = manifest[manifest["split"] == "train"]
        if len(table) < wanted.count:
            raise InputError(f"targets.{context.key}.references.count: {wanted.count} wanted, the training split of '{domain}' has {len(table)}; "
                             "lower the count or give references.dir")
        drawn = table.index[in_drawn_order(table["image_sha256"].tolist(), wanted.seed)[:wanted.count]]
        table = table.loc[drawn]
        for file in inputs["data:target"].glob("*.npy"):
            np.save(out_dir / file.name, np.load(file, mmap_mode="r")[drawn])
        labelled, places = (out_dir / "masks.npy").exists(), [f"{domain}: case {case}" for case in table["case_id"]]
    else:
        with _arrays(config.task, config.data.size, out_dir) as (keep, _):
            listing = check_folder(context.root / wanted.dir, config.task, labelled=False, root=context.root, progress=context.progress,
                                   size=config.data.size, keep=keep)
        order = in_drawn_order([case.stem for case in listing.cases], wanted.seed)
        for file in out_dir.glob("*.npy"):
            np.save(file, np.load(file)[order])
        cases = [listing.cases[i] for i in order]
        known = dict(zip(manifest["case_id"], manifest["group"], strict=True))
        own_groups = bool(group_files(listing.folder))
        table = _table(cases, domain)
        if not own_groups:
            table["group"] = [known.get(case, group) for case, group in zip(table["case_id"], table["group"], strict=True)]
        labelled, places = listing.labelled, [str(listing.folder / case.image_file) for case in cases]
    _refuse_test_images(table, places, manifest[manifest["split"] == "test"], domain)
    table = table.assign(role=roles(table["group"].astype(str).tolist(), wanted.held_out_fraction), labelled=labelled)
    table[[*REFERENCE_COLUMNS]].to_parquet(out_dir / "manifest.parquet", index=False)
    n_held_out = int((table["role"] == "held_out").sum())
    return _reference_numbers(len(table) - n_held_out, n_held_out, labelled)


def _moments_alone(file: Path, config: Any, out_dir: Path) -> dict[str, float]:
    """A reference set that is a file of moments: no rows, and the moments. That none of its images is a test image nobody can check here."""
    import pandas as pd

    from alignflow_core.reference_moments import MOMENTS_FILE, read_moments, write_moments

    given, size = read_moments(file), config.data.size
    if given.instrument.get("size") != size:
        raise InputError(f"{file}: was measured at {given.instrument.get('size')!r} pixels, data.size is {size}; make a kit of this run "
                         "(alignflow reference-kit) and ask for its moments")
    write_moments(out_dir / MOMENTS_FILE, given)
    np.save(out_dir / "images.npy", np.empty((0, size, size, 3), np.uint8))
    table = pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in REFERENCE_COLUMNS.items()})
    table.to_parquet(out_dir / "manifest.parquet", index=False)
    return _reference_numbers(given.n_images["align"], given.n_images.get("held_out", 0), labelled=False)


def _reference_numbers(n_align: int, n_held_out: int, labelled: bool) -> dict[str, float]:
    return {"n_references": float(n_align + n_held_out), "n_align": float(n_align), "n_held_out": float(n_held_out), "labelled": float(labelled)}


def _table(cases: Sequence[Case], domain: str) -> "pd.DataFrame":
    """The columns of both manifests."""
    import pandas as pd

    return pd.DataFrame({
        "case_id": [case_id(domain, case.stem) for case in cases], "domain": domain,
        "group": [pseudonym("group", f"{domain}/{case.group}") for case in cases], "image_sha256": [case.image_sha256 for case in cases],
        "width": [case.width for case in cases], "height": [case.height for case in cases]})


def case_id(domain: str, stem: str) -> str:
    """Opaque id of an image of a domain."""
    return pseudonym("case", f"{domain}/{stem}")


def _refuse_other_key(folder: Path) -> None:
    """Stop where a domain's ids are of another site key: references could not be told from its test images by group."""
    if read_json(folder / KEY_FILE)["key_check"] != key_check():
        raise InputError(f"{folder}: its ids are of another site key than {key_file()}; give that key ({VARIABLE}), "
                         "or remove the folder to build it again")


@contextlib.contextmanager
def _arrays(task: Task, size: int, out_dir: Path) -> Iterator[tuple[Keep, np.ndarray]]:
    """What keeps the pixels of a folder while it is checked: ``images.npy`` [N, size, size, 3] and, if labelled, ``masks.npy`` [N, size, size].

    Yields:
        the keeper, and how many pixels of each class it has kept, [C + 1].
    """
    counts = np.zeros(len(task.classes) + 1, np.int64)
    with contextlib.ExitStack() as files:
        streams: dict[str, IO[bytes]] = {}

        def write(name: str, pixels: np.ndarray, n: int) -> None:
            if name not in streams:
                streams[name] = files.enter_context(open_array(out_dir / name, (n, *pixels.shape)))
            streams[name].write(pixels.tobytes())

        def keep(n: int, image: Picture, mask: Picture | None) -> None:
            write("images.npy", image.pixels, n)
            if mask is not None:
                classes = resize_classes(mask.pixels, task, size)
                write("masks.npy", classes, n)
                counts[:] += np.bincount(classes.ravel(), minlength=len(counts))

        yield keep, counts


def _areas(counts: np.ndarray, task: Task) -> dict[str, float]:
    """Share of all pixels by class, of nested classes with those inside."""
    return {name: float(counts[k:].sum() if task.nested else counts[k]) / max(1, counts.sum()) for k, name in enumerate(task.classes, 1)}


def _refuse_shared_images(source: "pd.DataFrame", target: "pd.DataFrame") -> None:
    """Stop where a test image of the target is, by content, one that painters and segmenters learn from."""
    learnt, test = source[source["split"] != "test"], target[target["split"] == "test"]
    shared = test.merge(learnt, on="image_sha256", suffixes=("", "_source"))
    if len(shared):
        raise InputError(*(f"{row['domain']}: its test image {row['case_id']} is also the image {row['case_id_source']} of the source "
                           f"'{row['domain_source']}', which is learnt from ('alignflow case' names both files); remove it from one of them"
                           for row in shared.to_dict("records")))


def _refuse_test_images(table: "pd.DataFrame", places: Sequence[str], test: "pd.DataFrame", domain: str) -> None:
    """Stop where a reference is a test image of its domain by content, or of a patient or sequence that is."""
    contents = dict(zip(test["image_sha256"], test["case_id"], strict=True))
    by_group = dict(zip(test["group"].astype(str), test["case_id"], strict=True))
    problems = []
    for place, sha256, group in zip(places, table["image_sha256"], table["group"].astype(str), strict=True):
        if sha256 in contents:
            problems.append(f"{place}: is the test image {contents[sha256]} of '{domain}' ('alignflow case' names its file); "
                            "take another reference or remove it from the domain")
        elif group in by_group:
            problems.append(f"{place}: belongs to the patient or sequence of the test image {by_group[group]} of '{domain}' "
                            "('alignflow case' names its file); take another reference, or if it is another patient rename the file or give "
                            "the references a groups.csv")
    if problems:
        raise InputError(*problems)
