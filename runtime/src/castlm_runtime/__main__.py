"""`python -m castlm_runtime serve|generate FOLDER`: runs the model of a folder, packed or plain."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from castlm_runtime.errors import InputError

# Before numpy is imported: it starts threads to multiply matrices, which takes 40 ms, and here it multiplies none.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 2 for bad input."""
    options = _parser().parse_args(arguments)
    try:
        return _serve(options) if options.command == "serve" else _generate(options)
    except InputError as error:
        print(f"castlm_runtime: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    from castlm_runtime.model import CACHE_KINDS

    parser = argparse.ArgumentParser(prog="python -m castlm_runtime", description="Runs a model packed by castlm.")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve a model over the OpenAI API")
    generate = commands.add_parser("generate", help="continue a prompt, or answer it by the model's chat template")
    for command in (serve, generate):
        command.add_argument("folder", help="folder of a model, packed or plain")
        command.add_argument("--threads", type=int, default=0, help="0: the physical cores that it may use")
        command.add_argument("--cache", choices=CACHE_KINDS, default="bf16", help="format of keys and values")
        command.add_argument("--context", type=int, help="most tokens of a request; default: the model's, or what fits")
    serve.add_argument("--host", default="localhost")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--served-model-name", help="name in requests; default: the last part of the folder")
    serve.add_argument("--allowed-hosts", nargs="*", default=(), help='further names of this server; "*" for any')
    serve.add_argument("--no-prefix-cache", action="store_true", help="requests share no keys and values")
    serve.add_argument("--api-key", help="asked for by /v1; or in the environment, as CASTLM_API_KEY")
    serve.add_argument("--access-log", action="store_true", help="a line for each request")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.0)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--raw", action="store_true", help="continue the prompt as it is, without a chat template")
    return parser


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _serve(options: argparse.Namespace) -> int:
    from castlm_runtime.defaults import Defaults
    from castlm_runtime.machine import check_threads
    from castlm_runtime.model import Model
    from castlm_runtime.server.run import check_installed, check_port, default_name, serve
    from castlm_runtime.tokenizer import Tokenizer

    check_installed()
    check_threads(options.threads)
    check_port(options.host, options.port)
    tokenizer = Tokenizer.open(options.folder)  # before the model: reading it takes 40 MiB for a moment
    serve(
        Model.open(options.folder, options.threads),
        tokenizer,
        Defaults.open(options.folder),
        options.served_model_name or default_name(options.folder),
        host=options.host,
        port=options.port,
        allowed_hosts=options.allowed_hosts,
        kind=options.cache,
        context=options.context,
        shares_prefixes=not options.no_prefix_cache,
        api_key=options.api_key,
        has_log=options.access_log,
        say=_note,
        ready=lambda line: print(line, flush=True),
    )
    return 0


def _generate(options: argparse.Namespace) -> int:
    from castlm_runtime.generate import Session
    from castlm_runtime.machine import check_threads

    check_threads(options.threads)
    session = Session.open(
        options.folder, threads=options.threads, kind=options.cache, context=options.context, say=_note
    )
    done = session.generate(
        session.encode(options.prompt, options.raw),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        write=lambda text: print(text, end="", flush=True),
    )
    print(flush=True)
    _note(str(done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
