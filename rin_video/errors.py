"""The errors for problems that a user can solve."""


class UsageError(ValueError):
    """The error for a request that cannot be fulfilled as made.

    The message names the file, the number and the remedy, in one line. The command line prints it without a traceback
    and exits with code 2; in Python it is an ordinary `ValueError`.
    """


def one_line(text: object) -> str:
    """Return the text as one line for any terminal, page or file: non-printable characters are escaped."""
    text = str(text).encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class ReportedError(UsageError):
    """The error of another process, which reports it; this process ends without a second report."""


class TransientError(UsageError):
    """A failure that is not the file's fault (permissions, a missing package, a killed child process).

    The file is tried again the next time.
    """


class ShortClipError(UsageError):
    """A clip has too few frames: `fits` is the largest number that fits, `problem` the message without the remedy."""

    def __init__(self, problem: str, remedy: str = "", fits: int = 0) -> None:  # workers raise it with one text
        super().__init__(problem, remedy, fits)
        self.problem, self.remedy, self.fits = problem, remedy, fits

    def __str__(self) -> str:
        return f"{self.problem}: {self.remedy}" if self.remedy else self.problem


class TimeLimitError(UsageError):
    """Reading a file exceeded the time limit; a higher limit may succeed."""


class DatasetError(UsageError):
    """The format, shape or label of a sample shows that training cannot use the dataset.

    Other samples are presumably alike, so this error stops the run. A plain `UsageError` only excludes the sample that
    raises it.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class Stopped(SystemExit):
    """A signal stopped training after it had written a checkpoint; the same command resumes it.

    A script that does not catch it exits with code 75 ("try again later"), which a cluster can distinguish from a
    failure.
    """

    CODE = 75

    def __init__(self, message: str) -> None:
        super().__init__(self.CODE)
        self.message = message

    def __str__(self) -> str:
        return self.message
