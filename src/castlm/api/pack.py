"""`castlm.pack`: store a model for castlm's kernels, an n:m one without its zeros."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from castlm.api.objects import Objects, Result
from castlm.api.signature import with_keywords_of
from castlm.core.nm import Pattern
from castlm.data.options import TextOptions
from castlm.fields import Needs, build, choice, option, parsed, positional
from castlm.patterns import parse_pattern_or_dense
from castlm_runtime.formats import FORMATS, HEADS

if typing.TYPE_CHECKING:  # they import torch
    from transformers import PreTrainedTokenizerBase

    from castlm.api.objects import Model, Text
    from castlm.export.packed import PackReport


HEAD_CHOICES = (*HEADS, "source")
"""Of the option `head`."""
CALIBRATION = Needs("a calibration text, which int6, int4 and int3 read", lambda options: options.reads_text)
READS = Needs("--head int6 or int4", lambda options: options.head in HEADS and FORMATS[options.head].reads_text)


@dataclass(frozen=True)
class PackOptions(TextOptions):
    """The options of packing."""

    model: str = positional(
        help='Model folder in Hugging Face format, run of `castlm train`, hub id, GGUF file, or "demo"; n:m or dense.',
    )

    output_dir: str = option(
        help="Folder for the packed model.",
    )

    pattern: Pattern | Literal["dense"] | None = parsed(
        None,
        parse_pattern_or_dense,
        help="n:m, at most n non-zeros in every m along the input axis, or dense. The default is the pattern in "
        "castlm.json; without one, 2:4 if the first layer has it, otherwise dense.",
    )

    dtype: Literal["bf16", "fp16", "fp32"] | None = option(
        None,
        help="Cast all weights to this dtype first. By default they keep their bits, except that -0.0 may become 0.0.",
    )

    head: str | None = choice(
        None,
        HEAD_CHOICES,
        help="int8 rounds the output head and the embedding, tied or not, with one scale per row, int6 and int4 "
        "with a scale for every 64 columns; source keeps them. The default is int6 where the layers are integers "
        "and head and embedding more than a tenth of the file, otherwise source.",
    )

    calibration: str | None = option(
        None,
        needs=READS,
        help="Calibration text: a file, folder, glob or hub dataset. An int6 or int4 head is then rounded by least "
        "squares on the hidden states that it reads; without a text, to the nearest.",
    )

    calibration_sequences: int = option(
        64,
        at_least=1,
        needs=CALIBRATION,
        help="Calibration sequences.",
    )

    seq_len: int = option(
        512,
        at_least=1,
        needs=CALIBRATION,
        help="Tokens per calibration sequence, at most the model's context length.",
    )

    seed: int = option(
        0,
        needs=CALIBRATION,
        help="Seed for drawing calibration sequences.",
    )

    overwrite: bool = option(
        False,
        help="Replace an earlier result in output_dir.",
    )

    @property
    def reads_text(self) -> bool:
        return self.calibration is not None


@with_keywords_of(PackOptions)
def pack(
    model: Model,
    text: Text | None = None,
    *,
    output_dir: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> Result:
    """Stores a model for castlm's CPU kernels, and verifies it; an n:m one without its zeros.

    transformers loads the folder after `castlm.register()`. `pack_model_` packs the layers of a model in memory in
    place.

    Args:
        model: a Hugging Face folder, a run of `train`, a hub id, a GGUF file, or "demo"; a `PreTrainedModel`, or the
            result of another call; n:m or dense.
        text: the calibration text of an int6 or int4 head: a file, folder, glob or hub dataset, a list of texts, a
            `datasets.Dataset`, or any other iterable of documents.
        output_dir: the folder of the packed model; without one, the result is a model in memory.
        tokenizer: of a model in memory; by default the one where it was loaded from.
        options: as of `castlm pack`: `pattern`, `dtype`, `head`, `calibration_sequences` and others.

    Returns:
        The result, whose `report` has the number of packed tensors, and the bytes of the weight files before and after.

    Raises:
        InputError: an option out of range, a model without the pattern, or `output_dir` taken.

    Examples:
        >>> import castlm
        >>> report = castlm.pack("run", output_dir="packed", head="int8").report  # doctest: +SKIP
        >>> report.bytes_after / report.bytes_before  # doctest: +SKIP
        0.34
    """
    with Objects(output_dir) as given:
        values = {"model": given.model(model, tokenizer), "output_dir": given.output_dir, **options}
        values["calibration"] = given.text(text)
        chosen = build(PackOptions, {name: value for name, value in values.items() if value is not None})
        report = run_pack(chosen)
        return given.result(chosen.output_dir, report=report, unpack=False)


def unpack(
    model: str | Path | Result,
    *,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    tie: bool = False,
) -> Result:
    """Writes a packed model or a GGUF file as a plain Hugging Face folder, which loads without castlm.

    Args:
        model: the folder of a packed model, a GGUF file, or the result of `pack`.
        output_dir: the folder of the plain model; without one, the result is a model in memory.
        overwrite: replace an earlier result in `output_dir`.
        tie: keep one table for embedding and output head, the finer one, where a GGUF file holds two roundings of it.

    Raises:
        InputError: not a packed folder, damaged files, `output_dir` taken, or a GGUF file of one table with `tie`.
    """
    with Objects(output_dir) as given:
        source = given.model(model)
        run_unpack(source, given.output_dir, overwrite, tie)
        return given.result(given.output_dir)


def run_unpack(source: str, output_dir: str, overwrite: bool, tie: bool = False) -> int:
    """`unpack` of a name into a folder; returns the number of tensors."""
    from castlm.export.packed import unpack_folder
    from castlm.files.output import check_output
    from castlm.progress import shown_progress

    folder = check_output(output_dir, overwrite=overwrite, inputs={"model": source})
    with shown_progress("unpack, tensors") as progress:
        return unpack_folder(source, folder, overwrite=overwrite, tie=tie, progress=progress)


def run_pack(options: PackOptions) -> PackReport:
    """`pack` with converted options."""
    from castlm.data.documents import open_documents
    from castlm.export.head import head_hessian
    from castlm.export.packed import groups_of, pack_folder, pattern_of
    from castlm.files.output import check_output
    from castlm.models.locate import result_folder
    from castlm.oneshot.draw import Draw
    from castlm.progress import note, shown_progress

    groups = groups_of(options.model, pattern_of(options.model, options.pattern))
    source, hessian = result_folder(options.model), None
    inputs = {"model": source, "calibration": options.calibration}
    folder = check_output(options.output_dir, overwrite=options.overwrite, inputs=inputs)
    if options.calibration is not None:
        draw = Draw(
            documents=open_documents(options.calibration, options),
            options=options,
            num_sequences=options.calibration_sequences,
            seq_len=options.seq_len,
            seed=options.seed,
            precision="fp32",
        )
        with shown_progress("head, blocks") as progress:
            hessian = head_hessian(source, draw, progress=progress, say=note)
    with shown_progress("pack, tensors") as progress:
        return pack_folder(
            options.model,
            folder,
            groups,
            dtype=options.dtype,
            head=options.head,
            hessian=hessian,
            overwrite=options.overwrite,
            progress=progress,
            say=note,
        )
