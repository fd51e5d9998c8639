"""Writes `castlm/keywords.py`: python -m tests.keywords

The fields of the option dataclasses are the one list of options. Type checkers do not run code, so that what they read
is written out from those fields, and `tests/test_api.py` compares it with them.
"""

import typing
from pathlib import Path
from typing import Any

import castlm.keywords
from castlm.api.evaluate import EvaluateOptions, evaluate
from castlm.api.pack import PackOptions, pack
from castlm.api.prune import PruneOptions, prune
from castlm.api.signature import keywords_of
from castlm.api.train import FINETUNE_OPTIONS, TRAIN_OPTIONS, finetune, train
from castlm.fields import alternatives

FILE = Path(castlm.keywords.__file__)
FUNCTIONS: dict[str, tuple[Any, list[type[Any]]]] = {
    "Prune": (prune, [PruneOptions]),
    "Train": (train, TRAIN_OPTIONS),
    "Finetune": (finetune, FINETUNE_OPTIONS),
    "Evaluate": (evaluate, [EvaluateOptions]),
    "Pack": (pack, [PackOptions]),
}
HEAD = '''"""The keyword arguments of `castlm.prune` and its siblings, for editors and type checkers.

Written by python -m tests.keywords from the fields of the options, which have the defaults, limits and descriptions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from castlm.core.nm import Pattern
'''


def source() -> str:
    """The content of the file."""
    classes = [_typed_dict(name, *function) for name, function in FUNCTIONS.items()]
    return "\n\n".join([HEAD, *classes])


def _typed_dict(name: str, function: Any, sections: list[type[Any]]) -> str:
    code = function.__code__
    named = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    lines = [f"class {name}Keywords(TypedDict, total=False):", f'    """Options of `castlm.{name.lower()}`."""', ""]
    hints = {key: hint for section in sections for key, hint in typing.get_type_hints(section).items()}
    for field in keywords_of(sections, named):
        lines.append(f"    {field.name}: {_accepted(hints[field.name])}")
    return "\n".join(lines) + "\n"


def _accepted(hint: Any) -> str:
    """The type of the values that an option accepts in Python: more than the type that its field has afterwards."""
    names = dict.fromkeys(_named(kind) for kind in alternatives(hint))
    is_text = any("str" in name.split(" | ") for name in names)
    return " | ".join(name for name in names if not (is_text and name.startswith("Literal")))


def _named(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        inner = " | ".join(dict.fromkeys(_named(part) for part in parts if part is not ...))
        return f"Sequence[{inner}]" if parts[-1] is ... else f"tuple[{', '.join(map(_named, parts))}]"
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(_quoted, parts))}]"
    if kind is type(None):
        return "None"
    return {"Path": "str | Path", "Pattern": "Pattern | str"}.get(kind.__name__, kind.__name__)


def _quoted(name: Any) -> str:
    return f'"{name}"' if isinstance(name, str) else repr(name)


if __name__ == "__main__":
    FILE.write_text(source(), encoding="utf-8")
