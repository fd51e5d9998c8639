"""Calibration sequences of a text for one-shot solvers, with images where its conversations have some."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from castlm.core.errors import InputError, naming
from castlm.data.columns import Kind
from castlm.data.documents import AnyDocuments, Documents, HubDocuments, Mixture, furthest_behind
from castlm.data.extra import join_extra
from castlm.data.tokens import Encoder, parts_up_to, up_to
from castlm.say import Say, silent

CALIBRATION_POOL = 16
"""Sequences are drawn from this many times their tokens, so that a long text need not be read whole."""

Extras = Sequence[Mapping[str, Tensor]] | None
"""The further arguments of the model's forward, such as images, for each calibration sequence; None if it has none."""


@dataclass(frozen=True)
class CalibrationText:
    """The sequences that the steps of a start read."""

    sequences: Tensor
    """int64, (num_sequences, seq_len), as from `draw_calibration`."""
    extras: Extras = None
    precision: str = "fp32"
    """Precision of the passes over the text: "fp32" runs them in the dtype of the weights, "bf16" under autocast, which
    multiplies in bf16. Statistics and solvers are fp32."""

    def check(self, num_tokens: int) -> None:
        """Raises `InputError` unless these are token ids of a vocabulary of `num_tokens`, in a known precision."""
        ids, types = self.sequences, (torch.int32, torch.int64)
        if not isinstance(ids, Tensor) or ids.dtype not in types or ids.dim() != 2 or 0 in ids.shape:
            found = f"{ids.dtype}, {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
            raise InputError(
                f"calibration is {found}: give token ids, int64, (num_sequences, seq_len), as draw_calibration does"
            )
        least, most = (int(bound) for bound in ids.aminmax())
        if least < 0 or (most >= num_tokens and self.extras is None):  # tokens of images may have no embedding
            wrong = least if least < 0 else most
            raise InputError(f"calibration holds the token {wrong}, the model 0 to {num_tokens - 1}: tokenize it anew")
        if self.precision not in ("fp32", "bf16"):
            raise InputError(f"precision = {self.precision!r:.200}: choose fp32 or bf16")

    def __len__(self) -> int:
        return len(self.sequences)

    def first(self, num_sequences: int) -> CalibrationText:
        """The text without its later sequences."""
        extras = None if self.extras is None else self.extras[:num_sequences]
        return replace(self, sequences=self.sequences[:num_sequences], extras=extras)

    def record(self) -> dict[str, Any]:
        """Everything on which a result depends, for JSON."""
        return {
            "num_sequences": len(self.sequences),
            "seq_len": self.sequences.shape[1],
            "tokens_sha256": hashlib.sha256(self.sequences.numpy().tobytes()).hexdigest(),
            "extras_sha256": None if self.extras is None else _hash_of_extras(self.extras),
            "precision": self.precision,
        }


def _hash_of_extras(extras: Sequence[Mapping[str, Tensor]]) -> str:
    """A SHA-256 of the further arguments of every sequence: name, dtype, shape and values."""
    digest = hashlib.sha256()
    for number, arguments in enumerate(extras):
        for name, value in sorted(arguments.items()):
            digest.update(f"{number} {name} {value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def draw_calibration(token_ids: Tensor, num_sequences: int = 128, seq_len: int = 2048, seed: int = 0) -> Tensor:
    """Draws random sequences of a text: the same as SparseGPT's and Wanda's loaders of WikiText-2 and PTB for a seed.

    Each sequence begins at `random.Random(seed).randint(0, num_tokens - seq_len - 1)`, also in the middle of a
    document; sequences can overlap. For C4, those loaders draw a document first, and then one sequence of it.

    Args:
        token_ids: int64, (num_tokens,): the text, tokenized as a whole with the special tokens at its start.
        seq_len: tokens per sequence; `calibration_length(model)` is the convention.

    Returns:
        int64, (num_sequences, seq_len), in the order drawn.

    Raises:
        InputError: fewer than `seq_len + 1` tokens.
    """
    last = len(token_ids) - seq_len - 1
    if last < 0:
        raise InputError(
            f"the calibration text has {len(token_ids):,} tokens, and sequences of seq_len {seq_len:,} need "
            f"{seq_len + 1:,}: pass a longer text or a smaller seq_len"
        )
    draw = random.Random(seed)
    starts = [draw.randint(0, last) for _ in range(num_sequences)]
    return torch.stack([token_ids[start : start + seq_len] for start in starts]).long()


def calibration_sequences(
    documents: AnyDocuments,
    encoder: Encoder,
    num_sequences: int,
    seq_len: int,
    seed: int = 0,
    say: Say = silent,
) -> tuple[Tensor, list[dict[str, Tensor]] | None]:
    """Draws calibration sequences, by `draw_calibration`, from the first `CALIBRATION_POOL` times as many tokens.

    If a longer text has several files, or documents that are read in pieces, these tokens come from all parts of it.
    Each text of a mixture gives its share of the sequences. A conversation with images is drawn whole; text of other
    conversations fills the rest of its sequence.

    Args:
        encoder: see `castlm.data.tokens.open_encoder`; which tokens count does not matter.
        say: called with a line if there are fewer conversations than sequences, or if what is read is the start of a
            much longer file.

    Returns:
        int64, (num_sequences, seq_len), and for each sequence the further arguments of the model's forward, or None for
        a text without images. With images there may be fewer: one for each conversation whose images fit.
    """
    if isinstance(documents, Mixture):
        return _of_each(documents, encoder, num_sequences, seq_len, seed, say)
    if documents.kind is Kind.WITH_EXTRA:
        ids, extra = _with_extra(documents, encoder, num_sequences, seq_len, seed)
        if len(ids) < num_sequences:
            say(
                f"calibration: {len(ids)} conversations have images that fit into {seq_len} tokens, not {num_sequences}"
            )
        return ids, extra
    limit = CALIBRATION_POOL * num_sequences * seq_len
    parts = parts_up_to(limit, encoder.joined(documents))
    tokens = up_to(limit, parts)
    if isinstance(documents, Documents) and len(tokens.ids) == limit:
        if (scattered := documents.scattered()) is not None:
            most = math.ceil(limit / min(CALIBRATION_POOL, len(scattered)))  # tokens of one document
            tokens = up_to(limit, (part.part(slice(most)) for part in encoder.joined(scattered, seed)))
        elif len(parts) < len(documents) / CALIBRATION_POOL:
            say(
                f"calibration: sequences come from the first {len(parts):,} of the {len(documents):,} documents of "
                f"{documents.name}; shuffle it if it is sorted"
            )
    return draw_calibration(torch.from_numpy(tokens.ids).long(), num_sequences, seq_len, seed), None


def _of_each(
    documents: Mixture,
    encoder: Encoder,
    num_sequences: int,
    seq_len: int,
    seed: int,
    say: Say,
) -> tuple[Tensor, list[dict[str, Tensor]] | None]:
    """Takes the sequences of the texts in turns, by share, so that the first few sequences cover all texts."""
    turns, used = list[int](), [0] * len(documents.parts)  # the text of each sequence; the sequences of each text
    for _ in range(num_sequences):
        turns.append(furthest_behind(used, documents.weights))
        used[turns[-1]] += 1
    drawn: dict[int, Iterator[tuple[Tensor, dict[str, Tensor]]]] = {}
    for number in sorted(set(turns)):
        part = documents.parts[number]
        with naming(part.name):
            ids, extra = calibration_sequences(part, encoder, used[number], seq_len, seed, say=say)
        drawn[number] = iter(list(zip(ids, extra or [{}] * len(ids))))
    found = [sequence for number in turns if (sequence := next(drawn[number], None)) is not None]
    extras = [extra for _, extra in found] if documents.kind is Kind.WITH_EXTRA else None
    return torch.stack([ids for ids, _ in found]), extras


def _with_extra(
    documents: Documents | HubDocuments, encoder: Encoder, num_sequences: int, seq_len: int, seed: int
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    pool = list(islice(documents.pieces(None), CALIBRATION_POOL * num_sequences))
    random.Random(seed).shuffle(pool)
    ids, extra = list[Tensor](), list[dict[str, Tensor]]()
    for number, document in enumerate(pool):
        tokens = encoder.conversation(document)
        if tokens.extra is not None and not tokens.extra.fits(seq_len):
            continue
        row, following = tokens.ids[:seq_len].tolist(), number
        while len(row) < seq_len:
            following = (following + 1) % len(pool)
            row += encoder.text_alone(pool[following].text)
        ids.append(torch.tensor(row[:seq_len]))
        extra.append(join_extra([tokens.extra], seq_len))
        if len(ids) == num_sequences:
            break
    if not ids:
        raise InputError(f"{documents.name}: the images of no conversation fit into {seq_len} tokens: raise seq_len")
    return torch.stack(ids), extra
