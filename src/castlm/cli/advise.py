"""`castlm advise` recommends a format for a model on this machine, or a recipe for a size; `castlm shrink` runs it."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from castlm.cli.command_line import check_json_path, result_folder, to_stdout, write_json
from castlm.core.errors import InputError
from castlm.core.nm import NM, Pattern
from castlm.fields import Needs, like, option, parsed, positional
from castlm.patterns import parse_pattern
from castlm.training.options import ModelOptions
from castlm_runtime.reading import read_json_object

if TYPE_CHECKING:
    from castlm.lab.advice.cpu import Quality
    from castlm.lab.advice.recipes import Choice


def parse_factor(text: Any) -> float:
    """A perplexity in units of the dense model's: "1.2x" is 1.2."""
    try:
        factor = float(str(text).removesuffix("x"))
    except ValueError:
        factor = 0.0
    if not 1 < factor < math.inf:
        raise InputError(f"perplexity_at_most {text!r}: give a factor above 1 of the dense model's, such as 1.2x")
    return factor


@dataclass(kw_only=True)
class LimitOptions:
    """The limits that a recipe keeps."""

    megabytes: float | None = option(
        None,
        above=0,
        help="The most MB of the packed weights. The recipe of least perplexity is chosen.",
    )

    perplexity_at_most: float | None = parsed(
        None,
        parse_factor,
        help="The most perplexity as a factor of the dense model's, such as 1.2x. Alone, it chooses the smallest "
        "model.",
    )

    tokens_per_second: float | None = option(
        None,
        above=0,
        help="The least speed of decoding one sequence on this CPU, by the linear layers alone, which are timed.",
    )

    @property
    def has_limits(self) -> bool:
        return (self.megabytes, self.perplexity_at_most, self.tokens_per_second) != (None, None, None)

    def choose(self, model: str, trust_remote_code: bool, is_timed: bool) -> Choice:
        """The best recipe for a model. Speeds are timed if asked for, or if they are limited."""
        from castlm.lab.advice.cpu import SECONDS, check_can_time, shapes_of
        from castlm.lab.advice.recipes import choose
        from castlm.progress import shown_progress

        is_timed = is_timed or self.tokens_per_second is not None
        if is_timed:
            check_can_time("bf16")
        with shown_progress("layer shapes timed") as progress:
            return choose(
                shapes_of(model, trust_remote_code),
                megabytes=self.megabytes,
                factor=self.perplexity_at_most,
                tokens_per_second=self.tokens_per_second,
                seconds=SECONDS if is_timed else None,
                progress=progress,
            )


@dataclass
class AdviseCommand(LimitOptions):
    """Show the speed and size of a model in every format, dense and n:m, and which to use for what.

    On a CPU every format is timed, in about a minute; on an NVIDIA GPU each layer is timed dense and 2:4. With
    --megabytes, --perplexity-at-most or --tokens-per-second, show the best recipe for that on a CPU, as commands.
    """

    model: str = positional(
        help='Local Hugging Face folder, run of `castlm train`, hub id, GGUF file, or "demo"; only its config is read.',
    )

    tokens: int = option(
        0,
        at_least=0,
        help="Tokens that a layer computes at once: the batch size in decoding, or all tokens of a prompt. 0 times "
        "1, 8 and 512 on a CPU, and 1 on a GPU.",
    )

    dtype: Literal["bf16", "fp16", "fp32"] = option(
        "bf16",
        help="Dtype in which the model is served now, on a GPU bf16 or fp16. Speeds are relative to it.",
    )

    device: Literal["auto", "cpu", "cuda"] = option(
        "auto",
        help="Device to time; auto takes the GPU if there is one.",
    )

    pattern: Pattern | None = parsed(
        None,
        parse_pattern,
        help="n:m. The default is the pattern of MODEL, if castlm made it. For a dense model it is 2:4, and on a "
        "CPU also two patterns that keep half in longer groups: the longest that all layers allow, such as 32:64, "
        "and the longest that this processor takes nearly as fast as 2:4, which is 8:16 with AVX2.",
    )

    law: str | None = option(
        None,
        needs=Needs("a CPU, where perplexity is shown", lambda command: not command.is_on_gpu),
        help="Scaling law of `castlm plan fit --json`, which predicts the perplexity of n:m after train_tokens.",
    )

    train_tokens: float | None = option(
        None,
        above=0,
        needs=Needs("--law", lambda command: command.law is not None),
        help="Training tokens for which the law predicts.",
    )

    json: str | None = option(
        None,
        help='File for the advice as JSON; "-" prints it instead of the table.',
    )

    trust_remote_code: bool = like(ModelOptions, "trust_remote_code")

    @property
    def is_on_gpu(self) -> bool:
        from castlm.hardware import choose_device

        return choose_device(self.device) == "cuda"

    def run(self) -> int:
        check_json_path(self.json)
        if self.law is not None and self.train_tokens is None:
            raise InputError("--law predicts for a number of training tokens: give --train-tokens too")
        if not isinstance(self.pattern, NM | None):
            raise InputError(f"pattern {self.pattern}: advise knows n:m alone")
        if self.has_limits:
            return self._recipe()
        report, advice = self._on_gpu() if self.is_on_gpu else self._on_cpu()
        write_json(self.json, report)
        if self.json != "-":
            to_stdout(advice, keep="\n")
        return 0

    def _recipe(self) -> int:
        name = result_folder(self.model)
        choice = self.choose(name, self.trust_remote_code, is_timed=True)
        commands = choice.commands(self.model, "TEXT", "FOLDER")
        write_json(self.json, choice.as_dict(commands))
        if self.json != "-":
            to_stdout(choice.text(commands), keep="\n")
        return 0

    def _on_cpu(self) -> tuple[dict[str, Any], str]:
        from castlm.lab.advice.cpu import SECONDS, WORKLOADS, check_can_time, patterns_for, rank, shapes_of
        from castlm.models.locate import gguf_bytes
        from castlm.progress import note, shown_progress

        check_can_time(self.dtype)
        name = result_folder(self.model)
        shapes, quality = shapes_of(name, self.trust_remote_code), self._quality(name)
        pattern = self.pattern or quality.pattern
        patterns = [pattern] if isinstance(pattern, NM) else patterns_for(shapes)
        workloads = {f"{self.tokens} tokens": self.tokens} if self.tokens else WORKLOADS
        num_shapes = len(shapes.blocks) + (shapes.head is not None)
        note(f"timing {num_shapes} layer shapes in every format takes about {1.5 * SECONDS:.0f} s")
        with shown_progress("advise, layer shapes") as progress:
            advice = rank(
                shapes,
                patterns=patterns,
                quality=quality,
                file_bytes=gguf_bytes(name),
                dtype=self.dtype,
                workloads=workloads,
                progress=progress,
            )
        return advice.as_dict(), advice.text()

    def _quality(self, name: str) -> Quality:
        """The perplexities of the result in the folder `name`, if it has the pattern that was asked for.

        With a law, the perplexity of the sparse model is the law's prediction.
        """
        from castlm.export.folder import read_facts, recorded_pattern
        from castlm.facts import Perplexities
        from castlm.lab.advice.cpu import Quality
        from castlm.lab.planning.law import Law, predict_perplexity

        facts = read_facts(Path(name))
        measured, pattern = facts.perplexity, recorded_pattern(facts)
        is_known = measured.known() and pattern is not None and facts.rounded is None  # else of rounded weights
        if not is_known or self.pattern not in (None, pattern):
            measured, pattern = Perplexities(), None
        if self.law is None:
            return Quality(measured.dense, measured.final, "measured by its run", pattern)
        law = Law.from_dict(read_json_object(Path(self.law)))
        law_pattern = parse_pattern(law.runs_of.get("pattern", "2:4"))
        if self.pattern not in (None, law_pattern):
            raise InputError(
                f"{self.law} is the law of {law_pattern}, and --pattern is {self.pattern}: give the one or the other"
            )
        assert self.train_tokens is not None  # checked in `run`
        predicted = predict_perplexity(law, self.train_tokens)
        interval = f"90 %: {predicted.low:.2f} to {predicted.high:.2f}"
        source = f"{law_pattern} predicted by {self.law} for {predicted.tokens:.3g} training tokens ({interval})"
        return Quality(measured.dense, predicted.perplexity, source, law_pattern)

    def _on_gpu(self) -> tuple[dict[str, Any], str]:
        from castlm.lab.advice.cpu import shapes_of
        from castlm.lab.advice.gpu import advise_on_gpu

        if self.pattern not in (None, NM(2, 4)):
            raise InputError(f"pattern {self.pattern}: GPUs have hardware for 2:4 alone")
        shapes = shapes_of(result_folder(self.model), self.trust_remote_code)
        found = advise_on_gpu(shapes, tokens=self.tokens or 1, dtype=self.dtype)
        return found.as_dict(), found.text()


@dataclass
class ShrinkCommand(LimitOptions):
    """Make a model small by the best recipe for a size: train it if the recipe does, and pack it for castlm's CPU
    kernels.

    OUTPUT_DIR/packed is the result, and OUTPUT_DIR/run the run of castlm train with its page. The commands are printed
    before they run; the same command with --resume continues after a stop.
    """

    model: str = positional(
        help='Local Hugging Face folder, hub id, GGUF file, or "demo"; dense.',
    )

    dataset: str = positional(
        help="Text to train on: a file, folder, glob or hub dataset, as --dataset of castlm train.",
    )

    output_dir: str = option(
        help="Folder of the run and of the packed model.",
    )

    max_steps: int = option(
        100,
        at_least=1,
        help="Steps of training. The expected perplexity is that of 100 steps of 512 tokens.",
    )

    seq_len: int = option(
        512,
        at_least=1,
        help="Tokens of a step, which is one sequence.",
    )

    resume: bool = option(
        False,
        help="Continue where an earlier start with the same options stopped.",
    )

    trust_remote_code: bool = like(ModelOptions, "trust_remote_code")

    def run(self) -> int:
        from castlm.cli.main import main
        from castlm.progress import note

        if not self.has_limits:
            raise InputError("no size: give --megabytes, --perplexity-at-most or --tokens-per-second")
        folder = Path(self.output_dir).expanduser()
        if folder.exists() and not self.resume:
            raise InputError(f"output_dir {folder} exists: name another one, or continue with --resume")
        choice = self.choose(result_folder(self.model), self.trust_remote_code, is_timed=False)
        commands = choice.commands(self.model, self.dataset, str(folder), self.max_steps, self.seq_len)
        to_stdout(choice.text(commands), keep="\n")
        for words in commands:
            made = folder / ("run" if words[0] == "train" else "packed")
            if made.exists() and words[0] != "train":
                continue
            remote = ["--trust-remote-code"] if self.trust_remote_code and self.model in words else []
            resumed = ["--resume"] if made.exists() else []
            note(shlex.join(["castlm", *words]))
            if code := main([*words, *remote, *resumed]):
                return code
        return 0
