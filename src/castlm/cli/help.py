"""The text of `castlm COMMAND --help`: the essential options in full, and the others by section.

`--help-all` describes every option.
"""

from __future__ import annotations

import dataclasses
import textwrap
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Union

from castlm.fields import choices_of, default_of, docs_of, hints_of, is_required

WIDTH = 100
_INDENT = 30

Sections = Sequence[tuple[str, type[Any]]]
"""Dataclasses of a command's options, by the title of their section; titles may repeat."""


def help_text(sections: Sections, name: str, everything: bool, about: type[Any], hidden: Iterable[str] = ()) -> str:
    """The help of a command.

    Args:
        about: the class whose docstring describes the command.
        everything: describe all options; otherwise only name the inessential ones, if the command has essential ones.
        hidden: options that the command has and does not need.
    """
    groups: dict[str, list[tuple[type[Any], dataclasses.Field[Any]]]] = {}
    for title, kind in sections:
        shown = (field for field in dataclasses.fields(kind) if field.name not in hidden)
        groups.setdefault(title, []).extend((kind, field) for field in shown)
    options = [option for members in groups.values() for option in members]
    positional = [field.name.upper() for _, field in options if field.metadata.get("positional")]
    usage = " ".join(["usage: castlm", name, *positional, "[OPTIONS]"])
    summary = " ".join(str(about.__doc__).partition("\n\n")[0].split())
    lines = [usage, "", *_wrap(summary), ""]
    essential = [option for option in options if option[1].metadata.get("essential")]
    if everything or not essential:
        for title, members in groups.items():
            lines += [f"{title}:", *(line for option in members for line in _described(*option)), ""]
        return "\n".join(lines).rstrip()
    essential.sort(key=lambda option: not is_required(option[1]))
    lines += ["most important options:", *(line for option in essential for line in _described(*option)), ""]
    for title, members in groups.items():
        others = [(kind, field) for kind, field in members if not field.metadata.get("essential")]
        names = "  ".join(_option(field, hints_of(kind)[field.name]) for kind, field in others)
        lines += _wrap(names, initial_indent=f"{title + ':':13}", subsequent_indent=" " * 13)
    return "\n".join([*lines, "", f"castlm {name} --help-all describes every option."])


def _wrap(text: str, width: int = WIDTH, **indents: str) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False, **indents)


def _option(field: dataclasses.Field[Any], hint: Any) -> str:
    if field.metadata.get("positional"):
        return field.name.upper()
    dashes = field.name.replace("_", "-")
    return f"--no-{dashes}" if hint is bool and default_of(field) else f"--{dashes}"


def _described(kind: type[Any], field: dataclasses.Field[Any]) -> list[str]:
    hint = hints_of(kind)[field.name]
    head = f"  {_option(field, hint)} {'' if field.metadata.get('positional') else _values(field, hint)}".rstrip()
    text = f"{docs_of(kind).get(field.name, '')} {_default(field, hint)}".strip()
    if hint is bool and default_of(field):
        text = f"Turn this off: {text[:1].lower()}{text[1:]}"
    wrapped = _wrap(text, WIDTH - _INDENT)
    if len(head) >= _INDENT:
        return [head, *(" " * _INDENT + line for line in wrapped)]
    first, *rest = wrapped or [""]
    return [f"{head:{_INDENT}}{first}".rstrip(), *(" " * _INDENT + line for line in rest)]


def _values(field: dataclasses.Field[Any], hint: Any) -> str:
    """The values that an option takes: `INT`, `FLOAT|auto`, `cast|ste`."""
    if hint is bool:
        return ""
    if names := choices_of(field):
        return "|".join(names)
    return _type(typing.get_args(hint)[0] if field.metadata.get("append") else hint)


def _type(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "|".join(map(str, parts))
    if origin in (Union, types.UnionType):
        names = [_type(part) for part in parts if part is not type(None)]
        return names[-1] if names[-1] == f"{names[0]} ..." else "|".join(names)  # one or several
    if origin is tuple:
        return f"{_type(parts[0])} ..." if parts[-1] is ... else " ".join(map(_type, parts))
    return {int: "INT", float: "FLOAT"}.get(hint, "TEXT")


def _default(field: dataclasses.Field[Any], hint: Any) -> str:
    if is_required(field):
        return "(required)"
    value = default_of(field)
    if value is None or value == () or hint is bool:
        return ""
    shown = " ".join(map(_plain, value)) if isinstance(value, tuple) else _plain(value)
    return f"(default: {shown})"


def _plain(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
