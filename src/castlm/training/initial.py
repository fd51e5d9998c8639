"""Where CAST starts from when its masks are not to be those of magnitude: a one-shot method's, made before step 0.

Such a method looks at the text, which |W| does not, so that no refresh could find its masks again: they stay.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from castlm.baselines.calibration import CALIBRATION_POOL, calibration_blocks
from castlm.baselines.oneshot import prune_oneshot_
from castlm.core.adams import AdamS
from castlm.core.sparsify import FilterFn, weight_parameter
from castlm.progress import shown_progress
from castlm.training.config import TrainConfig
from castlm.training.data import token_ids
from castlm.training.documents import Documents
from castlm.training.telemetry import warn


def oneshot_weights(
    model: PreTrainedModel,
    config: TrainConfig,
    pattern: tuple[int, int],
    filter_fn: FilterFn,
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Tensor]:
    """Weights (out, in) of the sparse layers by name, as the one-shot method `config.initial_mask` leaves them.

    A copy of the model is pruned, calibrated on the start of the training text; the model stays as it is.

    Raises:
        InputError: as `calibration_blocks` and `prune_oneshot_`.
    """
    num_windows, length = config.calibration_sequences, config.seq_len
    ids = token_ids(documents, tokenizer, limit=CALIBRATION_POOL * num_windows * length)
    windows = calibration_blocks(ids, num_windows, length, config.seed)
    n, m = pattern
    pruned = copy.deepcopy(model)
    with shown_progress(f"masks of {config.initial_mask}, blocks") as progress:
        report = prune_oneshot_(
            pruned, config.initial_mask, n=n, m=m, calibration=windows, filter_fn=filter_fn, progress=progress
        )
    if report.raised_damping:
        warn(f"SparseGPT took more damping than {report.damping} for {', '.join(report.raised_damping)}")
    return {layer.name: pruned.get_submodule(layer.name).weight.detach() for layer in report.layers}


@torch.no_grad()
def start_from_(layers: Mapping[str, nn.Linear], optimizer: AdamS, weights: Mapping[str, Tensor]) -> None:
    """Masks what is zero in `weights`: those that are kept take their value there, masked ones decay from their own."""
    for name, new in weights.items():
        parameter = weight_parameter(layers[name])
        kept = new != 0
        optimizer.set_mask(parameter, kept)
        parameter.copy_(torch.where(kept, new, parameter))
