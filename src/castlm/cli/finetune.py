"""`castlm finetune`: an n:m sparse model in, one that is fine-tuned and still n:m out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from castlm.cli.options import read_arguments, result_folder
from castlm.cli.train import FileOptions, PageOptions, run_training
from castlm.cli.verify import recorded_pattern
from castlm.core.errors import InputError
from castlm.core.pattern import Pattern
from castlm.export.unit_count import groups_of
from castlm.fields import COMMAND_LINE, checked
from castlm.training.config import flatten, read_layers
from castlm.training.finetune import FinetuneConfig


def parse_finetune(arguments: Sequence[str]) -> tuple[FinetuneConfig, bool]:
    """The options of `castlm finetune`: the files of `--config` in their order, then the command line.

    The pattern of the model's castlm.json is the default, and a run of `castlm train` stands for its model folder.

    Returns:
        The config, and whether to write the page of the run.

    Raises:
        InputError: whatever `read_arguments`, `read_yaml_mapping` or `FinetuneConfig` refuses.
    """
    given = read_arguments([FinetuneConfig, FileOptions, PageOptions], arguments, "finetune")
    paths = given.pop("config", [])
    page = checked(PageOptions, {"report": given.pop("report")} if "report" in given else {}, COMMAND_LINE)
    layers = [*read_layers(paths), (COMMAND_LINE, given)]
    config = FinetuneConfig.from_layers(layers)
    has_pattern = any("pattern" in flatten(values, source) for source, values in layers)
    return _of_result(config, has_pattern), bool(page.get("report", True))


def _of_result(config: FinetuneConfig, has_pattern: bool) -> FinetuneConfig:
    """`config` with the model folder of a run in place of the run, and the recorded pattern where none is given.

    Raises:
        InputError: castlm.json names no pattern, or one that left no zeros in the model.
    """
    model = result_folder(config.model)
    recorded = None if has_pattern else recorded_pattern(model)
    pattern = config.pattern
    if recorded is not None:
        left = groups_of(Pattern.parse(recorded))
        if left is None:
            raise InputError(f"{config.model} is {recorded}, a smaller dense model: fine-tune it like any dense one")
        pattern = str(left)
    return dataclasses.replace(config, model=model, init_from=model, pattern=pattern)


def main(arguments: list[str]) -> int:
    return run_training(*parse_finetune(arguments))
