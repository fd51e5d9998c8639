"""Signatures of the public functions at run time, for `help`, notebooks and documentation."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from castlm.fields import default_of, is_required

F = TypeVar("F", bound=Callable[..., Any])


def with_keywords_of(*sections: type[Any]) -> Callable[[F], F]:
    """Decorates a function: its signature names the fields of these dataclasses in place of `**options`."""

    def decorated(function: F) -> F:
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        options = keywords_of(sections, (parameter.name for parameter in named))
        more = [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=default_of(field), annotation=field.type
            )
            for field in options
        ]
        function.__signature__ = signature.replace(parameters=[*named, *more])  # type: ignore[attr-defined]
        return function

    return decorated


def keywords_of(sections: Iterable[type[Any]], named: Iterable[str]) -> list[dataclasses.Field[Any]]:
    """The fields of dataclasses that a function takes by `**options`, besides its parameters `named`.

    The required ones are parameters too, of which a text may have another name.
    """
    fields = {field.name: field for section in sections for field in dataclasses.fields(section)}
    without = {*named}
    return [field for name, field in fields.items() if name not in without and not is_required(field)]
