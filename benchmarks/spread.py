"""Counts how far each concept of castlm is spread over its source files, as one table for source trees.

`python -m benchmarks.spread [TREE ...]` counts the trees that are named, or this one. Identifiers are Python's tokens,
so that a word in a docstring or a comment does not count. The counts show where to look; they are not limits, because
fewer but denser lines are no gain.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

IMAGES = "files that name images or vision"
STRUCTURED = "files that name structured patterns"
EXPERTS = "files that name experts"
FORMATS = "files that name int4, int8 or fp8"
CHAT = "files that name chat or assistant"
ADAPTERS = "files that name adapters"

CONCEPTS = {
    IMAGES: r"image|(?<!re)vision|pixel",
    STRUCTURED: r"(?<!semi_)(?<!semi)structured|channels|(?<!num_)(?<!kv_)(?<!attention_)heads|units|(?<!quan)tiles",
    EXPERTS: r"expert|router",
    FORMATS: r"(?<!u)int4|(?<!u)int8|fp8|float8",
    CHAT: r"chat|assistant",
    ADAPTERS: r"adapter|lora|shira",
}
"""Patterns of the identifiers of each concept. `uint8` is the type of bytes and bits, and no numeric format."""

ROOMS = {
    IMAGES: r"data/image",
    STRUCTURED: r"structured/|core/(structured|combined|unit_masks)",
    EXPERTS: r"(core|inference)/experts|oneshot/routed",
    FORMATS: r"inference/(formats|rounding)\.",
    CHAT: r"data/chat",
    ADAPTERS: r"methods/",
}
"""The files that are the room of each concept, in this layout and in the one before it."""

METHODS = {"cast", "ste", "srste", "ast", "gradual_magnitude", "finetune", "dense"}
SHORT = 40
"""Longest string, in characters, that is a value ("int8") and not a text that mentions one."""


@dataclass
class Source:
    """A Python file of the package, read once."""

    path: str
    """Relative to the package, such as core/nm.py."""
    text: str
    tree: ast.Module
    identifiers: set[str] = field(default_factory=set)
    values: set[str] = field(default_factory=set)
    """Short strings, with their quotes."""

    @classmethod
    def read(cls, path: Path, package: Path) -> Source:
        text = path.read_text(encoding="utf-8")
        source = cls(path.relative_to(package).as_posix(), text, ast.parse(text))
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME:
                source.identifiers.add(token.string)
            elif token.type == tokenize.STRING and len(token.string) <= SHORT:
                source.values.add(token.string)
        return source


def python_files(tree: Path) -> list[Source]:
    """Every Python file of `src/castlm` in `tree`."""
    package = tree / "src" / "castlm"
    return [Source.read(path, package) for path in sorted(package.rglob("*.py"))]


def num_lines(tree: Path) -> int:
    """Lines of Python and C++ of the package, with comments and blank lines."""
    package = tree / "src" / "castlm"
    files = (path for path in package.rglob("*") if path.suffix in (".py", ".cpp", ".h"))
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


def files_that_name(sources: list[Source], concept: str) -> list[str]:
    """Files outside the concept's room in which an identifier names it.

    A numeric format counts as a short string as well, since code meets it as a value: `weights == "int8"`.
    """
    pattern = re.compile(CONCEPTS[concept], re.IGNORECASE)
    found = []
    for source in sources:
        words = source.identifiers | (source.values if concept == FORMATS else set())
        if not re.match(ROOMS[concept], source.path) and any(map(pattern.search, words)):
            found.append(source.path)
    return found


def functions(sources: list[Source]) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function and method, with the path of its file."""
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield source.path, node


def takes_whole_config(sources: list[Source]) -> list[str]:
    """Functions and methods with a parameter that is annotated as TrainConfig."""
    found = []
    for path, function in functions(sources):
        arguments = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
        if any(a.annotation and re.search(r"\bTrainConfig\b", ast.unparse(a.annotation)) for a in arguments):
            found.append(f"{path}:{function.name}")
    return found


def compares_methods(sources: list[Source]) -> list[str]:
    """Files outside methods/ that compare something called a method with the name of a training method.

    `method == "cast"`, `config.method in ("ste", "ast")` and `fields.get("method") != "dense"` count.
    """
    found = []
    for source in sources:
        compared = (node for node in ast.walk(source.tree) if isinstance(node, ast.Compare))
        for node in compared:
            strings = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            if "method" in ast.unparse(node) and strings & METHODS:
                found.append(source.path)
                break
    return [path for path in found if not path.startswith("methods/")]


def median_function(sources: list[Source]) -> float:
    """Median lines of a function, from `def` to its last line, with its docstring."""
    return statistics.median((function.end_lineno or 0) - function.lineno + 1 for _, function in functions(sources))


def count(tree: Path) -> dict[str, float]:
    """The rows of the table for one tree."""
    sources = python_files(tree)
    texts = [source.text for source in sources]
    rows: dict[str, float] = {"lines of source, C++ included": num_lines(tree), "Python files": len(sources)}
    rows |= {concept: len(files_that_name(sources, concept)) for concept in CONCEPTS}
    return rows | {
        "functions that take the whole TrainConfig": len(takes_whole_config(sources)),
        "calls that parse a pattern": sum(
            len(re.findall(r"\b(?:Pattern\.parse|parse_pattern)\(", text)) for text in texts
        ),
        "files outside methods/ that compare a method's name": len(compares_methods(sources)),
        "`raise InputError`": sum(text.count("raise InputError") for text in texts),
        "median lines of a function": median_function(sources),
    }


def main(arguments: list[str]) -> None:
    """Prints the table, one column for each tree; `--files` lists the files counted in the first one."""
    trees = [Path(name) for name in arguments if name != "--files"] or [Path(__file__).resolve().parents[1]]
    columns = [count(tree) for tree in trees]
    print("| what | " + " | ".join(tree.name for tree in trees) + " |")
    print("|---|" + "---:|" * len(trees))
    for row in columns[0]:
        print(f"| {row} | " + " | ".join(f"{column[row]:,g}" for column in columns) + " |")
    if "--files" in arguments:
        sources = python_files(trees[0])
        lists = {concept: files_that_name(sources, concept) for concept in CONCEPTS}
        lists |= {"whole TrainConfig": takes_whole_config(sources), "a method's name": compares_methods(sources)}
        for title, found in lists.items():
            print(f"\n{title}:\n  " + "\n  ".join(found))


if __name__ == "__main__":
    main(sys.argv[1:])
