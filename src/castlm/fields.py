"""Values from YAML, JSON, Python or a command line, checked against the types of a dataclass.

Options from every source pass `checked`, so that all sources accept and refuse the same values, with the same one-line
errors. This module does not import torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import operator
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union

from castlm.core.errors import InputError

T = TypeVar("T")
Choices = Iterable[str] | Callable[[], Iterable[str]]

LIMITS: dict[str, Callable[[Any, Any], bool]] = {
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
    "below": operator.lt,
}
"""The limits that a field of a number may have: how an allowed number compares with each."""

COMMAND_LINE = "the command line"
"""The `source` of options on the command line: errors then write `--max-steps` instead of `max_steps`."""

OTHER_NAMES = {
    "initial_mask": "init_from",
    "batch_size": "per_device_train_batch_size",
    "micro_batch": "per_device_train_batch_size",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "max_length": "seq_len",
    "max_seq_length": "seq_len",
    "block_size": "seq_len",
    "tensorboard": "report_to",
    "completion_only_loss": "assistant_only_loss",
    "dataset_text_field": "column",
    "warmup_ratio": "warmup_steps",
    "num_sequences": "calibration_sequences",
    "bf16": "precision",
    "fp16": "precision",
}
"""The names of options in other libraries and earlier versions, for the suggestion in an error."""


class Needs(NamedTuple):
    """A condition without which an option has no effect: metadata `needs` of its field, one or a tuple of several.

    Two more entries of the metadata describe an option: `changes_result=False` (the result of a run is the same with
    every value) and `may_change=True` (a run that is resumed may have another value, although it changes the result).
    """

    words: str
    """The condition, as the end of the sentence "... has an effect only with"."""
    is_met: Callable[[Any], bool]
    """Called with all options of the command or run, as attributes of one object."""
    off: Any = dataclasses.MISSING
    """A value beside the default that asks for nothing, such as 0 iterations."""


def option(default: Any = dataclasses.MISSING, **metadata: Any) -> Any:
    """A field of an option, required if there is no default.

    Args:
        metadata: `help`, its text in `--help` and in the reference; `needs`, `changes_result` and `may_change`, see
            `Needs`; of a number, or a tuple of numbers, the `LIMITS` that it must keep to.
    """
    return dataclasses.field(default=default, kw_only=True, metadata=metadata)


def choice(default: str | None, choices: Choices, **more: Any) -> Any:
    """A field of type `str`, or `str | None`, that takes one of the names in `choices`.

    Args:
        choices: a table, or a function that returns one.
    """
    return dataclasses.field(default=default, metadata={"choices": choices, **more})


def essential(default: Any = dataclasses.MISSING, **more: Any) -> Any:
    """A field that `--help` describes in full, one of about ten; required if it has no default."""
    metadata = {"essential": True, **more}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, kw_only=True, metadata=metadata)


def positional(**more: Any) -> Any:
    """A required field that stands on the command line without a name."""
    return dataclasses.field(metadata={"positional": True, **more})


def parsed(default: Any, parse: Callable[[Any], Any], **more: Any) -> Any:
    """A field whose text `parse` turns into an object. Objects, such as `default`, pass unchanged."""
    return dataclasses.field(default=default, kw_only=True, metadata={"parse": parse, **more})


def like(section: type[Any], name: str, **more: Any) -> Any:
    """A field with the default, the help and the choices of the option `name` of another dataclass, but its `needs`.

    Args:
        more: a `default` of its own, or metadata such as `essential`.
    """
    field = next(field for field in dataclasses.fields(section) if field.name == name)
    default = more.pop("default", field.default)
    metadata = {**field.metadata, "needs": (), **more}
    return dataclasses.field(default=default, kw_only=True, metadata=metadata)


class Bounded:
    """A dataclass of options that checks the limits of its fields when it is made in Python."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            check_limits(field.name, getattr(self, field.name), field.metadata)


def check_limits(label: str, value: Any, limits: Mapping[str, Any]) -> None:
    """Raises `InputError` for a number beyond a limit.

    Args:
        value: a number or a tuple of numbers; anything else, such as None and "auto", passes.
        limits: the metadata of a field.
    """
    limits = {name: limits[name] for name in LIMITS if name in limits}
    numbers = [each for each in (value if isinstance(value, tuple) else [value]) if isinstance(each, (int, float))]
    if all(LIMITS[name](each, limit) for name, limit in limits.items() for each in numbers):
        return
    allowed = " and ".join(f"{name.replace('_', ' ')} {limit:,}" for name, limit in limits.items())
    if limits.keys() == {"at_least", "at_most"}:
        allowed = f"between {limits['at_least']:,} and {limits['at_most']:,}"
    raise InputError(f"{label} = {value} is out of range: it must be {allowed}")


def choices_of(field: dataclasses.Field[Any]) -> tuple[str, ...] | None:
    """The names that a field accepts; None if it accepts any text."""
    found = field.metadata.get("choices")
    if callable(found):
        found = found()
    return None if found is None else tuple(found)


def is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field that is not required."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def given(options: Any, names: Iterable[str]) -> list[str]:
    """Returns the names of the fields whose value differs from the default.

    Args:
        names: the fields to look at.
    """
    fields = {field.name: field for field in dataclasses.fields(options)}
    return [name for name in names if getattr(options, name) != default_of(fields[name])]


# ---- which options have an effect, and which may change


class Joined:
    """The attributes of several objects as those of one, for the conditions of options in several sections."""

    def __init__(self, *parts: Any) -> None:
        self._parts = parts

    def __getattr__(self, name: str) -> Any:
        for part in self._parts:
            if hasattr(part, name):
                return getattr(part, name)
        raise AttributeError(name)


def needs_of(field: dataclasses.Field[Any]) -> tuple[Needs, ...]:
    """The conditions of an option."""
    needs = field.metadata.get("needs", ())
    return (needs,) if isinstance(needs, Needs) else needs


def unmet(field: dataclasses.Field[Any], options: Any) -> str | None:
    """The first condition of an option that `options` do not meet, in words; None if the option has an effect."""
    return next((needs.words for needs in needs_of(field) if not needs.is_met(options)), None)


def without_effect(
    kinds: Iterable[type[Any]], values: Mapping[str, Any], options: Any, source: str = ""
) -> dict[str, str]:
    """The options that ask for something and have no effect, each with the reason.

    Args:
        kinds: dataclasses whose fields are the options.
        values: the options that were given. The default of an option and its `Needs.off` ask for nothing.
        options: all options as attributes of one object.
        source: as in `label`.

    Examples:
        >>> @dataclasses.dataclass
        ... class Options:
        ...     rate: float = 0.1
        ...     warmup: int = option(0, needs=Needs("rate above 0", lambda options: options.rate > 0))
        >>> without_effect([Options], {"rate": 0.0, "warmup": 5}, Options(0.0, warmup=5))
        {'warmup': 'warmup = 5 has an effect only with rate above 0'}
    """
    reasons = {}
    for field in itertools.chain.from_iterable(map(dataclasses.fields, kinds)):
        if field.name not in values or is_required(field):
            continue
        value = values[field.name]
        asks_for_nothing = [None, default_of(field), *(needs.off for needs in needs_of(field))]
        if value not in asks_for_nothing and (words := unmet(field, options)) is not None:
            reasons[field.name] = f"{label(field.name, source)} = {value} has an effect only with {words}"
    return reasons


def without_result(kinds: Iterable[type[Any]]) -> frozenset[str]:
    """The options that do not change the result of a run."""
    fields = itertools.chain.from_iterable(map(dataclasses.fields, kinds))
    return frozenset(field.name for field in fields if not field.metadata.get("changes_result", True))


def free_on_resume(kinds: Iterable[type[Any]]) -> frozenset[str]:
    """The options that may differ between a run and its resumption."""
    kinds = list(kinds)
    fields = itertools.chain.from_iterable(map(dataclasses.fields, kinds))
    return without_result(kinds) | {field.name for field in fields if field.metadata.get("may_change")}


_HINTS: dict[type[Any], dict[str, Any]] = {}  # not functools.cache: to mypy, `type[Any]` has no hash


def hints_of(kind: type[Any]) -> dict[str, Any]:
    """The type of each field, resolved."""
    if kind not in _HINTS:
        _HINTS[kind] = typing.get_type_hints(kind)
    return _HINTS[kind]


def build(kind: type[T], values: Mapping[str, Any], source: str = "", asked: Iterable[str] | None = None) -> T:
    """A dataclass from a mapping of field names to values.

    Args:
        source: the file of the values, or `COMMAND_LINE`; errors begin with it.
        asked: the values that must have an effect; by default all.

    Raises:
        InputError: an unknown or missing field, a value that is not of its type, or one `without_effect`.
    """
    found = checked([kind], values, source)
    check_complete([kind], found, source)
    options = kind(**found)
    given = found if asked is None else {name: found[name] for name in asked}
    for reason in without_effect([kind], given, options, source).values():
        raise InputError(f"{reason}: leave it out")
    return options


def check_complete(kinds: Iterable[type[Any]], values: Mapping[str, Any], source: str = "") -> None:
    """Raises `InputError` if `values` lack a required field of one of the dataclasses `kinds`."""
    for field in itertools.chain.from_iterable(map(dataclasses.fields, kinds)):
        if is_required(field) and field.name not in values:
            is_option = source == COMMAND_LINE and not field.metadata.get("positional")
            where = "" if source in ("", COMMAND_LINE) else f"{source}: "
            remedy = f": give {label(field.name, source)}" if is_option else ""
            raise InputError(f"{where}{field.name} is missing{remedy}")


def checked(kinds: Sequence[type[Any]], values: Mapping[str, Any], source: str = "") -> dict[str, Any]:
    """`values` converted to the types of the fields of the dataclasses `kinds`.

    Args:
        source: the file of the values, or `COMMAND_LINE`; errors begin with it.
    """
    fields = {field.name: (kind, field) for kind in kinds for field in dataclasses.fields(kind)}
    converted = {}
    for name, value in values.items():
        if name not in fields:
            raise InputError(unknown(name, fields, source))
        kind, field = fields[name]
        if parse := field.metadata.get("parse"):
            converted[name] = parse(value)
            continue
        converted[name] = convert(label(name, source), value, hints_of(kind)[name], choices_of(field))
        check_limits(label(name, source), converted[name], field.metadata)
    return converted


def label(name: str, source: str) -> str:
    """The name of an option in an error."""
    if source == COMMAND_LINE:
        return f"--{name.replace('_', '-')}"
    return f"{source}: {name}" if source else name


def unknown(name: str, known: Iterable[str], source: str = "") -> str:
    """The error for an unknown option; suggests the most similar one."""
    in_file = "" if source in ("", COMMAND_LINE) else f"{source}: "
    style = COMMAND_LINE if source == COMMAND_LINE else ""
    meant = suggest(str(name), known)
    remedy = f"; did you mean {label(meant, style)}?" if meant else ""
    return f"{in_file}there is no option {label(str(name), style)}{remedy}"


def suggest(name: str, known: Iterable[str]) -> str | None:
    """The option in `known` that a user probably meant by `name`: a name in other libraries, or a typing error.

    Examples:
        >>> suggest("lr", ["max_steps", "learning_rate"])
        'learning_rate'
        >>> suggest("max_step", ["max_steps", "learning_rate"])
        'max_steps'
    """
    name, known = name.lower().replace("-", "_"), list(known)
    if OTHER_NAMES.get(name) in known:
        return OTHER_NAMES[name]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    words = [option for option in known if name in option.split("_") or option.startswith(name)]
    return next(iter([*close, *words]), None)


def convert(label: str, value: Any, hint: Any, choices: tuple[str, ...] | None = None) -> Any:
    """Converts `value` to the type `hint`. Text is parsed by that type, so that options and quoted YAML values behave
    alike.

    Raises:
        InputError: `value` is of another type; a number is NaN, infinite or has more than 64 bits; or a text is empty,
            not UTF-8 or holds a NUL.
    """
    if choices is not None:
        hint = Union[(Literal[choices], *(option for option in typing.get_args(hint) if option is type(None)))]
    reason = ""
    for option in alternatives(hint):
        try:
            return _converted(value, option)
        except _WrongTypeError as error:
            reason = reason or str(error)
    is_typed = label.startswith("--")  # on a command line, where nothing is null
    expected = " or ".join(_described(o) for o in alternatives(hint) if not (is_typed and o is type(None)))
    remedy = f": {reason}" if reason else ""
    if isinstance(value, str) and (meant := suggest(value, [str(c) for o in alternatives(hint) for c in _names(o)])):
        remedy = f"; did you mean {meant}?"
    raise InputError(f"{label} = {_shown(value)} is not {expected}{remedy}")


class _WrongTypeError(Exception):
    """A value is not of the type asked for; the text gives the reason unless it is obvious."""


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union of types; of any other type, the type alone."""
    is_union = typing.get_origin(hint) in (Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _names(option: Any) -> tuple[Any, ...]:
    return typing.get_args(option) if typing.get_origin(option) is Literal else ()


def _described(option: Any) -> str:
    if names := _names(option):
        return f"one of {', '.join(map(str, names))}" if len(names) > 1 else str(names[0])
    if typing.get_origin(option) is tuple:
        return "a list"
    described = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "text"}
    return described.get(option, "null")


def _shown(value: Any) -> str:
    text = "null" if value is None else ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _converted(value: Any, option: Any) -> Any:
    if names := _names(option):
        if str(value) not in map(str, names):
            raise _WrongTypeError
        return next(name for name in names if str(name) == str(value))
    if typing.get_origin(option) is tuple:
        kinds = typing.get_args(option)
        if kinds[-1] is Ellipsis:
            items = [value] if isinstance(value, str) else value
            if not isinstance(items, (list, tuple)):
                raise _WrongTypeError
            return tuple(_converted(item, kinds[0]) for item in items)
        if not isinstance(value, (list, tuple)) or len(value) != len(kinds):
            raise _WrongTypeError(f"it takes {len(kinds)} values")
        return tuple(_converted(item, kind) for item, kind in zip(value, kinds))
    if option is type(None):
        if value is not None:
            raise _WrongTypeError
        return None
    if option is bool:
        words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        found = words.get(value.lower()) if isinstance(value, str) else value
        if not isinstance(found, bool):
            raise _WrongTypeError
        return found
    if option is int:
        if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]+(_[0-9]+)*", value) and len(value) <= 40:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise _WrongTypeError
        if not -(2**63) <= value < 2**63:
            raise _WrongTypeError("it has more than 64 bits")
        return value
    if option is float:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise _WrongTypeError
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise _WrongTypeError from None
        if isinstance(value, str) and not value.isascii():  # `float` takes the digits of every script
            raise _WrongTypeError("write its digits in ASCII")
        if isinstance(value, str) and vanishes(value):
            raise _WrongTypeError("it is too small for a float")
        if not math.isfinite(number):
            raise _WrongTypeError("it must be finite")
        return number
    text = _as_text(value)
    return Path(text) if option is Path else text


def vanishes(text: str) -> bool:
    """Whether the text of a number is above 0 and too small for a float, such as "1e-1000"."""
    return float(text) == 0 and re.search("[1-9]", re.split("[eE]", text)[0]) is not None


def _as_text(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # YAML reads the name `2024` as a number
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise _WrongTypeError(f"write it in quotes: {str(value)!r}" if isinstance(value, (bool, float)) else "")
    if not value.strip():
        raise _WrongTypeError("it is empty")
    if "\0" in value:
        raise _WrongTypeError("it has a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _WrongTypeError("it is not UTF-8") from None
    if value.startswith("~") and os.path.expanduser(value) == value:
        raise _WrongTypeError("there is no such user")
    return value
