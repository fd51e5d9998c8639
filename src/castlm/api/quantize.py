"""`castlm.quantize`: round a model, sparse or dense, to int8, float8, int4 or int3, zeros kept."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from castlm.api.objects import Objects, Result
from castlm.api.pack import CALIBRATION, HEAD_CHOICES
from castlm.api.signature import with_keywords_of
from castlm.core.errors import InputError
from castlm.core.nm import Pattern
from castlm.data.options import TextOptions
from castlm.facts import Facts
from castlm.fields import Needs, build, choice, like, option, parsed, positional
from castlm.patterns import parse_pattern_or_dense
from castlm.signals import num_ranks
from castlm.training.options import ModelOptions, RuntimeOptions
from castlm_runtime.formats import FORMATS, rounded_formats
from castlm_runtime.reading import user_path

if TYPE_CHECKING:  # they import torch
    from transformers import PreTrainedTokenizerBase

    from castlm.api.objects import Model, Text
    from castlm.oneshot.steps.round import QuantizeReport
    from castlm.training.scales import ScaleTraining

FOLDER = Needs("output_dir", lambda options: options.output_dir is not None)


@dataclass(frozen=True)
class QuantizeOptions(TextOptions):
    """The options of rounding a model."""

    model: str = positional(
        help='Hugging Face folder, run of `castlm train`, hub id, GGUF file, or "demo"; n:m or dense.',
    )

    output_dir: str | None = option(
        None,
        help="Folder for the quantized model.",
    )

    gguf: str | None = option(
        None,
        help="Write this GGUF file, for llama.cpp, Ollama and LM Studio, instead of a folder: int4 as Q4_0, int8 "
        "as Q8_0. The model is a GGUF file too; its metadata, tokenizer, embedding and head stay as they are.",
    )

    kind: str = choice(
        "int8",
        rounded_formats,
        help="int8 and fp8 round to the nearest, with one scale per row. int4 and int3 have a scale for every 64 "
        "columns of a row and round by GPTQ with a calibration text. int3 loses far less with --train-steps, or by "
        "castlm train --weight-bits 3.",
    )

    packed: bool = option(
        False,
        needs=FOLDER,
        help="Write codes and scales without zeros, in castlm's packed format (not fp8), instead of a plain model "
        "folder.",
    )

    head: str | None = choice(
        None,
        HEAD_CHOICES,
        needs=FOLDER,
        help="With --packed, int8 also rounds the output head and the embedding, tied or not, with one scale per "
        "row, int6 and int4 with a scale for every 64 columns, better with a calibration text; source keeps them. "
        "The default is int6 where head and embedding are more than a tenth of the file, otherwise source.",
    )

    calibration: str | None = option(
        None,
        help="Calibration text: a file, folder, glob or hub dataset, as --dataset of castlm train. int3 needs one; "
        "int4 without one is rounded to the nearest, which loses more.",
    )

    pattern: Pattern | Literal["dense"] | None = parsed(
        None,
        parse_pattern_or_dense,
        help="n:m of the model, or dense. The default is the pattern in its castlm.json; without one, 2:4 if the "
        "first layer has it, otherwise dense.",
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

    damping: float = option(
        0.01,
        at_least=0,
        at_most=1,
        needs=CALIBRATION,
        help="int4, int3: add this fraction of the mean diagonal to the Hessian.",
    )

    train_steps: int = option(
        0,
        at_least=0,
        needs=CALIBRATION,
        help="int4, int3: steps in which the scales of the rounded model are trained on the calibration text, by the "
        "KL divergence from the model before the rounding; the codes stay. A step reads one sequence. Both models "
        "must fit in memory.",
    )

    learning_rate: float = option(
        1e-2,
        above=0,
        needs=Needs("train_steps above 0", lambda options: options.train_steps > 0),
        help="Peak learning rate of the logarithm of a scale.",
    )

    device: Literal["auto", "cpu", "cuda"] = like(RuntimeOptions, "device")

    save_dtype: Literal["source", "fp32", "bf16", "fp16"] = option(
        "source",
        needs=FOLDER,
        help="Dtype of the dequantized values in a plain folder. source: the dtype of the stored model.",
    )

    overwrite: bool = option(
        False,
        help="Replace an earlier result in output_dir, or the file of --gguf.",
    )

    trust_remote_code: bool = like(ModelOptions, "trust_remote_code")

    @property
    def reads_text(self) -> bool:
        return self.calibration is not None


@with_keywords_of(QuantizeOptions)
def quantize(
    model: Model,
    text: Text | None = None,
    *,
    kind: str = "int8",
    output_dir: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> Result:
    """Rounds the linear layers of a model to int8, fp8, int4 or int3, and verifies the result. Zeros stay.

    Args:
        model: a Hugging Face folder, a run of `train`, a hub id, a GGUF file, or "demo"; a `PreTrainedModel`, or the
            result of another call; n:m or dense.
        text: the calibration text of int4 and int3: a file, folder, glob or hub dataset, a list of texts, a
            `datasets.Dataset`, or any other iterable of documents.
        kind: "int8" and "fp8" round to the nearest, "int4" and "int3" by GPTQ.
        output_dir: the folder of the rounded model; without it and the option `gguf`, the result is a model in memory.
        tokenizer: of a model in memory; by default the one where it was loaded from.
        options: as of `castlm quantize`: `packed`, `head`, `pattern`, `calibration_sequences`, `seq_len` and others.

    Returns:
        The result, whose `report` has codes, scales and errors by layer. With `packed=True` castlm's kernels run its
        `model`.

    Raises:
        InputError: an option out of range, a model without its pattern, or a text that is missing or has no use.

    Examples:
        >>> import castlm
        >>> rounded = castlm.quantize("run", "text.txt", kind="int4", output_dir="small", packed=True)  # doctest: +SKIP
    """
    with Objects(output_dir) as given:
        values = {"kind": kind, "output_dir": None if options.get("gguf") else given.output_dir, **options}
        values |= {"model": given.model(model, tokenizer), "calibration": given.text(text)}
        chosen = build(QuantizeOptions, {name: value for name, value in values.items() if value is not None})
        _, report = run_quantize(chosen)
        if chosen.gguf is not None:
            return Result(Path(chosen.gguf), Facts(pattern=None, left_dense={}, quantized=report.facts()), report)
        return given.result(str(chosen.output_dir), report=report, unpack=not chosen.packed)


def run_quantize(options: QuantizeOptions) -> tuple[Pattern | None, QuantizeReport]:
    """`quantize` with converted options; returns the pattern that was verified, and the report."""
    from castlm.data.documents import open_documents
    from castlm.export.gguf import ROUNDED_TO, gguf_source
    from castlm.export.packed import pattern_of
    from castlm.export.quantized import check_text, quantize_folder
    from castlm.files.output import check_beside, check_output
    from castlm.hardware import choose_device
    from castlm.models.locate import result_folder
    from castlm.oneshot.draw import Draw
    from castlm.progress import note, shown_progress

    if (options.output_dir is None) == (options.gguf is None):
        raise InputError("quantize writes a folder or a GGUF file: pass --output-dir FOLDER or --gguf FILE")
    kind = options.kind if options.gguf is None else ROUNDED_TO.get(options.kind, options.kind)
    if line := check_text(kind, options.head, options.calibration is not None, options.packed):
        note(line)
    draw = None
    if options.calibration is not None:
        draw = Draw(
            documents=open_documents(options.calibration, options),
            name=options.calibration,
            options=options,
            num_sequences=options.calibration_sequences,
            seq_len=options.seq_len,
            seed=options.seed,
            precision="fp32",
        )
    source = result_folder(options.model)
    if options.gguf is not None:
        output = Path(os.path.realpath(user_path(options.gguf)))
        gguf_source(source, options.kind, output, options.overwrite)
        check_beside(output)
    pattern = pattern_of(source, options.pattern)
    training = _scale_training(options, kind, source)
    if options.output_dir is not None:
        inputs = {"model": source, "calibration": options.calibration}
        output = check_output(options.output_dir, overwrite=options.overwrite, inputs=inputs)
    with shown_progress(f"{options.kind}, blocks", before=None) as progress:
        report = quantize_folder(
            source,
            output,
            kind,
            pattern=pattern,
            draw=draw,
            packed=options.packed,
            gguf=options.gguf is not None,
            head=options.head,
            damping=options.damping,
            train=training,
            train_steps=options.train_steps or None,
            options=options,
            dtype=options.save_dtype,
            device=choose_device(options.device),
            trust_remote_code=options.trust_remote_code,
            overwrite=options.overwrite,
            progress=progress,
            say=note,
        )
    return pattern, report


def _scale_training(options: QuantizeOptions, kind: str, teacher: str) -> ScaleTraining | None:
    """The training of the scales that `train_steps` asks for; None without."""
    if not options.train_steps:
        return None
    from castlm.progress import note
    from castlm.training.scales import ScaleTraining

    steps = f"--train-steps {options.train_steps}"
    if not FORMATS[kind].reads_text:
        raise InputError(f"{steps} is for int4 and int3: {kind} loses too little to gain by it; leave it out")
    if num_ranks() > 1:
        raise InputError(f"{steps} is for one rank: run castlm quantize without torchrun")
    assert options.calibration is not None  # `train_steps` needs it
    training = ScaleTraining(
        teacher,
        options.calibration,
        options.train_steps,
        kind,
        learning_rate=options.learning_rate,
        seq_len=options.seq_len,
        seed=options.seed,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
        of_text=options,
        restart=options.overwrite,
        say=note,
    )
    training.check()
    return training
