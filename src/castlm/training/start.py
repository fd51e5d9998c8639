"""Starts other than magnitude: pruned by a one-shot solver before step 0, or taken from a given n:m model.

A start is made in its folder beside the output, and every rank reads its rows of it there, whether there are one or
many. Ranks prune the model together, block by block from its files, unless the model or a step does not allow that:
then the main rank prunes the whole model. The masks depend on text, and a refresh by |W| of the dense weights would
lose them, so masked weights start at zero.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from castlm.core.errors import InputError
from castlm.core.nm import Pattern
from castlm.core.shards import local, own_rows
from castlm.core.sparsify import FilterFn, dense_name, scope_of, transformer_blocks, weight_parameter
from castlm.distributed.sharding import may_skip_modules
from castlm.facts import Basis, Facts, Start
from castlm.files.atomic_file import atomic_file, flush_file, reporting_full_disk
from castlm.hardware import available_memory
from castlm.methods.base import Retraining
from castlm.models.architecture import embedding_weight, is_vision_language, move_
from castlm.models.io import load_model
from castlm.models.loading import (
    Place,
    StoredWeights,
    open_sharded,
    opened_files,
    read_finite,
)
from castlm.names import duration
from castlm.oneshot.draw import Draw
from castlm.oneshot.folder import COPY, begun_work, block_file
from castlm.oneshot.methods import method_of, methods_of, steps_of
from castlm.oneshot.options import BasisOptions, Refinements, part_of
from castlm.oneshot.run import run_start
from castlm.oneshot.source import DENSE, MemoryModel, StoredModel, block_stack
from castlm.oneshot.steps.base import Step
from castlm.progress import note, shown_progress
from castlm.say import silent
from castlm.training.model import OpenedModel
from castlm.training.options import StartOptions
from castlm.training.text import TrainingText
from castlm.world import ALONE, World, reporting_once
from castlm_runtime.stored import read_header

_FARTHEST = 0.5  # largest relative distance by which training may have moved the embeddings


def prune_for_start(
    options: StartOptions,
    dense: OpenedModel,
    text: TrainingText,
    world: World,
    output: Path,
    *,
    pattern: Pattern,
    filter_fn: FilterFn,
    draw: Draw,
    keeps_dense: bool,
    training_tokens: float,
    overwrite: bool = False,
) -> tuple[StoredWeights, Start]:
    """Prunes the dense model by a one-shot method into the folder of the start; all ranks call it.

    Finished transformer blocks are in `partial_folder(output)`, from which a start that was killed continues. That
    folder stays until `drop_work`.

    Args:
        draw: the calibration text, of the training text.
        keeps_dense: also store the dense weights in the basis of the start, at which masked weights may begin.
        training_tokens: tokens of all forward passes of the training on one rank; a backward pass counts as two.
        overwrite: begin again if that folder holds a start with other options, or a damaged one.

    Returns:
        The places of the weights of all blocks, and with `keeps_dense` of the dense weights under `DENSE` and their
        name; and the report of the start. Both are the same on every rank.

    Raises:
        InputError: on the main rank, as `run_start`. The other ranks raise `SystemExit`, after a line about an error of
            their own.
    """

    def steps() -> list[Step]:  # an instance belongs to one start
        basis, refinements = part_of(options, BasisOptions), part_of(options, Refinements)
        return steps_of(options.name, pattern, basis, refinements, options.start_effort)

    def prune(blocks: MemoryModel | StoredModel, work: Path, ranks: World) -> Start:
        """Takes the steps in a model, calibrated on the beginning of the training text."""
        method, device, model, layers = options.name, world.device, blocks.model, blocks.layers
        is_main = ranks.is_main
        say = note if is_main else silent
        try:
            calibration = None
            if method_of(method, pattern).reads_text:
                calibration = ranks.on_main(lambda: draw.text(model, layers, text.encoder, device, note), patient=True)

            def time_after(seconds_per_token: float) -> str:
                # The output head is as much work as so many blocks, by its weights: 28.3 M / 3.5 M = 8 (SmolLM2-135M).
                head = model.get_output_embeddings().weight.numel()
                size = len(blocks.blocks) + head / sum(weight.numel() for weight in blocks.blocks[0].parameters())
                return f"; training takes about {duration(training_tokens * size * seconds_per_token)} after it"

            facts = {
                "weights": dense.fingerprint,
                "keeps_dense": keeps_dense,
                "layers": sorted(layers),
                "seed": draw.seed,
            }
            shown = f"starting from {method}, transformer blocks"
            with shown_progress(shown, before=None, is_main=is_main) as progress:
                report = run_start(
                    blocks,
                    steps(),
                    calibration,
                    work,
                    facts=facts,
                    restart=overwrite,
                    say=say,
                    progress=progress,
                    time_after=time_after,
                    world=ranks,
                )
        except InputError as error:
            raise InputError(f"init_from {method}: {error}; init_from magnitude needs no text") from None
        for line in report.notes():
            say(line)
        return Start(
            **vars(report.solved()),
            calibration_tokens=0 if calibration is None else calibration.sequences.numel(),
            layer_errors={layer.name: layer.error for layer in report.layers},
            reconstructions=report.reconstructions,
        )

    def prune_together(work: Path) -> Start:
        """Prunes the model block by block, from its files; all ranks call it."""
        assert dense.stored is not None
        model = copy.deepcopy(dense.model)
        scope = scope_of(model, pattern, filter_fn)
        blocks = StoredModel(
            model, dense.stored, scope.layers, world.device, None, scope.pattern, keeps_dense, world=world
        )
        with reporting_once(world):
            facts = prune(blocks, work, world)
        return world.on_main(lambda: facts)

    def prune_alone(work: Path) -> Start:
        """Prunes a copy of the whole model in memory; the main rank calls it."""
        if world.mesh is not None:
            note(f"the start is made by the main rank alone: {why_alone}")
        _check_memory(options, dense.model, world)
        model = dense.whole_model()
        move_(model, world.device)
        scope = scope_of(model, pattern, filter_fn)
        return prune(MemoryModel(model, scope.layers, scope.pattern, keeps_dense), work, ALONE)

    why_alone = _why_one_rank(dense, world, pattern, steps())
    with world.context_on_main(begun_work(output)) as work:
        # patient, because loading a large model and each block may take long
        alone = partial(world.on_main, lambda: prune_alone(work), patient=True)
        facts = prune_together(work) if why_alone is None else alone()
    stack, blocks = block_stack(dense.model, scope_of(dense.model, pattern, filter_fn).layers)
    places: dict[str, Place] = {}
    for index in range(len(blocks)):
        file = block_file(work, index)
        for key in read_header(file):
            name = key if key.startswith(f"{stack}.") else f"{key}.weight"  # dense weights go by the name of the layer
            places[name] = Place(file, key)
    return StoredWeights(str(work), places), facts


def _why_one_rank(dense: OpenedModel, world: World, pattern: Pattern, steps: list[Step]) -> str | None:
    """Why one rank makes the start of the whole model; None if the ranks make it together, block by block.

    Experts that are modules of a list divide their tokens unseen by `castlm.oneshot.inputs`, so a rank could miss the
    input of one.
    """
    if world.mesh is None:
        return "there is one process"
    if is_vision_language(dense.model.config):
        return "the model reads images"
    if dense.stored is None:
        return "transformers converts the weights of this model while it loads them"
    if any(map(may_skip_modules, transformer_blocks(dense.model).values())):
        return "its experts are modules of their own"
    whole = next((str(step) for step in steps if not step.is_divided), None)
    return None if whole is None else f"{whole} takes the whole model"


def _check_memory(options: StartOptions, model: PreTrainedModel, world: World) -> None:
    """Raises `InputError` if the whole model does not fit into the memory that is free."""
    # fp32; the copy that is pruned comes beside the model
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    free = available_memory(world.device.type)
    if needed > free:
        gib = [f"{size / 2**30:.1f} GiB" for size in (needed, free)]
        raise InputError(
            f"init_from {options.name}: the start holds the whole model, {gib[0]} in fp32, and {gib[1]} are "
            "free: prune beforehand (castlm prune --memory block), and pass its folder as init_from"
        )


def open_given(
    name: str,
    dense: OpenedModel,
    world: World,
    output: Path,
    *,
    pattern: Pattern,
    filter_fn: FilterFn,
    keeps_dense: bool,
    compares_hidden: bool,
) -> StoredWeights:
    """The places of the weights of an n:m model that `init_from` names; all ranks call it.

    They are those of its own files. Weights that transformers converts while it loads them are written once into the
    folder of the start, `partial_folder(output)`.

    Args:
        keeps_dense: the run lets masked weights begin at their dense values, in the basis of the dense model.
        compares_hidden: the run compares hidden states with the dense model's.

    Raises:
        InputError: on the main rank, for a given model that is not the dense one at n:m; the basis inside its blocks
            may be another. The other ranks raise `SystemExit`.
    """
    options = {**dense.options.loading, "revision": None}
    opened, failure = None, None
    try:
        with _naming_methods(name, pattern):
            opened = open_sharded(name, **options)
    except InputError as error:
        failure = str(error)
    are_open = world.gather(opened is not None, patient=True)
    world.check_all(failure)
    if opened is not None and all(are_open):
        theirs, given = opened[0].model, opened[1]
        world.on_main(lambda: _check_shapes(name, theirs, dense))
    else:

        def write(work: Path) -> None:
            with _naming_methods(name, pattern):
                model = load_model(name, **options).model
            _check_shapes(name, model, dense)
            with reporting_full_disk(work, "free some space"), atomic_file(work / COPY) as temporary:
                save_file({key: value.detach().contiguous() for key, value in model.named_parameters()}, temporary)
                flush_file(temporary)

        with world.context_on_main(begun_work(output)) as work:
            world.on_main(lambda: write(work), patient=True)
        given = StoredWeights(name, {key: Place(work / COPY, key) for key, _ in dense.model.named_parameters()})
    world.on_main(lambda: _check_same_model(name, given, dense, keeps_dense, compares_hidden), patient=True)

    check_pattern(f"init_from {name}", given.read, dense, world, pattern=pattern, filter_fn=filter_fn)
    return given


@contextlib.contextmanager
def _naming_methods(name: str, pattern: Pattern) -> Iterator[None]:
    """Names the one-shot methods in the error of a model that cannot be opened."""
    try:
        yield
    except InputError as error:
        known = ", ".join(methods_of(pattern))
        raise InputError(f"init_from {name} is neither one of {known} nor a model: {error}") from None


def check_pattern(
    what: str,
    read: Callable[[str], Tensor],
    dense: OpenedModel,
    world: World,
    *,
    pattern: Pattern,
    filter_fn: FilterFn,
) -> None:
    """Checks that the layers of a model that the run makes sparse are of the pattern; each rank counts some of them.

    Args:
        what: names the model in the error.
        read: reads a whole parameter by its name.

    Raises:
        InputError: on the main rank, if a layer is not. The other ranks raise `SystemExit`.
    """
    failure = None
    for layer in list(scope_of(dense.model, pattern, filter_fn).layers)[world.rank :: world.size]:
        weight = read(f"{layer}.weight")
        if failure is None and pattern.at(layer).violations(weight):
            failure = (
                f"{what} is not {pattern} in {layer}: give its own pattern, prune it first (castlm prune), or name "
                "the layer in left_dense"
            )
    world.check_all(failure, patient=True)  # the others may read longer


def _check_shapes(name: str, model: PreTrainedModel, dense: OpenedModel) -> None:
    theirs = {each: parameter.shape for each, parameter in model.named_parameters()}
    ours = {each: parameter.shape for each, parameter in dense.model.named_parameters()}
    for each in sorted(ours.keys() | theirs.keys()):
        if ours.get(each) != theirs.get(each):
            raise InputError(f"init_from {name} and {dense.options.model} differ in the shape of {each}: another model")


def _check_same_model(
    name: str, given: StoredWeights, dense: OpenedModel, keeps_dense: bool, compares_hidden: bool
) -> None:
    """Checks that a given model has the basis and the embeddings that the run needs."""
    if keeps_dense:
        changed = Facts.read(Path(name)).basis or Basis()
        if changes := [change.what for change in changed.changes if change.num_kept]:
            raise InputError(
                f"init_from {name} is written in another basis ({', '.join(changes)}), in which masked weights "
                "have no dense values to begin at: prune it with --rotate off --no-permute"
            )
    if compares_hidden:
        embeddings = embedding_weight(dense.model)
        (key,) = (key for key, parameter in dense.model.named_parameters() if parameter is embeddings)
        ours = dense.read(key).float().cpu()
        theirs = given.read(key).float()
        if not (ours - theirs).norm() <= _FARTHEST * theirs.norm():
            raise InputError(
                f"init_from {name}: its embeddings are far from the dense model's, so that their hidden states "
                "cannot be compared: use hidden_weight 0"
            )


@torch.no_grad()
def load_start_(model: nn.Module, method: Retraining, start: StoredWeights, world: World) -> None:
    """Reads a start into the model, each rank its rows. The method decides the values of masked weights.

    Dense parameters that `start` has a place for get their values there. In sparse ones, zeros are masked, and kept
    weights get their values; the values under `DENSE` come first, where masked weights decay from them.

    Raises:
        InputError: on the main rank, if the files cannot be read. The other ranks raise `SystemExit`.
    """
    parameters = {dense_name(name): parameter for name, parameter in model.named_parameters()}
    failure = None
    with opened_files() as read:

        def rows_of(name: str, like: Tensor, own: slice) -> Tensor:
            rows = torch.empty_like(like, dtype=torch.float32)
            if own.stop > own.start:  # there may be fewer rows than ranks
                rows.copy_(read_finite(start, name, read, own))
            return rows

        try:
            for name, parameter in parameters.items():
                key = f"{DENSE}{name}" if f"{DENSE}{name}" in start.places else name
                if key in start.places and (key != name or name.removesuffix(".weight") not in method.layers):
                    local(parameter).copy_(rows_of(key, local(parameter), own_rows(parameter)))
            for name, layer in method.layers.items():
                sparse = weight_parameter(layer)
                weight = rows_of(f"{name}.weight", local(sparse), own_rows(sparse))
                method.start_layer_(layer, weight, method.pattern.at(name).mask(weight))
        except InputError as error:
            failure = f"init_from {start.source}: {error}"
    world.check_all(failure)


@torch.no_grad()
def keep_own_masks_(method: Retraining) -> None:
    """Starts fine-tuning: masks the zeros of the model itself, each rank in its rows."""
    for name, layer in method.layers.items():
        weight = local(weight_parameter(layer)).detach().clone()
        method.start_layer_(layer, weight, method.pattern.at(name).mask(weight))
