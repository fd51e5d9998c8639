"""`castlm serve`: transformers' OpenAI-compatible server, which loads packed folders once castlm is imported."""

from __future__ import annotations

import dataclasses
import socket
from dataclasses import dataclass

from castlm.cli.options import parse, result_folder, use_threads
from castlm.core.errors import InputError
from castlm.fields import positional


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
        from transformers.cli.serve import Serve

        dtype = dtype_to_run(config, note)
        print(
            f"castlm: {self.path} at http://{self.host}:{self.port}/v1, until Ctrl-C (twice while a request runs)",
            flush=True,
        )
        Serve(
            force_model=where.target,
            host=self.host,
            port=self.port,
            dtype=dtype,
            trust_remote_code=self.trust_remote_code,
        )
        return 0


def _check_address(host: str, port: int) -> None:
    """Raises `InputError` where the server could not listen, before the model is loaded."""
    if not 1 <= port <= 65535:
        raise InputError(f"port {port} is out of range: it must be from 1 to 65535")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address, family=family).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot listen on {host}, port {port} ({reason}): choose another host or port") from error


def main(arguments: list[str]) -> int:
    return int(parse(ServeCommand, arguments, "serve").run())
