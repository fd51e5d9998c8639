"""Perplexity, with everything that a comparison needs: sequence length, stride, text, tokenizer, versions.

The output head is applied to a chunk of tokens at a time, so that the logits of a whole text are never in memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from castlm.core.distill import distillation_loss
from castlm.core.errors import InputError
from castlm.data.documents import open_documents
from castlm.data.images import join_images
from castlm.data.scored import ScoredText, scored_text
from castlm.data.tokens import IGNORED, check_vocabulary
from castlm.inference.layers import PackedLinear
from castlm.models.architecture import backbone, context_length, eval_mode, logit_scale, output_head
from castlm.versions import library_versions

_HEAD_ROWS = 192  # tokens whose logits are in memory at once


@dataclasses.dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and how it was measured."""

    perplexity: float
    """exp(loss)."""
    loss: float
    """Mean cross-entropy in nats per scored token."""
    num_tokens: int
    """Number of scored tokens, which is below the number of tokens of the text; see `perplexity`."""
    seq_len: int
    """Tokens of the longest sequence: as requested, or the whole text if it is shorter."""
    stride: int

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    text: Tensor | ScoredText,
    *,
    seq_len: int = 1024,
    stride: int | None = None,
    batch_size: int = 1,
    autocast_dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Perplexity of a text, over sequences of `seq_len` tokens that begin every `stride` tokens.

    `stride=None` is the convention of GPTQ, SparseGPT and Wanda: sequences side by side, each on its own, and all
    tokens of a sequence but the first are scored. A smaller stride is the sliding window of Hugging Face: each sequence
    scores only the tokens that no earlier sequence contained. Every token of the text but the first is then scored
    once, with at least `seq_len - stride` tokens before it from the second sequence on. The last sequence ends with the
    text and may be shorter. (The published GPTQ code drops a shorter one; cut the text to whole sequences to compare
    with it.)

    The model is evaluated in eval mode; the mode of every module is restored. Losses are summed in float64.

    Args:
        text: token ids of a plain text, int64, (num_tokens,), on any device; or a `ScoredText`, whose conversations are
            each a text of their own.
        seq_len: tokens per sequence, at most the model's `max_position_embeddings`.
        batch_size: sequences per forward pass. It changes speed and memory, not the perplexity.
        autocast_dtype: for example `torch.bfloat16`; None computes in the model's dtype.
        progress: called with (sequences done, number of sequences) after each batch.

    Returns:
        The perplexity, the mean loss in nats per scored token, the number of scored tokens, and the lengths.

    Raises:
        InputError: fewer than 2 tokens, ids outside the vocabulary, a `seq_len` above the model's limit, a stride
            outside 1..seq_len, or a loss that is not finite (the message names the sequence).
    """
    stride = seq_len if stride is None else stride
    packed_head = model.get_output_embeddings()
    head = None if isinstance(packed_head, PackedLinear) else output_head(model)
    device = model.device
    text = text if isinstance(text, ScoredText) else ScoredText.of(text)
    _check(model, text.ids, seq_len, stride, batch_size)
    check_vocabulary(text.ids, packed_head.out_features if head is None else head.weight.shape[0])

    sequences = sequences_of(text, seq_len, stride)
    total, done, scored = 0.0, 0, 0
    with eval_mode(model):
        for batch in _batches(sequences, batch_size):
            input_ids = torch.stack([text.ids[w.begin : w.end] for w in batch]).to(device)
            labels = torch.stack([text.labels[w.begin + 1 : w.end] for w in batch])
            for row, sequence in zip(labels, batch):
                row[: sequence.first_scored - sequence.begin - 1] = IGNORED
            scored += int((labels != IGNORED).sum())
            labels = labels.to(device)
            images = images_of(text, batch, device)
            with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
                hidden = backbone(model)(input_ids=input_ids, use_cache=False, **images).last_hidden_state
                if head is None:
                    nll = _packed_nll(model, hidden[:, :-1], labels)
                else:
                    nll = distillation_loss(hidden[:, :-1], head, labels, eta=0, num_tokens=1).loss.item()
            if not math.isfinite(nll):
                raise InputError(
                    f"the loss is {nll} in tokens {batch[0].begin} to {batch[-1].end} of the text: the model has "
                    "non-finite weights or overflows; check it with `castlm verify`, or evaluate it in float32"
                )
            total += nll
            done += len(batch)
            if progress is not None:
                progress(done, len(sequences))

    if not scored:
        raise InputError("no token of the text is scored: give more text")
    loss = total / scored
    return PerplexityResult(
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        loss=loss,
        num_tokens=scored,
        seq_len=min(seq_len, max(end - begin for begin, end in text.stretches)),
        stride=stride,
    )


def _packed_nll(model: PreTrainedModel, hidden: Tensor, labels: Tensor) -> float:
    """The summed loss through a packed head, which castlm's kernels compute as they do in `castlm generate`."""
    head, (scale, softcap), total = model.get_output_embeddings(), logit_scale(model.config), 0.0
    for x, y in zip(hidden.flatten(0, 1).split(_HEAD_ROWS), labels.flatten().split(_HEAD_ROWS)):
        logits = head(x).float() * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        total += F.cross_entropy(logits, y, ignore_index=IGNORED, reduction="sum").item()
    return total


def _check(model: PreTrainedModel, token_ids: Tensor, seq_len: int, stride: int, batch_size: int) -> None:
    if token_ids.dim() != 1 or token_ids.dtype != torch.int64:
        raise InputError(f"token_ids are {tuple(token_ids.shape)} {token_ids.dtype}: give a 1-D int64 tensor")
    if len(token_ids) < 2:
        raise InputError(
            f"the text has {len(token_ids)} token(s): at least 2 are needed, one to predict the other from"
        )
    if seq_len < 2:
        raise InputError(f"seq_len is {seq_len}: a sequence needs at least 2 tokens")
    longest = context_length(model.config)
    if longest is not None and seq_len > longest:
        raise InputError(f"seq_len is {seq_len}, and the model takes at most {longest} tokens: use --seq-len {longest}")
    if not 1 <= stride <= seq_len:
        raise InputError(
            f"stride is {stride}: it must be between 1 and seq_len ({seq_len}), or tokens would be skipped"
        )
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: it must be at least 1")


class Scored(NamedTuple):
    """The part of a text that one forward pass sees: the tokens begin .. end-1."""

    begin: int
    end: int
    first_scored: int  # scores the tokens first_scored .. end-1
    stretch: int = 0  # of the text, in which it lies


def scored_sequences(num_tokens: int, seq_len: int, stride: int) -> list[Scored]:
    """The sequences of a text of `num_tokens`, as `perplexity` describes them, without those that score nothing."""
    sequences, seen = [], 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + seq_len, num_tokens)
        first_scored = max(seen, begin + 1)  # nothing predicts a sequence's first token
        if first_scored < end:
            sequences.append(Scored(begin, end, first_scored))
        if end == num_tokens:
            break
        seen = end
    return sequences


def sequences_of(text: ScoredText, seq_len: int, stride: int) -> list[Scored]:
    """The sequences of a text, each within a conversation where it has some, without those that score nothing.

    Of a conversation with images the first sequence alone is scored, as the others do not see them.

    Raises:
        InputError: images that do not fit into a sequence.
    """
    found: list[Scored] = []
    for number, (begin, end) in enumerate(text.stretches):
        parts = scored_sequences(end - begin, seq_len, stride)
        if text.images and (images := text.images[number]) is not None:
            if images.end > seq_len:
                raise InputError(
                    f"the images of the conversation that begins {images.begin} end at token {images.end:,}, after "
                    f"seq_len {seq_len}: raise seq_len, or leave it out of the evaluation text"
                )
            parts = parts[:1]
        found += [Scored(begin + p.begin, begin + p.end, begin + p.first_scored, number) for p in parts]
    return [s for s in found if not text.is_chat or bool((text.labels[s.first_scored : s.end] != IGNORED).any())]


def images_of(
    text: ScoredText, sequences: Sequence[Scored | None], device: torch.device, width: int | None = None
) -> dict[str, Tensor]:
    """What the forward of a model takes beside the tokens of a batch, on `device`; empty of a text without images.

    Args:
        sequences: one a row; None for a row that scores nothing.
        width: tokens of a row; by default those of the first sequence.
    """
    if not text.images:
        return {}
    found = [None if s is None else text.images[s.stretch] for s in sequences]
    width = next(s.end - s.begin for s in sequences if s is not None) if width is None else width
    joined = join_images([None if images is None else images.load() for images in found], width)
    return {name: tensor.to(device) for name, tensor in joined.items()}


def _batches(sequences: list[Scored], batch_size: int) -> Iterator[list[Scored]]:
    """Batches of one length each. The last sequence may be shorter, and padding would change what it attends to."""
    for _, equal in groupby(sequences, key=lambda sequence: sequence.end - sequence.begin):
        group = list(equal)
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def measured_on(
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    text: str,
    text_sha256: str,
    held_out: ScoredText,
    precision: str,
) -> dict[str, Any]:
    """The entry of castlm.json on how perplexities were measured, over sequences of `seq_len` side by side.

    Args:
        held_out: the tokens of the text, scored or not. Which of them are scored is recorded of conversations.
    """
    return {
        "seq_len": seq_len,
        "stride": seq_len,
        "text": text,
        "text_sha256": text_sha256,
        "num_tokens": len(held_out.ids),
        **({"tokens": held_out.tokens} if held_out.is_chat else {}),
        "tokenizer": str(tokenizer.name_or_path),
        "precision": precision,
    }


def evaluate_file(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text_file: str | Path,
    seq_len: int = 1024,
    stride: int | None = None,
    *,
    column: str | None = None,
    split: str = "validation",
    data_config: str | None = None,
    limit: int | None = None,
    assistant_only: bool = True,
    open_processor: Callable[[], ProcessorMixin] | None = None,
    batch_size: int = 1,
    autocast_dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The `perplexity` of a file with everything that it depends on, as `castlm eval --json` writes it.

    `text_sha256` is what `sha256sum` prints for the file. `text_tokens` counts all of its tokens, `num_tokens` the
    scored, and `tokens` says which those are.

    Args:
        split, data_config: of a hub dataset.
        limit: most tokens of the text; None takes all.
        assistant_only: of conversations, score the tokens of the assistant alone.
        open_processor: opens what prepares the images of conversations that have some.

    Raises:
        InputError: see `perplexity` and `open_documents`.
    """
    documents = open_documents(text_file, column=column, split=split, data_config=data_config)
    processor = open_processor() if documents.has_images and open_processor is not None else None
    text = scored_text(documents, tokenizer, limit, assistant_only=assistant_only, processor=processor)
    result = perplexity(
        model,
        text,
        seq_len=seq_len,
        stride=stride,
        batch_size=batch_size,
        autocast_dtype=autocast_dtype,
        progress=progress,
    )
    return result.as_dict() | {
        "text": Path(text_file).name,
        "text_sha256": documents.text_hash(),
        "text_tokens": len(text.ids),
        "tokens": text.tokens,
        "tokenizer": tokenizer.name_or_path,
        "dtype": str(autocast_dtype or model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "versions": library_versions("torch", "transformers"),
    }
