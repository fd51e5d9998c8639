"""The start: what is made of a dense model, without training, in one walk over its transformer blocks.

    for each block, in memory one after another:         walk.py, source.py
        for each step:                                    steps/: ChangeBasis, Solve, Reconstruct, Round
            the step changes the block, with the inputs that the changed blocks before it give

`train`, `prune`, `quantize` and `compare` call `run_start` with their steps; `castlm.oneshot.methods` lists those of
each pattern.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from castlm.core.errors import InputError
from castlm.data.calibration import CalibrationText
from castlm.models.architecture import eval_mode
from castlm.names import duration
from castlm.oneshot.draw import check_calibration
from castlm.oneshot.folder import StartFolder
from castlm.oneshot.inputs import check_plain_weights
from castlm.oneshot.layer_input import ERROR_TOKENS
from castlm.oneshot.report import OneshotReport
from castlm.oneshot.source import Source
from castlm.oneshot.steps.base import Step
from castlm.oneshot.walk import walk
from castlm.say import Progress, Say, silent
from castlm.world import ALONE, World

_SHORT = 10.0  # seconds; the time that a shorter start will take is not announced


@torch.no_grad()
def run_start(
    source: Source,
    steps: Sequence[Step],
    text: CalibrationText | None = None,
    folder: Path | None = None,
    *,
    facts: Mapping[str, Any] | None = None,
    restart: bool = False,
    say: Say = silent,
    progress: Progress = silent,
    time_after: Callable[[float], str] = lambda seconds_per_token: "",
    world: World = ALONE,
) -> OneshotReport:
    """Takes the steps in each transformer block of a model, in place; of a `StoredModel`, into `folder`.

    Memory beyond the model, or one block of it: the hidden states of the calibration text (on disk if there is a
    `folder`), and what the steps hold for one block (SparseGPT: an fp32 matrix (in, in) for each distinct input). With
    staged statistics, a model in memory also needs the outputs of the attention of one block. The result has the same
    bits with one block or the whole model in memory, and on one rank or several.

    Args:
        folder: an existing folder that records each finished block, so that a start that was killed continues.
        facts: everything else on which the result depends, such as the model, for the record in `folder`.
        restart: begin again if `folder` holds an unfinished start with other options, or a damaged one.
        say: called with a line about each change of basis that was made, omitted or undone, and about the remaining
            time.
        progress: called with (finished blocks, all blocks): first with those of an earlier process.
        time_after: words about the time of what follows the start, from the seconds of one token in the forward pass of
            one block.
        world: the ranks that make the start together, each with the same arguments and a source of its own. They
            divide the text and the rows, and end with the same blocks. Steps that are not `divided` take one rank.

    Raises:
        InputError: a step that needs a text without any, a text or a model that does not fit, a weight or an input of a
            layer that is not finite, a model that cannot be followed block by block, or an unfinished start with other
            options in `folder`.
    """
    assert world.size == 1 or all(step.is_divided for step in steps)
    check_plain_weights(source.layers)
    if text is not None:
        check_calibration(source.model, text.sequences)
    for step in steps:
        if step.needs_text and text is None:
            raise InputError(f"{step} needs a calibration text: pass calibration, from draw_calibration")
        step.check(source, text)
    if text is not None and not any(step.reads_text for step in steps):
        text = text.first(-(-ERROR_TOKENS // text.sequences.shape[1]))
    work = None
    if folder is not None:
        # A GPU rounds otherwise than a CPU: blocks of both are not the start of either.
        options = {"device": source.device.type, **(facts or {}), **(text.record() if text else {})}
        for step in steps:
            options |= step.options()
        work = StartFolder(folder, options, restart, world)
    report = OneshotReport()
    started = time.perf_counter()
    with eval_mode(source.model):
        for step in steps:
            step.begin(source, text, report)
        if work is not None and work.done:
            report.restore_(work.results)
            started = time.perf_counter() - report.basis.seconds - report.seconds  # the earlier process counts too
            where = f"{work.done} of {len(source.blocks)} transformer blocks, which are in {work.path}"
            say(f"continuing after {where}")
        visits = walk(
            source,
            text,
            follows_dense=any(step.follows_dense for step in steps),
            folder=work,
            results=report.saved,
            progress=progress,
            world=world,
        )
        first_started = 0.0
        for number, visit in enumerate(visits):
            if number == 0:  # the text has passed through the embeddings
                first_started = time.perf_counter()
            if number == 1 and visit.inputs:  # the first block is done: the others take as long
                num_left = len(source.blocks) - visit.index
                seconds = (time.perf_counter() - first_started) * num_left
                if seconds > _SHORT:
                    after = time_after(visit.inputs.seconds_per_token())
                    say(f"the start takes about {duration(seconds)} more, for {num_left} transformer blocks{after}")
            for step in steps:
                step(visit, report)
            report.seconds = time.perf_counter() - started - report.basis.seconds
        report.seconds = time.perf_counter() - started - report.basis.seconds
    for line in (*report.basis.changes, *report.basis.notes):
        say(str(line))
    return report
