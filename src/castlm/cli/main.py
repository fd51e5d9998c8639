"""The command `castlm`: a table of subcommands, each a dataclass of options. Nothing heavy is imported early."""

from __future__ import annotations

import errno
import importlib
import io
import logging
import os
import sys
import textwrap
from collections.abc import Callable
from typing import NamedTuple, TextIO

from castlm.core.errors import DivergedError, InputError, MostlyDenseError, is_out_of_memory, is_panic
from castlm.names import columns_of, for_stream, printable
from castlm.signals import TERMINATED, ending_on_sigterm, stopped_by_sigterm

_FULL = (errno.ENOSPC, errno.EDQUOT)


class Command(NamedTuple):
    """A row of `COMMANDS`."""

    place: str | type | Callable[[list[str]], int]
    """The dataclass of options that runs itself, or a function of the arguments. As a text, its module in `castlm.cli`
    and its name there, so that it is imported only when it runs."""
    what: str
    """The line of help."""

    def run(self, name: str, arguments: list[str]) -> int:
        """Runs the command of this name, and returns its exit code."""
        command = self.place
        if isinstance(command, str):
            module, _, member = command.partition(".")
            command = getattr(importlib.import_module(f"castlm.cli.{module}"), member)
        if isinstance(command, type):
            from castlm.cli.command_line import parse

            return int(parse(command, arguments, name).run())
        return int(command(arguments))


COMMANDS: dict[str, Command] = {
    "train": Command("train.main", "train a dense model to a verified n:m sparse one"),
    "finetune": Command("train.finetune", "fine-tune an n:m sparse model; every zero stays"),
    "prune": Command("prune.main", "prune one-shot, without training: magnitude, Wanda, SparseGPT"),
    "cut": Command("cut.CutCommand", "remove channels or heads: a smaller dense model, without training"),
    "eval": Command("evaluate.EvalCommand", "measure the perplexity of a model on a text, or its zero-shot accuracy"),
    "compare": Command("compare.main", "train CAST and its rivals under equal conditions and print one table"),
    "sample": Command("sample.SampleCommand", "let a model write its own training text, if you have no data"),
    "report": Command("report.ReportCommand", "write an HTML page about a run: verdict, charts, sample text"),
    "plan check": Command("plan.check", "run the first steps: will the run converge, and how long does it take?"),
    "plan memory": Command("plan.memory", "predict the memory on each rank from the model's config"),
    "plan fit": Command("plan.FitCommand", "fit a scaling law to finished runs"),
    "plan predict": Command("plan.PredictCommand", "predict a perplexity, or the tokens that it takes"),
    "quantize": Command(
        "quantize.QuantizeCommand", "round a model, sparse or dense, to int8, fp8, int4 or int3; every zero stays"
    ),
    "advise": Command("advise.AdviseCommand", "time every format of a model here, and tell which to use for what"),
    "shrink": Command("advise.ShrinkCommand", "make a model small by the best recipe for a size"),
    "verify": Command("verify.VerifyCommand", "count every n:m group of a model folder"),
    "pack": Command("pack.PackCommand", "store a model for castlm's CPU kernels; an n:m one without its zeros"),
    "unpack": Command("pack.UnpackCommand", "write a packed model as a plain model folder again"),
    "generate": Command("generate.GenerateCommand", "continue a prompt with a model, plain or packed"),
    "serve": Command("serve.ServeCommand", "serve a model, plain or packed, over the OpenAI API"),
    "demo": Command("demo.DemoCommand", "train the bundled SmolLM2-135M-Instruct to 32:64 on a laptop, in minutes"),
}


def usage(first: str = "") -> str:
    """The commands whose names begin with `first`."""
    columns = columns_of(sys.stdout) or sys.maxsize
    lines = []
    for name, command in COMMANDS.items():
        if name.startswith(first):
            lines += textwrap.wrap(f"  {name:14}{command.what}", columns, subsequent_indent=" " * 16)
    return "\n".join(["usage: castlm COMMAND [OPTIONS]   (castlm COMMAND --help lists the options)", "", *lines])


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0: done. 1: the answer is no (a pattern does not hold, a run diverged, a run of `compare` failed). 2: bad input, or
    output that cannot be written, reported in one line. 130: after Ctrl-C. 141: nobody reads the output any more
    (`castlm ... | head -1`), as after SIGPIPE.

    Every other exception is reported in one line too, with exit code 2; CASTLM_TRACEBACK=1 shows the traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # escape characters that the output cannot encode, instead of failing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return _main(sys.argv[1:] if arguments is None else arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # an unflushed error would show a traceback at exit
    except BrokenPipeError:
        _discard(sys.stdout)
        _discard(sys.stderr)  # stderr itself may be the stream that failed
        return 141
    except OSError as error:
        if os.environ.get("CASTLM_TRACEBACK"):
            raise
        _discard(sys.stdout)
        _complain(f"the output cannot be written: {error.strerror}")
        return 2


def _check_utf8(arguments: list[str]) -> None:
    """Refuses names that are not UTF-8, which JSON, YAML and safetensors cannot record: a run would fail at its end."""
    try:
        folder = os.getcwd()
    except FileNotFoundError:
        raise InputError("the working folder no longer exists: change to one that does") from None
    for name, what in [*((argument, "the argument") for argument in arguments), (folder, "the working folder")]:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise InputError(f"{what} '{printable(name)}' is not UTF-8: rename it") from None


def _discard(stream: TextIO) -> None:
    """Discards the rest of `stream`, which would otherwise fail again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _describe(error: BaseException) -> str:
    """Describes an exception in one line: its own message, if that is meant for a user."""
    if isinstance(error, InputError):
        return str(error)
    if is_out_of_memory(error):
        is_of_gpu = "CUDA" in str(error) or "CUSOLVER" in str(error)
        elsewhere = "device cpu, or a larger GPU" if is_of_gpu else "or a larger machine"
        return (
            f"not enough memory ({str(error)[:200] or 'an allocation failed'}): use a smaller batch or seq_len, "
            f"{elsewhere}; castlm plan memory says what a run needs"
        )
    if isinstance(error, OSError) and str(error):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"unexpected {reason[:400]} (CASTLM_TRACEBACK=1 shows where it happened)"


def _complain(reason: str) -> None:
    try:
        text = f"castlm: error: {printable(' '.join(reason.split()))}"
        print(for_stream(text, sys.stderr), file=sys.stderr, flush=True)
    except OSError:  # both go to the same full disk
        _discard(sys.stderr)


def _main(arguments: list[str]) -> int:
    if "_ARGCOMPLETE" in os.environ:  # a shell asks
        from castlm.cli.completion import complete_command

        complete_command(COMMANDS, lambda name: COMMANDS[name].run(name, []))
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        import castlm

        print(castlm.__version__)
        return 0
    try:
        for name in ("torchao", "bitsandbytes", "torch.utils._pytree", "lm_eval"):  # transformers and peft import three
            logging.getLogger(name).setLevel(logging.ERROR)
        _check_utf8(arguments)
        words = 2 if arguments[0] == "plan" else 1
        name = " ".join(arguments[:words])
        if name in ("plan", "plan -h", "plan --help"):
            print(usage("plan"))
            return 0 if arguments[1:] else 2
        if name not in COMMANDS:
            raise InputError(f"there is no command {name!r}: use one of {', '.join(COMMANDS)}")
        with ending_on_sigterm():
            return COMMANDS[name].run(name, arguments[words:])
    except SystemExit as stop:
        if stop.code == TERMINATED:
            print(for_stream(f"castlm: {stopped_by_sigterm()}", sys.stderr), file=sys.stderr)
        raise
    except Exception as error:
        # The standard output is full: the error of a file would have its name, or be an InputError.
        is_output_full = isinstance(error, OSError) and error.filename is None and error.errno in _FULL
        if isinstance(error, BrokenPipeError) or is_output_full or os.environ.get("CASTLM_TRACEBACK"):
            raise
        _complain(_describe(error))
        return 1 if isinstance(error, DivergedError | MostlyDenseError) else 2
    except KeyboardInterrupt:
        print("castlm: stopped", file=sys.stderr)
        return 130
    except BaseException as error:
        if not is_panic(error):
            raise
        _complain(_describe(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())
