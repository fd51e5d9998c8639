"""`castlm cut`: removes channels or heads, which leaves a smaller dense model."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Literal

from castlm.cli.command_line import to_stdout
from castlm.core.errors import InputError
from castlm.data.options import TextOptions
from castlm.fields import Needs, choice, essential, like, option, parsed
from castlm.structured.scores import SCORES
from castlm.structured.units import DEFAULT_SCORE, Units
from castlm.training.options import CheckpointOptions, ModelOptions, RuntimeOptions

_TEXT = Needs("--calibration", lambda command: command.calibration is not None)


@dataclass(frozen=True, kw_only=True)
class _OwnOptions:
    model: str = essential(
        help='Local Hugging Face folder, hub id, GGUF file, or "demo".',
    )

    output_dir: str = essential(
        help="Folder for the smaller model.",
    )

    units: Units = parsed(
        Units("channels", 0.5),
        Units.parse,
        essential=True,
        help="Units, and the share of them that stays: channels:SHARE of the MLPs, or heads:SHARE (KV heads with "
        "their query heads).",
    )

    score: str | None = choice(
        None,
        SCORES,
        essential=True,
        help="Score by which units are ranked: flap (the default of channels), taylor (of heads), or magnitude, "
        "which needs no text.",
    )

    calibration: str | None = essential(
        None,
        help="Calibration text: a file, folder, glob or hub dataset, as --dataset of castlm train.",
    )

    calibration_sequences: int | None = option(
        None,
        at_least=1,
        needs=_TEXT,
        help="Calibration sequences. The default is enough for 32,768 tokens (16 for each input of the widest "
        "layer if that is more), at most 128.",
    )

    seq_len: int = essential(
        0,
        at_least=0,
        needs=_TEXT,
        help="Tokens per calibration sequence. 0 is the model's context length, at most 2,048.",
    )

    seed: int = option(
        0,
        needs=_TEXT,
        help="Seed for drawing calibration sequences.",
    )

    refit: bool = option(
        True,
        needs=_TEXT,
        help="Solve for the kept weights of the output layers by least squares, so that they compensate for the "
        "units that are removed.",
    )

    device: Literal["auto", "cpu", "cuda"] = like(RuntimeOptions, "device")

    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto",
        needs=_TEXT,
        help="Compute type of the passes over the calibration text. auto: bf16 if the hardware multiplies it "
        "faster and the model is not tiny.",
    )

    save_dtype: Literal["source", "fp32", "bf16", "fp16"] = like(CheckpointOptions, "save_dtype")

    overwrite: bool = essential(
        False,
        help="Replace an earlier result in output_dir.",
    )

    revision: str | None = like(ModelOptions, "revision")
    trust_remote_code: bool = like(ModelOptions, "trust_remote_code")


@dataclass(frozen=True, kw_only=True)
class CutCommand(TextOptions, _OwnOptions):
    """Remove MLP channels or attention heads from a model, without training; the result is a smaller dense model.

    The whole model is in memory in fp32. Train the result with castlm train --method dense --teacher MODEL.
    """

    def run(self) -> int:
        import torch

        from castlm.data.documents import open_documents
        from castlm.export.pruned import cut_folder
        from castlm.files.output import check_output
        from castlm.hardware import choose_device
        from castlm.oneshot.draw import Draw
        from castlm.progress import shown_progress

        score = self.score or DEFAULT_SCORE[self.units.kind]
        if SCORES[score].needs_text and self.calibration is None:
            raise InputError(f"score {score} needs a calibration text: give --calibration FILE, or --score magnitude")
        draw = None
        if self.calibration is not None:
            draw = Draw(
                documents=open_documents(self.calibration, self, shown=shown_progress),
                name=self.calibration,
                options=self,
                num_sequences=self.calibration_sequences,
                seq_len=self.seq_len,
                seed=self.seed,
                precision=self.precision,
            )
        inputs = {"model": self.model, "calibration": self.calibration}
        cut = cut_folder(
            self.model,
            check_output(self.output_dir, overwrite=self.overwrite, inputs=inputs),
            self.units,
            score,
            draw=draw,
            refits=self.refit,
            device=torch.device(choose_device(self.device)),
            dtype=self.save_dtype,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            overwrite=self.overwrite,
        )
        changed = [
            f"{name} {old:,} -> {cut.after[name]:,}" for name, old in cut.before.items() if cut.after[name] != old
        ]
        train = (
            f"castlm train --method dense --model {shlex.quote(self.output_dir)} --teacher {shlex.quote(self.model)}"
        )
        to_stdout(f"{self.output_dir}: {', '.join(changed)}; train it with: {train} --dataset TEXT --output-dir RUN")
        return 0
