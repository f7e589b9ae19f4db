"""The one error that means "your input, not our fault"."""


class InputError(Exception):
    """Bad input or usage: the command prints the problems and exits with code 2.

    Args:
        problems: one line each, naming the file or key, the cause and the remedy.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
