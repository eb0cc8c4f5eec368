"""The one error for what a user can mend."""


class UsageError(ValueError):
    """Something the user asked for cannot be done as asked.

    The message names the file, the number and the remedy, in one line. The command line prints it without a traceback
    and exits with code 2; in Python it is an ordinary `ValueError`.
    """


def one_line(text: object) -> str:
    """Text as one line that any terminal, page or file can hold: what does not print is escaped."""
    text = str(text).encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class ReportedError(UsageError):
    """The error of another process, which says it: this one ends with it."""


class TransientError(UsageError):
    """What a file is not to blame for (rights, a missing package, a killed child): it is tried again the next time."""


class ShortClipError(UsageError):
    """A clip has too few frames; `fits` of them are there. `problem` is the message without the remedy."""

    def __init__(self, problem: str, remedy: str = "", fits: int = 0) -> None:  # of one text too, as workers raise it
        super().__init__(problem, remedy, fits)
        self.problem, self.remedy, self.fits = problem, remedy, fits

    def __str__(self) -> str:
        return f"{self.problem}: {self.remedy}" if self.remedy else self.problem


class TimeLimitError(UsageError):
    """A file took longer than the limit: with a higher one it may be read."""


class DatasetError(UsageError):
    """A sample whose form, shape or label shows that the data set is not what training takes.

    Others are of the same make, so that the run stops, where a `UsageError` costs the one sample that raises it.
    """


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class Stopped(SystemExit):
    """Training was stopped by a signal, after it had written a checkpoint: the same command goes on.

    A script that lets it pass ends with exit code 75 ("try again later"), so that a cluster can tell it from a failure.
    """

    CODE = 75

    def __init__(self, message: str) -> None:
        super().__init__(self.CODE)
        self.message = message

    def __str__(self) -> str:
        return self.message
