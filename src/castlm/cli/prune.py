"""`castlm prune`: one-shot pruning without training."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields
from typing import Literal

from castlm.cli.options import read_arguments, refuse_given, to_stdout
from castlm.core.errors import InputError
from castlm.core.nm import Pattern
from castlm.data.options import TextOptions
from castlm.fields import COMMAND_LINE, build, choice, essential, like, number
from castlm.oneshot.options import EFFORTS, BasisOptions, EffortOptions, Refinements, with_effort
from castlm.patterns import all_solvers
from castlm.training.options import CheckpointOptions, ModelOptions, RuntimeOptions

_OF_CALIBRATION = ("calibration", "precision", *(option.name for option in fields(TextOptions)))


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """The model, the pattern, the solver and the calibration text."""

    model: str = essential()
    """Local Hugging Face folder, hub id, GGUF file, or "demo"."""

    output_dir: str = essential()
    """Folder for the pruned model."""

    method: str | None = choice(None, all_solvers, essential=True)
    """Solver that chooses the masked weights: sparsegpt (the default; it also updates the kept ones), wanda, magnitude.
    Structured patterns rank their units by flap (the default of channels), taylor (of heads) or magnitude."""

    calibration: str | None = essential(None)
    """Calibration text, for all methods except magnitude: a file, folder, glob or hub dataset, as --dataset
    of castlm train.
    """

    pattern: Pattern = like(ModelOptions, "pattern", essential=True)
    num_sequences: int | None = number(None, at_least=1)
    """Calibration sequences. The default is enough for 32,768 tokens (16 for each input of the widest layer if that is
    more), at most 128, and a quarter for a quick start."""

    seq_len: int = essential(0, at_least=0)
    """Tokens per calibration sequence. 0 is the model's context length, at most 2,048."""

    seed: int = 0
    """Seed for drawing calibration sequences."""

    device: Literal["auto", "cpu", "cuda"] = like(RuntimeOptions, "device")

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute type of the passes over the calibration text; solvers compute in fp32. auto: bf16 if the hardware
    multiplies it faster and the model is not tiny.
    """

    memory: Literal["auto", "model", "block"] = essential("auto")
    """Keep the whole model in memory in fp32, or one transformer block at a time; the result is the same. auto: block
    if the model does not fit, in GPU memory if there is a GPU.
    """

    save_dtype: Literal["source", "fp32", "bf16", "fp16"] = like(CheckpointOptions, "save_dtype")

    overwrite: bool = essential(False)
    """Replace an earlier result in output_dir."""

    revision: str | None = like(ModelOptions, "revision")
    trust_remote_code: bool = like(ModelOptions, "trust_remote_code")


@dataclass(frozen=True, kw_only=True)
class PruneCommand(
    Refinements, BasisOptions, EffortOptions, TextOptions, PruneOptions
):  # the last base's fields come first
    """Prune a model one-shot, without training, and verify the result.

    Finished transformer blocks are kept in OUTPUT_DIR.partial, so that the same command continues after a kill.
    """

    def run(self) -> int:
        from castlm.data.documents import open_documents
        from castlm.files.output import check_output
        from castlm.hardware import choose_device
        from castlm.models.locate import local_folder
        from castlm.oneshot.prune import Prune, choose_memory
        from castlm.oneshot.start import Start

        pattern = self.pattern
        if self.memory == "block":
            local_folder(self.model)
        device = choose_device(self.device)
        method = self.method or pattern.default_solver
        if method == "magnitude" and self.rotate in ("values", "residual"):
            raise InputError(f"rotate {self.rotate} needs a calibration text: use method sparsegpt or wanda")
        needs_text = method != "magnitude"
        refits = pattern.cut_out is not None  # the rest of a layer, on a text, after its units are removed
        if needs_text and self.calibration is None:
            raise InputError(
                f"method {method} needs a calibration text: give --calibration FILE, or --method magnitude"
            )
        if not needs_text and not refits:
            why = f"is for a method that reads a text, and {method} reads none: leave it out, or use wanda or sparsegpt"
            refuse_given(self, _OF_CALIBRATION, why)
        text = None if self.calibration is None else open_documents(self.calibration, self)
        start = Start.of(self, method, pattern, seed=self.seed)
        inputs = {"model": self.model, "calibration": self.calibration}
        folder = check_output(self.output_dir, overwrite=self.overwrite, inputs=inputs)
        memory = self.memory
        if memory == "auto":
            memory = choose_memory(self.model, self.revision, folder, pattern, device)
        prune = Prune(
            model=self.model,
            start=start,
            text=text,
            text_name=self.calibration,
            num_sequences=self.num_sequences,
            seq_len=self.seq_len,
            effort=EFFORTS[self.start_effort],
            device=device,
            memory=memory,
            precision=self.precision,
            save_dtype=self.save_dtype,
            options=self,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            overwrite=self.overwrite,
        )
        report = prune.run(folder)
        for line in report.notes():
            to_stdout(line)
        measure = f"castlm eval {shlex.quote(str(folder))} --text FILE"
        to_stdout(f"{folder}: {pattern} by {method}, verified; measure it with: {measure}")
        return 0


def main(arguments: list[str]) -> int:
    given = read_arguments([("options", PruneCommand)], arguments, "prune", about=PruneCommand)
    return build(PruneCommand, with_effort(given), COMMAND_LINE).run()
