"""Counts the channels or heads that a cut model still has of its base: `verify` for structured patterns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from castlm.core.errors import InputError
from castlm.core.nm import Pattern
from castlm.files.reading import read_json_object, user_path
from castlm.structured.pattern import Units, sizes_after, sizes_of, units_of

_SAME = ("model_type", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "vocab_size")
"""Fields of config.json that are equal in a cut model and its base."""


def base_config(
    base: str | None, config: Mapping[str, Any], sizes: Mapping[str, int], pattern: Pattern
) -> tuple[dict[str, Any], str]:
    """The config.json of the model before the cut, and its source in words.

    Args:
        base: the folder of that model; None takes the `sizes` in castlm.json.
        config: config.json of the model that is verified.
        sizes: fields of config.json before the cut; empty if castlm.json has none.

    Raises:
        InputError: neither names the sizes, or the base is another model.
    """
    if base is None:
        if not sizes:
            raise InputError(
                f"pattern {pattern} is counted against the dense model it was cut out of: give --base DENSE"
            )
        return {**config, **sizes}, "the sizes in castlm.json"
    assert isinstance(pattern, Units)
    file = user_path(base) / "config.json"
    found = read_json_object(file)
    resolved = {**found, **sizes_of(pattern, found)}
    for name, size in {**{name: config.get(name) for name in _SAME}, **sizes}.items():
        if resolved.get(name) != size:
            raise InputError(f"--base {base} has {name} {resolved.get(name)}, and the model {size}: it is not its base")
    return found, base


class UnitCount(NamedTuple):
    """The count of one layer."""

    num_units: int
    """Units in the base."""
    num_violations: int
    """Units that are left beyond the share of the pattern."""
    cut: int
    """Weights of the base that were cut out."""


def count_units(
    pattern: Pattern, shapes: Mapping[str, tuple[int, int]], base: Mapping[str, Any], path: str
) -> dict[str, UnitCount]:
    """Counts the channels or heads of the layers that hold some.

    Args:
        shapes: (out, in) of every layer of the transformer blocks, by name.
        base: config.json of the model before the cut.
        path: the checkpoint, for messages.

    Raises:
        InputError: a block without units, or with layers that hold other numbers of them.
    """
    assert isinstance(pattern, Units)
    before = sizes_of(pattern, base)
    _, number = units_of(before)
    _, limit = units_of(sizes_after(pattern, before))
    found: dict[str, UnitCount] = {}
    blocks = pattern.unit_layers(shapes)
    for names in blocks:
        left = _units_in({name: shapes[name] for name in names}, pattern, before)
        for name in names:
            numel = math.prod(shapes[name])
            cut = max(0, numel * number // left - numel) if left else 0
            found[name] = UnitCount(number, max(0, left - limit), cut)
    num_blocks = base.get("num_hidden_layers", base.get("n_layer"))
    if len(blocks) != num_blocks:
        raise InputError(f"{path} has units in {len(blocks)} blocks, and its base has {num_blocks} blocks")
    return found


def _units_in(shapes: Mapping[str, tuple[int, int]], pattern: Units, base: Mapping[str, int]) -> int:
    """The number of units in the layers of one block; raises `InputError` if they differ, or hold a part of one."""
    *inner, last = shapes.values()
    sizes = [rows for rows, _ in inner] + [last[1]]  # the last layer has its units in the columns
    counts = {size / rows for size, rows in zip(sizes, pattern.rows_of_a_unit(base))}
    if len(counts) != 1 or not (count := counts.pop()).is_integer():
        raise InputError(
            f"{next(iter(shapes))} and the layers beside it do not hold the same whole number of units of {pattern}: "
            "they were not cut together"
        )
    return int(count)
