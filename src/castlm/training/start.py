"""Where a run starts when not from the masks of magnitude: a one-shot method's, made before step 0, or a given model's.

Such masks look at the text, which |W| does not, so that no refresh could find them again: CAST keeps them. One rank
prunes, or reads, the whole model and hands its layers out, one at a time, to all the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from castlm.core.errors import InputError
from castlm.core.masks import is_nm_sparse, nm_mask
from castlm.core.sparsify import FilterFn, sparse_linears, weight_parameter
from castlm.data.tokens import token_ids
from castlm.distributed.sharding import own_rows
from castlm.distributed.world import World
from castlm.methods.base import Retraining
from castlm.models import load_model
from castlm.oneshot.calibration import CALIBRATION_POOL, calibration_blocks
from castlm.oneshot.prune import prune_oneshot_
from castlm.oneshot.solvers import SOLVERS
from castlm.progress import note, shown_progress
from castlm.training.config import TrainConfig
from castlm.training.source import Source
from castlm.training.text import TrainingText


def starting_weights(
    config: TrainConfig,
    source: Source,
    text: TrainingText,
    pattern: tuple[int, int],
    filter_fn: FilterFn,
    world: World,
) -> dict[str, Tensor]:
    """Weights (out, in) of the sparse layers by name as `initial_mask` says; on the main rank, none on the others.

    Raises:
        InputError: on the main rank, whatever the one-shot solver refuses, or a start that is not this model at n:m;
            the other ranks raise `SystemExit`.
    """
    weights: dict[str, Tensor] = {}

    def make(alive: Callable[[], None]) -> None:
        if config.initial_mask in SOLVERS:
            weights.update(_pruned(config, source, text, pattern, filter_fn, world, alive))
        else:
            weights.update(_read(config, source, pattern, filter_fn, alive))

    world.long_on_main(make)
    return weights


def _pruned(
    config: TrainConfig,
    source: Source,
    text: TrainingText,
    pattern: tuple[int, int],
    filter_fn: FilterFn,
    world: World,
    alive: Callable[[], None],
) -> dict[str, Tensor]:
    """Prunes a copy of the model, calibrated on the start of the training text; the model stays as it is."""
    solver = str(config.initial_mask)
    num_sequences, length = config.calibration_sequences, config.seq_len
    try:
        ids = token_ids(text.documents, source.tokenizer, limit=CALIBRATION_POOL * num_sequences * length)
        calibration = calibration_blocks(ids, num_sequences, length, config.seed)
        alive()
        model = source.whole_model().to(world.device)
        alive()
        n, m = pattern
        with shown_progress(f"starting from {solver}, blocks") as show:

            def progress(done: int, total: int) -> None:
                show(done, total)
                alive()

            report = prune_oneshot_(
                model, solver, n=n, m=m, calibration=calibration, filter_fn=filter_fn, progress=progress
            )
    except InputError as error:
        raise InputError(f"initial_mask {solver}: {error}; initial_mask magnitude does without") from None
    if report.raised_damping:
        note(report.damping_note())
    if world.mesh is not None:
        model.to("cpu")  # it is sent to the other ranks from there, and leaves the device to training
    return {layer.name: model.get_submodule(layer.name).weight.detach() for layer in report.layers}


def _read(
    config: TrainConfig, source: Source, pattern: tuple[int, int], filter_fn: FilterFn, alive: Callable[[], None]
) -> dict[str, Tensor]:
    """Reads the layers of the n:m model that `initial_mask` names."""
    name, (n, m) = str(config.initial_mask), pattern
    try:
        model = load_model(name, trust_remote_code=config.trust_remote_code).model
    except InputError as error:
        raise InputError(f"initial_mask {name}, neither one of {', '.join(SOLVERS)} nor a model: {error}") from None
    alive()
    layers, _ = sparse_linears(source.model, n, m, filter_fn)
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
