"""Renders a chat template, in the process of `castlm_runtime.templates`.

It imports nothing but Jinja. Templates see what transformers' `render_jinja_template` shows; tests compare the two.
"""

import datetime
import functools
import json
from typing import Any

import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field; templates read the first or second


class Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks what the assistant wrote; the spans of characters are in `environment.spans`."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        text = str(caller())
        environment: Any = self.environment
        if environment.pieces is not None:
            begin = len("".join(environment.pieces))
            environment.spans.append((begin, begin + len(text)))
        return text


class Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that begin with an underscore, which could reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as Jinja's, so that `namespace(self=...)` works
        self, *given = args
        found = dict(*given, **kwargs)
        for name in found:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, found)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template stores {name!r}, which begins with an underscore")


class Dict:
    """`dict` without its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes the characters of HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache
def compiled(template: str) -> Any:
    environment: Any = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.pieces, environment.spans = None, []
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    environment.globals["dict"] = Dict()
    environment.globals["namespace"] = Namespace
    return environment.from_string(template)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    value = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    return message if value is None else {"thinking": value, **message, "reasoning_content": value}


def render(request: dict[str, Any], _: bytes) -> tuple[Any, bytes]:
    """The text, and the spans of its characters inside generation marks; none without `marks`. No bytes."""
    return _render(**request), b""


def _render(
    template: str, messages: list[dict[str, Any]], marks: bool, **variables: Any
) -> tuple[str, list[tuple[int, int]]]:
    found = compiled(template)
    environment = found.environment
    environment.pieces, environment.spans = [] if marks else None, []
    messages = [_with_reasoning(message) for message in messages]
    if not marks:
        return found.render(messages=messages, **variables), []
    for piece in found.generate(messages=messages, **variables):
        environment.pieces.append(piece)
    return "".join(environment.pieces), environment.spans
