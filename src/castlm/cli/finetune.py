"""`castlm finetune`: an n:m sparse model in, one that is fine-tuned and still n:m out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from castlm.cli.options import read_arguments
from castlm.cli.train import PageOptions, run_training
from castlm.fields import COMMAND_LINE, checked, essential
from castlm.training.config import read_layers
from castlm.training.finetune import FinetuneConfig


@dataclass
class FileOptions:
    """Where options come from besides the command line."""

    config: tuple[str, ...] = essential((), append=True)
    """YAML file of options; those on the command line override it. If it is given several times, later files override
    earlier ones."""


def parse_finetune(arguments: Sequence[str]) -> tuple[FinetuneConfig, bool]:
    """The options of `castlm finetune`: the files of `--config` in their order, then the command line.

    Returns:
        The config, and whether to write the page of the run.

    Raises:
        InputError: whatever `read_arguments`, `read_yaml_mapping` or `FinetuneConfig` refuses.
    """
    given = read_arguments([FinetuneConfig, FileOptions, PageOptions], arguments, "finetune")
    paths = given.pop("config", [])
    page = checked(PageOptions, {"report": given.pop("report")} if "report" in given else {}, COMMAND_LINE)
    config = FinetuneConfig.from_layers([*read_layers(paths), (COMMAND_LINE, given)])
    return config, bool(page.get("report", True))


def main(arguments: list[str]) -> int:
    return run_training(*parse_finetune(arguments))
