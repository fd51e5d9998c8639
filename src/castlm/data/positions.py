"""Where documents begin inside a packed sequence, and whether a saved position in the data is of the same order.

transformers builds a block-diagonal attention mask when the position ids of a sequence start again at 0 and there is no
other mask (`find_packed_sequence_indices` in its masking_utils), so that the position ids alone keep documents apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from castlm.core.errors import InputError


def check_same_order(state: Mapping[str, Any], **order: Any) -> None:
    """Raises `InputError` unless the position `state` was saved with the same seed, seq_len and repeat, the `order`."""
    for name, now in order.items():
        if state.get(name, False) != now:
            raise InputError(
                f"the data position was saved with {name} {state.get(name, False)}, not {now}: keep {name}"
            )


def document_positions(begins: Tensor) -> Tensor:
    """The position of each token in its own document.

    Args:
        begins: bool, (batch, seq), for example (8, 512): whether a token is the first of a document.

    Returns:
        int64, (batch, seq). The first document of a row starts at 0, even if an earlier row holds its beginning.

    Examples:
        >>> document_positions(torch.tensor([[0, 0, 0, 1, 0, 1, 1]]).bool())
        tensor([[0, 1, 2, 0, 1, 0, 0]])
    """
    index = torch.arange(begins.shape[1], device=begins.device).expand_as(begins)
    return index - torch.where(begins, index, 0).cummax(dim=1).values


def document_mask(positions: Tensor) -> Tensor:
    """The causal mask in which no token attends to another document, for models that do not derive it from positions.

    Args:
        positions: (batch, seq), from `document_positions`.

    Returns:
        bool, (batch, 1, seq, seq), True = attends.
    """
    document = (positions == 0).cumsum(dim=1)
    same = document[:, :, None] == document[:, None, :]
    return torch.tril(same)[:, None]
