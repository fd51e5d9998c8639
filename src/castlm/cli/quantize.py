"""`castlm quantize`: round a model, sparse or dense, to int8, float8, int4 or int3, zeros kept."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from castlm.api.quantize import QuantizeOptions, run_quantize
from castlm.cli.command_line import to_stdout


@dataclass(frozen=True)
class QuantizeCommand(QuantizeOptions):
    """Round the linear layers of a model to int8, fp8, int4 or int3, and verify the result. Zeros stay.

    One transformer block at a time is in memory, and finished ones are kept in OUTPUT_DIR.partial, so that the same
    command continues after a kill. A model with experts, images, or other tensor names in its files is loaded whole.
    """

    def run(self) -> int:
        from castlm.progress import note

        pattern, report = run_quantize(self)
        for line in report.notes:
            note(line)
        output = self.gguf or str(self.output_dir)
        to_stdout(
            f"{output}: {self.kind} in {len(report.errors)} layers, mean relative error "
            f"{report.mean_error:.2e}, {'dense' if pattern is None else f'{pattern} verified'}; "
            f"measure it with: castlm eval {shlex.quote(output)} --text FILE"
        )
        return 0
