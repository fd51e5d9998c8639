"""`castlm plan`: the table of its commands, which are imported on use."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from castlm.core.errors import InputError


class PlanCommand(NamedTuple):
    """A row of `COMMANDS`: the function in `castlm.cli` that takes the arguments, and its help line."""

    module: str
    function: str
    what: str

    def run(self, arguments: list[str]) -> int:
        return int(getattr(importlib.import_module(f"castlm.cli.{self.module}"), self.function)(arguments))


COMMANDS: dict[str, PlanCommand] = {
    "check": PlanCommand("plan_check", "main", "run the first steps: will the run converge, and what does it cost?"),
    "memory": PlanCommand("plan_memory", "main", "predict the memory on each rank from the model's config"),
    "sweep": PlanCommand("plan_law", "sweep", "find the scaling law of a model and text with few runs"),
    "fit": PlanCommand("plan_law", "fit", "fit a scaling law to finished runs"),
    "predict": PlanCommand("plan_law", "predict", "predict a perplexity, or the tokens that it takes, from a law"),
}


def plan_usage() -> str:
    lines = [f"  {name:10}{command.what}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: castlm plan COMMAND [OPTIONS]   (castlm plan COMMAND --help lists the options)", "", *lines]
    )


def main(arguments: list[str]) -> int:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name in COMMANDS:
        return COMMANDS[name].run(rest)
    if name not in ("", "-h", "--help"):
        raise InputError(f"there is no command castlm plan {name!r}: use one of {', '.join(COMMANDS)}")
    print(plan_usage())
    return 0 if name else 2
