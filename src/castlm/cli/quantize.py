"""`castlm quantize`: round a model, sparse or dense, to int8, float8 or int4, zeros kept."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Literal

from castlm.cli.options import parse, refuse_given, result_folder
from castlm.fields import positional

_OF_INT4 = ("column", "num_sequences", "seq_len", "seed", "damping")


@dataclass
class QuantizeCommand:
    """Round the linear layers of a model to int8, fp8 or int4, keep every zero of an n:m one, and verify the result."""

    model: str = positional()
    """Hugging Face folder, run of `castlm train`, hub id, GGUF file, or "demo"; n:m or dense."""

    output_dir: str
    """Folder for the quantized model."""

    kind: Literal["int8", "fp8", "int4"] = "int8"
    """int8 and fp8 round each row to the nearest; int4 rounds groups of 64 columns by GPTQ with a calibration text."""

    packed: bool = False
    """Write int8 or int4 in the packed format, codes and scales without the zeros, in place of a plain model folder."""

    head: Literal["int8"] | None = None
    """With --packed: int8 rounds the output head, and an embedding tied to it, to int8 with a scale for each row."""

    calibration: str | None = None
    """Text for int4: a file, folder, glob or hub dataset, as --dataset of castlm train."""

    column: str | None = None
    """Column of .jsonl and .parquet that holds the text, or messages, which the chat template renders. By default it is
    found."""

    chat_template_path: str | None = None
    """File with a Jinja chat template to use, and to save, in place of the tokenizer's own."""

    pattern: str | None = None
    """n:m of the model, or dense; by default that of its castlm.json, else 2:4 if its first layer is, else dense."""

    num_sequences: int = field(default=64, metadata={"at_least": 1})
    """Calibration sequences."""

    seq_len: int = field(default=512, metadata={"at_least": 1})
    """Their length in tokens, at most the model's context."""

    seed: int = 0
    """Seed of the draw of calibration sequences."""

    damping: float = 0.01
    """int4: share of the mean diagonal that is added to the Hessian."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses CUDA if there is a GPU."""

    save_dtype: Literal["source", "fp32", "bf16", "fp16"] = "source"
    """What the dequantized values are written in; source: what the model is stored in."""

    overwrite: bool = False
    """Replace what output_dir holds."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    def run(self) -> int:
        from castlm.export.packed import pattern_of
        from castlm.export.quantized import CalibrationText, quantize_folder
        from castlm.files.output import check_output
        from castlm.hardware import choose_device, keep_freed_memory
        from castlm.oneshot.options import check_damping
        from castlm.oneshot.report import few_experts_note
        from castlm.progress import note, shown_progress

        keep_freed_memory()
        check_damping(self.damping)
        calibration = None
        if self.calibration is None:
            refuse_given(self, _OF_INT4, "is for int4, which reads a --calibration text: leave it out")
        else:
            drawn = self.num_sequences, self.seq_len, self.seed
            calibration = CalibrationText(self.calibration, self.column, *drawn)
        source = result_folder(self.model)
        pattern = pattern_of(source, self.pattern)
        inputs = {"model": source, "calibration": self.calibration}
        folder = check_output(self.output_dir, overwrite=self.overwrite, inputs=inputs)
        with shown_progress(f"{self.kind}, {'blocks' if calibration else 'layers'}") as progress:
            report = quantize_folder(
                source,
                folder,
                self.kind,
                pattern=pattern,
                calibration=calibration,
                packed=self.packed,
                head=self.head,
                damping=self.damping,
                chat_template_path=self.chat_template_path,
                dtype=self.save_dtype,
                device=choose_device(self.device),
                trust_remote_code=self.trust_remote_code,
                progress=progress,
                say=note,
            )
        if report.few_experts:
            note(few_experts_note(report.few_experts))
        print(
            f"{folder}: {self.kind} in {len(report.layers)} layers, mean relative error {report.mean_error:.2e}, "
            f"{'dense' if pattern is None else f'{pattern} verified'}; "
            f"measure it with: castlm eval {shlex.quote(str(folder))} --text FILE"
        )
        return 0


def main(arguments: list[str]) -> int:
    return int(parse(QuantizeCommand, arguments, "quantize").run())
