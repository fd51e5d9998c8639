"""A hash of a few numbers of every dense weight, which distinguishes two models without reading all weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor, nn

FIRST = 64
"""The largest count of numbers per parameter: the first of its first row, or of its first expert."""


def fingerprint(model: nn.Module) -> str:
    """A hash of the first 64 numbers of every parameter's first row, by name, of a dense model in memory."""
    return fingerprint_of({name: p.detach()[:1].flatten()[:FIRST] for name, p in model.named_parameters()})


def fingerprint_of(first: Mapping[str, Tensor]) -> str:
    """The fingerprint of a model from the first numbers of its parameters, by name, in any dtype."""
    digest = hashlib.sha256()
    for name, numbers in sorted(first.items()):
        digest.update(name.encode())
        digest.update(numbers.float().cpu().numpy().tobytes())
    return digest.hexdigest()
