"""Serves a model until Ctrl-C."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Collection
from pathlib import Path

from castlm_runtime.chat import ChatTemplate
from castlm_runtime.defaults import Defaults
from castlm_runtime.engine import Engine, silent
from castlm_runtime.errors import InputError
from castlm_runtime.model import Model
from castlm_runtime.templates import start
from castlm_runtime.tokenizer import Tokenizer


def check_port(host: str, port: int) -> None:
    """Raises `InputError` if nothing can listen there: to be called before a model is loaded."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address, family=family).close()
    except (OSError, UnicodeError) as error:  # UnicodeError: an invalid host name
        reason = getattr(error, "strerror", None) or str(error.__cause__ or error)
        raise InputError(f"cannot listen on {host}, port {port} ({reason}): choose another host or port") from error


def check_installed() -> None:
    """Raises `InputError` without the libraries of the extra `serve`."""
    lacking = [name for name in ("starlette", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if lacking:
        raise InputError(f"serving needs {' and '.join(lacking)}: pip install {' '.join(lacking)}")


def serve(
    model: Model,
    tokenizer: Tokenizer,
    defaults: Defaults,
    name: str,
    *,
    host: str = "localhost",
    port: int = 8000,
    allowed_hosts: Collection[str] = (),
    kind: str = "bf16",
    context: int | None = None,
    shares_prefixes: bool = True,
    api_key: str | None = None,
    has_log: bool = False,
    say: Callable[[str], None] = silent,
    ready: Callable[[str], None] = silent,
) -> None:
    """Answers requests until Ctrl-C.

    Args:
        name: of the model in requests.
        allowed_hosts: names of this server in requests, beside host, localhost and addresses; "*" for any.
        kind, context, shares_prefixes: as for `Engine`.
        api_key: that requests to /v1 must have; None takes the environment variable CASTLM_API_KEY, which other users
            of the machine do not see in the list of processes, or asks for none.
        has_log: `say` takes a line for each request.
        say: takes a line for the user.
        ready: takes the line with the address, once the model is there.
    """
    from castlm_runtime.server.app import make_app
    from castlm_runtime.server.connections import Server

    if ChatTemplate(tokenizer).has_template:
        start()  # of the process that renders templates: the first request does not wait for it
    else:
        say("the model has no chat template: /v1/chat/completions answers 400, use /v1/completions")
    engine = Engine(model, tokenizer, defaults, kind=kind, context=context, shares_prefixes=shares_prefixes, say=say)
    key = api_key or os.environ.get("CASTLM_API_KEY") or None
    app = make_app(engine, name, (host, *allowed_hosts), api_key=key, log=say if has_log else None)
    # A thread that waits for Python's lock, as the engine does several times a token, has it after 0.5 ms.
    sys.setswitchinterval(5e-4)
    shown = f"[{host}]" if ":" in host else host  # IPv6
    ready(f"castlm: model {name} at http://{shown}:{port}/v1, until Ctrl-C")
    try:
        Server(app, engine, host, port).run()
    finally:
        engine.close()


def default_name(path: str) -> str:
    """The default name of a served model: the last part of its folder or file, or its hub id."""
    place = Path(path).expanduser()
    return place.resolve().name if place.exists() else path
