"""The two errors whose message says everything: bad input, and work that cannot succeed as configured."""


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
