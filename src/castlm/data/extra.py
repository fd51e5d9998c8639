"""Tensors that documents bring beside their tokens, such as the images of conversations, on their way to the model.

A batch is a dict with the joined tensors beside `input_ids` and `labels`; code that runs a model passes all of them to
its forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Extra(NamedTuple):
    """The tensors that one document brings beside its tokens."""

    by_item: dict[str, Tensor]
    """Tensors to join along the first dimension, such as `pixel_values`."""
    by_token: dict[str, Tensor]
    """Tensors of one number a token, (num_tokens,): `mm_token_type_ids`."""
    end: int
    """Number of tokens up to and including the last one that the tensors belong to."""

    def fits(self, num_tokens: int) -> bool:
        """Whether the tensors belong to the first `num_tokens` tokens alone."""
        return self.end <= num_tokens


def join_extra(rows: Sequence[Extra | None], width: int) -> dict[str, Tensor]:
    """The tensors of a batch by the name of their argument, `width` tokens a row; empty where no row brings any.

    Tensors that differ in a dimension other than the first, for example in their number of tiles, are padded with
    zeros, as processors do.
    """
    joined: dict[str, Tensor] = {}
    present = [row for row in rows if row is not None]
    for name in dict.fromkeys(name for row in present for name in row.by_item):
        parts = [row.by_item[name] for row in present if name in row.by_item]
        largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts))]
        missing = [[size - own for size, own in zip(largest, part.shape[1:])] for part in parts]
        ends = [[n for size in reversed(sizes) for n in (0, size)] for sizes in missing]  # as `F.pad` takes them
        joined[name] = torch.cat([F.pad(part, end) for part, end in zip(parts, ends)])
    for name in dict.fromkeys(name for row in present for name in row.by_token):
        empty = torch.zeros(0, dtype=present[0].by_token[name].dtype)
        found = [empty if row is None else row.by_token[name][:width] for row in rows]
        joined[name] = torch.stack([F.pad(row, (0, width - len(row))) for row in found])
    return joined
