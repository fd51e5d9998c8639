"""Keeps the documents of a training sequence apart: the arguments of a forward pass, and which of them a model obeys.

There are three ways. Position ids that begin again at 0 are enough where transformers makes the mask of a model from
them. Other models need the mask (batch, 1, seq, seq) itself. On a GPU, a kernel that gets the offsets of the documents
skips what such a mask forbids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from castlm.core.errors import InputError, is_out_of_memory
from castlm.data.packing import DocumentOffsets, document_mask, document_offsets
from castlm.models.architecture import backbone, embedding_weight
from castlm.training.attention import can_lay_end_to_end, of_documents

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
