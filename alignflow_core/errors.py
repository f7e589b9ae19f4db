"""The two errors whose message says everything: bad input, and work that cannot succeed as configured."""

import sys
from collections.abc import Callable


class InputError(Exception):
    """Bad input or usage: the command prints the problems and exits with code 2.

    Args:
        problems: one line each, naming the file or key, the cause and the remedy.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class StageError(Exception):
    """A stage that ran and cannot give a usable artifact: the message says why and what to change; exit code 1."""


def exit_code(command: Callable[[], int]) -> int:
    """Run a command; print what went wrong, a line a problem, and turn it into the exit code: 1 failure, 2 bad input, 130 interrupted."""
    try:
        return command()
    except InputError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return 2
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
