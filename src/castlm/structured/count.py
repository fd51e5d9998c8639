"""Counts the channels or heads that a cut model still has of its base: `verify` for structured patterns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from castlm.core.errors import InputError
from castlm.core.nm import Pattern
from castlm.export.report import LayerReport, VerifyReport
from castlm.files.reading import read_json_object, user_path
from castlm.structured.pattern import Heads, Units, sizes_after, sizes_of, units_of

_SAME = ("model_type", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "vocab_size")
"""Fields of config.json that are equal in a cut model and its base."""


def base_config(
    base: str | None, config: Mapping[str, Any], record: Path, pattern: Pattern
) -> tuple[dict[str, Any], str]:
    """The config.json of the model before the cut, and its source in words.

    Args:
        base: the folder of that model; None takes the sizes in castlm.json, at the path `record`.
        config: config.json of the model that is verified.

    Raises:
        InputError: neither names the sizes, or the base is another model.
    """
    cut = read_json_object(record).get("cut") if record.is_file() else None
    sizes = cut.get("before") if isinstance(cut, dict) else None
    sizes = sizes if isinstance(sizes, dict) else {}
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
    for name, size in ({name: config.get(name) for name in _SAME} | sizes).items():
        if resolved.get(name) != size:
            raise InputError(f"--base {base} has {name} {resolved.get(name)}, and the model {size}: it is not its base")
    return found, base


def count_units(report: VerifyReport, config: Mapping[str, Any], base: Mapping[str, Any], where: str) -> None:
    """Adds the channels or heads of every layer to `report`; each unit above the share is one violation."""
    pattern = report.pattern
    assert isinstance(pattern, Units)
    before = sizes_of(pattern, base)
    allowed = sizes_after(pattern, before)
    _, number = units_of(before)
    _, limit = units_of(allowed)
    report.base = where
    layers = {layer.name.removesuffix(".weight"): layer for layer in report.layers}
    blocks = pattern.unit_layers(layers)
    for names in blocks:
        members = [layers[name] for name in names]
        found = _units_in(members, pattern, before)
        for layer in members:
            layer.num_groups += number
            layer.num_violations += max(0, found - limit)
            layer.cut = max(0, layer.numel * number // found - layer.numel) if found else 0
    inside = {name for names in blocks for name in names}
    if pattern.inner is None:
        for name, layer in layers.items():
            if name not in inside and layer.left_dense is None:
                layer.left_dense = pattern.outside
    num_blocks = base.get("num_hidden_layers", base.get("n_layer"))
    if len(blocks) != num_blocks:
        raise InputError(f"{report.path} has units in {len(blocks)} blocks, and its base has {num_blocks} blocks")


def _units_in(layers: list[LayerReport], pattern: Units, base: Mapping[str, int]) -> int:
    """The number of units in the layers of one block; raises `InputError` if they differ, or hold a part of one."""
    shapes = [layer.shape[::-1] if layer.axis == 0 else layer.shape for layer in layers]
    per_row = [1] * len(shapes)
    if isinstance(pattern, Heads):
        head_dim = base["head_dim"]
        of_query = base["num_attention_heads"] // base["num_key_value_heads"] * head_dim
        per_row = [of_query, head_dim, head_dim, of_query]
    sizes = [shape[0] for shape in shapes[:-1]] + [shapes[-1][1]]
    counts = {size / rows for size, rows in zip(sizes, per_row)}
    if len(counts) != 1 or not (count := counts.pop()).is_integer():
        raise InputError(
            f"{layers[0].name} and the layers beside it do not hold the same whole number of units of {pattern}: "
            "they were not cut together"
        )
    return int(count)
