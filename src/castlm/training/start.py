"""Where a run starts when not from the masks of magnitude: a one-shot method's, made before step 0, or a given model's.

Such masks look at the text, which |W| does not, so that no refresh could find them again: CAST keeps them. One rank
prunes, or reads, the whole model and hands its layers out, one at a time, to all the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from castlm.core.errors import InputError
from castlm.core.pattern import Pattern
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
    pattern: Pattern,
    filter_fn: FilterFn,
    world: World,
) -> dict[str, Tensor]:
    """Weights (out, in) of the sparse layers by name as `init_from` says; on the main rank, none on the others.

    Raises:
        InputError: on the main rank, whatever the one-shot solver refuses, or a start that is not this model at n:m;
            the other ranks raise `SystemExit`.
    """
    weights: dict[str, Tensor] = {}

    def make(alive: Callable[[], None]) -> None:
        if config.start in SOLVERS:
            weights.update(_pruned(config, source, text, pattern, filter_fn, world, alive))
        else:
            weights.update(_read(config, source, pattern, filter_fn, alive))

    world.long_on_main(make)
    return weights


def _pruned(
    config: TrainConfig,
    source: Source,
    text: TrainingText,
    pattern: Pattern,
    filter_fn: FilterFn,
    world: World,
    alive: Callable[[], None],
) -> dict[str, Tensor]:
    """Prunes a copy of the model, calibrated on the start of the training text; the model stays as it is."""
    solver = str(config.start)
    num_sequences, length = config.calibration_sequences, config.seq_len
    try:
        ids = token_ids(text.documents, source.tokenizer, limit=CALIBRATION_POOL * num_sequences * length)
        calibration = calibration_blocks(ids, num_sequences, length, config.seed)
        alive()
        model = source.whole_model().to(world.device)
        alive()
        with shown_progress(f"starting from {solver}, blocks") as show:

            def progress(done: int, total: int) -> None:
                show(done, total)
                alive()

            report = prune_oneshot_(
                model, solver, pattern=pattern, calibration=calibration, filter_fn=filter_fn, progress=progress
            )
    except InputError as error:
        raise InputError(f"init_from {solver}: {error}; init_from magnitude does without") from None
    if report.raised_damping:
        note(report.damping_note())
    if world.mesh is not None:
        model.to("cpu")  # it is sent to the other ranks from there, and leaves the device to training
    return {layer.name: model.get_submodule(layer.name).weight.detach() for layer in report.layers}


def _read(
    config: TrainConfig, source: Source, pattern: Pattern, filter_fn: FilterFn, alive: Callable[[], None]
) -> dict[str, Tensor]:
    """Reads the layers of the n:m model that `init_from` names."""
    name = str(config.start)
    try:
        model = load_model(name, trust_remote_code=config.trust_remote_code).model
    except InputError as error:
        raise InputError(f"init_from {name}, neither one of {', '.join(SOLVERS)} nor a model: {error}") from None
    alive()
    layers, _ = sparse_linears(source.model, pattern, filter_fn)
    found = dict(model.named_modules())
    weights: dict[str, Tensor] = {}
    for layer_name, layer in layers.items():
        theirs = found.get(layer_name)
        if not isinstance(theirs, nn.Linear) or theirs.weight.shape != layer.weight.shape:
            raise InputError(f"init_from {name} has no {layer_name} of {tuple(layer.weight.shape)}: another model")
        weight = theirs.weight.detach()
        if pattern.violations(weight):
            raise InputError(f"init_from {name} is not {pattern} in {layer_name}: prune it first (castlm prune)")
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
        method.start_layer_(layer, rows, method.pattern.mask(rows))
