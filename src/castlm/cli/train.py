"""`castlm train` and `castlm finetune`: train a dense model to a verified n:m one, and fine-tune an n:m one."""

from __future__ import annotations

import shlex
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from castlm.api.train import FOREIGN, RecipeOptions, of_recorded_pattern
from castlm.cli.command_line import read_arguments
from castlm.core.errors import InputError
from castlm.fields import COMMAND_LINE, build, essential, label, option
from castlm.files.yaml_file import read_yaml_mapping
from castlm.training.config import FinetuneConfig, TrainConfig, names_of

_LARGE_CHECKPOINTS = 2**28
"""Bytes of checkpoints from which on a finished run tells their size."""


@dataclass
class FileOptions:
    """Files of options."""

    config: tuple[str, ...] = essential(
        (),
        append=True,
        help="YAML file of options, overridden by the command line. Later files override earlier ones.",
    )


@dataclass
class PageOptions:
    """The page that `castlm train` writes when the run is finished."""

    report: bool = option(
        True,
        help="Write report.html, a page with charts and a sample text, into output_dir when the run is finished.",
    )


def parse_train(
    arguments: Sequence[str],
    name: str = "train",
    more: type[Any] = PageOptions,
    unless_given: Mapping[str, Any] = types.MappingProxyType({}),
    unread: Collection[str] = (),
    ranks_of: Callable[[Any], int | None] = lambda options: None,
) -> tuple[TrainConfig, Any]:
    """The options of a run: the recipe, then the files of `--config` in their order, then the command line.

    Args:
        name: the command; `finetune` makes a `FinetuneConfig`, which has no recipe.
        more: a dataclass of further options; its docstring describes a command other than `train` and `finetune`.
        unless_given: values of options of `castlm train` that this command needs no value for.
        unread: options of castlm train that this command does not read. A file of `--config` may have them.
        ranks_of: the number of ranks of the run by the further options; None: as torchrun started them.

    Returns:
        The config, and an instance of `more`.
    """
    kind: type[TrainConfig] = TrainConfig
    files, other = [FileOptions, RecipeOptions], "finetune"
    if name == "finetune":
        kind, files, other = FinetuneConfig, [FileOptions], "train"
    sections, of_other = kind.sections(), FOREIGN["train" if kind is TrainConfig else "finetune"]
    foreign = [option for title in of_other for option in names_of(sections[title])]
    titled: list[tuple[str, type[Any]]] = [*sections.items(), *(("options", each) for each in (*files, more))]
    given = read_arguments(
        titled, arguments, name, about=kind if more is PageOptions else more, hidden=[*foreign, *unless_given, *unread]
    )
    if found := [label(option, COMMAND_LINE) for option in foreign if option in given]:
        raise InputError(f"castlm {name} does not read {found[0]}: leave it out, or use castlm {other}")
    if found := [label(option, COMMAND_LINE) for option in unread if option in given]:
        raise InputError(f"castlm {name} does not read {found[0]}, an option of castlm train: leave it out")
    layers = [(path, read_yaml_mapping(path)) for path in given.pop("config", [])]
    further = {field.name: given.pop(field.name) for field in fields(more) if field.name in given}
    options = build(more, further, COMMAND_LINE)
    return kind.from_layers([("", unless_given), *layers, (COMMAND_LINE, given)], ranks_of(options)), options


def parse_finetune(arguments: Sequence[str]) -> tuple[TrainConfig, bool]:
    """The options of `castlm finetune`, and whether to write the page of the run.

    The default pattern is the one in the model's castlm.json; raises `InputError` for the demo model, and if
    castlm.json names no pattern, or one that left no zeros in the model. A run of `castlm train` stands for its model
    folder.
    """
    config, page = parse_train(arguments, "finetune")
    return of_recorded_pattern(config), page.report


def main(arguments: list[str]) -> int:
    config, page = parse_train(arguments)
    return run_training(config, page.report)


def finetune(arguments: list[str]) -> int:
    return run_training(*parse_finetune(arguments))


def _tell_of_checkpoints(folder: Path) -> None:
    """Tells the size of the checkpoints that a finished run leaves, if it is one that a disk feels."""
    from castlm.progress import note
    from castlm.training.checkpoint import RunFolder

    checkpoints = RunFolder(folder).checkpoints
    size = sum(file.stat().st_size for file in checkpoints.rglob("*") if file.is_file())
    if size >= _LARGE_CHECKPOINTS:
        remedy = f"rm -r {shlex.quote(str(checkpoints))}"
        note(f"{checkpoints} takes {size / 2**30:.1f} GiB, which the finished model does not need: {remedy}")


def run_training(config: TrainConfig, report: bool) -> int:
    """Runs `config` and writes its page if `report` asks for it; returns the exit code."""
    from castlm.cli.report import write_report
    from castlm.hardware import keep_freed_memory
    from castlm.progress import note
    from castlm.signals import Interrupted
    from castlm.training.train import train
    from castlm.world import is_main_rank

    keep_freed_memory()
    try:
        verdict = train(config).verdict
        if report and is_main_rank():
            folder = config.checkpoint.output_dir
            try:
                note(f"report: {write_report(folder)}")
            except (InputError, OSError) as error:  # the run itself is finished
                note(f"no report: {error}; try castlm report {shlex.quote(str(folder))}")
        if is_main_rank():
            _tell_of_checkpoints(config.checkpoint.output_dir)
    except Interrupted as stop:  # on all ranks, after the same step
        if is_main_rank():
            note(str(stop))
        return stop.exit_code
    return 1 if verdict is not None and verdict.outcome == "diverged" else 0
