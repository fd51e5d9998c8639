"""`castlm.prune`: one-shot pruning without training, from the name of a model to a verified folder."""

from __future__ import annotations

import functools
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from castlm.api.objects import Objects, Result
from castlm.api.signature import with_keywords_of
from castlm.core.errors import InputError
from castlm.core.nm import Pattern
from castlm.data.options import TextOptions
from castlm.export.verify_report import ALLOW_DENSE
from castlm.fields import Needs, build, choice, essential, label, like, option
from castlm.oneshot.methods import Reads, all_methods, default_method, method_of, reads_of, steps_of
from castlm.oneshot.options import EFFORTS, BasisOptions, EffortOptions, Refinements, part_of, with_effort
from castlm.training.options import CheckpointOptions, ModelOptions, RuntimeOptions

if typing.TYPE_CHECKING:  # they import torch
    from transformers import PreTrainedTokenizerBase

    from castlm.api.objects import Model, Text
    from castlm.oneshot.report import OneshotReport
    from castlm.world import World

TEXT = Needs("a solver that reads a text, such as wanda or sparsegpt", lambda options: options.reads.is_calibrated)


@dataclass(frozen=True, kw_only=True)
class OwnOptions:
    """The model, the pattern, the solver and the calibration text."""

    model: str = essential(
        help='Local Hugging Face folder, hub id, GGUF file, or "demo".',
    )

    output_dir: str = essential(
        help="Folder for the pruned model.",
    )

    solver: str | None = choice(
        None,
        all_methods,
        essential=True,
        help="Solver that chooses the masked weights: sparsegpt (the default; it also updates the kept ones), "
        "wanda, magnitude.",
    )

    calibration: str | None = essential(
        None,
        needs=TEXT,
        help="Calibration text, for all solvers except magnitude: a file, folder, glob or hub dataset, as "
        "--dataset of castlm train.",
    )

    pattern: Pattern = like(ModelOptions, "pattern", essential=True)
    calibration_sequences: int | None = option(
        None,
        at_least=1,
        needs=TEXT,
        help="Calibration sequences. The default is enough for 32,768 tokens (16 for each input of the widest "
        "layer if that is more), at most 128, and a quarter for a quick start.",
    )

    seq_len: int = essential(
        0,
        at_least=0,
        needs=TEXT,
        help="Tokens per calibration sequence. 0 is the model's context length, at most 2,048.",
    )

    seed: int = option(
        0,
        needs=TEXT,
        help="Seed for drawing calibration sequences.",
    )

    device: Literal["auto", "cpu", "cuda"] = like(RuntimeOptions, "device")

    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto",
        needs=TEXT,
        help="Compute type of the passes over the calibration text; solvers compute in fp32. auto: bf16 if the "
        "hardware multiplies it faster and the model is not tiny.",
    )

    memory: Literal["auto", "model", "block"] = essential(
        "auto",
        help="Keep the whole model in memory in fp32, or one transformer block at a time; the result is the same. "
        "auto: block if the model does not fit, in GPU memory if there is a GPU.",
    )

    save_dtype: Literal["source", "fp32", "bf16", "fp16"] = like(CheckpointOptions, "save_dtype")

    allow_dense: float = option(
        ALLOW_DENSE,
        at_least=0,
        at_most=1,
        help="The largest share of the weights by which the transformer blocks multiply that may stay dense. A "
        "model of which more would, such as one with experts that castlm does not make sparse, is refused with "
        "exit code 1.",
    )

    overwrite: bool = essential(
        False,
        help="Replace an earlier result in output_dir.",
    )

    revision: str | None = like(ModelOptions, "revision")
    trust_remote_code: bool = like(ModelOptions, "trust_remote_code")


@dataclass(frozen=True, kw_only=True)
class PruneOptions(Refinements, BasisOptions, EffortOptions, TextOptions, OwnOptions):  # the last base comes first
    """The options of a prune."""

    @property
    def solver_name(self) -> str:
        """`solver`, or the default of the pattern."""
        return self.solver or default_method(self.pattern)

    @property
    def reads_text(self) -> bool:
        return self.reads.is_calibrated

    @property
    def reads(self) -> Reads:
        """What the prune reads, for the conditions of its options."""
        return reads_of(method_of(self.solver_name, self.pattern), self.pattern)


@with_keywords_of(PruneOptions)
def prune(
    model: Model,
    text: Text | None = None,
    *,
    pattern: Pattern | str = "2:4",
    output_dir: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> Result:
    """Prunes a model one-shot, without training, and verifies the result from the disk.

    With `output_dir`, finished transformer blocks are kept in `OUTPUT_DIR.partial`, so that the same call continues
    after a kill. `prune_oneshot_` prunes a model in place, with sequences of token ids.

    Args:
        model: a Hugging Face folder, hub id, GGUF file, or "demo"; a `PreTrainedModel`, which stays as it is.
        text: the calibration text: a file, folder, glob or hub dataset, a list of texts, a `datasets.Dataset`, or any
            other iterable of documents; not for "magnitude".
        pattern: n:m, where n of every m consecutive weights along the input axis are kept.
        output_dir: the folder of the pruned model; without one, the result is a model in memory.
        tokenizer: of a model in memory; by default the one where it was loaded from.
        options: as of `castlm prune`: `solver`, `calibration_sequences`, `seq_len`, `start_effort`, `overwrite` and
            others.

    Returns:
        The result, whose `report` has the errors of all layers and the changes of basis.

    Raises:
        InputError: an option out of range, a model or text that cannot be read, or a failed verification.

    Examples:
        >>> import castlm
        >>> castlm.prune("demo", "text.txt", pattern="2:4", output_dir="pruned", seq_len=512)  # doctest: +SKIP
        >>> sparse = castlm.prune(model, ["One text.", "Another."], tokenizer=tokenizer).model  # doctest: +SKIP
    """
    with Objects(output_dir) as given:
        values = {"pattern": pattern, "output_dir": given.output_dir, **options}
        values |= {"model": given.model(model, tokenizer), "calibration": given.text(text)}
        values = {name: value for name, value in values.items() if value is not None}
        chosen = build(PruneOptions, with_effort(values), asked=values)
        report = run_prune(chosen)
        return given.result(chosen.output_dir, report=report)


def run_prune(options: PruneOptions, source: str = "") -> OneshotReport:
    """`prune` with checked options; under `torchrun` all ranks prune together.

    Args:
        source: `COMMAND_LINE` if they are from there; errors then write `--calibration` instead of `calibration`.
    """
    from castlm.world import closing, init_world, naming_missing_ranks, reporting_once

    with (
        closing(init_world(options.device, "full")) as world,
        naming_missing_ranks(world),
        reporting_once(world),
    ):
        return _prune(options, source, world)


def _prune(options: PruneOptions, source: str, world: World) -> OneshotReport:
    from castlm.data.documents import open_documents
    from castlm.export.pruned import choose_memory, prune_folder
    from castlm.files.output import check_output
    from castlm.models.locate import local_folder, locate
    from castlm.oneshot.draw import Draw
    from castlm.progress import shown_progress

    pattern, method = options.pattern, options.solver_name
    if options.memory == "block" and not locate(options.model).gguf:
        local_folder(options.model)
    basis, refinements = part_of(options, BasisOptions), part_of(options, Refinements)
    steps = steps_of(method, pattern, basis, refinements, options.start_effort)
    if world.size > 1:
        whole = next((str(step) for step in steps if not step.is_divided), None)
        if options.memory == "model" or whole is not None:
            why = f"{label('memory', source)} model" if options.memory == "model" else whole
            raise InputError(f"{why} takes the whole model in one process, not {world.size} ranks: leave out torchrun")
    if method_of(method, pattern).reads_text and options.calibration is None:
        raise InputError(
            f"solver {method} needs a calibration text: give {label('calibration', source)} FILE, or "
            f"{label('solver', source)} magnitude"
        )
    draw = None
    if options.calibration is not None:
        shown = functools.partial(shown_progress, is_main=world.is_main)
        draw = Draw(
            documents=open_documents(options.calibration, options, shown=shown),
            name=options.calibration,
            options=options,
            num_sequences=options.calibration_sequences,
            seq_len=options.seq_len,
            seed=options.seed,
            precision=options.precision,
            effort=EFFORTS[options.start_effort],
        )
    inputs = {"model": options.model, "calibration": options.calibration}
    folder = world.on_main(lambda: check_output(options.output_dir, overwrite=options.overwrite, inputs=inputs))
    memory = "block" if world.size > 1 else options.memory
    if memory == "auto":
        memory = choose_memory(options.model, options.revision, folder, world.device.type)
    return prune_folder(
        options.model,
        folder,
        method,
        pattern,
        steps,
        draw=draw,
        memory=memory,
        device=world.device,
        dtype=options.save_dtype,
        allow_dense=options.allow_dense,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        overwrite=options.overwrite,
        world=world,
    )
