"""The interface of a step."""

from __future__ import annotations

from typing import Any

from castlm.data.calibration import CalibrationText
from castlm.oneshot.report import OneshotReport
from castlm.oneshot.source import Source
from castlm.oneshot.walk import Visit


class Step:
    """One thing that a start does in each transformer block. A start is made of several, in order.

    An instance belongs to one start, since it may hold state between the blocks.
    """

    reads_text: bool = True
    """Whether it reads all of a calibration text. Other steps only measure errors, on its first tokens."""
    needs_text: bool = True
    """Whether it requires one."""
    is_divided: bool = False
    """Whether several ranks take it together, with the same bits as one. `see_inputs` and `by_rows` divide its work.
    Each rank does all else, which may depend only on statistics and weights, as these are the same on all ranks."""
    follows_dense: bool = False
    """Whether it reads `Visit.dense_outputs`, for which the text also runs through the dense model."""

    def __str__(self) -> str:
        """The step in a few words, for messages."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The options on which the result depends, by name, for JSON."""
        raise NotImplementedError

    def check(self, source: Source, text: CalibrationText | None) -> None:
        """Raises `InputError` for a model or a text that does not fit, before anything changes."""

    def begin(self, source: Source, text: CalibrationText | None, report: OneshotReport) -> None:
        """Is called once, before the first block, in every process that works on the start."""

    def __call__(self, visit: Visit, report: OneshotReport) -> None:
        """Changes the transformer block of a visit in place, and adds the result to the report.

        Raises:
            InputError: a weight or an input of a layer that is not finite, or other bad input that the block shows.
        """
        raise NotImplementedError
