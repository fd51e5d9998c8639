"""`castlm finetune`: fine-tunes an n:m sparse model, which stays n:m."""

from __future__ import annotations

from collections.abc import Sequence

from castlm.cli.options import read_arguments, result_folder
from castlm.cli.train import FileOptions, PageOptions, run_training
from castlm.cli.verify import recorded_pattern
from castlm.core.errors import InputError
from castlm.core.nm import Pattern
from castlm.fields import COMMAND_LINE, checked
from castlm.training.config import FinetuneConfig, names_of, read_layers
from castlm.training.options import ModelOptions


def parse_finetune(arguments: Sequence[str]) -> tuple[FinetuneConfig, bool]:
    """The options of `castlm finetune`: the files of `--config` in their order, then the command line.

    The default pattern is the one in the model's castlm.json. A run of `castlm train` stands for its model folder.

    Returns:
        The config, and whether to write the page of the run.

    Raises:
        InputError: whatever `read_arguments`, `read_yaml_mapping` or `FinetuneConfig` refuses; castlm.json names no
            pattern, or one that left no zeros in the model.
    """
    all_sections = FinetuneConfig.sections()
    of_train = [all_sections.pop("method"), all_sections.pop("start")]
    sections = [*all_sections.items(), ("options", FileOptions), ("options", PageOptions)]
    elsewhere = {option: "train" for section in of_train for option in names_of(section)}
    given = read_arguments(sections, arguments, "finetune", FinetuneConfig, elsewhere)
    paths = given.pop("config", [])
    page = checked([PageOptions], {"report": given.pop("report")} if "report" in given else {}, COMMAND_LINE)
    config = FinetuneConfig.from_layers([*read_layers(paths), (COMMAND_LINE, given)])
    model = result_folder(config.model.model)
    pattern = config.model.pattern if "pattern" in config.given else _pattern_of(model)
    config = config.changed(model=model, init_from=model, pattern=pattern)
    return config, bool(page.get("report", True))


def _pattern_of(model: str) -> Pattern:
    """The pattern of a model's zeros, by its castlm.json; 2:4 without one.

    Raises:
        InputError: castlm.json names no pattern, or one that left no zeros in the model.
    """
    recorded = recorded_pattern(model)
    if recorded is None:
        return ModelOptions.pattern
    if recorded.nm is None:
        raise InputError(f"{model} is {recorded}, a smaller dense model: fine-tune it like any dense one")
    return recorded.nm


def main(arguments: list[str]) -> int:
    return run_training(*parse_finetune(arguments))
