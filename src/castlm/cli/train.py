"""`castlm train`: trains a dense model to a verified n:m one."""

from __future__ import annotations

import shlex
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from castlm.cli.options import read_arguments
from castlm.core.errors import InputError
from castlm.fields import COMMAND_LINE, checked, choice, essential
from castlm.training.config import RECIPES, TrainConfig, names_of, read_layers


@dataclass
class FileOptions:
    """Files of options."""

    config: tuple[str, ...] = essential((), append=True)
    """YAML file of options, overridden by the command line. Later files override earlier ones."""


@dataclass
class RecipeOptions(FileOptions):
    """Files of options, and the values that they override."""

    recipe: str = choice("castlm", RECIPES)
    """Base values of all options. castlm: our defaults. paper: decay, learning rates, eta, batch and length as
    published for LLaMA2-7B, with Adam's usual betas.
    """


@dataclass
class PageOptions:
    """The page that `castlm train` writes when the run is finished."""

    report: bool = True
    """Write report.html, a page with charts and a sample text, into output_dir when the run is finished."""


def parse_train(
    arguments: Sequence[str],
    name: str = "train",
    more: type[Any] | None = None,
    unless_given: Mapping[str, Any] = types.MappingProxyType({}),
) -> tuple[TrainConfig, dict[str, Any]]:
    """The options of `castlm train`: the recipe, then the files of `--config` in their order, then the command line.

    Args:
        more: a dataclass of further options of the command `name`; its docstring describes a command other than
            `train`.
        unless_given: values of options of `castlm train` that this command needs no value for.

    Returns:
        The config, and the options of `more` that were given.

    Raises:
        InputError: whatever `read_arguments`, `read_yaml_mapping` or `TrainConfig` refuses.
    """
    all_sections = TrainConfig.sections()
    elsewhere = dict.fromkeys(names_of(all_sections.pop("adapter")), "finetune")
    sections = [*all_sections.items(), ("options", RecipeOptions), *([("options", more)] if more else [])]
    about = TrainConfig if more is None or name == "train" else more
    given = read_arguments(sections, arguments, name, about, elsewhere, unless_given)
    paths = given.pop("config", [])
    extra = {field.name: given.pop(field.name) for field in fields(more) if field.name in given} if more else {}
    config = TrainConfig.from_layers([("", unless_given), *read_layers(paths), (COMMAND_LINE, given)])
    return config, checked([more], extra, COMMAND_LINE) if more else {}


def main(arguments: list[str]) -> int:
    config, more = parse_train(arguments, more=PageOptions)
    return run_training(config, more.get("report", True))


def run_training(config: TrainConfig, report: bool) -> int:
    """Runs `config` and writes its page if `report` asks for it; returns the exit code."""
    from castlm.distributed.world import is_main_rank
    from castlm.hardware import keep_freed_memory
    from castlm.signals import Interrupted
    from castlm.training.record import problem
    from castlm.training.train import train

    keep_freed_memory()
    try:
        record = train(config)
        if report and is_main_rank():
            _write_page(config.checkpoint.output_dir)
    except Interrupted as stop:
        print(f"castlm: {stop}", file=sys.stderr)
        return stop.exit_code
    return 1 if problem(record.get("verdict", {})) == "diverged" else 0


def _write_page(folder: Path) -> None:
    """Writes the page of the run. An error here is reported but does not fail a finished run."""
    from castlm.cli.report import write_report
    from castlm.progress import note

    try:
        note(f"report: {write_report(folder)}")
    except (InputError, OSError) as error:
        note(f"no report: {error}; try castlm report {shlex.quote(str(folder))}")
