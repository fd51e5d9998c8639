"""The one exception for what a user can put right; the command line prints it as one line and exits with 2."""


class InputError(ValueError):
    """What was given cannot be used. The message names the offending value and the remedy, in one line."""
