"""DVC's command line, with ``dvc.lock`` read by libyaml before it is rewritten: ``python -m pipelines.dvc_command`` with DVC's arguments.

DVC rewrites the whole file after every stage, and first reads it in a way that keeps comments and is written in Python. The file has no comments, and
grows with the stages: of 65 this reading takes 1.9 s of CPU, by libyaml .3. What is written is the same (tests/test_dvc.py). Should DVC look
otherwise inside some day, its own way is taken.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

LOCK = "dvc.lock"


def read_lock_files_quickly() -> None:
    """Let this process's DVC change lock files without their comments."""
    from dvc import dvcfile
    from dvc.utils.serialize._common import _modify_data
    from dvc.utils.serialize._yaml import _dump, parse_yaml

    its_own = dvcfile.modify_yaml

    @contextlib.contextmanager
    def modify(path: Any, fs: Any = None) -> Iterator[Any]:
        with _modify_data(path, parse_yaml, _dump, fs=fs) if os.path.basename(path) == LOCK else its_own(path, fs=fs) as data:
            yield data

    dvcfile.modify_yaml = modify


def main(arguments: list[str]) -> int:
    """Run DVC."""
    with contextlib.suppress(ImportError, AttributeError):
        read_lock_files_quickly()
    from dvc.cli import main as dvc

    return int(dvc(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
