"""Starts other than magnitude: from a one-shot solver, which runs before step 0, or from a given n:m model.

Their masks depend on text. A refresh by |W| of the dense weights would lose them, so masked weights start at zero.
Several ranks prune the model together, block by block from its files, and each then reads its rows of the finished
blocks. If the model or a step does not allow that, the main rank prunes or reads the whole model, and sends it to the
other ranks layer by layer.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from castlm.core.errors import InputError, check_finite
from castlm.core.nm import Pattern
from castlm.core.shards import local, own_rows
from castlm.core.sparsify import FilterFn, dense_name, scope_of, transformer_blocks, weight_parameter
from castlm.distributed.loading import Checkpoint, Place, open_sharded, opened_files
from castlm.distributed.sharding import may_skip_modules
from castlm.distributed.world import World, reporting_once
from castlm.facts import Basis, Facts, Reconstructed, Start
from castlm.files.output import check_beside
from castlm.files.reading import user_path
from castlm.hardware import available_memory
from castlm.methods.base import Retraining
from castlm.models.architecture import embedding_weight, is_vision_language, move_
from castlm.models.io import load_model
from castlm.models.locate import locate
from castlm.names import duration
from castlm.oneshot.calibration import Draw
from castlm.oneshot.folder import begun_work, block_file, partial_folder
from castlm.oneshot.options import BasisOptions, Refinements, part_of
from castlm.oneshot.ranks import ONE_RANK, Ranks
from castlm.oneshot.report import OneshotReport
from castlm.oneshot.source import DENSE, MemoryModel, StoredModel
from castlm.oneshot.start import run_start
from castlm.oneshot.steps.base import Step
from castlm.progress import note, shown_progress
from castlm.say import silent
from castlm.starts import all_methods, method_of, methods_of, steps_of, trained_from
from castlm.training.options import StartOptions
from castlm.training.source import Source, TrainingText

_FARTHEST = 0.5  # largest relative distance by which training may have moved the embeddings


@dataclass
class StartWeights:
    """The weights of a start: on the main rank alone, or in files, from which each rank reads its rows."""

    pruned: dict[str, Tensor] = field(default_factory=dict)
    """n:m weights (out, in) of the sparse layers, by layer."""
    dense: dict[str, Tensor] = field(default_factory=dict)
    """Parameters that differ from the dense model's, by name: dense ones in a new basis or of a given model, and the
    dense values of sparse layers in a new basis, if the run `keeps_dense_values`."""
    given: Checkpoint | None = None
    """The places of the weights of a given model, or of the blocks that the ranks have pruned together, on every rank,
    which reads its rows. `pruned` and `dense` are empty then."""
    given_dense: dict[str, Place] = field(default_factory=dict)
    """Beside `given`, the places of the dense values of sparse layers, as in `dense`."""
    facts: Start = field(default_factory=Start)
    """The report of the start, with its times, on every rank."""


def check_start(name: str, output_dir: Path, world: World) -> None:
    """Checks, before the model is loaded, that the start `name` exists, and that its work can be written.

    Raises `InputError` for a model that is not found, or a solver whose folder cannot be made beside `output_dir`.
    """
    if name in all_methods():
        world.on_main(lambda: check_beside(partial_folder(output_dir)))
    else:
        locate(name)


@dataclass(frozen=True, kw_only=True)
class TrainingStart:
    """The start of a run: its options, and the facts of the run on which it depends."""

    options: StartOptions
    source: Source
    text: TrainingText
    world: World
    pattern: Pattern
    filter_fn: FilterFn
    """Chooses the layers that become sparse."""
    draw: Draw
    """The calibration text, of the training text."""
    keeps_dense_values: bool
    """Whether masked weights begin at their dense values."""
    is_finetuning: bool
    """Whether the model of the run is its own start."""
    compares_hidden: bool
    """Whether the run compares hidden states with the teacher's, for which both must be in one basis."""
    training_tokens: float
    """Tokens of all forward passes of the training on one rank; a backward pass counts as two."""

    def make(self, output_dir: str | Path, overwrite: bool = False) -> StartWeights:
        """Makes the start: by a one-shot method, or from the model that `init_from` names.

        Ranks share the work where the files of the model allow it: see `_why_whole` for a method, and of a given
        model, each rank takes its own part.

        Finished transformer blocks are in `partial_folder(output_dir)`, from which a start that was killed continues.
        The folder stays until `drop_work`.

        Args:
            overwrite: begin again if that folder holds a start with other options, or a damaged one.

        Raises:
            InputError: on the main rank, as `run_start`, or for a given model that is not this one at n:m. The other
                ranks raise `SystemExit`, after a line about an error of their own.
        """
        start = StartWeights()
        is_given = trained_from(self.options.name, self.pattern) is None
        if is_given and (opened := self._open_given()) is not None:
            self._take_places_(start, *opened)
            return start

        output = user_path(output_dir)
        why_whole = None if is_given else self._why_whole()
        if not is_given and why_whole is None:
            with self.world.context_on_main(begun_work(output)) as work:
                start.facts = self._prune_together_(start, work, overwrite)
            return start

        def fill() -> Start:
            if is_given:
                self._read_(start)
                return Start()
            if self.world.mesh is not None:
                note(f"the start is made by the main rank alone: {why_whole}")
            with begun_work(output) as work:
                return self._prune_whole_(start, work, overwrite)

        # patient, because loading a large model and each block may take long
        start.facts = self.world.on_main(fill, patient=True)
        return start

    def _steps(self) -> list[Step]:
        """The steps of the start; an instance belongs to one start."""
        options = self.options
        basis, refinements = part_of(options, BasisOptions), part_of(options, Refinements)
        return steps_of(options.name, self.pattern, basis, refinements, options.start_effort)

    def _why_whole(self) -> str | None:
        """Why one rank makes the start of the whole model; None if the ranks make it together, block by block.

        Experts that are modules of a list divide their tokens unseen by `castlm.oneshot.inputs`, so a rank could miss
        the input of one.
        """
        source = self.source
        if self.world.mesh is None:
            return "there is one process"
        if is_vision_language(source.model.config):
            return "the model reads images"
        if source.stored is None:
            return "transformers converts the weights of this model while it loads them"
        if any(map(may_skip_modules, transformer_blocks(source.model).values())):
            return "its experts are modules of their own"
        whole = next((str(step) for step in self._steps() if not step.is_divided), None)
        if whole is not None or not self.pattern.independent_rows:
            return f"{whole or self.pattern} takes the whole model"
        return None

    def _prune_together_(self, start: StartWeights, work: Path, overwrite: bool) -> Start:
        """Prunes the model block by block; all ranks call it, and find the blocks in the folder `work`."""
        world, stored, model = self.world, self.source.stored, copy.deepcopy(self.source.model)
        assert stored is not None
        scope = scope_of(model, self.pattern, self.filter_fn)
        keeps_dense = self.keeps_dense_values
        blocks = StoredModel(model, stored, scope.layers, world.device, None, scope.pattern, keeps_dense, ranks=world)
        with reporting_once(world):
            facts, _ = self._run(blocks, work, overwrite, world)
        places: dict[str, Place] = {}
        for index, block in enumerate(blocks.blocks):
            file = block_file(work, index)
            names = [name for name, _ in block.named_parameters(prefix=f"{blocks.stack}.{index}")]
            places |= {name: Place(file, name) for name in names}
            if self.keeps_dense_values:
                inside = [name for name in scope.layers if f"{name}.weight" in names]
                start.given_dense |= {f"{name}.weight": Place(file, f"{DENSE}{name}") for name in inside}
        # The finished blocks are the start: each rank reads its rows there, and rank 0 sends nothing.
        start.given = Checkpoint(str(work), places)
        return world.on_main(lambda: facts)

    def _prune_whole_(self, start: StartWeights, work: Path, overwrite: bool) -> Start:
        """Prunes a copy of the model in memory, on this rank alone."""
        self._check_memory()
        model = self.source.whole_model()
        move_(model, self.world.device)
        scope = scope_of(model, self.pattern, self.filter_fn)
        layers = scope.layers
        blocks = MemoryModel(model, layers, scope.pattern, self.keeps_dense_values)
        facts, report = self._run(blocks, work, overwrite, ONE_RANK)
        if self.world.mesh is not None:
            move_(model, "cpu")  # weights are sent to the other ranks from there, and the device is free for training
        pruned = {name: weight_parameter(layer) for name, layer in layers.items()}
        start.pruned = {name: parameter.detach() for name, parameter in pruned.items()}
        replaced = set(pruned.values())
        start.dense = {name: p.detach() for name, p in model.named_parameters() if p not in replaced}
        if report.basis.changes:
            start.dense |= {f"{name}.weight": weight for name, weight in blocks.dense.items()}
        return facts

    def _run(
        self, blocks: MemoryModel | StoredModel, work: Path, overwrite: bool, ranks: Ranks
    ) -> tuple[Start, OneshotReport]:
        """Takes the steps in a model, calibrated on the beginning of the training text; returns two reports of them."""
        method, device, model, layers = self.options.name, self.world.device, blocks.model, blocks.layers
        is_main = ranks.rank == 0
        say = note if is_main else silent
        try:
            text = None
            if method_of(method, self.pattern).reads_text:
                text = ranks.on_main(
                    lambda: self.draw.text(model, layers, self.text.encoder, device, note), patient=True
                )

            def time_after(seconds_per_token: float) -> str:
                # The output head is as much work as so many blocks, by its weights: 28.3 M / 3.5 M = 8 (SmolLM2-135M).
                head = model.get_output_embeddings().weight.numel()
                size = len(blocks.blocks) + head / sum(weight.numel() for weight in blocks.blocks[0].parameters())
                return f"; training takes about {duration(self.training_tokens * size * seconds_per_token)} after it"

            facts = {
                "weights": self.source.fingerprint,
                "keeps_dense": self.keeps_dense_values,
                "layers": sorted(layers),
                "seed": self.draw.seed,
            }
            with shown_progress(
                f"starting from {method}, transformer blocks", before=None, is_main=is_main
            ) as progress:
                report = run_start(
                    blocks,
                    self._steps(),
                    text,
                    work,
                    facts=facts,
                    restart=overwrite,
                    say=say,
                    progress=progress,
                    time_after=time_after,
                    ranks=ranks,
                )
        except InputError as error:
            raise InputError(f"init_from {method}: {error}; init_from magnitude needs no text") from None
        for line in report.notes():
            say(line)
        start = Start(
            **vars(report.solved()),
            calibration_tokens=0 if text is None else text.sequences.numel(),
            layer_errors={layer.name: layer.error for layer in report.layers},
            reconstructions=[Reconstructed(**asdict(block)) for block in report.reconstructions],
        )
        return start, report

    def _check_memory(self) -> None:
        """Raises `InputError` if the whole model does not fit into the memory that is free."""
        # fp32; the copy that is pruned comes beside the model
        needed = 4 * sum(parameter.numel() for parameter in self.source.model.parameters())
        free = available_memory(self.world.device.type)
        if needed > free:
            gib = [f"{size / 2**30:.1f} GiB" for size in (needed, free)]
            raise InputError(
                f"init_from {self.options.name}: the start holds the whole model, {gib[0]} in fp32, and {gib[1]} are "
                "free: prune beforehand (castlm prune --memory block), and pass its folder as init_from"
            )

    def _read_(self, start: StartWeights) -> None:
        """Reads the model that `init_from` names: its sparse layers and, unless fine-tuning, all other parameters."""
        pattern, source = self.pattern, self.source
        is_loaded = self.is_finetuning and source.stored is None
        with self._naming_methods():
            model = source.model if is_loaded else load_model(self.options.name, **self._given_options).model
        if not self.is_finetuning:
            self._check_given(model, lambda: embedding_weight(model).detach())
        scope = scope_of(source.model, pattern, self.filter_fn)
        theirs = dict(model.named_parameters())
        start.pruned = {layer: theirs[f"{layer}.weight"].detach() for layer in scope.layers}
        for part, unit in scope.parts:
            if part.joint_violations([start.pruned[layer] for layer in unit]):
                raise InputError(self._not_of_pattern(unit[-1]))
        if not self.is_finetuning:
            pruned = {f"{layer}.weight" for layer in scope.layers}
            start.dense = {each: parameter.detach() for each, parameter in theirs.items() if each not in pruned}

    def _open_given(self) -> tuple[PreTrainedModel, Checkpoint] | None:
        """The model that `init_from` names, without its weights, and the places of these; all ranks call it.

        None if a rank cannot read its rows alone: in a single process, for a pattern that needs whole weights, and for
        files of which `open_sharded` says so.
        """
        source, opened, failure = self.source, None, None
        if self.world.mesh is None or not self.pattern.independent_rows:
            return None
        try:
            with self._naming_methods():
                if not self.is_finetuning:
                    found = open_sharded(self.options.name, **self._given_options)
                    opened = None if found is None else (found[0].model, found[1])
                elif source.stored is not None:
                    opened = source.model, source.stored
        except InputError as error:
            failure = str(error)
        are_open = self.world.gather(opened is not None, patient=True)
        self.world.check_all(failure)
        return opened if all(are_open) else None

    def _take_places_(self, start: StartWeights, model: PreTrainedModel, given: Checkpoint) -> None:
        """Gives `start` the places of a model, of which each rank reads its rows; all ranks call it.

        Each rank counts the pattern of some sparse layers.

        Args:
            model: the given model, without weights.
        """
        if not self.is_finetuning:
            (name,) = (n for n, p in model.named_parameters() if p is embedding_weight(model))

            def embeddings() -> Tensor:
                with opened_files() as read:
                    return given.places[name].read(read, slice(None)).float()

            self.world.on_main(lambda: self._check_given(model, embeddings), patient=True)
        scope = scope_of(self.source.model, self.pattern, self.filter_fn)
        failure = None
        with opened_files() as read:
            for layer in [*scope.layers][self.world.rank :: self.world.size]:
                weight = given.places[f"{layer}.weight"].read(read, slice(None))
                if failure is None and scope.pattern.at(layer).joint_violations([weight]):
                    failure = self._not_of_pattern(layer)
        self.world.gather(None, patient=True)  # the others may read longer
        self.world.check_all(failure)
        places = {f"{layer}.weight": given.places[f"{layer}.weight"] for layer in scope.layers}
        start.given = Checkpoint(given.source, places if self.is_finetuning else given.places)

    @property
    def _given_options(self) -> dict[str, Any]:
        """The options with which the model that `init_from` names is opened."""
        options = self.source.options
        return options if self.is_finetuning else {**options, "revision": None}

    @contextlib.contextmanager
    def _naming_methods(self) -> Iterator[None]:
        """Names the one-shot methods in the error of a model that cannot be opened."""
        try:
            yield
        except InputError as error:
            known = ", ".join(methods_of(self.pattern))
            raise InputError(f"init_from {self.options.name} is neither one of {known} nor a model: {error}") from None

    def _not_of_pattern(self, layer: str) -> str:
        given = self.options.name if self.is_finetuning else f"init_from {self.options.name}"
        return (
            f"{given} is not {self.pattern} in {layer}: give its own pattern, prune it first (castlm prune), or name "
            "the layer in left_dense"
        )

    def _check_given(self, model: PreTrainedModel, embeddings: Callable[[], Tensor]) -> None:
        """Checks that a given model may be the dense one at n:m; the basis inside its blocks may be another.

        Args:
            embeddings: reads its input embeddings (vocab, hidden).
        """
        name, source = self.options.name, self.source
        theirs = {each: parameter.shape for each, parameter in model.named_parameters()}
        ours = {each: parameter.shape for each, parameter in source.model.named_parameters()}
        for each in sorted(ours.keys() | theirs.keys()):
            if each not in ours or each not in theirs or ours[each] != theirs[each]:
                raise InputError(f"init_from {name} and {source.name} differ in the shape of {each}: another model")
        if self.keeps_dense_values:
            changed = Facts.read(Path(name)).basis or Basis()
            if changes := [change.what for change in changed.changes if change.num_kept]:
                raise InputError(
                    f"init_from {name} is written in another basis ({', '.join(changes)}), in which masked weights "
                    "have no dense values to begin at: prune it with --rotate off --no-permute"
                )
        if self.compares_hidden:
            dense, given = source.embeddings().float(), embeddings()
            if not (dense - given).norm() <= _FARTHEST * given.norm():
                raise InputError(
                    f"init_from {name}: its embeddings are far from the dense model's, so that their hidden states "
                    "cannot be compared: use hidden_weight 0"
                )


@torch.no_grad()
def start_(model: nn.Module, method: Retraining, start: StartWeights, world: World) -> None:
    """Loads the weights of a start into the model, each rank its rows, from the main rank or from files.

    Parameters in `start.dense` get these values. Zeros in `start.pruned` are masked, and kept weights get its values;
    the method decides the values of masked weights.

    Raises:
        InputError: on the main rank, if the files cannot be read. The other ranks raise `SystemExit`.
    """
    if start.given is not None:
        _start_from_files_(model, method, start, world)
        return

    def whole_of(weights: dict[str, Tensor], name: str, parameter: Tensor) -> Tensor:
        return world.from_main(weights[name] if world.is_main else None, parameter.shape)

    by_name = {dense_name(name): parameter for name, parameter in model.named_parameters()}
    for name in world.on_main(lambda: list(start.dense)):
        parameter = by_name[name]
        local(parameter).copy_(whole_of(start.dense, name, parameter)[own_rows(parameter)])
    for pattern, unit in method.pattern.parts(method.layers):
        parameters = [weight_parameter(method.layers[name]) for name in unit]
        weights = [whole_of(start.pruned, name, parameter) for name, parameter in zip(unit, parameters)]
        own = [own_rows(parameter) for parameter in parameters]
        rows = [weight[part].to(p.device) for weight, part, p in zip(weights, own, parameters)]
        if pattern.gathers(parameters):
            # A channel's mask needs all rows of three weights, which every rank has been sent: no second gather.
            whole_masks = pattern.joint_masks(weights)
            masks = [mask[part].to(p.device) for mask, part, p in zip(whole_masks, own, parameters)]
        else:
            masks = pattern.joint_masks(rows)
        for name, weight, mask in zip(unit, rows, masks):
            method.start_layer_(method.layers[name], weight, mask)


def _start_from_files_(model: nn.Module, method: Retraining, start: StartWeights, world: World) -> None:
    """Starts every parameter that `start` has a place for, from this rank's rows there; see `start_`."""
    given = start.given
    assert given is not None
    layer_of = {weight_parameter(layer): layer for layer in method.layers.values()}
    failure = None
    with opened_files() as read:
        for full_name, parameter in model.named_parameters():
            name, own = dense_name(full_name), own_rows(parameter)
            if name not in given.places:
                continue
            try:
                rows = torch.empty_like(local(parameter), dtype=torch.float32)  # there may be fewer rows than ranks
                if own.stop > own.start:
                    # Masked weights that decay from their dense values: these come first, and `start_layer_` sets the
                    # kept ones.
                    if name in start.given_dense:
                        local(parameter).copy_(start.given_dense[name].read(read, own))
                    rows.copy_(given.places[name].read(read, own))
                check_finite(f"{name} of {given.source}", rows)
            except Exception as error:  # safetensors' own type
                failure = f"init_from {given.source}: {name} cannot be read: {error}"
                break
            layer = layer_of.get(parameter)
            if layer is None:
                local(parameter).copy_(rows)
            else:
                pattern = method.pattern.at(name.removesuffix(".weight"))
                method.start_layer_(layer, rows, *pattern.joint_masks([rows]))
    world.check_all(failure)
