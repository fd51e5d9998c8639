"""`Say` and `Progress`: the callables through which a library call tells its caller what it does, as it never prints.

`castlm.progress` has the ones of the commands, which print on stderr.
"""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]
"""Takes a line for the user."""
Progress = Callable[[int, int], None]
"""Takes the finished parts of the work and all of them, after each part."""


def silent(*_: object) -> None:
    """A `Say` and a `Progress` that show nothing: the default of library calls."""
