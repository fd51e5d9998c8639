"""`castlm report`: one HTML page about a run."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from castlm.cli.command_line import to_stdout
from castlm.core.errors import InputError
from castlm.fields import option, positional
from castlm.progress import note


@dataclass
class ReportCommand:
    """Write report.html into the folder of a run: verdict, charts, sample text and settings."""

    run_folder: str = positional(
        help="Output folder of `castlm train`.",
    )

    sample: Literal["auto", "yes", "no"] = option(
        "auto",
        help="Include text by the dense and the sparse model. auto: for models up to a billion parameters.",
    )

    watch: bool = option(
        False,
        help="Rewrite the page every few seconds until the run ends; an open browser tab reloads it.",
    )

    def run(self) -> int:
        from castlm.lab.report.run_page import REFRESH_SECONDS, read_run, write_run_page

        run = read_run(self.run_folder)
        if not os.access(run.folder, os.W_OK):
            raise InputError(f"{run.folder} cannot be written: change its permissions, or copy the run")
        if self.watch:
            file = write_run_page(run, refresh=True)
            note(f"{file}: open it in a browser; Ctrl-C stops watching, not the run")
            while not run.is_finished:
                time.sleep(REFRESH_SECONDS)
                run = read_run(self.run_folder)
                write_run_page(run, refresh=True)
        to_stdout(write_report(self.run_folder, self.sample))
        return 0


def write_report(folder: str | Path, sample: Literal["auto", "yes", "no"] = "auto") -> Path:
    """Writes the page of a run, with a sample text if the run is finished and its models can be read.

    Raises `InputError` if the folder holds no run, or `sample` is "yes" and there can be none.
    """
    from castlm.lab.report.run_page import read_run, write_run_page
    from castlm.lab.report.sample import LARGEST_PARAMS, read_sample, write_sample

    run = read_run(folder)
    text = read_sample(run) if run.is_finished and sample != "no" else None
    is_small = run.facts is not None and (run.facts.num_params or 0) <= LARGEST_PARAMS
    if text is None and (sample == "yes" or (sample == "auto" and is_small)):
        try:
            text = write_sample(run)
        except InputError as error:
            if sample == "yes":
                raise
            note(f"no sample of text: {error}")
    return write_run_page(run, text)
