"""Measures perplexity, and records what a comparison needs: sequence length, stride, text, tokenizer, versions.

The output head is applied to one chunk of tokens at a time, so that memory never holds the logits of a whole text.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from castlm.core.distill import distillation_loss
from castlm.core.errors import InputError, check_type
from castlm.data.documents import Documents, HubDocuments
from castlm.data.scored import ScoredText, scored_text
from castlm.data.tokens import IGNORED, Encoder, check_vocabulary
from castlm.dtypes import dtype_name
from castlm.facts import Conditions
from castlm.fields import check_limits, convert
from castlm.hardware import library_versions
from castlm.models.architecture import (
    backbone,
    check_of_transformers,
    context_length,
    eval_mode,
    logit_scale,
    output_head,
)
from castlm.packed.layers import PackedLinear
from castlm.say import Progress, silent

_HEAD_ROWS = 192  # tokens whose logits are in memory at once
SEQ_LEN = 1024
"""Default tokens per sequence, for models with at least this context."""


@dataclasses.dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and how it was measured."""

    perplexity: float
    """exp(loss)."""
    loss: float
    """Mean cross-entropy in nats per scored token."""
    num_tokens: int
    """Number of scored tokens, fewer than the tokens of the text; see `perplexity`."""
    seq_len: int
    """Tokens of the longest sequence: as requested, or the length of the text if it is shorter."""
    stride: int


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    text: Tensor | ScoredText,
    *,
    seq_len: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
    autocast_dtype: torch.dtype | None = None,
    progress: Progress = silent,
) -> PerplexityResult:
    """Perplexity of a text, over sequences of `seq_len` tokens that begin every `stride` tokens.

    `stride=None` is the convention of GPTQ, SparseGPT and Wanda: separate, adjacent sequences, where all tokens but
    the first are scored. A smaller stride is the sliding window of Hugging Face: each sequence scores only the tokens
    that no earlier sequence contained. Every token of the text but the first is then scored once, with at least
    `seq_len - stride` tokens before it from the second sequence on. The last sequence ends with the text and may be
    shorter. (The published GPTQ code drops a shorter one; cut the text to whole sequences to compare with it.)

    The model is evaluated in eval mode; the mode of every module is restored. Losses are summed in float64.

    Args:
        text: token ids of a plain text, int64, (num_tokens,), on any device; or a `ScoredText`, which scores each
            conversation separately.
        seq_len: tokens per sequence, at most the model's context length; default: 1,024, or that length if it is
            shorter.
        batch_size: sequences per forward pass. It changes speed and memory, not the perplexity: no token attends to
            those that fill up a shorter sequence.
        autocast_dtype: for example `torch.bfloat16`; None computes in the model's dtype.
        progress: called with (sequences done, number of sequences) after each batch.

    Raises:
        InputError: fewer than 2 tokens, ids outside the vocabulary, a `seq_len` above the model's limit, a stride
            outside 1..seq_len, or a loss that is not finite (the message names the sequence).
    """
    check_of_transformers(model)
    check_type(text, (Tensor, ScoredText), "text must be a tensor of token ids", "tokenize it, or use castlm.evaluate")
    if isinstance(text, Tensor) and (text.dim() != 1 or text.is_floating_point()):
        raise InputError(
            f"text is a tensor of shape {tuple(text.shape)} and {text.dtype}: give (num_tokens,) token ids"
        )
    seq_len, stride = convert("seq_len", seq_len, int | None), convert("stride", stride, int | None)
    batch_size = convert("batch_size", batch_size, int)
    check_limits("batch_size", batch_size, {"at_least": 1})
    if seq_len is None:
        seq_len = min(SEQ_LEN, context_length(model.config) or SEQ_LEN)
    stride = seq_len if stride is None else stride
    packed_head = model.get_output_embeddings()
    head = None if isinstance(packed_head, PackedLinear) else output_head(model)
    device = model.device
    text = text if isinstance(text, ScoredText) else ScoredText.of(text)
    longest = context_length(model.config) or seq_len
    if not 2 <= seq_len <= longest:
        raise InputError(f"seq_len is {seq_len} where the model takes 2 to {longest} tokens")
    if not 1 <= stride <= seq_len:
        raise InputError(f"stride is {stride}: from 1 to the seq_len of {seq_len} it skips no token")
    check_vocabulary(text.ids, packed_head.out_features if head is None else head.weight.shape[0])

    sequences = text.sequences(seq_len, stride)
    if not sequences:
        raise InputError(f"the text has {len(text.ids)} tokens, and none to score: give at least 2")
    total, done, scored = 0.0, 0, 0
    with eval_mode(model):
        for start in range(0, len(sequences), batch_size):
            batch = sequences[start : start + batch_size]
            tensors = text.batch(batch, max(sequence.end - sequence.begin for sequence in batch))
            scored += int((tensors["labels"] != IGNORED).sum())
            tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
            labels = tensors.pop("labels")[:, :-1]  # nothing follows the last token
            with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None, cache_enabled=False):
                hidden = backbone(model)(**tensors, use_cache=False).last_hidden_state  # (1, 1024, 576)
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
            progress(done, len(sequences))

    loss = total / scored
    return PerplexityResult(
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        loss=loss,
        num_tokens=scored,
        seq_len=min(seq_len, max(end - begin for begin, end in text.stretches)),
        stride=stride,
    )


def _packed_nll(model: PreTrainedModel, hidden: Tensor, labels: Tensor) -> float:
    """The summed loss through a packed head, by the same kernels as in `castlm generate`."""
    head, (scale, softcap), total = model.get_output_embeddings(), logit_scale(model.config), 0.0
    for x, y in zip(hidden.flatten(0, 1).split(_HEAD_ROWS), labels.flatten().split(_HEAD_ROWS)):
        logits = head(x).float() * scale  # (192, 49152)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        total += F.cross_entropy(logits, y, ignore_index=IGNORED, reduction="sum").item()
    return total


def measured_on(
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    text: str,
    text_sha256: str,
    held_out: ScoredText,
    precision: str,
) -> Conditions:
    """The entry of castlm.json that describes how perplexities were measured, over adjacent sequences of `seq_len`.

    Args:
        held_out: the evaluation text. For conversations, the entry also names the scored tokens.
    """
    return Conditions(
        seq_len=seq_len,
        stride=seq_len,
        text=text,
        text_sha256=text_sha256,
        num_tokens=len(held_out.ids),
        tokenizer=str(tokenizer.name_or_path),
        precision=precision,
        tokens=held_out.tokens if held_out.by_document else None,
    )


def evaluate_text(
    model: PreTrainedModel,
    documents: Documents | HubDocuments,
    encoder: Encoder,
    *,
    limit: int | None = None,
    autocast_dtype: torch.dtype | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measures the perplexity of a text, with all settings that it depends on, as in `castlm eval --json`.

    `text_sha256` is the output of `sha256sum` for a file. `text_tokens` counts all tokens and `num_tokens` the scored
    ones, which `tokens` names.

    Args:
        limit: at most this many tokens of the text; None takes all.
        autocast_dtype, options: as for `perplexity`.
    """
    text, name = scored_text(documents, encoder, limit), Path(documents.name).name
    identity = {"text": name, "text_sha256": documents.text_hash(), "tokenizer": encoder.tokenizer_name}
    return evaluate_tokens(model, text, identity, autocast_dtype=autocast_dtype, **options)


def evaluate_tokens(
    model: PreTrainedModel,
    text: ScoredText,
    identity: dict[str, str],
    *,
    autocast_dtype: torch.dtype | None = None,
    **options: Any,
) -> dict[str, Any]:
    """`evaluate_text` for tokens, with the name and hash of their text and the name of their tokenizer."""
    result = perplexity(model, text, autocast_dtype=autocast_dtype, **options)
    return dataclasses.asdict(result) | {
        **identity,
        "text_tokens": len(text.ids),
        "tokens": text.tokens,
        "dtype": dtype_name(autocast_dtype or model.dtype),
        "device": model.device.type,
        "versions": library_versions("torch", "transformers"),
    }
