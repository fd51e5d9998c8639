"""Reads YAML as a user means it, with the rules of YAML 1.2 for numbers and booleans.

PyYAML follows YAML 1.1, in which `2:4` is 124 (base 60), `1e-4` is text, `010` is 8, `no` is false and a date is an
object. Here `1e-4` is a number and the others are text, which `castlm.fields` converts to the type of the option.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from castlm.core.errors import InputError
from castlm.fields import vanishes
from castlm_runtime.reading import check_regular, read_text

MAX_BYTES = 1 << 17  # nested lists of this size take PyYAML two seconds


def read_yaml_mapping(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping. All keys are text, and no file takes long to read.

    Raises:
        InputError: the file is missing, no regular file, larger than 128 KiB, not UTF-8, not valid YAML or not a
            mapping; it repeats a key, uses an alias or a tag, or nests hundreds of levels.
    """
    if check_regular(path).stat().st_size > MAX_BYTES:
        raise InputError(f"{path} is larger than {MAX_BYTES >> 10} KiB: that is not a file of options")
    return parse_yaml_mapping(read_text(path), str(path))


def parse_yaml_mapping(text: str, source: str) -> dict[str, Any]:
    """As `read_yaml_mapping`, for text that was read from `source`."""
    import yaml

    seen: set[int] = set()

    def value_of(node: yaml.Node) -> Any:
        where = f"{source}, line {node.start_mark.line + 1}"
        if id(node) in seen or node.tag not in _TAGS:  # an alias of aliases would make a small file huge
            raise InputError(f"{where}: an alias, or the tag {node.tag}, is not supported: write the value itself")
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            return [value_of(item) for item in node.value]
        if isinstance(node, yaml.ScalarNode):
            return _plain_value(node.value) if node.style is None else node.value
        found: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in found:
                raise InputError(f"{source}, line {key.start_mark.line + 1}: a key must be text, and there only once")
            found[key.value] = value_of(value)
        return found

    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)  # which converts no value, and knows no tag
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    content = None if node is None else value_of(node)
    if not isinstance(content, dict):
        raise InputError(f"{source} holds {type(content).__name__}, not a mapping: write lines as `max_steps: 300`")
    return content


def to_yaml(content: Mapping[str, Any]) -> str:
    """`content` as YAML, in the order of its keys; `parse_yaml_mapping` reads the same content again."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes text that would be read back as another value, such as `1e-4` or a text with line breaks."""

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        is_plain = value.isprintable() and isinstance(_plain_value(value), str)
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if is_plain else '"')

    Dumper.add_representer(str, text)
    return str(yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True))


_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"-?(0|[1-9][0-9]{0,18})")
_FLOAT = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")


def _plain_value(text: str) -> Any:
    """The value of a scalar without quotes: a number, boolean, null, or else text."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) and not vanishes(text) else text
