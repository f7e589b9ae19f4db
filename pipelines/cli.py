"""``alignflow``: the command line. Imports nothing heavy before it knows the command."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from alignflow_core.errors import InputError, exit_code, told_paths

STALE = 3


def main(arguments: list[str] | None = None) -> int:
    """Run one command; exit code 0 fine, 1 failure or findings, 2 bad input or usage, 3 something is stale, 130 or 143 interrupted."""
    grammar = parser()
    options, rest = grammar.parse_known_args(arguments)
    if any("=" not in word or word.startswith("-") for word in rest) or (rest and "overrides" not in options):
        grammar.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse takes what follows an option for no part of the list before it
        options.overrides += rest
    command: Callable[[argparse.Namespace], int] = options.command

    def work() -> int:
        with told_paths():
            return command(options)

    return exit_code(work)


def parser() -> argparse.ArgumentParser:
    """The grammar of every command."""
    top = argparse.ArgumentParser(prog="alignflow",
                                  description="Image and mask pairs in the look of a target clinic, from a few unlabelled images of it.",
                                  epilog="Exit codes: 0 fine, 1 failure (doctor and audit: something was found), 2 bad input or usage, "
                                         "3 something is stale.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str, epilog: str | None = None) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=epilog)
        sub.set_defaults(command=command)
        return sub

    def add_root(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--root", type=Path, default=Path("."), metavar="DIR", help="project root with params.yaml (default: here)")

    def add_overrides(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("overrides", nargs="*", metavar="key=value",
                         help="options: profile=smoke|demo|cpu|gpu, reward=NAME, encoder=NAME, or any key of params.yaml, such as align.rho=2")

    def add_quiet(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--quiet", action="store_true", help="no progress on stderr")

    def add_jobs(sub: argparse.ArgumentParser, what: str) -> None:
        sub.add_argument("--jobs", type=_jobs, metavar="N", help=f"{what} built at once (default: cores / machine.threads)")

    def add_json(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--json", action="store_true", help="print JSON")

    sub = add("demo", demo, "built-in data, the whole method, a report; minutes on two cores")
    sub.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder of the run (default: runs/demo)")
    add_overrides(sub)
    add_quiet(sub)
    add_jobs(sub, "stages")

    sub = add("phantom", phantom, "write the built-in data below DIR/data")
    sub.add_argument("dir", type=Path, metavar="DIR")

    sub = add("check", check, "validate a folder of images and masks; lists every problem")
    sub.add_argument("dir", type=Path, metavar="DIR", help="folder with images/ and masks/")
    sub.add_argument("--task", default="binary", help="how masks are read: binary (default), refuge, labels or phantom")
    sub.add_argument("--unlabelled", action="store_true", help="reference images: masks/ may be missing")
    add_overrides(sub)
    add_json(sub)

    sub = add("run", run, "raw folders -> report, without git or DVC; the same command resumes an interrupted run")
    sub.add_argument("--source", type=Path, required=True, metavar="DIR", help="source domain: folder with images/ and masks/")
    sub.add_argument("--target", action="append", required=True, metavar="NAME=DIR", help="target domain; may be given several times")
    sub.add_argument("--unlabelled", action="append", default=[], metavar="NAME",
                     help="this target has no masks: nothing is measured on it; may be given several times")
    sub.add_argument("--references", required=True, metavar="N|DIR|FILE",
                     help="draw N target images that are never tested on (their masks are not looked at), or a folder of reference images, or a file "
                          "of their moments (alignflow reference-moments); with several targets a folder with one NAME or NAME.safetensors for each")
    sub.add_argument("--task", required=True, help="how masks are read: binary, refuge or labels")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    add_overrides(sub)
    add_quiet(sub)
    add_jobs(sub, "stages")

    sub = add("paper", paper, "every comparator, rival and segmenter on equal terms; the paper's tables and figures as HTML, CSV and LaTeX")
    sub.add_argument("--task", required=True, help="phantom (built-in data), binary, refuge or labels")
    sub.add_argument("--source", type=Path, metavar="DIR", help="source domain; not with phantom")
    sub.add_argument("--target", action="append", default=[], metavar="NAME=DIR", help="target domain; may be given several times; not with phantom")
    sub.add_argument("--references", default="10", metavar="N|DIR", help="as for run, but images (default: 10)")
    sub.add_argument("--seeds", type=int, default=1, metavar="N", help="generator seeds 0 .. N-1, a run each (default: 1)")
    sub.add_argument("--counts", default="1,5,20", metavar="N,N", help="numbers of references of the curve, for the first target (default: 1,5,20)")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="runs below DIR/seed<N>, tables and figures in DIR/paper")
    add_overrides(sub)
    add_quiet(sub)
    add_jobs(sub, "stages")

    sub = add("init", init, "a project of one's own: params.yaml, folders for the images, DVC and Dagster set up")
    sub.add_argument("--root", type=Path, default=Path("."), metavar="DIR", help="folder of the project (default: here)")
    sub.add_argument("--source", required=True, metavar="NAME", help="name of the source domain")
    sub.add_argument("--target", action="append", required=True, metavar="NAME", help="name of a target domain; may be given several times")
    sub.add_argument("--unlabelled", action="append", default=[], metavar="NAME",
                     help="this target has no masks: nothing is measured on it; may be given several times")
    sub.add_argument("--references", type=int, metavar="N", help="draw N references from each target domain (default: a folder of its own for each)")
    sub.add_argument("--task", required=True, help="how masks are read: binary, refuge or labels")
    add_overrides(sub)

    sub = add("target", target, "add a target to the project, take one out, list them")
    actions = sub.add_subparsers(dest="action", required=True, metavar="ACTION")
    one = actions.add_parser("add", help="add a target; nothing of the others becomes stale")
    one.add_argument("name", metavar="NAME")
    one.add_argument("--references", required=True, metavar="DIR|N|FILE",
                     help="folder of reference images, or how many to draw from the target's domain, or a file of their moments")
    one.add_argument("--like", metavar="TARGET",
                     help="take its way of aligning, its arms and (without --domain) its domain (default: the first target's, domain apart)")
    one.add_argument("--domain", type=Path, metavar="DIR", help="labelled images to measure on (default: data/target/NAME if there, else --like's)")
    one.add_argument("--unlabelled", action="store_true", help="the images of --domain have no masks: nothing is measured on them")
    add_root(one)
    one = actions.add_parser("remove", help="take a target and its variants out; built artifacts stay on disk")
    one.add_argument("name", metavar="NAME")
    add_root(one)
    add_root(actions.add_parser("list", help="the targets, one a line"))

    sub = add("compose", compose, "write params.yaml anew from pipelines/conf and the options, for the built-in data",
              "Options given earlier do not count. A project with data of its own is left alone: edit its params.yaml.")
    sub.add_argument("--check", action="store_true", help="write nothing; exit code 3 if params.yaml differs")
    add_overrides(sub)
    add_root(sub)

    sub = add("ablate", ablate, "add variants of targets to params.yaml; what they share is built once")
    sub.add_argument("axes", nargs="+", metavar="KEY=VALUE,VALUE",
                     help="reward=frechet,skl, encoder=statconv,flow, references.count=1,5,10, references.seed=1,2 (other images), "
                          "synthetic_share=0.25,0.5, align.gradient=sparse,last_k, align.regions=none,pseudo, align.gates.hold=false or any other "
                          "key of a target")
    sub.add_argument("--target", action="append", default=[], help="target to vary; may be given several times (default: all that are no variants)")
    sub.add_argument("--grid", action="store_true", help="every combination of the axes instead of one axis at a time")
    sub.add_argument("--run", action="store_true", help="then build everything, as 'alignflow run' does")
    add_root(sub)
    add_quiet(sub)
    add_jobs(sub, "stages")

    sub = add("plan", plan, "what is stale, and why")
    sub.add_argument("--check", action="store_true", help="exit code 3 if anything is stale")
    add_root(sub)
    add_json(sub)

    sub = add("materialize", materialize, "build what is stale, through Dagster and DVC")
    what = sub.add_mutually_exclusive_group()
    what.add_argument("--stale", action="store_true", help="all that is stale and nothing else (the default)")
    what.add_argument("selection", nargs="?", metavar="SELECTION", help="Dagster asset selection, such as key:report")
    sub.add_argument("--target", help="only this target, with what it needs")
    add_jobs(sub, "domains and targets")
    add_root(sub)

    sub = add("sync", sync, "tell Dagster and MLflow what a terminal 'dvc repro' has built, and DVC what was built without it")
    add_root(sub)

    sub = add("ui", ui, "Dagster UI and MLflow UI on loopback")
    add_root(sub)

    sub = add("compare", compare, "targets side by side, from MLflow")
    sub.add_argument("--metric", default="dice", help="metric to compare (default: dice)")
    add_root(sub)

    sub = add("pool", pool, "one table per target from runs that differ in their seed")
    sub.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of finished runs")
    sub.add_argument("--baseline", action="append", default=[], metavar="ARM", help="also compare with this arm; may be given several times")

    sub = add("export", export, "kept synthetic pairs as PNG files for other tools")
    sub.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    sub.add_argument("--format", choices=["folder", "nnunet"], default="folder",
                     help="folder: images/, masks/ and manifest.csv for each target (default); nnunet: a dataset of nnU-Net v2 for each target")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    sub.add_argument("--with-source", action="store_true", help="nnunet: the source's training pairs too; else synthetic pairs alone")
    sub.add_argument("--dataset-id", type=int, metavar="N", help="nnunet: number of the first target's dataset (default: 501)")
    sub.add_argument("--pairs", type=int, metavar="N", help="at most so many pairs a target (default: all that are kept)")
    sub.add_argument("--on-copy", choices=["block", "replace", "keep"], default="block",
                     help="near copies of training or reference images: block refuses and names them (default), replace leaves them out "
                          "(with --pairs, other kept pairs take their place), keep writes them with a warning")
    sub.add_argument("--accept-copies", action="store_true", help="needed with --on-copy keep: you know that patients' images may be among them")

    sub = add("audit", audit, "copies of training or reference images among synthetic ones",
              "Exit codes: 0 no copies, 1 copies found, 2 bad input, or too few real images held out to tell a copy from chance (not calibrated).")
    sub.add_argument("dir", type=Path, metavar="DIR", help="folder of a run (all its kept pairs), or an exported folder with --against")
    sub.add_argument("--against", type=Path, metavar="RUN", help="the run that an exported folder came from")
    add_json(sub)

    sub = add("case", case, "which files on this machine the opaque ids of reports and audits stand for")
    sub.add_argument("ids", nargs="+", metavar="ID")
    add_root(sub)

    sub = add("reference-kit", reference_kit, "a small folder with which a hospital measures its reference images, so that they can stay at home")
    sub.add_argument("run", type=Path, metavar="RUN", help="folder of a run or project; its source data and labeller are built if need be")
    sub.add_argument("--target", metavar="NAME", help="whose way of aligning the kit is for (default: the only one)")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    add_quiet(sub)

    sub = add("reference-moments", reference_moments, "at the hospital: its images -> one file of feature moments for --references, no image in it")
    sub.add_argument("kit", type=Path, metavar="KIT", help="folder that 'alignflow reference-kit' wrote")
    sub.add_argument("images", type=Path, metavar="IMAGES", help="folder of at least five images without masks")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE", help="new file, NAME.safetensors")

    sub = add("doctor", doctor, "versions, device, data, telemetry; what is wrong and how to mend it")
    add_root(sub)
    add_json(sub)
    return top


def demo(options: argparse.Namespace) -> int:
    """Built-in data -> report."""
    from alignflow_core.runner import stop_on_sigterm
    from pipelines import local
    from pipelines.compose import write_params

    stop_on_sigterm()
    write_params(options.out / "params.yaml", options.overrides)
    local.write_builtin_data(options.out)
    print(f"report: {local.run_all(options.out, options.quiet, options.jobs)}")
    return 0


def phantom(options: argparse.Namespace) -> int:
    """Built-in data only."""
    from pipelines.local import write_builtin_data

    if (options.dir / "data").exists():
        raise InputError(f"{options.dir / 'data'}: exists; remove it or give another folder")
    options.dir.mkdir(parents=True, exist_ok=True)
    write_builtin_data(options.dir)
    print(options.dir / "data")
    return 0


def run(options: argparse.Namespace) -> int:
    """Raw folders -> report."""
    from alignflow_core.runner import stop_on_sigterm
    from pipelines import local

    stop_on_sigterm()
    folders = local.Folders(options.source, _named_folders(options.target), options.references, options.unlabelled)
    local.prepare_run(folders, options.task, options.out, options.overrides)
    print(f"report: {local.run_all(options.out, options.quiet, options.jobs)}")
    return 0


def paper(options: argparse.Namespace) -> int:
    """The paper's tables and figures."""
    from alignflow_core.runner import stop_on_sigterm
    from pipelines.local import Folders
    from pipelines.paper import build

    stop_on_sigterm()
    counts = [text for text in options.counts.split(",") if text]
    if not all(text.isdecimal() and int(text) for text in counts):
        raise InputError(f"--counts {options.counts}: not numbers of images; write for instance --counts 1,5,20")
    if (options.source is None) != (not options.target) or (options.source is not None and options.task == "phantom"):
        raise InputError("--source and --target go together, and neither goes with --task phantom")
    folders = None if options.source is None else Folders(options.source, _named_folders(options.target), options.references)
    page = build(folders, options.task, options.out, options.overrides, options.seeds, [*map(int, counts)], options.quiet, options.jobs)
    print(f"tables and figures: {page}")
    return 0


def _jobs(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of at least 1")
    return int(text)


def _named_folders(texts: list[str]) -> dict[str, Path]:
    targets = dict(_named_folder(text) for text in texts)
    if len(targets) < len(texts):
        raise InputError("--target: a name is given twice; give each target its own")
    return targets


def _named_folder(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise InputError(f"--target {text}: not NAME=DIR; write for instance --target zeiss=data/zeiss")
    return name, Path(folder)


def init(options: argparse.Namespace) -> int:
    """A new project."""
    from pipelines.scaffold import init as write

    steps = write(options.root, options.source, options.target, options.references, options.task, options.overrides, options.unlabelled)
    print("\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1)))
    return 0


def target(options: argparse.Namespace) -> int:
    """Targets of a project."""
    from pipelines import targets

    if options.action == "add":
        targets.add(options.root, options.name, options.references, options.like, options.domain, not options.unlabelled)
        print(f"target {options.name} added; 'alignflow materialize' builds it")
    elif options.action == "remove":
        print("\n".join(f"target {name} taken out" for name in targets.remove(options.root, options.name)))
    else:
        print(targets.listing(options.root))
    return 0


def compose(options: argparse.Namespace) -> int:
    """conf -> params.yaml."""
    from alignflow_core.config import read_params
    from pipelines import dvcfile
    from pipelines.compose import compose as composed
    from pipelines.compose import refuse_to_lose, render, write_text

    file = options.root / "params.yaml"
    wanted = composed(options.overrides)
    if not options.check:
        for name in refuse_to_lose(file, wanted):
            print(f"{file}: target {name} is no longer in it; 'alignflow target add' or 'ablate' adds it again", file=sys.stderr)
        write_text(file, render(wanted, options.overrides))
        if (options.root / "dvc.yaml").exists():
            dvcfile.write(options.root)
        return 0
    now = read_params(file)
    differing = sorted(str(section) for section in now.keys() | wanted.keys() if now.get(section) != wanted.get(section))
    if differing:
        print(f"{file}: differs in {', '.join(differing)}; run 'alignflow compose' with the same options", file=sys.stderr)
    return STALE if differing else 0


def check(options: argparse.Namespace) -> int:
    """Validate a folder of pairs or references."""
    from alignflow_core.folders import check_folder
    from pipelines.local import task_named

    task = task_named(options.task, options.overrides)
    found: dict[str, object] = {"folder": str(options.dir), "task": task.name, "problems": []}
    try:
        listing = check_folder(options.dir, task, labelled=not options.unlabelled)
    except InputError as error:
        if not options.json:
            raise
        found["problems"] = error.problems
    else:
        found |= {"images": len(listing.cases), "groups": len({case.group for case in listing.cases}), "labelled": listing.labelled,
                  "empty_masks": listing.empty_masks}
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        print(f"{options.dir}: fine; {found['images']} images in {found['groups']} groups")
        print("\n".join(f"note: {name} has no foreground; kept as a case without one" for name in listing.empty_masks), end="")
    return 2 if found["problems"] else 0


def ablate(options: argparse.Namespace) -> int:
    """Variants of targets -> params.yaml (and dvc.yaml); with --run everything is built."""
    from alignflow_core.runner import stop_on_sigterm
    from pipelines import dvcfile, local
    from pipelines.ablate import write_variants

    added = write_variants(options.root, options.target, options.axes, options.grid)
    print("\n".join(f"target {name}" for name in added) or "no new targets")
    if (options.root / "dvc.yaml").exists():
        dvcfile.write(options.root)
    if options.run:
        stop_on_sigterm()
        print(f"report: {local.run_all(options.root, options.quiet, options.jobs)}")
    return 0


def plan(options: argparse.Namespace) -> int:
    """What is stale, and why."""
    from pipelines.plan import plan as planned

    stale = planned(options.root)
    if options.json:
        print(json.dumps([{"node": node, "cause": cause} for node, cause in stale], indent=1))
    else:
        print("\n".join(f"{node}: {cause}" for node, cause in stale) or "everything is up to date")
    return STALE if stale and options.check else 0


def materialize(options: argparse.Namespace) -> int:
    """Build what is stale, or a selection."""
    from pipelines.build import materialize as build

    print("\n".join(build(options.root, options.selection, options.target, jobs=options.jobs)) or "everything is up to date")
    return 0


def sync(options: argparse.Namespace) -> int:
    """dvc.lock -> Dagster."""
    from pipelines.sync import sync as report

    print("\n".join(report(options.root)) or "Dagster knows everything already")
    return 0


def ui(options: argparse.Namespace) -> int:
    """Serve both UIs until interrupted."""
    from pipelines.ui import serve

    serve(options.root)
    return 0


def compare(options: argparse.Namespace) -> int:
    """Targets side by side."""
    from pipelines.tracking import compare_table

    print(compare_table(options.root, options.metric))
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Examine machine and project."""
    import dataclasses

    from pipelines.doctor import examine

    findings = list(examine(options.root))
    if options.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            print(f"{'!!' if finding.remedy else 'ok'}  {finding.subject:18} {finding.state}")
            if finding.remedy:
                print(f"    -> {finding.remedy}")
    return 1 if any(finding.remedy for finding in findings) else 0


def pool(options: argparse.Namespace) -> int:
    """Tables over several seeds."""
    from pipelines.pool import pooled

    print(pooled(options.runs, options.baseline))
    return 0


def reference_kit(options: argparse.Namespace) -> int:
    """A run -> a kit."""
    from alignflow_core.config import load_project
    from alignflow_core.reference_kit import write_kit
    from alignflow_core.runner import stop_on_sigterm
    from pipelines.local import build_for_kit

    stop_on_sigterm()
    name = build_for_kit(options.run, options.target, options.quiet)
    write_kit(load_project(options.run / "params.yaml"), options.run, name, options.out)
    print(f"{options.out}: reference kit for target {name}; README.txt says what the hospital does with it")
    return 0


def reference_moments(options: argparse.Namespace) -> int:
    """Images -> moments."""
    from alignflow_core.reference_kit import apply_kit, summary

    print("\n".join([f"{options.out}: written", *summary(apply_kit(options.kit, options.images, options.out))]))
    return 0


def export(options: argparse.Namespace) -> int:
    """Synthetic pairs as files, past the copy audit."""
    from pipelines.export import Gate, export_folder
    from pipelines.nnunet import FIRST_DATASET, export_nnunet

    gate = Gate(options.on_copy, options.accept_copies, options.pairs)
    if options.format == "nnunet":
        choices = export_nnunet(options.run, options.out, gate, options.with_source,
                                FIRST_DATASET if options.dataset_id is None else options.dataset_id)
    elif options.with_source or options.dataset_id is not None:
        raise InputError("--with-source and --dataset-id are about nnU-Net datasets; add --format nnunet")
    else:
        choices = export_folder(options.run, options.out, gate)
    for target, choice in choices.items():
        print(f"{options.out} {target}: {int(choice.rows.sum())} pairs")
        if choice.left_out:
            print(f"{target}: left out as near copies of real images: {', '.join(choice.left_out)}")
        if options.on_copy == "keep":
            print(f"warning: {target}: treat these pairs as patients' data; {len(choice.verdict.copies)} look copied", file=sys.stderr)
    return 0


def case(options: argparse.Namespace) -> int:
    """Opaque ids -> files, for the terminal of those who have the files and the key."""
    from pipelines.audit import files_of

    print("\n".join(f"{each}: {', '.join(map(str, files))}" for each, files in files_of(options.root, options.ids).items()))
    return 0


def audit(options: argparse.Namespace) -> int:
    """Copies among synthetic images."""
    from pipelines.audit import audit_folder, told

    found = audit_folder(options.dir, options.against)
    if options.json:
        print(json.dumps({target: verdict.as_json() for target, verdict in found.items()}, indent=1))
    else:
        print("\n".join(told(target, verdict) for target, verdict in found.items()))
    if any(verdict.copies for verdict in found.values()):
        return 1
    return 2 if any(verdict.missing for verdict in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
