"""What a calibration text says about an output head: the Hessian of its input, by which int6 and int4 are rounded.

`castlm quantize` sums it while it rounds the blocks. `castlm pack`, which changes no block, reads its text for the head
alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from castlm.data.calibration import CalibrationText, calibration_sequences
from castlm.data.documents import AnyDocuments, open_documents
from castlm.data.options import DEFAULTS, TextOptions
from castlm.data.tokens import Encoder, text_encoder
from castlm.distributed.loading import open_sharded
from castlm.hardware import keep_freed_memory, return_freed_memory
from castlm.models.architecture import is_vision_language
from castlm.models.io import load_model
from castlm.oneshot.draw import calibration_length
from castlm.oneshot.run import run_start
from castlm.oneshot.source import MemoryModel, Source, StoredModel
from castlm.oneshot.steps.round import SeeHead, layers_to_round
from castlm.say import Progress, Say, silent


@dataclass(frozen=True)
class CalibrationOptions:
    """A calibration text for int6, int4 or int3, and the draw of sequences from it."""

    text: str
    """A file, folder, glob or hub dataset."""
    num_sequences: int = 64
    seq_len: int = 512
    seed: int = 0

    def draw(self, documents: AnyDocuments, encoder: Encoder, model: PreTrainedModel, say: Say) -> Tensor:
        """Sequences that fit the context of the model: int64 (num_sequences, seq_len)."""
        seq_len = min(self.seq_len, calibration_length(model))
        return calibration_sequences(documents, encoder, self.num_sequences, seq_len, self.seed, say)[0]

    def record(self, documents: AnyDocuments) -> dict[str, Any]:
        """The text of `documents` and its seed, for castlm.json."""
        return {"text": self.text, "text_sha256": documents.text_hash(), "seed": self.seed}


@torch.no_grad()
def head_hessian(
    name: str,
    calibration: CalibrationOptions,
    *,
    options: TextOptions = DEFAULTS,
    progress: Progress = silent,
    say: Say = silent,
) -> Tensor:
    """The Hessian of what the output head of a model reads on a calibration text: fp32 (hidden, hidden).

    One transformer block at a time is in memory; a model with images, or with other tensor names in its files, is
    loaded whole.

    Args:
        name: a model folder, hub id, GGUF file or "demo".
        options: how the text is read.
        progress: called with (finished blocks, all blocks).
    """
    documents = open_documents(calibration.text, options)
    loaded, checkpoint = open_sharded(name, trust_remote_code=False, revision=None) or (None, None)
    if loaded is None or checkpoint is None or is_vision_language(loaded.model.config):
        keep_freed_memory()
        loaded = load_model(name, dtype=torch.float32)
        source: Source = MemoryModel(loaded.model, layers_to_round(loaded.model))
    else:
        return_freed_memory()
        source = StoredModel(loaded.model, checkpoint, layers_to_round(loaded.model), torch.device("cpu"), None)
    tokens = calibration.draw(documents, text_encoder(loaded.tokenizer, options), loaded.model, say)
    return hessian_of(source, tokens, progress=progress, say=say)


def hessian_of(source: Source, tokens: Tensor, *, progress: Progress = silent, say: Say = silent) -> Tensor:
    """`head_hessian` of an opened model and sequences (num_sequences, seq_len)."""
    step = SeeHead()
    run_start(source, [step], CalibrationText(tokens), progress=progress, say=say)
    assert step.hessian is not None
    return step.hessian
