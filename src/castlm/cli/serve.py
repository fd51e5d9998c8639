"""`castlm serve`: the OpenAI API over a model, plain or packed, decoded as `castlm generate` does."""

from __future__ import annotations

import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path

from castlm.cli.options import to_stdout, use_threads
from castlm.core.errors import InputError
from castlm.fields import like, number, positional
from castlm.packages import require
from castlm.training.options import ModelOptions


@dataclass
class ServeCommand:
    """Serve a model, plain or packed, over the OpenAI API: chat completions and completions, streamed or not."""

    path: str = positional()
    """Folder, plain or packed, run of `castlm train`, hub id, GGUF file, or "demo"."""

    served_model_name: str | None = None
    """Name of the model in requests. The default is the last part of the folder, or the hub id."""

    host: str = "localhost"
    """Address to listen on."""

    port: int = number(8000, at_least=1, at_most=65535)
    """Port to listen on."""

    allowed_hosts: tuple[str, ...] = field(default=(), kw_only=True)
    """Names of this server in requests, beside host, localhost and addresses; "*" allows any, and so every web page."""

    threads: int = number(0, at_least=0)
    """Processor threads; 0 leaves the number to torch."""

    trust_remote_code: bool = like(ModelOptions, "trust_remote_code")

    def run(self) -> int:
        require("serving needs", "starlette", "uvicorn")
        try:  # before the model is loaded
            family, *_, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            socket.create_server(address, family=family).close()
        except (OSError, UnicodeError) as error:  # UnicodeError: an invalid host name
            reason = getattr(error, "strerror", None) or str(error.__cause__ or error)
            raise InputError(
                f"cannot listen on {self.host}, port {self.port} ({reason}): choose another host or port"
            ) from error
        use_threads(self.threads)
        from castlm.data.chat import Chat
        from castlm.progress import note
        from castlm.runtime.generate import load_to_generate
        from castlm.serving.app import make_app
        from castlm.serving.connections import Server
        from castlm.serving.engine import Engine

        code = {"trust_remote_code": self.trust_remote_code}
        model, tokenizer = load_to_generate(self.path, as_stored=False, say=note, **code)
        if not Chat(tokenizer).has_template:
            note("the model has no chat template: /v1/chat/completions answers 400, use /v1/completions")
        engine = Engine(model, tokenizer, say=note)
        name = self.served_model_name or default_name(self.path)
        app = make_app(engine, name, (self.host, *self.allowed_hosts))
        # A thread that waits for Python's lock, as the engine does several times a token, has it after 0.5 ms.
        sys.setswitchinterval(5e-4)
        host = f"[{self.host}]" if ":" in self.host else self.host  # IPv6
        to_stdout(f"castlm: model {name} at http://{host}:{self.port}/v1, until Ctrl-C")
        try:
            Server(app, engine, self.host, self.port).run()
        finally:
            engine.close()
        return 0


def default_name(path: str) -> str:
    """The default name of a served model: the last part of its folder or file, or its hub id."""
    place = Path(path).expanduser()
    return place.resolve().name if place.exists() else path
