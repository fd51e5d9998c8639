"""`castlm quantize`: round a model, sparse or dense, to int8, float8, int4 or int3, zeros kept."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Literal

from castlm.api.pack import head_formats
from castlm.cli.options import result_folder, to_stdout
from castlm.core.nm import Pattern
from castlm.data.options import TextOptions
from castlm.fields import Needs, choice, like, number, option, parsed, positional
from castlm.formats.table import rounded_formats
from castlm.patterns import parse_pattern_or_dense
from castlm.training.options import ModelOptions, RuntimeOptions

CALIBRATION = Needs("--calibration, which int4 and int3 read", lambda command: command.reads_text)


@dataclass(frozen=True)
class QuantizeCommand(TextOptions):
    """Round the linear layers of a model to int8, fp8, int4 or int3, and verify the result. Zeros stay.

    One transformer block at a time is in memory, and finished ones are kept in OUTPUT_DIR.partial, so that the same
    command continues after a kill. A model with experts, images, or other tensor names in its files is loaded whole.
    """

    model: str = positional()
    """Hugging Face folder, run of `castlm train`, hub id, GGUF file, or "demo"; n:m or dense."""

    output_dir: str
    """Folder for the quantized model."""

    kind: str = choice("int8", rounded_formats)
    """int8 and fp8 round to the nearest, with one scale per row. int4 and int3 have a scale for every 64 columns of a
    row and round by GPTQ with a calibration text. castlm train --weight-bits 3 loses far less than int3 here.
    """

    packed: bool = False
    """Write codes and scales without zeros, in castlm's packed format (not fp8), instead of a plain model folder.
    """

    head: str | None = choice(None, head_formats)
    """With --packed, int8 also rounds the output head and the embedding, tied or not, with one scale per row."""

    calibration: str | None = None
    """Calibration text: a file, folder, glob or hub dataset, as --dataset of castlm train. int3 needs one; int4 without
    one is rounded to the nearest, which loses more.
    """

    pattern: Pattern | Literal["dense"] | None = parsed(None, parse_pattern_or_dense)
    """n:m of the model, or dense. The default is the pattern in its castlm.json; without one, 2:4 if the first layer
    has it, otherwise dense.
    """

    num_sequences: int = number(64, at_least=1, needs=CALIBRATION)
    """Calibration sequences."""

    seq_len: int = number(512, at_least=1, needs=CALIBRATION)
    """Tokens per calibration sequence, at most the model's context length."""

    seed: int = option(0, needs=CALIBRATION)
    """Seed for drawing calibration sequences."""

    damping: float = number(0.01, at_least=0, at_most=1, needs=CALIBRATION)
    """int4, int3: add this fraction of the mean diagonal to the Hessian."""

    device: Literal["auto", "cpu", "cuda"] = like(RuntimeOptions, "device")

    save_dtype: Literal["source", "fp32", "bf16", "fp16"] = "source"
    """Dtype of the dequantized values in a plain folder. source: the dtype of the stored model."""

    overwrite: bool = False
    """Replace an earlier result in output_dir."""

    trust_remote_code: bool = like(ModelOptions, "trust_remote_code")

    @property
    def reads_text(self) -> bool:
        return self.calibration is not None

    def run(self) -> int:
        from castlm.export.packed import pattern_of
        from castlm.export.quantized import CalibrationOptions, quantize_folder
        from castlm.files.output import check_output
        from castlm.hardware import choose_device
        from castlm.progress import note, shown_progress

        calibration = None
        if self.calibration is not None:
            calibration = CalibrationOptions(self.calibration, self.num_sequences, self.seq_len, self.seed)
        source = result_folder(self.model)
        pattern = pattern_of(source, self.pattern)
        inputs = {"model": source, "calibration": self.calibration}
        folder = check_output(self.output_dir, overwrite=self.overwrite, inputs=inputs)
        with shown_progress(f"{self.kind}, blocks", before=None) as progress:
            report = quantize_folder(
                source,
                folder,
                self.kind,
                pattern=pattern,
                calibration=calibration,
                packed=self.packed,
                head=self.head,
                damping=self.damping,
                options=self,
                dtype=self.save_dtype,
                device=choose_device(self.device),
                trust_remote_code=self.trust_remote_code,
                overwrite=self.overwrite,
                progress=progress,
                say=note,
            )
        for line in report.notes:
            note(line)
        to_stdout(
            f"{folder}: {self.kind} in {len(report.errors)} layers, mean relative error {report.mean_error:.2e}, "
            f"{'dense' if pattern is None else f'{pattern} verified'}; "
            f"measure it with: castlm eval {shlex.quote(str(folder))} --text FILE"
        )
        return 0
