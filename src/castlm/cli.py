"""The command `castlm`: a table of subcommands, each a dataclass parsed by tyro. Nothing heavy is imported early."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any, TextIO

from castlm.core.errors import InputError

Command = Callable[[list[str]], int]


def _parse(kind: type[Any], arguments: list[str], name: str) -> Any:
    """Arguments into a dataclass; tyro's boxed complaints are folded into one line.

    Raises:
        InputError: what tyro complains of.
    """
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, args=arguments, prog=f"castlm {name}", config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as stop:
        if not stop.code:
            raise
        # the box's frame and rules go, its sentences stay
        words = re.sub(r"[╭╮╰╯│─━]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", complaint.getvalue()))
        text = " ".join(words.split()).partition("For full helptext")[0].strip()
        text = re.sub(r"^Value error Error parsing \w+: ", "", text)  # what follows is our own
        raise InputError(f"{text} (castlm {name} --help lists the options)") from None


def train_command(arguments: list[str]) -> int:
    from castlm.training.config import parse_train_arguments

    config = parse_train_arguments(arguments, _parse)
    from castlm.training.hardware import keep_freed_memory
    from castlm.training.interrupt import Interrupted
    from castlm.training.loop import train

    keep_freed_memory()
    try:
        train(config)
    except Interrupted as stop:
        print(f"castlm: {stop}", file=sys.stderr)
        return stop.exit_code
    return 0


def eval_command(arguments: list[str]) -> int:
    from castlm.commands import EvalCommand

    return int(_parse(EvalCommand, arguments, "eval").run())


def compare_command(arguments: list[str]) -> int:
    from castlm.compare.command import CompareCommand

    return int(_parse(CompareCommand, arguments, "compare").run(_parse))


def plan_command(arguments: list[str]) -> int:
    from castlm.planning.command import COMMANDS as PLANS
    from castlm.planning.command import CheckCommand, plan_usage
    from castlm.planning.sweep import SweepCommand
    from castlm.training.config import parse_train_arguments

    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name == "check":
        return parse_train_arguments(rest, _parse, CheckCommand, "plan check").run()
    if name == "sweep":
        return int(_parse(SweepCommand, rest, "plan sweep").run(_parse))
    if name in PLANS:
        return int(_parse(PLANS[name], rest, f"plan {name}").run())
    if name not in ("", "-h", "--help"):
        raise InputError(f"there is no castlm plan {name!r}: use check, sweep, {', '.join(PLANS)}")
    print(plan_usage())
    return 0 if name else 2


def verify_command(arguments: list[str]) -> int:
    from castlm.commands import VerifyCommand

    return int(_parse(VerifyCommand, arguments, "verify").run())


def prune_command(arguments: list[str]) -> int:
    from castlm.commands import PruneCommand

    return int(_parse(PruneCommand, arguments, "prune").run())


def demo_command(arguments: list[str]) -> int:
    from castlm.commands import DemoCommand

    return int(_parse(DemoCommand, arguments, "demo").run())


COMMANDS: dict[str, tuple[Command, str]] = {
    "train": (train_command, "a dense model in, a proven n:m sparse one out"),
    "prune": (prune_command, "prune one-shot, without training: magnitude, Wanda, SparseGPT"),
    "eval": (eval_command, "perplexity of a model on a text, zero-shot accuracies on tasks"),
    "compare": (compare_command, "CAST and its rivals in one harness, and the paper's ablations: one table"),
    "plan": (plan_command, "before a run: will it converge, what will it reach, what does it cost in hours and memory"),
    "verify": (verify_command, "prove that every group of a checkpoint is n:m"),
    "demo": (demo_command, "the main job on the embedded SmolLM2-135M-Instruct, in minutes, on a laptop"),
}


def usage() -> str:
    lines = [f"  {name:10}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: castlm COMMAND [OPTIONS]   (castlm COMMAND --help lists the options)", "", *lines])


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. Exit codes: 0 done; 1 a proof does not hold; 2 bad input, or output that cannot be written, in
    one line; 130 after Ctrl-C; 141, as of a process that SIGPIPE ends, where nobody reads the output any more
    (`castlm ... | head -1`)."""
    try:
        try:
            return _main(sys.argv[1:] if arguments is None else arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # else it fails at exit, with a traceback
    except BrokenPipeError:
        _discard(sys.stdout)
        _discard(sys.stderr)  # the one that failed may have been this
        return 141
    except OSError as error:
        if os.environ.get("CASTLM_TRACEBACK"):
            raise
        _discard(sys.stdout)
        _complain(f"the output cannot be written: {error.strerror}")
        return 2


def _discard(stream: TextIO) -> None:
    """What is left in `stream` goes nowhere; else it fails once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _is_output_full(error: Exception) -> bool:
    """Of what is printed; a file that cannot be written has a name, or is an InputError."""
    return isinstance(error, OSError) and error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _complain(reason: str) -> None:
    try:
        print(f"castlm: error: {reason}", file=sys.stderr, flush=True)
    except OSError:  # both go to the same full disk
        _discard(sys.stderr)


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        import castlm

        print(castlm.__version__)
        return 0
    for name in ("torchao", "torch.utils._pytree"):  # of the import that transformers makes: nothing here uses it
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        if arguments[0] not in COMMANDS:
            raise InputError(f"there is no command {arguments[0]!r}: use one of {', '.join(COMMANDS)}")
        return COMMANDS[arguments[0]][0](arguments[1:])
    except (InputError, OSError) as error:
        if isinstance(error, BrokenPipeError) or _is_output_full(error) or os.environ.get("CASTLM_TRACEBACK"):
            raise
        _complain(" ".join(str(error).split()))
        return 2
    except KeyboardInterrupt:
        print("castlm: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
