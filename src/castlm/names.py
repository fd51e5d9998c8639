"""Text for display: tables, times, and names from other sources, which may hold terminal escapes or Markdown.

A terminal escape in a tensor's name can rewrite what a report says above it; a `|` or a link breaks a table.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TextIO

LAYOUT = "\n\t\u00a0\u3000\u200c\u200d"
"""Characters that stay in text of a language model: line breaks, spaces, and joiners of letters and emoji."""

_WORDS = re.compile(r"( *)((?<!\S)'[^']*'|[^ ]+)")
"""A word of a line and the spaces before it; a quoted argument of a command is one word."""
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~$!&])")


def printable(text: object, keep: str = "") -> str:
    r"""`text` in one line, with control characters as escapes such as `\x1b` or `\u202e`.

    Escapes control characters, line breaks, bidirectional and zero-width marks, and surrogates of bytes that are not
    UTF-8.

    Args:
        keep: characters that stay, such as line breaks in the text of a model.

    >>> printable("model.\x1b[2Klayers.0")
    'model.\\x1b[2Klayers.0'
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode("ascii") for char in text
    )


def markdown(text: object) -> str:
    r"""Escapes `text` for a paragraph or table cell of Markdown, so that nothing in it is read as markup or HTML.

    >>> markdown("a|b <script>")
    'a\\|b \\<script\\>'
    """
    return _MARKDOWN.sub(r"\\\1", printable(text))


def markdown_code(text: object) -> str:
    r"""`text` as inline code of Markdown; handles backticks, and escapes `|` for tables.

    >>> markdown_code("a`b")
    '``a`b``'
    """
    text = printable(text).replace("|", "\\|")
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * (longest + 1)
    edge = " " if not text or text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{edge}{text}{edge}{fence}"


def filled(text: str, columns: int) -> str:
    """`text` with spaces at the end of each row of a terminal, so that the next one begins with a whole word.

    Spaces take the place of line breaks so that a command of several rows is still one line when it is copied. The
    words of two rows have at least one between them, and the terminal breaks a word that is longer than a row.

    >>> filled("resume with castlm train", 14)
    'resume with   castlm train'
    """
    rows = []
    for line in text.split("\n"):
        row, place = "", 0
        words = _WORDS.findall(line)
        for number, (spaces, word) in enumerate(words, 1):
            room = columns - (number < len(words))  # the last word of a line needs no space behind it
            if place and len(word) <= room < place + len(spaces) + len(word):
                row += " " * (columns - place)
                place = 0
            else:
                row += spaces
                place += len(spaces)
            row += word
            place = (place + len(word)) % columns
        rows.append(row)
    return "\n".join(rows)


def columns_of(stream: TextIO | None) -> int | None:
    """The columns of a terminal, or `COLUMNS`; None for a file, a pipe or a stream that is closed."""
    try:
        if stream is None or not stream.isatty():
            return None
        asked = os.environ.get("COLUMNS", "")
        columns = int(asked) if asked.isdigit() else os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return None
    return columns if columns > 1 else None


def for_stream(text: str, stream: TextIO | None) -> str:
    """`text` as `filled` for a terminal, and unchanged for a file or a pipe, where a line stays one line."""
    columns = columns_of(stream)
    return text if columns is None else filled(text, columns)


def duration(seconds: float) -> str:
    """A time in seconds, in minutes from two on, or in hours from two on.

    >>> duration(3.5), duration(150), duration(9000)
    ('3.5 s', '2 minutes', '2.5 hours')
    """
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.3g} hours"


def clock(seconds: float) -> str:
    """A time in seconds as hours, minutes and seconds, for a line that is refreshed.

    >>> clock(50_000)
    '13:53:20'
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; the first column is aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*table)]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in table]
