"""`castlm advise`: recommends a format for a model on this CPU or a GPU, and compares finished results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castlm.cli.options import check_json_path, refuse_given, result_folder, to_stdout, write_json
from castlm.core.errors import InputError
from castlm.core.nm import NM, Pattern
from castlm.fields import like, number, parsed, positional
from castlm.files.reading import read_json_object
from castlm.patterns import parse_pattern
from castlm.training.options import ModelOptions

if TYPE_CHECKING:
    from castlm.lab.advice.cpu import Quality


@dataclass
class AdviseCommand:
    """Show the speed and size of a model in every format, dense and n:m, and which to use for what.

    On this CPU every format is timed, in about a minute. A GPU is estimated, or timed where it is at hand.
    """

    model: str = positional()
    """Local Hugging Face folder, run of `castlm train`, hub id, GGUF file, or "demo"; only its config is read."""

    tokens: int = number(0, at_least=0)
    """Rows of a layer's input: the batch size when decoding, or all prompt tokens in prefill. 0 takes 1, 8 and 512 on a
    CPU, and 1 on a GPU.
    """

    dtype: str = "bf16"
    """Dtype in which the model is served now: bf16, fp16, fp32, and on some GPUs int8 or fp8. Speeds are relative to
    it.
    """

    device: str = "this"
    """"this" times the GPU or CPU of this machine. A name such as h100, a100-40gb, l40s or rtx4090 estimates that GPU
    (an unknown name lists all).
    """

    pattern: Pattern = parsed(NM(2, 4), parse_pattern)
    """n:m (2:4 on a GPU), or a structured pattern such as channels:0.5. The advice is then for the smaller, cut model,
    and compares its speed with the whole model.
    """

    law: str | None = None
    """Scaling law of `castlm plan fit --json`, which predicts the perplexity of n:m after train_tokens."""

    train_tokens: float | None = number(None, above=0)
    """Training tokens for which the law predicts."""

    results: tuple[str, ...] = ()
    """Runs of `castlm train`, or their model folders, to compare with the dense model at equal perplexity: bytes, and
    decoding speed on this CPU in bf16. All must be evaluated on the same text.
    """

    json: str | None = None
    """File for the advice as JSON; "-" prints it instead of the table."""

    trust_remote_code: bool = like(ModelOptions, "trust_remote_code")

    def run(self) -> int:
        check_json_path(self.json)
        report, advice = self._of_results() if self.results else self._of_formats()
        write_json(self.json, report)
        if self.json != "-":
            to_stdout(advice, keep="\n")
        return 0

    def _of_results(self) -> tuple[dict[str, Any], str]:
        """The comparison of finished results, as a report and as text."""
        from castlm.lab.compare.tradeoff import as_dict, candidates, measure, text
        from castlm.progress import note
        from castlm.runtime.native import built

        refuse_given(self, _OF_ADVICE, "is not for --results, which decodes one sequence in bf16 here: leave it out")
        built()
        chosen = candidates(self.model, [result_folder(path) for path in self.results])
        report = as_dict(measure(chosen, note))
        return report, text(report)

    def _of_formats(self) -> tuple[dict[str, Any], str]:
        """The advice for this CPU or a GPU, as a report and as text."""
        from castlm.lab.advice.gpu import this_gpu

        cut = None if self.pattern.cut_out is None else self.pattern
        if (self.law is None) != (self.train_tokens is None):
            raise InputError("give both --law and --train-tokens, or neither")
        if cut is None and not isinstance(self.pattern, NM):
            raise InputError(f"pattern {self.pattern}: advise knows n:m, and channels and heads that are cut out")
        is_on_gpu = self.device != "this" or this_gpu() is not None
        return self._on_gpu(cut) if is_on_gpu else self._on_cpu(cut)

    def _on_cpu(self, cut: Pattern | None) -> tuple[dict[str, Any], str]:
        from castlm.lab.advice.cpu import SECONDS, WORKLOADS, check_can_time, rank, shapes_of
        from castlm.progress import note, shown_progress

        check_can_time(self.dtype)
        name = result_folder(self.model)
        shapes, quality = shapes_of(name, self.trust_remote_code, cut), self._quality(name)
        workloads = {f"{self.tokens} tokens": self.tokens} if self.tokens else WORKLOADS
        num_shapes = len(shapes.blocks) + (shapes.head is not None)
        expected = 1.5 * SECONDS * (1 if cut is None else 2)
        note(f"timing {num_shapes} layer shapes in every format takes about {expected:.0f} s")
        with shown_progress("advise, layer shapes") as progress:
            options = {"dtype": self.dtype, "workloads": workloads, "progress": progress}
            found = rank(
                shapes,
                pattern=self.pattern if isinstance(self.pattern, NM) else None,
                quality=quality,
                **options,
            )
            report, lines = found.as_dict(), [found.text()]
            if cut is not None:
                whole = rank(shapes_of(name, self.trust_remote_code), pattern=None, **options)
                speeds = {w: whole.base.seconds[w] / found.base.seconds[w] for w in workloads}
                report |= {"pattern": str(cut), "cut_speedup": speeds}
                said = ", ".join(f"{speed:.2f} for {workload}" for workload, speed in speeds.items())
                lines.append(f"{cut}: dense in {self.dtype}, times as fast as the whole model: {said}")
        return report, "\n".join(lines)

    def _quality(self, name: str) -> Quality:
        """The figures of the result in the folder `name`, if it has this pattern; n:m by the law if there is one."""
        from castlm.export.folder import read_manifest
        from castlm.lab.advice.cpu import Quality
        from castlm.lab.planning.law import Law, predict_perplexity
        from castlm.training.record import final_perplexity

        pattern = self.pattern
        record = read_manifest(Path(name)) if Path(name).is_dir() else {}
        found = record.get("perplexity")
        is_ours = record.get("pattern") == str(pattern) and "rounded" not in record  # else of rounded weights
        found = found if isinstance(found, dict) and is_ours else {}
        if self.law is None:
            return Quality(found.get("dense"), final_perplexity(found), "measured by its run")
        law = Law.from_dict(read_json_object(Path(self.law)))
        of = law.runs_of.get("pattern", str(pattern))
        if of != str(pattern):
            raise InputError(f"{self.law} is the law of {of}, and --pattern is {pattern}: give the one or the other")
        at = predict_perplexity(law, self.train_tokens)
        interval = f"90 %: {at.low:.2f} to {at.high:.2f}"
        source = f"{pattern} predicted by {self.law} for {at.tokens:.3g} training tokens ({interval})"
        return Quality(found.get("dense"), at.perplexity, source)

    def _on_gpu(self, cut: Pattern | None) -> tuple[dict[str, Any], str]:
        from castlm.devices import find_device
        from castlm.lab.advice.cpu import shapes_of
        from castlm.lab.advice.gpu import gpu_timer, this_gpu
        from castlm.lab.advice.roofline import advise

        if cut is None and self.pattern != NM(2, 4):
            raise InputError(f"pattern {self.pattern}: GPUs have hardware for 2:4 alone")
        device = this_gpu() if self.device == "this" else find_device(self.device)
        assert device is not None
        name = result_folder(self.model)
        options: dict[str, Any] = {"tokens": self.tokens or 1, "dtype": self.dtype}
        if self.device == "this":
            options["seconds"] = gpu_timer(self.dtype)
        found = advise(shapes_of(name, self.trust_remote_code, cut), device, **options)
        report, lines = found.as_dict(), [found.text()]
        if cut is not None:
            whole = advise(shapes_of(name, self.trust_remote_code), device, **options)
            before, after = whole.totals[self.dtype], found.totals[self.dtype]
            report |= {"pattern": str(cut), "seconds_before_cut": before, "cut_speedup": before / after}
            lines.append(
                f"{cut}: dense in {self.dtype}, the layers and the head that are left are {before / after:.2f} "
                "times as fast as those of the whole model"
            )
        return report, "\n".join(lines)


_OF_ADVICE = ("tokens", "dtype", "device", "pattern", "law", "train_tokens", "trust_remote_code")
