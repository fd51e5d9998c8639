"""The command line of a dataclass: one option per field, read by argparse and checked by `castlm.fields`; its help.

Uses argparse instead of tyro, which reports errors as boxes on stderr and cannot hide options from `--help`. In
argparse `error` can be overridden, so every error is one line with the option that was probably meant.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import shlex
import sys
import textwrap
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import castlm.fields
from castlm.cli import completion
from castlm.core.errors import InputError
from castlm.fields import (
    COMMAND_LINE,
    alternatives,
    build,
    choices_of,
    default_of,
    hints_of,
    is_required,
    unknown,
)
from castlm.names import columns_of, for_stream, printable
from castlm_runtime.machine import check_threads
from castlm_runtime.reading import read_json_object, user_path

T = TypeVar("T")

WIDTH = 100
"""The most columns of a help text."""
_INDENT = 30

Sections = Sequence[tuple[str, type[Any]]]
"""Dataclasses of a command's options, by the title of their section; titles may repeat."""


def parse(kind: type[T], arguments: Sequence[str], name: str) -> T:
    """The options of the command `castlm <name>` as the dataclass `kind`. Prints the help and exits if asked to.

    Raises `InputError` for an unknown or missing option, a value of the wrong type, or an option without effect.
    """
    return build(kind, read_arguments([("options", kind)], arguments, name, about=kind), COMMAND_LINE)


def read_arguments(
    sections: Sections,
    arguments: Sequence[str],
    name: str,
    about: type[Any],
    hidden: Iterable[str] = (),
) -> dict[str, Any]:
    """The given options by field name, as unchecked text. The last of several values counts.

    Args:
        sections: dataclasses whose fields are the options.
        about: the class whose docstring describes the command in the help.
        hidden: options that the help does not show.

    Raises:
        InputError: an unknown option, or one without its value.
    """
    fields = [(kind, field) for _, kind in sections for field in dataclasses.fields(kind)]
    unnamed = [field.name for _, field in fields if field.metadata.get("positional")]
    named = [field.name for _, field in fields if field.name not in unnamed]
    arguments = _model_in_place(unnamed, named, arguments)
    before_dashes = list(arguments)[: arguments.index("--")] if "--" in arguments else arguments
    if "--help-all" in before_dashes or {"-h", "--help"} & set(before_dashes):
        print(help_text(sections, name, everything="--help-all" in before_dashes, about=about, hidden=hidden))
        raise SystemExit(0)
    parser = _Parser(prog=f"castlm {name}", add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    actions = [_add(parser, field, hints_of(kind)[field.name]) for kind, field in fields]
    if completion.IS_ASKED:
        choices = {field.name: _choices(field, hints_of(kind)[field.name]) for kind, field in fields}
        completion.complete_options(parser, actions, choices, list(hidden))
    known = {option for action in actions for option in action.option_strings}
    for argument in before_dashes:
        option = argument.partition("=")[0]
        if option.startswith("--") and option not in known:
            of_runs = "config" in named and option[2:].replace("-", "_") in _options_of_runs()
            where = f"castlm {name} --help lists the options"
            if of_runs:
                where = "it is an option of the runs: write it into a file, --config FILE"
            raise InputError(f"{unknown(option[2:], named, COMMAND_LINE)} ({where})")
    return vars(parser.parse_args(arguments))


def _model_in_place(unnamed: Sequence[str], named: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Accepts `--model X` in commands that take their model as a plain argument X, and a first X in the others."""
    if not unnamed and "model" in named and arguments and not arguments[0].startswith("-"):
        return ["--model", *arguments]
    takes_model = {"model", "path"}.intersection(unnamed)
    for index, argument in enumerate(arguments):
        if argument == "--" or not takes_model:
            break
        if argument == "--model" and index + 1 < len(arguments):
            return [arguments[index + 1], *arguments[:index], *arguments[index + 2 :]]
        if argument.startswith("--model="):
            return [argument.removeprefix("--model="), *arguments[:index], *arguments[index + 1 :]]
    return list(arguments)


def _options_of_runs() -> set[str]:
    """The options of `castlm train`, which `compare` reads from the file of `--config`."""
    from castlm.training.config import TrainConfig, names_of

    return {name for section in TrainConfig.sections().values() for name in names_of(section)}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help lists the options)")


def _add(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], hint: Any) -> argparse.Action:
    kinds = alternatives(hint)
    items = next((typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is tuple), ())
    if field.metadata.get("positional"):
        return parser.add_argument(field.name, nargs="+" if items else None)
    names = dict.fromkeys([f"--{field.name.replace('_', '-')}", f"--{field.name}"])  # Hugging Face's options have _
    if hint is bool:
        return parser.add_argument(*names, dest=field.name, action=argparse.BooleanOptionalAction)
    if field.metadata.get("append"):
        return parser.add_argument(*names, dest=field.name, action="append")
    if items and items[-1] is ...:  # if repeated, appends
        return parser.add_argument(*names, dest=field.name, nargs="*" if len(kinds) == 1 else "+", action="extend")
    if items:
        return parser.add_argument(*names, dest=field.name, nargs=len(items))
    return parser.add_argument(*names, dest=field.name)


def help_text(sections: Sections, name: str, everything: bool, about: type[Any], hidden: Iterable[str] = ()) -> str:
    """The help of a command.

    Args:
        about: the class whose docstring describes the command.
        everything: describe all options; otherwise only name the inessential ones, if the command has essential ones.
        hidden: options that the command accepts and has no use for.
    """
    groups: dict[str, list[tuple[type[Any], dataclasses.Field[Any]]]] = {}
    for title, kind in sections:
        for field in dataclasses.fields(kind):
            if field.name not in hidden:
                groups.setdefault(title, []).append((kind, field))
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


def _width() -> int:
    """The width of a help text: as wide as the terminal, at most `WIDTH`."""
    return min(WIDTH, max(60, columns_of(sys.stdout) or WIDTH))


def _wrap(text: str, width: int | None = None, initial_indent: str = "", subsequent_indent: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        width or _width(),
        break_on_hyphens=False,
        initial_indent=initial_indent,
        subsequent_indent=subsequent_indent,
    )


def _option(field: dataclasses.Field[Any], hint: Any) -> str:
    if field.metadata.get("positional"):
        return field.name.upper()
    dashes = field.name.replace("_", "-")
    return f"--no-{dashes}" if hint is bool and default_of(field) else f"--{dashes}"


def _described(kind: type[Any], field: dataclasses.Field[Any]) -> list[str]:
    hint = hints_of(kind)[field.name]
    head = f"  {_option(field, hint)} {'' if field.metadata.get('positional') else _values(field, hint)}".rstrip()
    default = "(required)"
    if not is_required(field):
        value = default_of(field)
        shown = " ".join(map(_plain, value)) if isinstance(value, tuple) else _plain(value)
        default = "" if value is None or value == () or hint is bool else f"(default: {shown})"
    text = f"{field.metadata.get('help', '')} {default}".strip()
    if hint is bool and default_of(field):
        text = f"Turn this off: {text[:1].lower()}{text[1:]}"
    wrapped = _wrap(text, _width() - _INDENT)
    if len(head) >= _INDENT:
        return [head, *(" " * _INDENT + line for line in wrapped)]
    first, *rest = wrapped or [""]
    return [f"{head:{_INDENT}}{first}".rstrip(), *(" " * _INDENT + line for line in rest)]


def _choices(field: dataclasses.Field[Any], hint: Any) -> list[str]:
    """The names that an option takes; empty if it takes other values too."""
    of_types = [typing.get_args(kind) for kind in alternatives(hint) if typing.get_origin(kind) is Literal]
    return list(choices_of(field) or map(str, itertools.chain.from_iterable(of_types)))


def _values(field: dataclasses.Field[Any], hint: Any) -> str:
    """The values that an option takes: `INT`, `FLOAT|auto`, `cast|ste`."""
    if hint is bool:
        return ""
    if names := choices_of(field):
        return "|".join(names)
    return _type(typing.get_args(hint)[0] if field.metadata.get("append") else hint)


def _type(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if len(kinds := alternatives(hint)) > 1:
        names = [_type(kind) for kind in kinds if kind is not type(None)]
        return names[-1] if names[-1] == f"{names[0]} ..." else "|".join(names)  # one or several
    if origin is Literal:
        return "|".join(map(str, parts))
    if origin is tuple:
        return f"{_type(parts[0])} ..." if parts[-1] is ... else " ".join(map(_type, parts))
    return {int: "INT", float: "FLOAT"}.get(hint, "TEXT")


def _plain(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def command_line(name: str, options: Any) -> str:
    """The command line that gives a dataclass of options, without options at their defaults."""
    values = {field.name: (field, getattr(options, field.name)) for field in dataclasses.fields(options)}
    return command_with(name, {n: v for n, (f, v) in values.items() if is_required(f) or v != default_of(f)})


def command_with(name: str, given: Mapping[str, Any]) -> str:
    """The command with these options."""
    words = ["castlm", *name.split()]
    for field_name, value in given.items():
        if value is None:
            continue
        option = f"--{field_name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            words += [option, *map(str, value)]
        else:
            words += [f"{option}={value}"] if str(value).startswith("-") else [option, str(value)]
    return shlex.join(words)


def to_stdout(text: object, keep: str = "") -> None:
    """Prints an answer of a command, in which names of files cannot move the cursor or begin a line.

    A terminal breaks it at words.
    """
    print(for_stream(printable(text, keep), sys.stdout), flush=True)


def use_threads(number: int) -> None:
    """Sets the number of threads of torch; 0 leaves it. Raises `InputError` for more threads than processors."""
    import torch

    check_threads(number)
    if number > 0:
        torch.set_num_threads(number)


def result_folder(path: str) -> str:
    """`castlm.models.locate.result_folder`, which imports rich: `--help` does not need it."""
    from castlm.models import locate

    return locate.result_folder(path)


WRITTEN_BY, DIGEST = "written_by", "sha256"
"""The entries of a JSON report by which a later command recognizes it: a changed one is not replaced."""


def check_json_path(path: str | None) -> None:
    """Checks, before the work, that the report of `--json` can be written and replaces nothing but a report."""
    if path is None or path == "-":
        return
    target = Path(os.path.realpath(user_path(path)))
    if target.is_dir() or not os.access(target.parent, os.W_OK) or target.parts[:2] in (("/", "dev"), ("/", "proc")):
        raise InputError(f"--json {path} is not a file in a folder that can be written: name another")
    if not _is_free(target):
        raise InputError(f"--json {path} exists and is not a report as castlm wrote it: name another file")


def _is_free(target: Path) -> bool:
    """Whether there is no file, or a report that nobody changed since castlm wrote it."""
    try:
        found = read_json_object(target) if os.path.lexists(target) else None
    except InputError:  # not JSON, or not even a regular file
        return False
    return found is None or (WRITTEN_BY in found and found.pop(DIGEST, None) == _digest(found))


def _digest(report: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()


def write_json(path: str | None, content: dict[str, Any]) -> None:
    """Writes a report to the file of `--json`, or beside it if another file has taken its place since the check.

    "-" is the standard output.
    """
    from castlm.files.atomic_file import atomic_write_json, plain_json
    from castlm.files.record import unused_name
    from castlm.progress import note

    report = plain_json({WRITTEN_BY: f"castlm {castlm.__version__}", **content})
    if path == "-":
        print(json.dumps(report, indent=2))
    elif path is not None:
        target = user_path(path)
        if not _is_free(Path(os.path.realpath(target))):
            target = unused_name(target)
            note(f"{path} is now a file of others: the report is in {target}")
        atomic_write_json(target, {**report, DIGEST: _digest(json.loads(json.dumps(report)))})
