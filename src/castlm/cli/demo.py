"""`castlm demo`: trains the bundled chat model and compares it with the dense one. `demo_run` does the work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from castlm.cli.command_line import command_line
from castlm.fields import option


@dataclass
class DemoCommand:
    """Train the bundled SmolLM2-135M-Instruct to a verified 32:64 model, and compare it with the dense one."""

    output_dir: str = option(
        "demo-output",
        help="Folder for the runs and the result.",
    )

    max_steps: int = option(
        25,
        help="Optimizer steps of 512 tokens, each for castlm and for the dense control.",
    )

    resume: bool = option(
        False,
        help="Continue an interrupted start; without one, start.",
    )

    overwrite: bool = option(
        False,
        help="Start again; the earlier output becomes OUTPUT_DIR.previous.",
    )

    def run(self) -> int:
        from castlm.cli.demo_run import run_demo
        from castlm.hardware import keep_freed_memory
        from castlm.progress import note
        from castlm.signals import Interrupted

        keep_freed_memory()
        again = f"continue with: {command_line('demo', replace(self, resume=True, overwrite=False))}"
        try:
            run_demo(Path(self.output_dir), self.max_steps, self.overwrite, self.resume)
        except Interrupted as stop:
            note(f"{stop.reason}; {again}")
            return stop.exit_code
        except (KeyboardInterrupt, SystemExit):
            note(again)
            raise
        return 0
