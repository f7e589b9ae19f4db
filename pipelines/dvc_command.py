"""DVC's command line, but of ``dvc.lock`` it rewrites only what has changed: ``python -m pipelines.dvc_command`` with DVC's arguments.

DVC reads the whole file once more after every stage, in a way that keeps comments, of which it has none, and writes all of it anew: for 65 stages
3 s of CPU, for twice as many twice that. Here the stage's entry is put into the text, which then takes the file's place at once. The text is the
same to the byte (tests/test_dvc.py). Should DVC look otherwise inside some day, or the file, DVC's own way is taken.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

from alignflow_core.artifact import write_whole
from pipelines import dvc_lock


def rewrite_only_what_changes() -> None:
    """Let this process's DVC change lock files by their entries."""
    from dvc.dvcfile import Lockfile, logger
    from dvc.stage.serialize import to_lockfile
    from dvc.utils.serialize import dumps_yaml

    its_own = Lockfile.dump_stages

    def dump_stages(self: Any, stages: Any, **kwargs: Any) -> None:
        file = Path(self.path)
        before = file.read_text(encoding="utf-8") if file.exists() else ""
        entries = {name: dumps_yaml({"stages": {name: value}}).removeprefix("stages:\n")
                   for stage in stages for name, value in to_lockfile(stage, **kwargs).items()}
        after = dvc_lock.replaced(before, entries)
        if after is None:
            its_own(self, stages, **kwargs)
        elif after != before:
            logger.info("Updating lock file '%s'", self.relpath)
            write_whole(file, after.encode())
            self.repo.scm_context.track_file(self.relpath)

    Lockfile.dump_stages = dump_stages


def main(arguments: list[str]) -> int:
    """Run DVC."""
    with contextlib.suppress(ImportError, AttributeError):
        rewrite_only_what_changes()
    from dvc.cli import main as dvc

    return int(dvc(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
