"""The one error for what a user can mend."""


class UsageError(ValueError):
    """Something the user asked for cannot be done as asked.

    The message names the file, the number and the remedy, in one line. The command line prints it without a traceback
    and exits with code 2; in Python it is an ordinary `ValueError`.
    """
