"""Where documents begin inside a packed sequence, and a position in the data that can be saved.

transformers builds a block-diagonal attention mask when the position ids of a sequence start again at 0 and there is no
other mask (`find_packed_sequence_indices` in its masking_utils), so that the position ids alone keep documents apart.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from castlm.core.errors import InputError


class Resumable:
    """Sequences that continue from a saved position of the same seed, seq_len and repeat."""

    seed: int
    seq_len: int
    repeat: bool
    _num_sequences: int
    """That were taken before the next one, those before a saved position too."""

    def state_dict(self) -> dict[str, Any]:
        """The position of the next sequence, as plain JSON, the same on every rank."""
        epoch, document, token = self._position()
        return {
            "epoch": epoch,
            "document": copy.deepcopy(document),
            "token": token,
            "sequences": self._num_sequences,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "repeat": self.repeat,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved position.

        Raises:
            InputError: the position was saved with another seed, seq_len or repeat.
        """
        for name in ("seed", "seq_len", "repeat"):
            before, now = state.get(name, False), getattr(self, name)
            if before != now:
                raise InputError(f"the data position was saved with {name} {before}, not {now}: keep {name}")
        self._go_to(state)

    def _position(self) -> tuple[int, Any, int]:
        """Epoch, position of a document as its reader gives it, and a number of tokens in it."""
        raise NotImplementedError

    def _go_to(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


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
