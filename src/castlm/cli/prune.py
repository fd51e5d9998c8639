"""`castlm prune`: one-shot pruning without training."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from castlm.api.prune import PruneOptions, run_prune
from castlm.cli.command_line import read_arguments, to_stdout
from castlm.fields import COMMAND_LINE, build
from castlm.oneshot.options import with_effort


@dataclass(frozen=True, kw_only=True)
class PruneCommand(PruneOptions):
    """Prune a model one-shot, without training, and verify the result.

    Finished transformer blocks are kept in OUTPUT_DIR.partial, so that the same command continues after a kill. Under
    torchrun, all ranks prune together, one transformer block at a time.
    """

    def run(self) -> int:
        from castlm.world import is_main_rank

        report = run_prune(self, COMMAND_LINE)
        if not is_main_rank():
            return 0
        for line in report.notes():
            to_stdout(line)
        measure = f"castlm eval {shlex.quote(self.output_dir)} --text FILE"
        share = f"in {report.share:.2%} of the weights that the transformer blocks multiply by"
        to_stdout(
            f"{self.output_dir}: {self.pattern} {share}, by {self.solver_name}, verified; measure it with: {measure}"
        )
        return 0


def main(arguments: list[str]) -> int:
    given = read_arguments([("options", PruneCommand)], arguments, "prune", about=PruneCommand)
    return build(PruneCommand, with_effort(given), COMMAND_LINE, asked=given).run()
