"""The exception for bad input. The command line prints it as one line, without a traceback, and exits with code 2."""


class InputError(ValueError):
    """The given input cannot be used. The message is one line that names the offending value and the remedy."""


class DivergedError(InputError):
    """The numbers of a run are no longer finite. The command line exits with code 1."""
