"""How names that others chose are shown: tensor names, paths and figures' labels may hold terminal escapes or Markdown.

A terminal escape in a tensor's name can rewrite what a report says above it; a `|` or a link breaks a table.
"""

from __future__ import annotations

import re

LAYOUT = "\n\t\u00a0\u3000\u200c\u200d"
"""Characters that text of a language model may hold: line breaks, spaces, and joiners of letters and emoji."""

_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~$!&])")


def printable(text: object, keep: str = "") -> str:
    r"""`text` without control characters, so also in one line: each becomes an escape such as `\x1b` or `\u202e`.

    Escaped are control characters, line breaks, bidirectional and zero-width marks, and surrogates that stand for bytes
    which are not UTF-8.

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
    r"""`text` as it reads in a paragraph or a table cell of Markdown, with nothing of it taken for markup or HTML.

    >>> markdown("a|b <script>")
    'a\\|b \\<script\\>'
    """
    return _MARKDOWN.sub(r"\\\1", printable(text))


def markdown_code(text: object) -> str:
    r"""`text` as inline code of Markdown, whatever backticks it holds; `|` is escaped for tables.

    >>> markdown_code("a`b")
    '``a`b``'
    """
    text = printable(text).replace("|", "\\|")
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * (longest + 1)
    edge = " " if not text or text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{edge}{text}{edge}{fence}"
