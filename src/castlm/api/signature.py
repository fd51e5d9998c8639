"""Signatures of the public functions at run time, for `help`, notebooks and documentation."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from castlm.fields import default_of, is_required

F = TypeVar("F", bound=Callable[..., Any])


def with_keywords_of(*sections: type[Any]) -> Callable[[F], F]:
    """Decorates a function: its signature names the fields of these dataclasses in place of `**options`."""

    def decorated(function: F) -> F:
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        fields = {field.name: field for section in sections for field in dataclasses.fields(section)}
        # The required options are parameters of the function too, of which a text may have another name.
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default_of(field), annotation=field.type)
            for name, field in fields.items()
            if name not in signature.parameters and not is_required(field)
        ]
        function.__signature__ = signature.replace(parameters=[*named, *more])  # type: ignore[attr-defined]
        return function

    return decorated
