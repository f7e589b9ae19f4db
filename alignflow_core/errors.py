"""The two errors whose message says everything: bad input, and work that cannot succeed as configured."""

import contextlib
import errno
import os
import select
import sys
from collections.abc import Callable, Iterator

NO_FOLDER, NO_RIGHT = "a file is where a folder is meant; give another path", "give a place that you may write to, or change its permissions"
# Errors of the file system that a path given by a user leads to, and their remedies.
PATH_ERRORS = {errno.EEXIST: NO_FOLDER, errno.ENOTDIR: NO_FOLDER, errno.EISDIR: "a folder is where a file is meant; give another path",
               errno.ENOENT: "create it or correct the path", errno.ENAMETOOLONG: "give a shorter one",
               errno.EACCES: NO_RIGHT, errno.EPERM: NO_RIGHT, errno.EROFS: NO_RIGHT}


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


@contextlib.contextmanager
def told_paths() -> Iterator[None]:
    """Turn what the file system says of a path into bad input; other errors of it, such as of a broken disk, stay what they are.

    For the command line and for raw folders: what a stage says of its own files is a failure of the stage.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None or error.errno not in PATH_ERRORS:
            raise
        raise InputError(f"{error.filename}: {error.strerror}; {PATH_ERRORS[error.errno]}") from error


def exit_code(command: Callable[[], int]) -> int:
    """Run a command; print what went wrong, a line a problem, and turn it into the exit code: 1 failure, 2 bad input, 130 interrupted.

    Where the reader of our output, such as ``head``, has gone away, nobody is told: 141, as of a process that SIGPIPE has ended.
    """
    try:
        code = command()
        sys.stdout.flush()
        return code
    except InputError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return 2
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        if not _unread():  # another pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would try once more
        return 141
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130


def _unread() -> bool:
    """Whether nobody reads our output any more."""
    looker = select.poll()
    looker.register(sys.stdout, select.POLLOUT)
    return any(event & select.POLLERR for _, event in looker.poll(0))
