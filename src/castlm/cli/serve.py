"""`castlm serve`: transformers' OpenAI-compatible server, which loads packed folders once castlm is imported."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from castlm.cli.options import parse, result_folder, use_threads
from castlm.core.errors import InputError
from castlm.fields import positional
from castlm.signals import TERMINATED


@dataclass
class ServeCommand:
    """Serve a model, plain or packed, over the OpenAI API: chat completions, completions, responses."""

    path: str = positional()
    """Folder, plain or packed, run of `castlm train`, or hub id."""

    host: str = "localhost"
    """Address to listen on."""

    port: int = 8000
    """Port to listen on."""

    threads: int = dataclasses.field(default=0, metadata={"at_least": 0})
    """Processor threads; 0 leaves the number to torch."""

    trust_remote_code: bool = False
    """Run Python code that comes with a hub model."""

    def run(self) -> int:
        from transformers.utils.import_utils import is_serve_available

        from castlm.inference.generate import dtype_to_run
        from castlm.models.io import load_weights
        from castlm.models.opening import open_model
        from castlm.progress import note

        _check_address(self.host, self.port)
        if not is_serve_available():
            raise InputError(
                "serving needs fastapi, uvicorn, pydantic and openai: pip install '.[serve]' in the clone of castlm"
            )
        path = result_folder(self.path)
        where, config, tokenizer = open_model(path, trust_remote_code=self.trust_remote_code)
        if where.gguf:
            raise InputError(f"{self.path} is a GGUF file: serve a model folder")
        if not tokenizer.chat_template:
            note("the model has no chat template: /v1/chat/completions and /v1/responses fail, use /v1/completions")
        use_threads(self.threads)
        dtype = dtype_to_run(config, note)
        # The server of transformers fills missing weights with random numbers, so they are checked first.
        load_weights(where, config, dtype=dtype, trust_remote_code=self.trust_remote_code)
        from transformers.cli.serve import Serve

        print(
            f"castlm: model {where.target} at http://{self.host}:{self.port}/v1, until Ctrl-C (twice during a request)",
            flush=True,
        )
        with _ending_at_once():
            Serve(
                force_model=where.target,
                host=self.host,
                port=self.port,
                dtype=dtype,
                trust_remote_code=self.trust_remote_code,
            )
        return 0


@contextlib.contextmanager
def _ending_at_once() -> Iterator[None]:
    """After Ctrl-C or SIGTERM in the block, the process ends with its exit code and without Python's own clean-up.

    A thread of the server that still generates would abort the process during that clean-up.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else stop.code
        if code in (130, TERMINATED):
            atexit.register(os._exit, code)
        raise


def _check_address(host: str, port: int) -> None:
    """Raises `InputError` where the server could not listen, before the model is loaded."""
    if not 1 <= port <= 65535:
        raise InputError(f"port {port} is out of range: it must be from 1 to 65535")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address, family=family).close()
    except (OSError, UnicodeError) as error:  # UnicodeError: of the codec for names of hosts
        reason = getattr(error, "strerror", None) or str(error.__cause__ or error)
        raise InputError(f"cannot listen on {host}, port {port} ({reason}): choose another host or port") from error


def main(arguments: list[str]) -> int:
    return int(parse(ServeCommand, arguments, "serve").run())
