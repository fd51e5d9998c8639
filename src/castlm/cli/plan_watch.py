"""`castlm plan watch`: where a running run will end."""

from __future__ import annotations

from dataclasses import dataclass

from castlm.cli.options import parse
from castlm.fields import positional


@dataclass
class WatchCommand:
    """Extrapolate a running run's prune-now perplexity to its end. Exit 1 when it will miss the target."""

    run_folder: str = positional()
    """Output folder of `castlm train`."""

    target_ppl: float | None = None
    """Perplexity that the run should reach."""

    def run(self) -> int:
        from castlm.planning.watch import watch_run

        report = watch_run(self.run_folder, self.target_ppl)
        print(report.message)
        return 1 if report.verdict == "will miss" else 0


def main(arguments: list[str]) -> int:
    return parse(WatchCommand, arguments, "plan watch").run()
