"""Turns documents into token ids, with the tokens that separate them, and checks the ids against a vocabulary."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from castlm.core.errors import InputError
from castlm.data.documents import Documents, HubDocuments, Piece, open_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The separator of documents in pretraining, for models whose `eos_token` has become the end of a chat turn.
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")


class Encoder:
    """Token ids of pieces, int32 arrays, with the tokens that start and end a document."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_id: int | None) -> None:
        # A copy: a fast tokenizer that another thread uses meanwhile may raise "Already borrowed".
        self._tokenizer = copy.deepcopy(tokenizer)
        self.eos = end_of_text_id(tokenizer) if eos_token_id is None else eos_token_id
        bos = tokenizer.bos_token_id
        self.bos = [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
        """The tokens that the tokenizer itself puts before a text."""
        self._first = self.bos if self.bos != [self.eos] else []  # where it is the end-of-text of the document before

    def __call__(self, pieces: list[Piece]) -> list[np.ndarray]:
        ids_of_pieces = self.plain([piece.text for piece in pieces])
        return [
            np.asarray(self._first * piece.first + ids + [self.eos] * piece.last, dtype=np.int32)
            if ids or not (piece.first and piece.last)
            else np.empty(0, dtype=np.int32)
            for piece, ids in zip(pieces, ids_of_pieces)
        ]

    def plain(self, texts: list[str]) -> list[list[int]]:
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # else it warns that a document is longer than the context
        )
        return encoded["input_ids"]


def token_ids(
    documents: Documents | HubDocuments | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
    *,
    eos_token_id: int | None = None,
) -> Tensor:
    """The tokens of documents in file order, joined with end-of-text, for evaluation: int64, shape (num_tokens,).

    For one document this is what `tokenizer(text)` returns, so perplexities agree with the usual protocol.

    Args:
        documents: documents, or a dataset for `open_documents`.
        limit: at most this many tokens, from the start.
    """
    if isinstance(documents, str | Path):
        documents = open_documents(documents)
    encoder = Encoder(tokenizer, eos_token_id)
    ids, text = list(encoder.bos), []
    for piece in documents.pieces(None):
        text.append(piece.text)
        if not piece.last:
            continue
        if len(ids) > len(encoder.bos):
            ids += [encoder.eos, *(encoder.bos if encoder.bos != [encoder.eos] else [])]
        ids += encoder.plain(["".join(text)])[0]
        text.clear()
        if limit is not None and len(ids) >= limit:
            break
    return torch.tensor(ids[:limit], dtype=torch.int64)


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token between documents: an end-of-text token among the added ones, else `eos_token_id`.

    Raises:
        InputError: the tokenizer has neither.
    """
    added = tokenizer.get_added_vocab()
    found = next((added[token] for token in _END_OF_TEXT if token in added), tokenizer.eos_token_id)
    if found is None:
        raise InputError(f"tokenizer {tokenizer.name_or_path!r} has no end-of-text token: set its eos_token")
    return found


def check_vocabulary(input_ids: Tensor, vocab_size: int) -> None:
    """Checks that the model has an embedding for every token id.

    Raises:
        InputError: an id is at least `vocab_size`.
    """
    if input_ids.numel() and (largest := int(input_ids.max())) >= vocab_size:
        raise InputError(
            f"token id {largest} is outside the model's vocabulary of {vocab_size}: use the model's own tokenizer"
        )
