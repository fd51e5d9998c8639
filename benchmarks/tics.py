"""Counts tics of style in the text of castlm, with one column per source tree.

`python -m benchmarks.tics [TREE ...]` counts the trees that are named, or this one, over the files that git tracks.
`--where` lists the places in the first one. The counts show where to read; they are not limits, because replacing a
phrase by rule makes a new riddle.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TICS = {
    'docstring begins with "Of "': r'"""Of ',
    'docstring begins with "What "': r'"""What ',
    'docstring begins with "How " or "Where "': r'"""(How|Where) ',
    '"that of", "those of"': r"\b(that|those) of\b",
    '"of which"': r"\bof which\b",
    '"is/are/was said", "says so"': r"\b((is|are|was) said|says so)\b",
    '"goes on", "go on", "going on"': r"\b(goes|go|going) on\b",
    '"what is/it/the/a/this/they/was ..."': r"\bwhat (is|it|the|a|this|they|was)\b",
}
"""Each tic as a regular expression, matched within a line and with its case."""

KINDS = {".py", ".md", ".cpp", ".h", ".yaml"}


def texts(tree: Path) -> dict[str, str]:
    """The tracked files of these kinds, by path; this file, which lists the tics, is left out."""
    names = subprocess.run(
        ["git", "ls-files"], cwd=tree, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return {
        name: (tree / name).read_text()
        for name in names
        if Path(name).suffix in KINDS and name != "benchmarks/tics.py" and (tree / name).is_file()
    }


def count(tree: Path) -> dict[str, int]:
    """The number of times that each tic occurs in a tree."""
    text = "\n".join(texts(tree).values())
    return {tic: len(re.findall(expression, text)) for tic, expression in TICS.items()}


def places(tree: Path) -> list[str]:
    """A line `path:number: text` for every line of a tree that has a tic."""
    any_tic = re.compile("|".join(TICS.values()))
    return [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts(tree).items()
        for number, line in enumerate(text.splitlines(), 1)
        if any_tic.search(line)
    ]


def main(arguments: list[str]) -> None:
    """Prints the table, one column for each tree."""
    trees = [Path(name) for name in arguments if name != "--where"] or [Path(__file__).resolve().parents[1]]
    columns = [count(tree) for tree in trees]
    print("| tic | " + " | ".join(tree.resolve().name for tree in trees) + " |")
    print("|---|" + "---:|" * len(trees))
    for tic in TICS:
        print(f"| {tic} | " + " | ".join(str(column[tic]) for column in columns) + " |")
    if "--where" in arguments:
        print("\n" + "\n".join(places(trees[0])))


if __name__ == "__main__":
    main(sys.argv[1:])
