"""castlm's attention, one place for both kinds of device, which a model finds by its name in transformers.

On a CPU it runs in blocks of queries, each with those keys alone that one of its queries may see. torch's kernel
multiplies each query with 512 keys at a time, later ones and those of other documents too. In blocks, sequences of 512
tokens with five documents take 0.4 of its time, and with one document 0.7.

    key        0 ... 109 | 110 .. 204 | 205 ... 364 | ...       mask of a packed sequence, by documents
    queries    0 ..  63:   keys   0 ..  63
    queries   64 .. 127:   keys   0 .. 127                      two documents
    queries  128 .. 191:   keys 110 .. 191

On a GPU a mask of documents (batch, 1, seq, seq) would keep torch from its flash kernel. There the documents of a batch
are laid end to end, and `torch.nn.attention.varlen` gets the offset of each.

The documents of a sequence are kept apart in one of three ways, and `way_to_keep_apart` finds the one that a model
obeys. Position ids that begin again at 0 are enough where transformers makes the mask of a model from them. Other
models need the mask (batch, 1, seq, seq) itself. On a GPU, the kernel that gets the offsets skips what it forbids.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward, use_gqa_in_sdpa
from transformers.masking_utils import sdpa_mask

from castlm.core.errors import InputError, is_out_of_memory
from castlm.data.packing import DocumentOffsets, document_mask, document_offsets
from castlm.models.architecture import backbone, embedding_weight
from castlm.models.io import quiet_transformers

NAME = "castlm"
"""The name by which a model's config selects `attend`."""

_QUERIES = 64  # of a block; 32 and 128 take a tenth longer for sequences of 512 (Zen 3)
_SHORT = 128  # tokens of a sequence that torch's kernel takes whole
_ASKS_FOR_SDPA = re.compile(r"_attn_implementation\s*(==|!=|in\b|not in\b).*sdpa")


def use_attention_(model: PreTrainedModel) -> bool:
    """Makes the text layers of `model` attend by `attend`, and returns whether they do.

    They do not if they are not on transformers' interface of attention functions (most remote code), if they
    do not use "sdpa" (attention sinks), or if their code does something else where the name is not "sdpa": layers that
    choose their keys, such as DeepSeek V3.2's, would read all keys.
    """
    text = model.config.get_text_config()
    if text._attn_implementation == NAME:
        return True
    if text._attn_implementation != "sdpa" or any(
        _asks_for_sdpa(type(module).__module__) for module in model.modules() if isinstance(module, PreTrainedModel)
    ):
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # else transformers would make no mask for this name
    parts = {key: NAME for key in model.config.sub_configs if getattr(model.config, key) is text}
    with quiet_transformers():  # it warns of a model that cannot be changed
        model.set_attn_implementation(NAME if text is model.config else parts)
    return bool(text._attn_implementation == NAME)


@functools.cache
def _asks_for_sdpa(module: str) -> bool:
    try:
        return _ASKS_FOR_SDPA.search(inspect.getsource(sys.modules[module])) is not None
    except (KeyError, OSError, TypeError):  # a module without a file
        return True


def can_lay_end_to_end(model: PreTrainedModel) -> bool:
    """Whether a model that uses `attend` may be given `of_documents`: all layers are causal, and none has a window."""
    config = model.config.get_text_config()
    windows = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    drops = any(value for name, value in config.to_dict().items() if "drop" in name and isinstance(value, float))
    uses = config._attn_implementation == NAME and config is model.config
    return uses and not windows and kinds == {"full_attention"} and not drops


def of_documents(documents: DocumentOffsets, device: torch.device) -> dict[str, Any]:
    """The arguments of a model's forward with which `attend` keeps documents apart by their offsets.

    The mask (1, 1, 1, 1) says nothing: with four dimensions, it keeps transformers from making one of the position ids.
    """
    offsets = documents.offsets.to(device, non_blocking=True)
    return {
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": documents.longest,
        "max_length_k": documents.longest,
    }


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers. The results are those of "sdpa" up to the order of sums.

    Masks of floats, biases of positions, dropout, and other devices without `of_documents` are left to "sdpa".

    Args:
        query: (batch, heads, seq, head_dim); `key` and `value` may have fewer heads, each of which serves a group.
        attention_mask: bool, (batch or 1, heads or 1, seq, seq), True = attends.

    Returns:
        (batch, seq, heads, head_dim), and no attention weights.
    """
    if options.get("cu_seq_lens_q") is not None:
        return _attend_end_to_end(query, key, value, scaling, options["cu_seq_lens_q"], options["max_length_q"]), None
    num_tokens, mask = query.shape[2], attention_mask
    in_blocks = query.device.type == "cpu" and num_tokens > _SHORT and not dropout
    if in_blocks and mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        mask = _causal_mask(num_tokens)
    if not in_blocks or not _is_whole(mask, query, key) or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **options)
    assert mask is not None
    group = getattr(module, "num_key_value_groups", 1)
    shares = group > 1 and use_gqa_in_sdpa(attention_mask, key, value)
    # 9 heads of queries, 3 of keys: repeated to 9 where torch's kernel does not share them.
    if group > 1 and not shares:
        key, value = repeat_kv(key, group), repeat_kv(value, group)
    rows = []
    for row, blocks in enumerate(_blocks_of(mask)):
        of = slice(row, row + 1) if len(mask) > 1 else slice(None)  # one mask can serve all rows
        parts = []
        for queries, keys in blocks:
            inputs = query[of, :, queries], key[of, :, keys], value[of, :, keys]
            part = mask[of, :, queries, keys]
            parts.append(scaled_dot_product_attention(*inputs, part, scale=scaling, enable_gqa=shares))
        rows.append(torch.cat(parts, dim=-2))
    return torch.cat(rows).transpose(1, 2).contiguous(), None


def _attend_end_to_end(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, offsets: Tensor, longest: int
) -> Tensor:
    """Causal attention within each document of a batch (batch, heads, seq, head_dim), all rows end to end."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    # (2, 9, 512, 64) -> (1024, 9, 64); rotary embeddings leave queries and keys in fp32 where autocast is on
    q, k, v = (part.transpose(1, 2).flatten(0, 1).to(dtype) for part in (query, key, value))
    shares, only_earlier = key.shape[1] != query.shape[1], (-1, 0)
    states = varlen_attn(
        q, k, v, offsets, offsets, longest, longest, scale=scaling, window_size=only_earlier, enable_gqa=shares
    )
    assert isinstance(states, Tensor)
    rows: Tensor = states.unflatten(0, (query.shape[0], query.shape[2]))  # (1024, 9, 64) -> (2, 512, 9, 64)
    return rows


@functools.lru_cache(maxsize=1)
def _causal_mask(num_tokens: int) -> Tensor:
    with torch.inference_mode(False):  # autograd will save it
        return torch.ones(1, 1, num_tokens, num_tokens, dtype=torch.bool).tril_()


_BLOCKS = WeakTensorKeyDictionary()  # every layer of a forward pass gets the same mask


def _blocks_of(mask: Tensor) -> list[list[tuple[slice, slice]]]:
    """The blocks of each row of a mask (rows, heads, queries, keys): their queries and keys."""
    if mask not in _BLOCKS:
        rows = []
        for allowed in mask.any(dim=1):  # (512, 512)
            blocks = []
            for start in range(0, len(allowed), _QUERIES):
                queries = slice(start, start + _QUERIES)
                # From the first to the last key that any of the 64 queries sees; the mask forbids what lies between.
                seen = allowed[queries].any(dim=0).nonzero().flatten().tolist()
                blocks.append((queries, slice(seen[0], seen[-1] + 1) if seen else slice(None)))
            rows.append(blocks)
        _BLOCKS[mask] = rows
    blocks_of_rows: list[list[tuple[slice, slice]]] = _BLOCKS[mask]
    return blocks_of_rows


def _is_whole(mask: Tensor | None, query: Tensor, key: Tensor) -> bool:
    """Whether a mask says of each query and key whether they meet: bool, (1 or batch, 1 or heads, queries, keys)."""
    if mask is None or mask.dtype != torch.bool or mask.dim() != 4:
        return False
    return len(mask) in (1, len(query)) and mask.shape[-2:] == (query.shape[-2], key.shape[-2])


Way = Literal["together", "positions", "mask", "offsets"]
"""How a model is told which tokens belong to one document; "together": it is not, and they attend to each other."""


def inputs_of(
    input_ids: Tensor, position_ids: Tensor | None, way: Way, documents: DocumentOffsets | None = None
) -> dict[str, Any]:
    """The arguments of a forward pass of a batch (batch, seq).

    Args:
        position_ids: begin again at 0 with each document; not read if they are "together".
        documents: for "offsets".
    """
    if way == "together":
        return {"input_ids": input_ids}
    assert position_ids is not None
    inputs = {"input_ids": input_ids, "position_ids": position_ids}
    if way == "offsets":
        assert documents is not None
        return inputs | of_documents(documents, input_ids.device)
    return inputs | ({"attention_mask": document_mask(position_ids)} if way == "mask" else {})


@torch.no_grad()
def way_to_keep_apart(student: PreTrainedModel, teacher: PreTrainedModel | None = None) -> Way:
    """The way in which the documents of a sequence do not attend to each other, found by running the models.

    With the right one, a change of the first document leaves the hidden states of the second as they are. "offsets" is
    for GPUs, if student and teacher compute the same with them as with positions.

    Raises:
        InputError: no way keeps the documents of the student apart.
    """
    if _keeps_apart(student, "positions"):
        is_faster = embedding_weight(student).device.type == "cuda"
        models = [student] if teacher is None else [student, teacher]
        return "offsets" if is_faster and agree_end_to_end(models) else "positions"
    has_window = getattr(student.config.get_text_config(), "sliding_window", None) is not None
    # a mask of documents would replace the window's
    if not has_window and _keeps_apart(student, "mask"):
        return "mask"
    raise InputError(
        f"{type(student).__name__} cannot keep the documents of a sequence apart: set cross_document_attention"
    )


def _two_documents(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Token ids and positions (2, 11) of two documents, of which the first, 5 tokens, differs between the rows."""
    weight = embedding_weight(model)
    words = torch.arange(min(len(weight), 32), device=weight.device)
    first = torch.stack([words[:1].expand(5), words[1:6]])
    second = words[6:12].expand(2, -1)
    starts = [torch.arange(part.shape[1], device=weight.device) for part in (first, second)]
    return torch.cat([first, second], dim=1), torch.cat(starts).expand(2, -1)  # positions 0 1 2 3 4 0 1 2 3 4 5


def _keeps_apart(model: PreTrainedModel, way: Way) -> bool:
    """Whether the first document has no influence on the second one."""
    input_ids, positions = _two_documents(model)

    def influence(inputs: dict[str, Any]) -> float:
        """The largest change of the second document's hidden states by the first document."""
        states = backbone(model)(**inputs, use_cache=False).last_hidden_state[:, 5:].float()  # (2, 6, hidden)
        return float((states[0] - states[1]).abs().max())

    try:
        # Not exactly 0: experts and low precision may round a little differently, far below a real influence.
        return influence(inputs_of(input_ids, positions, way)) <= 0.01 * influence({"input_ids": input_ids})
    except (TypeError, ValueError, RuntimeError) as error:  # the model takes no position ids, or no such mask
        return _never_of_memory(error)


def _never_of_memory(error: Exception) -> Literal[False]:
    """False: the model cannot do what it was asked. Raises `error` again if memory ran out, which says nothing of it.

    Another way would be tried otherwise, by this rank alone, and the other ranks would wait for it for ever.
    """
    if is_out_of_memory(error):
        raise error
    return False


@torch.no_grad()
def agree_end_to_end(models: Sequence[PreTrainedModel]) -> bool:
    """Whether the models compute the same by the offsets of documents as by positions, up to the rounding of bf16."""
    if not all(map(can_lay_end_to_end, models)):
        return False
    input_ids, positions = _two_documents(models[0])
    documents = document_offsets(positions.cpu())
    try:
        for model in models:
            expected, states = (
                backbone(model)(**inputs, use_cache=False).last_hidden_state.float()
                for inputs in (
                    inputs_of(input_ids, positions, "positions"),
                    inputs_of(input_ids, positions, "offsets", documents),
                )
            )
            if not (states - expected).abs().max() <= 0.05 * expected.abs().max():  # NaN is not, either
                return False
    except (TypeError, ValueError, RuntimeError) as error:  # no such arguments, or no kernel for dtype or head's size
        return _never_of_memory(error)
    return True
