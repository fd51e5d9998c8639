"""Shell completion by argcomplete: the names of commands, their options, and the names that an option takes.

The shell runs castlm with `_ARGCOMPLETE` and the line in its environment. argcomplete answers it and ends the process.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from castlm.packages import require

IS_ASKED = "_ARGCOMPLETE" in os.environ
"""Whether a shell asks for completions."""


def complete_command(commands: Collection[str], run: Callable[[str], Any]) -> None:
    """Answers with the options of the command on the line, or with the names of commands.

    Args:
        run: runs the command of this name without arguments, as far as `complete_options`.
    """
    require("shell completion needs", "argcomplete", install="'castlm[completion]'")
    from argcomplete.lexers import split_line

    first = int(os.environ["_ARGCOMPLETE"])  # the number of words before the arguments
    words = split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3][first:]
    for number in (2, 1):
        name = " ".join(words[:number])
        if name in commands and len(words) >= number:
            os.environ["_ARGCOMPLETE"] = str(first + number)
            run(name)
    group = [word for word in words[:1] if any(name.startswith(f"{word} ") for name in commands)]
    names = [name.removeprefix(f"{group[0]} ") for name in commands if name.startswith(group[0])] if group else commands
    parser = argparse.ArgumentParser(add_help=False)
    for _ in group:
        parser.add_argument("group")
    action: Any = parser.add_argument("command")
    action.completer = functools.partial(_all, dict.fromkeys(name.partition(" ")[0] for name in names))
    _answer(parser)


def complete_options(
    parser: argparse.ArgumentParser,
    actions: Iterable[Any],
    names: Mapping[str, Collection[str]],
    hidden: Collection[str],
) -> None:
    """Answers with the options of one command, or the names that the last of them takes.

    Args:
        parser: of the command; actions: those that were added to it.
        names: the names that an option takes, by option.
        hidden: those that its help does not show.
    """
    unshown = []
    for action in actions:
        if names.get(action.dest):
            action.completer = functools.partial(_all, names[action.dest])
        unshown += [name for name in action.option_strings if "_" in name or action.dest in hidden]
    _answer(parser, unshown)


def _all(names: Collection[str], **_: Any) -> list[str]:
    """A completer: argcomplete takes those that begin as the word on the line."""
    return list(names)


def _answer(parser: argparse.ArgumentParser, unshown: Collection[str] = ()) -> None:
    import argcomplete

    argcomplete.autocomplete(parser, exclude=list(unshown))
