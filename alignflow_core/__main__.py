"""``python -m alignflow_core stage NAME [--target T | --domain D | --base P | --comparator C]``: the one command that computes.

DVC, Dagster, torchrun, Slurm and Kubernetes all wrap this command. On several processes that torchrun started, rank 0 runs the stage
and the others help it train.
"""

import argparse
import os
import sys
from pathlib import Path

from alignflow_core.errors import exit_code
from alignflow_core.runner import run_stage, stop_on_sigterm


def main(arguments: list[str] | None = None) -> int:
    """Run one stage; exit code 0 fine, 1 failure, 2 bad input, 130 or 143 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m alignflow_core", description=__doc__)
    stage = parser.add_subparsers(required=True).add_parser("stage", help="build one artifact unless it is up to date")
    stage.add_argument("name", help="stage name, as in dvc.yaml")
    keys = stage.add_mutually_exclusive_group()
    keys.add_argument("--target", help="target of a per-target stage")
    keys.add_argument("--domain", help="domain of a per-domain stage")
    keys.add_argument("--base", help="generative process of a painter that comparators add to")
    keys.add_argument("--comparator", help="comparator of a per-comparator stage")
    stage.add_argument("--root", type=Path, default=Path("."), help="project root with params.yaml (default: here)")
    stage.add_argument("--quiet", action="store_true", help="no progress on stderr")
    options = parser.parse_args(arguments)
    stop_on_sigterm()
    key = options.target or options.domain or options.base or options.comparator

    def build() -> int:
        ran = run_stage(options.root, options.name, key, quiet=options.quiet)
        if not options.quiet:
            print("built" if ran else "up to date", file=sys.stderr)
        return 0

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return exit_code(build)
    from alignflow_core.distributed import run_together

    return exit_code(lambda: run_together(build, options.root, options.name, key))


if __name__ == "__main__":
    sys.exit(main())
