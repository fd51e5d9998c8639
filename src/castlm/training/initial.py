"""Where a run starts when not from the masks of magnitude: a one-shot method's, made before step 0, or a given model's.

Such masks look at the text, which |W| does not, so that no refresh could find them again: CAST keeps them. One rank
prunes, or reads, the whole model and hands its layers out, one at a time, to all the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from castlm.baselines.calibration import CALIBRATION_POOL, calibration_blocks
from castlm.baselines.oneshot import METHODS, prune_oneshot_
from castlm.baselines.retrain import Retraining
from castlm.core.errors import InputError
from castlm.core.masks import is_nm_sparse, nm_mask
from castlm.core.sparsify import sparse_linears, weight_parameter
from castlm.models import load_model
from castlm.progress import note, shown_progress
from castlm.training.data import token_ids
from castlm.training.distributed import World, own_rows

if TYPE_CHECKING:
    from castlm.training.setup import Setup


def starting_weights(setup: Setup) -> dict[str, Tensor]:
    """Weights (out, in) of the sparse layers by name as `initial_mask` says; on the main rank, none on the others.

    Raises:
        InputError: on the main rank, whatever the one-shot method refuses, or a model that is not ours at n:m; the
            other ranks raise `SystemExit`.
    """
    weights: dict[str, Tensor] = {}
    make = _pruned if setup.config.initial_mask in METHODS else _read
    setup.world.long_on_main(lambda alive: weights.update(make(setup, alive)))
    return weights


def _pruned(setup: Setup, alive: Callable[[], None]) -> dict[str, Tensor]:
    """A copy of the model is pruned, calibrated on the start of the training text; the model stays as it is."""
    config, method = setup.config, str(setup.config.initial_mask)
    num_windows, length = config.calibration_sequences, config.seq_len
    try:
        ids = token_ids(setup.documents, setup.loaded.tokenizer, limit=CALIBRATION_POOL * num_windows * length)
        windows = calibration_blocks(ids, num_windows, length, config.seed)
        alive()
        model = setup.whole_model().to(setup.world.device)
        alive()
        n, m = setup.pattern
        with shown_progress(f"starting from {method}, blocks") as show:

            def progress(done: int, total: int) -> None:
                show(done, total)
                alive()

            report = prune_oneshot_(
                model, method, n=n, m=m, calibration=windows, filter_fn=setup.is_sparse, progress=progress
            )
    except InputError as error:
        raise InputError(f"initial_mask {method}: {error}; initial_mask magnitude does without") from None
    if report.raised_damping:
        note(report.damping_note())
    if setup.world.mesh is not None:
        model.to("cpu")  # it goes to the others from there, and leaves the device to training
    return {layer.name: model.get_submodule(layer.name).weight.detach() for layer in report.layers}


def _read(setup: Setup, alive: Callable[[], None]) -> dict[str, Tensor]:
    """The layers of the n:m model that `initial_mask` names."""
    name, (n, m) = str(setup.config.initial_mask), setup.pattern
    try:
        model = load_model(name, trust_remote_code=setup.config.trust_remote_code).model
    except InputError as error:
        raise InputError(f"initial_mask {name}, neither one of {', '.join(METHODS)} nor a model: {error}") from None
    alive()
    layers, _ = sparse_linears(setup.model, n, m, setup.is_sparse)
    found = dict(model.named_modules())
    weights: dict[str, Tensor] = {}
    for layer_name, layer in layers.items():
        theirs = found.get(layer_name)
        if not isinstance(theirs, nn.Linear) or theirs.weight.shape != layer.weight.shape:
            raise InputError(f"initial_mask {name} has no {layer_name} of {tuple(layer.weight.shape)}: another model")
        weight = theirs.weight.detach()
        if not is_nm_sparse(weight, n, m):
            raise InputError(f"initial_mask {name} is not {n}:{m} in {layer_name}: prune it first (castlm prune)")
        weights[layer_name] = weight
    return weights


@torch.no_grad()
def start_(method: Retraining, weights: Mapping[str, Tensor], world: World) -> None:
    """Masks what is zero in the main rank's `weights` and gives what is kept its value there, on every rank its rows;
    what becomes of the masked ones is up to the method."""
    for name, layer in method.layers.items():
        parameter = weight_parameter(layer)
        new = world.from_main(weights[name] if world.is_main else None, parameter.shape)
        rows = new[own_rows(parameter)].to(parameter.device)
        method.start_layer_(layer, rows, nm_mask(rows, *method.pattern))
