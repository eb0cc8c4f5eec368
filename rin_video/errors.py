"""The one error for what a user can mend."""


class UsageError(ValueError):
    """Something the user asked for cannot be done as asked.

    The message names the file, the number and the remedy, in one line. The command line prints it without a traceback
    and exits with code 2; in Python it is an ordinary `ValueError`.
    """


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
