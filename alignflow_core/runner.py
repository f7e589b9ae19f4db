"""Run one stage: resolve its inputs, skip it when up to date, resume it, publish it atomically.

Layout under a project root::

    params.yaml                      configuration
    artifacts/<stage>[/<key>]/       the artifact: metrics.json, curves.parquet and the stage's own files
    artifacts/<stage>[/<key>].json   its provenance: fingerprint, content hash, inputs, params, versions, seconds, use of the machine
    .alignflow/work/<node>/          resumable state of an unfinished stage
    .alignflow/locks/                locks that die with their process
"""

import contextlib
import dataclasses
import errno
import importlib
import json
import math
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

from alignflow_core.artifact import exclusive, file_hash, json_hash, listing_hash, publish, raw_hashes, read_json, tree_hash, write_json
from alignflow_core.config import Project, load_project
from alignflow_core.errors import InputError, StageError, told_paths
from alignflow_core.floors import refuse_old_packages
from alignflow_core.site_key import pseudonym
from alignflow_core.stages import PACKAGE_DIR, STAGES, Stage, artifact_dir, node_id, source_files
from alignflow_core.usage import sampled

# Threads that wait for each other must sleep, not spin: on a machine with other work spinning made a step twenty times slower.
# OpenMP reads this when torch is first imported, which stages do later.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# numpy's threads spin too, over matrices too small to share: with two of them evaluation took three times the CPU time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Arrow's own allocator keeps what small tables leave: 12 of ingest's 147 MB at 10,000 images.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

ACCELERATORS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))  # NVIDIA's and AMD's drivers

OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # of CUDA, and of torch's allocator on a CPU
MEMORY_SETTINGS = {  # file of a stage -> what takes its memory
    "mask_flow": "mask_flow.training.batch", "image_flow": "image_flow.training.batch",
    "comparator": "image_flow.training.batch", "comparator_base": "image_flow.training.batch",
    "labeller": "labeller.training.batch", "align": "align.training.batch", "sample": "sample.batch", "segment": "segment.training.batch",
    "filtering": "segment.training.batch",
}

SPENT = "spent.json"  # among a stage's resumable state
RECORDED_PACKAGES = ("torch", "monai", "numpy", "scipy", "pillow", "pandas", "pyarrow", "safetensors")


@dataclass(frozen=True)
class Context:
    """What a stage may touch besides its inputs and its out folder.

    Attributes:
        key: domain or target name, ``None`` for a project-wide stage.
        root: project root; raw folders in the configuration are relative to it.
        work_dir: survives an interruption, emptied when the fingerprint changes and removed at the end.
        log: ``log(metrics, step)`` records points of curves.
        progress: ``progress(done, total, note)`` for the person who waits.
    """

    key: str | None
    root: Path
    work_dir: Path
    log: Callable[[dict[str, float], int], None]
    progress: Callable[[int, int, str], None]


@dataclass(frozen=True)
class Plan:
    """Fingerprint of a stage as the project stands, and what went into it.

    ``raw_files`` and ``code_files`` are the same as ``raw`` and ``code`` file by file: they say later what has changed, and decide nothing.
    """

    fingerprint: str
    params: dict[str, Any]
    inputs: dict[str, str]
    raw: dict[str, str]
    raw_files: dict[str, dict[str, str]]
    code: str
    code_files: dict[str, str]


def provenance_file(root: Path, stage: str, key: str | None) -> Path:
    """``artifacts/align/zeiss.json``."""
    folder = root / artifact_dir(stage, key)
    return folder.with_name(folder.name + ".json")


def stage_params(project: Project, stage: Stage, key: str | None) -> dict[str, Any]:
    """Resolved values of the stage's params as plain data, by dotted key (``{key}`` filled in)."""
    found: dict[str, Any] = {}
    for dotted in stage.params:
        value: Any = project
        for part in dotted.split("."):
            value = value[str(key) if part == "{key}" else part] if isinstance(value, dict) else getattr(value, part)
        found[dotted.replace("{key}", str(key))] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    """A section, a table of sections or a value as plain data; of the project only this part is copied."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return {name: _plain(each) for name, each in value.items()} if isinstance(value, dict) else value


def stage_config(project: Project, stage: Stage, key: str | None) -> SimpleNamespace:
    """The declared sections only, so that a stage cannot read what its fingerprint does not cover.

    ``domains.{key}`` appears as ``domain``, ``comparators.{key}`` as ``comparator``, ``targets.{key}.align`` as ``align``,
    ``targets.{key}.domain`` as ``target_domain``; of ``sample.guidance_scale`` there is ``sample`` with nothing else that is not declared too.
    """
    found: dict[str, Any] = {}
    for dotted in stage.params:
        parts = dotted.split(".")
        if parts[0] == "domains":
            found["domain"] = project.domains[str(key)]
        elif parts[0] == "comparators":
            found["comparator"] = project.comparators[str(key)]
        elif parts[0] == "targets" and len(parts) > 1:
            found["target_domain" if parts[2] == "domain" else parts[2]] = getattr(project.targets[str(key)], parts[2])
        else:
            section, _, name = dotted.partition(".")
            whole = getattr(project, section)
            if name:
                setattr(found.setdefault(section, SimpleNamespace()), name, getattr(whole, name))
            else:
                found[section] = whole
    return SimpleNamespace(**found)


def raw_dirs(project: Project, stage: Stage, key: str | None, root: Path) -> dict[str, Path]:
    """Raw folders and files a stage reads: dotted key -> absolute path."""
    values = stage_params(project, dataclasses.replace(stage, params=stage.raw), key)
    return {dotted: (root / value).resolve() for dotted, value in values.items() if value is not None}


def raw_kind(dotted: str) -> str:
    """``"folder"`` or ``"file"``, as the last word of the key says."""
    return "file" if dotted.endswith(".file") else "folder"


def raw_exists(dotted: str, path: Path) -> bool:
    """Whether a raw input is there and of its kind."""
    return path.is_file() if raw_kind(dotted) == "file" else path.is_dir()


def chosen_files(project: Project, stage: Stage, key: str | None) -> dict[str, str]:
    """Files that a stage depends on because params.yaml names what they hold: last word of the dotted key -> file in the package."""
    values = stage_params(project, dataclasses.replace(stage, params=tuple(stage.chosen)), key)
    return {dotted.rpartition(".")[2]: registry[value].partition(":")[0].replace(".", "/") + ".py"
            for (dotted, registry), value in zip(stage.chosen.items(), values.values(), strict=True)}


def code_files(stage_name: str, chosen: Iterable[str] = ()) -> dict[str, str]:
    """Hashes of the source files that decide a stage's result: the stage's own and those of what it chooses by name."""
    return {name: file_hash(PACKAGE_DIR / name) for name in sorted({*source_files(stage_name), *chosen})}


def code_hash(stage_name: str, chosen: Iterable[str] = ()) -> str:
    """One hash of all :func:`code_files`."""
    return json_hash(code_files(stage_name, chosen))


def listed(path: Path) -> tuple[str, dict[str, str]]:
    """Hash of a raw folder or file, and what provenance keeps of its files, in one pass: keyed hashes of the names (they can be names of
    patients) below their open folder -> shortened contents."""
    kept: dict[str, str] = {}

    def keeping() -> Iterator[tuple[str, str]]:
        for name, content in raw_hashes(path):
            kept[f"{PurePosixPath(name).parent}/{pseudonym('file', name, 12)}"] = content[:16]
            yield name, content

    return listing_hash(keeping()), kept


def plan_stage(project: Project, root: Path, stage: Stage, key: str | None) -> Plan:
    """Hash params, inputs, raw folders or files and source files of one stage.

    Raises:
        InputError: an input artifact or a raw folder or file is missing.
    """
    inputs: dict[str, str] = {}
    for name, (upstream, upstream_key) in project.graph.inputs(stage, key).items():
        file = provenance_file(root, upstream, upstream_key)
        if not file.exists():
            raise InputError(f"{file.with_suffix('')}: not built yet; run stage {node_id(upstream, upstream_key)} first")
        inputs[name] = read_json(file)["content"]
    raw, raw_files = {}, {}
    for dotted, path in raw_dirs(project, stage, key, root).items():
        if not raw_exists(dotted, path):
            raise InputError(f"{path}: no such {raw_kind(dotted)} ({dotted}); create it or correct the path")
        raw[dotted], raw_files[dotted] = listed(path)
    params = stage_params(project, stage, key)
    files = code_files(stage.name, chosen_files(project, stage, key).values())
    code = json_hash(files)
    return Plan(json_hash([stage.name, key, params, inputs, raw, code]), params, inputs, raw, raw_files, code, files)


def is_current(root: Path, stage: str, key: str | None, plan: Plan) -> bool:
    """Whether the artifact on disk has this fingerprint and its recorded content."""
    file, folder = provenance_file(root, stage, key), root / artifact_dir(stage, key)
    if not file.exists() or not folder.is_dir():
        return False
    provenance = read_json(file)
    return provenance["fingerprint"] == plan.fingerprint and provenance["content"] == tree_hash(folder)


def run_stage(root: Path, name: str, key: str | None = None, *, force: bool = False, quiet: bool = False) -> bool:
    """Build one artifact unless it is current; returns whether it ran.

    Args:
        root: project root with ``params.yaml``.
        name: stage name.
        key: domain, base, comparator or target, as the stage's scope asks.
        force: run even if current.
        quiet: no progress on stderr.

    Raises:
        InputError: bad configuration, key, input or lock; a package below its floor.
    """
    refuse_old_packages()
    root = root.resolve()
    if name not in STAGES:
        raise InputError(f"stage '{name}': unknown; valid: {', '.join(STAGES)}")
    stage, project = STAGES[name], load_project(root / "params.yaml")
    if key not in project.graph.keys(stage):
        raise InputError(f"stage {name}: {stage.scope} '{key}' is not one of {', '.join(map(str, project.graph.keys(stage)))}")
    node = node_id(name, key)
    state_dir = root / ".alignflow"
    with exclusive(state_dir / "locks" / f"{node}.lock"):
        with told_paths():
            plan = plan_stage(project, root, stage, key)
        if not force and is_current(root, name, key, plan):
            return False
        _refuse_lost(project, root, stage, key)
        work_dir = _work_dir(state_dir / "work" / node, plan.fingerprint)
        part_dir = (root / artifact_dir(name, key)).with_name(f".{node}.part")
        shutil.rmtree(part_dir, ignore_errors=True)
        part_dir.mkdir(parents=True)
        spool = work_dir / "curves.jsonl"
        spent, started = _spent(work_dir), math.nan
        try:
            with told_limits(stage, part_dir):
                with accelerator(stage, project, node, quiet), spool.open("a", encoding="utf-8") as stream, sampled() as usage:
                    started = time.time()  # its turn has come
                    context = Context(key, root, work_dir, _logger(stream), _progress(node, quiet))
                    metrics = call(project, stage, key, part_dir, context)
                write_json(part_dir / "metrics.json", {k: float(v) for k, v in metrics.items()})
                _write_curves(spool, part_dir / "curves.parquet")
                content = tree_hash(part_dir)
                publish(part_dir, root / artifact_dir(name, key))
        except BaseException:
            shutil.rmtree(part_dir, ignore_errors=True)
            if started > 0:  # its turn had come
                with contextlib.suppress(OSError):  # the disk may be full
                    write_json(work_dir / SPENT, {"seconds": spent + time.time() - started})
            raise
        write_json(provenance_file(root, name, key), {
            "stage": name, "key": key, "fingerprint": plan.fingerprint, "content": content, "params": plan.params,
            "inputs": plan.inputs, "raw": plan.raw, "raw_files": plan.raw_files, "code": plan.code,
            "code_files": plan.code_files, "seed": project.seed, "profile": project.profile,
            "versions": {p: version(p) for p in RECORDED_PACKAGES} | {"python": sys.version.split()[0]},
            "started": round(started, 1), "seconds": round(spent + time.time() - started, 1), "usage": usage,
        })
        shutil.rmtree(work_dir)
        return True


def _refuse_lost(project: Project, root: Path, stage: Stage, key: str | None) -> None:
    """Raise :class:`InputError` where of an input artifact the provenance is left alone: somebody has deleted its folder."""
    lost = [node for node in project.graph.inputs(stage, key).values() if not (root / artifact_dir(*node)).is_dir()]
    if lost:
        raise InputError(*(f"{root / artifact_dir(*node)}: no such folder, though it was built; run stage {node_id(*node)} again" for node in lost))


@contextlib.contextmanager
def told_limits(stage: Stage, folder: Path) -> Iterator[None]:
    """Turn "out of memory" and "no space" into what to do about it. Raises :class:`StageError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StageError(f"{folder.parent}: no space left on the disk; free some and run the same command, which continues") from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        lower = MEMORY_SETTINGS.get(stage.function.partition(":")[0], "data.size")
        raise StageError(f"{stage.name}: out of memory ({' '.join(str(error).split())[:120]}); lower {lower}, and run the same command") from error


def call(project: Project, stage: Stage, key: str | None, out_dir: Path, context: Context) -> dict[str, float]:
    """Call a stage's function with its configuration and its inputs, which lie below ``context.root``; returns its metrics."""
    module, _, function = stage.function.partition(":")
    run = getattr(importlib.import_module(f"alignflow_core.{module}"), function)
    inputs = {name: context.root / artifact_dir(*node) for name, node in project.graph.inputs(stage, key).items()}
    metrics: dict[str, float] = run(stage_config(project, stage, key), inputs, out_dir, context)
    return metrics


@contextlib.contextmanager
def accelerator(stage: Stage, project: Project, node: str, quiet: bool) -> Iterator[None]:
    """Hold this machine's accelerator while a stage that wants it computes: one at a time, whoever started it (Dagster, DVC, a terminal).

    Waits for its turn. Where there is none, or ``machine.device`` is ``cpu``, nothing is held. ``ALIGNFLOW_GPU_LOCK`` names another lock
    file, for instance one for each card; ``ALIGNFLOW_GPU_SHARE`` says how many stages a card takes at once (small networks leave most of it idle).

    Raises:
        InputError: ``ALIGNFLOW_GPU_SHARE`` is no number above 0.
    """
    if not stage.gpu or project.machine.device == "cpu" or not any(map(Path.exists, ACCELERATORS)):
        yield
        return
    file = Path(os.environ.get("ALIGNFLOW_GPU_LOCK") or Path.home() / ".cache" / "alignflow" / f"gpu-{socket.gethostname()}.lock")
    share = os.environ.get("ALIGNFLOW_GPU_SHARE", "1")
    if not share.isdecimal() or not int(share):
        raise InputError(f"ALIGNFLOW_GPU_SHARE={share}: not a number of stages; give 1 or more, or unset it")
    places = [file, *(file.with_name(f"{file.name}.{number}") for number in range(1, int(share)))]
    with contextlib.ExitStack() as held:
        for place in places:
            with contextlib.suppress(InputError):
                held.enter_context(exclusive(place))
                break
        else:
            held.enter_context(exclusive(places[os.getpid() % len(places)], wait=lambda holder: None if quiet else print(
                f"{node}: waiting for the accelerator, {holder}", file=sys.stderr, flush=True)))
        yield


def stop_on_sigterm() -> None:
    """Turn SIGTERM into an orderly exit, so that training loops save their state."""
    def stop(*_: object) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, stop)


def _work_dir(folder: Path, fingerprint: str) -> Path:
    """The stage's resumable state, emptied when it belongs to another fingerprint."""
    marker = folder / "fingerprint"
    if not (marker.exists() and marker.read_text() == fingerprint):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        marker.write_text(fingerprint)
    return folder


def _spent(work_dir: Path) -> float:
    """Seconds of the attempts that were stopped or failed; those of one that was killed are not known."""
    file = work_dir / SPENT
    return float(read_json(file)["seconds"]) if file.exists() else 0.0


def _logger(stream: Any) -> Callable[[dict[str, float], int], None]:
    def log(metrics: dict[str, float], step: int) -> None:
        stream.write(json.dumps({"step": step, **{k: float(v) for k, v in metrics.items()}}) + "\n")
        stream.flush()

    return log


def _write_curves(spool: Path, file: Path) -> None:
    """Long table (step, metric, value); a step logged again after a resume replaces the first."""
    import pandas as pd

    points: dict[tuple[int, str], float] = {}
    for line in spool.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the line being written when the process was killed
            continue
        step = row.pop("step")
        points |= {(step, metric): value for metric, value in row.items()}
    rows = [(step, metric, value) for (step, metric), value in sorted(points.items())]
    table = pd.DataFrame(rows, columns=["step", "metric", "value"])
    table.astype({"step": "int64", "metric": "str", "value": "float64"}).to_parquet(file, index=False)


def _progress(node: str, quiet: bool) -> Callable[[int, int, str], None]:
    """A line on stderr at most every two seconds (every thirty where stderr is no terminal)."""
    last = 0.0
    first: tuple[float, int] | None = None  # of this process: what a resumed stage did before says nothing about the pace
    interval = 2.0 if sys.stderr.isatty() else 30.0

    def progress(done: int, total: int, note: str = "") -> None:
        nonlocal last, first
        now = time.monotonic()
        if first is None or done <= first[1]:
            first = (now, done)
        if quiet or (now - last < interval and done < total):
            return
        last = now
        pace = (now - first[0]) / (done - first[1]) if done > first[1] else None
        left = "" if pace is None else f"{pace * (total - done):.0f} s left"
        print(f"{node}: {done}/{total} {note} {left}", file=sys.stderr, flush=True)

    return progress


