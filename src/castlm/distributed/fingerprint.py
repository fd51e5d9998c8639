"""A hash of a few numbers of every dense weight, which distinguishes two models without reading all weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor, nn

from castlm.core.shards import local
from castlm.core.sparsify import dense_name

FIRST = 64
"""The largest count of numbers per parameter: the first of its first row, or of its first expert."""


def fingerprint(model: nn.Module) -> str:
    """A hash of the dense weights of `model`, the same on any number of ranks.

    It covers the first 64 numbers of every parameter's first row, by name. The main rank, which holds the first rows,
    calls it. A head that was untied for the run counts as tied.
    """
    dense = {dense_name(name): parameter for name, parameter in model.named_parameters()}
    first = {
        name: local(parameter.detach())[:1].flatten()[:FIRST]
        for name, parameter in dense.items()
        if ".parametrizations." not in name  # else a weight scale
    }
    return fingerprint_of(first)


def fingerprint_of(first: Mapping[str, Tensor]) -> str:
    """The fingerprint of a model from the first numbers of its parameters, by name, in any dtype."""
    rows = {name: numbers.float().cpu().numpy().tobytes() for name, numbers in first.items()}
    if rows.get("lm_head.weight") in [row for name, row in rows.items() if "embed" in name or "wte" in name]:
        del rows["lm_head.weight"]
    digest = hashlib.sha256()
    for name, row in sorted(rows.items()):
        digest.update(name.encode())
        digest.update(row)
    return digest.hexdigest()
