"""What a calibration text says about an output head: the Hessian of its input, by which int6 and int4 are rounded.

`castlm quantize` sums it while it rounds the blocks. `castlm pack`, which changes no block, reads its text for the head
alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from castlm.data.calibration import CalibrationText
from castlm.data.tokens import text_encoder
from castlm.hardware import keep_freed_memory, return_freed_memory
from castlm.models.architecture import is_vision_language
from castlm.models.io import load_model
from castlm.models.loading import open_sharded
from castlm.oneshot.draw import Draw
from castlm.oneshot.run import run_start
from castlm.oneshot.source import MemoryModel, Source, StoredModel
from castlm.oneshot.steps.round import SeeHead, layers_to_round
from castlm.say import Progress, Say, silent


@torch.no_grad()
def head_hessian(
    name: str,
    draw: Draw,
    *,
    progress: Progress = silent,
    say: Say = silent,
) -> Tensor:
    """The Hessian of what the output head of a model reads on a calibration text: fp32 (hidden, hidden).

    One transformer block at a time is in memory; a model with images, or with other tensor names in its files, is
    loaded whole.

    Args:
        name: a model folder, hub id, GGUF file or "demo".
        draw: the text, and sequences of it, which are cut to the context of the model.
        progress: called with (finished blocks, all blocks).
    """
    loaded, checkpoint = open_sharded(name, trust_remote_code=False, revision=None) or (None, None)
    if loaded is None or checkpoint is None or is_vision_language(loaded.model.config):
        keep_freed_memory()
        loaded = load_model(name, dtype=torch.float32)
        source: Source = MemoryModel(loaded.model, layers_to_round(loaded.model))
    else:
        return_freed_memory()
        source = StoredModel(loaded.model, checkpoint, layers_to_round(loaded.model), torch.device("cpu"), None)
    encoder = text_encoder(loaded.tokenizer, draw.options)
    text = draw.within_context(loaded.model).text(loaded.model, source.layers, encoder, source.device, say)
    return hessian_of(source, text, progress=progress, say=say)


def hessian_of(source: Source, text: CalibrationText, *, progress: Progress = silent, say: Say = silent) -> Tensor:
    """`head_hessian` of an opened model and a text."""
    step = SeeHead()
    run_start(source, [step], text, progress=progress, say=say)
    assert step.hessian is not None
    return step.hessian
