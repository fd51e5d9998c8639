"""Reads YAML as a user means it, with the rules of YAML 1.2 for numbers and booleans.

PyYAML follows YAML 1.1, in which `2:4` is 124 (base 60), `1e-4` is text, `010` is 8, `no` is false and a date is an
object. Here `1e-4` is a number and the others are text, which `castlm.fields` converts to the type of the option.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from castlm.core.errors import InputError
from castlm.files.reading import open_regular

MAX_BYTES = 1 << 20
MAX_DEPTH = 20


def read_yaml_mapping(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping. All keys are text, and no file takes long to read.

    Raises:
        InputError: the file is missing, no regular file, larger than 1 MiB, not UTF-8, not valid YAML or not a mapping;
            it repeats a key, uses an alias or a tag, or nests deeper than 20 levels.
    """
    return parse_yaml_mapping(_read_text(path), str(path))


def parse_yaml_mapping(text: str, source: str) -> dict[str, Any]:
    """As `read_yaml_mapping`, for text that was read from `source`."""
    import yaml

    try:
        _check_events(text, source)
        loader = _loader(source)(text)
        content = loader.get_single_data()
    except InputError:  # a ValueError too, which already names the file and the line
        raise
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        kind = {type(None): "nothing", str: "text", list: "a list"}.get(type(content), "a number")
        raise InputError(f"{source} holds {kind}, not a mapping: write lines as `max_steps: 300`")
    return content


def to_yaml(content: Mapping[str, Any]) -> str:
    """`content` as YAML that `parse_yaml_mapping` reads back as it is, in the order of its keys."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes text that would be read back as another value, such as `1e-4` or a text with line breaks."""

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        is_plain = value.isprintable() and isinstance(_plain_value(value), str)
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if is_plain else '"')

    Dumper.add_representer(str, text)
    return str(yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True))


def _read_text(path: str | Path) -> str:
    with open_regular(path) as stream:
        raw = stream.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise InputError(f"{path} is larger than {MAX_BYTES >> 20} MiB: that is not a file of options")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8: save it as UTF-8") from None


def _check_events(text: str, source: str) -> None:
    """Refuses aliases, tags and deep nesting, which can make a small file huge, before building anything."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"{source}, line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise InputError(f"{where}: the alias *{event.anchor} is not supported: write the value again")
        if getattr(event, "tag", None) not in (None, "!"):
            raise InputError(f"{where}: the tag {event.tag} is not supported: leave it out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise InputError(f"{where}: more than {MAX_DEPTH} levels inside each other")


_PLAIN = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"-?(0|[1-9][0-9]{0,18})"),
    "float": re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?"),
}


def _plain_value(text: str) -> Any:
    """The value of a scalar without quotes: a number, boolean, null, or else text."""
    kind = next((kind for kind, form in _PLAIN.items() if form.fullmatch(text)), "text")
    if kind == "bool":
        return text.lower() == "true"
    return {"null": lambda _: None, "int": int, "float": float, "text": str}[kind](text)


def _loader(source: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Builds mappings, lists and scalars alone."""

        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node)
            if isinstance(node, yaml.SequenceNode):
                return [self.construct_object(item) for item in node.value]
            return _plain_value(node.value) if node.style is None else node.value

        def _mapping(self, node: Any) -> dict[Hashable, Any]:
            found: dict[Hashable, Any] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode):
                    raise InputError(f"{source}, line {line}: a key must be text")
                if key.value in found:
                    raise InputError(f"{source}, line {line}: the key {key.value} is there twice: keep one")
                found[key.value] = self.construct_object(value)
            return found

    return Loader
