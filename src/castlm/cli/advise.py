"""`castlm advise`: whether 2:4 pays off for a model on a device, and which of finished results does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from castlm.cli.json_report import check_json_path
from castlm.cli.options import parse, refuse_given, result_folder, write_json
from castlm.core.errors import InputError
from castlm.core.pattern import NM, Pattern
from castlm.fields import positional

if TYPE_CHECKING:
    from typing import Any

    from castlm.inference.advise import Advice
    from castlm.inference.devices import Device
    from castlm.inference.this_device import CpuTimer, GpuTimer


@dataclass
class AdviseCommand:
    """Say which layers of a model should be dense, 2:4 or something else on a device, before anything is trained."""

    model: str = positional()
    """Local Hugging Face folder, run of `castlm train`, hub id, GGUF file, or "demo"; only its config is read."""

    tokens: int = field(default=1, metadata={"at_least": 1})
    """Rows that a layer sees at once: the batch size in decode, the tokens of all prompts in prefill."""

    dtype: Literal["bf16", "fp16", "fp32", "int8", "fp8"] = "bf16"
    """What the model is served in now; every format is compared with it."""

    device: str = "this"
    """A GPU such as h100, a100-40gb, l40s or rtx4090 (an unknown name lists all), or "this" for the one at hand."""

    measure: bool = False
    """Time the layers on the device at hand instead of estimating them."""

    pattern: str = "2:4"
    """2:4, or channels and heads that are cut out, as channels:0.5: the advice is then on the smaller model, with its
    speed beside that of the whole one."""

    results: tuple[str, ...] = ()
    """Runs of `castlm train`, or their model folders: compare them and the dense model at equal perplexity, by bytes
    and decoding speed measured on this CPU in bf16. Their perplexities must be of the same text."""

    json: str | None = None
    """Write the advice there; "-" prints it instead of the table."""

    trust_remote_code: bool = False
    """Run Python code that comes with a hub model."""

    def run(self) -> int:
        from castlm.export.cut_sizes import cut_pattern
        from castlm.inference.devices import find_device

        check_json_path(self.json, result_folder(self.model), *self.results)
        if self.results:
            return self._compare_results()
        pattern = Pattern.parse(self.pattern)
        cut = None if cut_pattern(pattern) is None else pattern
        if cut is None and pattern != NM(2, 4):
            raise InputError(f"pattern {pattern}: advise knows 2:4, and channels and heads that are cut out")
        timer: CpuTimer | GpuTimer | None = None
        if self.device == "this":
            device, timer = self._this_device()
        elif self.measure:
            raise InputError(f"--measure times the device at hand: leave out --device {self.device}")
        else:
            device = find_device(self.device)
        found = self._advise(device, timer, cut)
        report, lines = found.as_dict(), [found.text()]
        if cut is not None:
            before, after = (advice.totals[self.dtype] for advice in (self._advise(device, timer, None), found))
            report |= {"pattern": self.pattern, "seconds_before_cut": before, "cut_speedup": before / after}
            lines.append(
                f"{pattern}: dense in {self.dtype}, the layers and the head that are left are {before / after:.2f} "
                "times as fast as those of the whole model"
            )
        return self._show(report, "\n".join(lines))

    def _show(self, report: dict[str, Any], text: str) -> int:
        write_json(self.json, report)
        if self.json != "-":
            print(text)
        return 0

    def _compare_results(self) -> int:
        from castlm.compare.tradeoff import as_dict, candidates, measure, text
        from castlm.inference.native import check_built
        from castlm.progress import note

        refuse_given(self, _ADVICE, "is not for --results, which decodes one sequence in bf16 here: leave it out")
        check_built()
        chosen = candidates(self.model, [result_folder(path) for path in self.results])
        report = as_dict(measure(chosen, note))
        return self._show(report, text(report))

    def _advise(self, device: Device, timer: CpuTimer | GpuTimer | None, cut: Pattern | None) -> Advice:
        from castlm.inference.advise import advise, shapes_of

        return advise(
            shapes_of(result_folder(self.model), self.trust_remote_code, cut),
            device,
            tokens=self.tokens,
            dtype=self.dtype,
            formats=timer.formats if timer else None,
            seconds=timer.seconds if timer else None,
        )

    def _this_device(self) -> tuple[Device, CpuTimer | GpuTimer | None]:
        """The record of the device at hand, and with --measure what times layers on it."""
        from castlm.inference.native import check_built
        from castlm.inference.roofline import cpu_formats
        from castlm.inference.this_device import CpuTimer, GpuTimer, this_cpu, this_gpu

        gpu = this_gpu()
        if gpu is not None:
            return gpu, GpuTimer(self.dtype) if self.measure else None
        check_built()
        return this_cpu(self.tokens), CpuTimer(cpu_formats(self.dtype)) if self.measure else None


_ADVICE = ("tokens", "dtype", "device", "measure", "pattern", "trust_remote_code")


def main(arguments: list[str]) -> int:
    return int(parse(AdviseCommand, arguments, "advise").run())
