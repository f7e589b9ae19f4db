"""Every row of docs/performance.md, each as a ratio against a peer measured in the same run.

    python -m benchmarks [--only NAME...] [--json FILE]

A subject is a module here with ``rows()``, which yields ``Row`` or ``Skipped``, and ``NUMBERS``, the rows of the table that it measures.
A missed bar is a finding and no error: it is printed, and the exit status is 0.
"""

import argparse
import importlib
import json
import os
import pkgutil
import sys
from pathlib import Path
from types import ModuleType

import benchmarks
from benchmarks.row import Row, Skipped

WIDE = 72
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # idle threads of a pool burn CPU seconds


def subjects() -> dict[str, ModuleType]:
    """Modules with rows, in the order of the table."""
    modules = [importlib.import_module(f"benchmarks.{found.name}") for found in pkgutil.iter_modules(benchmarks.__path__) if found.name != "__main__"]
    named = {module.__name__.split(".")[-1]: module for module in modules if hasattr(module, "rows")}
    return dict(sorted(named.items(), key=lambda item: item[1].NUMBERS))


def line(row: Row) -> str:
    """One row of the printed table."""
    bar = f"{'≥' if row.at_least else '≤'} {row.bar:g}"
    spread, verdict = " to ".join(f"{value:g}" for value in row.spread), "ok" if row.ok else "MISSED"
    return f"{row.name:{WIDE}s} {row.ours:10g} {row.peer:10g} {row.unit:8s} {row.ratio:8g} {bar:8s} {verdict:6s} {row.n:3d}  {spread}"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print as it goes, write the file."""
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))  # before numpy is imported
    named = subjects()
    listing = "\n".join(f"  {name:18s} {'row ' + ', '.join(map(str, module.NUMBERS)):10s} {(module.__doc__ or '').splitlines()[0]}"
                        for name, module in named.items())
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, epilog=f"names:\n{listing}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(named), default=list(named), help="these subjects alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    options = parser.parse_args(arguments)
    print(f"{'':{WIDE}s} {'ours':>10s} {'peer':>10s} {'unit':8s} {'ratio':>8s} {'bar':8s} {'':6s} {'n':>3s}  spread", flush=True)
    rows = []
    for name in options.only:
        for row in named[name].rows():
            if isinstance(row, Skipped):
                print(f"{row.name:{WIDE}s} skipped: {row.why}", flush=True)
            else:
                print(line(row), flush=True)
                rows.append(row)
    if options.json:
        options.json.write_text(json.dumps([row.record() for row in rows], indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"{sum(row.ok for row in rows)} of {len(rows)} rows reach their bar")
    return 0


if __name__ == "__main__":
    sys.exit(main())
