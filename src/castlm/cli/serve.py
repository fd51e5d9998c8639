"""`castlm serve`: the OpenAI API over a model, plain or packed, in the engine of castlm-runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from castlm.cli.command_line import to_stdout
from castlm.cli.engine import engine_folder
from castlm.core.errors import InputError
from castlm.fields import option, positional
from castlm.packages import require
from castlm_runtime.machine import check_threads

if TYPE_CHECKING:
    from castlm_runtime.defaults import Defaults
    from castlm_runtime.model import Model
    from castlm_runtime.tokenizer import Tokenizer


@dataclass
class ServeCommand:
    """Serve a model, plain or packed, over the OpenAI API: chat completions and completions, streamed or not."""

    path: str = positional(
        help='Folder, plain or packed, run of `castlm train`, hub id, GGUF file, or "demo".',
    )

    served_model_name: str | None = option(
        None,
        help="Name of the model in requests. The default is the last part of the folder, or the hub id.",
    )

    host: str = option(
        "localhost",
        help="Address to listen on.",
    )

    port: int = option(
        8000,
        at_least=1,
        at_most=65535,
        help="Port to listen on.",
    )

    allowed_hosts: tuple[str, ...] = option(
        (),
        help='Names of this server in requests, beside host, localhost and addresses; "*" allows any, and so every '
        "web page.",
    )

    threads: int = option(
        0,
        at_least=0,
        help="Processor threads; 0 takes the physical cores that the process may use.",
    )

    cache: Literal["bf16", "int8", "fp32"] = option(
        "bf16",
        help="What the cache keeps of keys and values: int8 takes half of the memory of bf16, fp32 twice as much.",
    )

    context: int = option(
        0,
        at_least=0,
        help="Most tokens of a request; 0 takes the model's context, or less where memory is short.",
    )

    prefix_cache: bool = option(
        True,
        help="Share keys and values among requests that begin alike, such as the turns of a conversation.",
    )

    api_key: str | None = option(
        None,
        help="Key that requests must have. The environment variable CASTLM_API_KEY sets it unseen by other users.",
    )

    access_log: bool = option(
        False,
        help="Print a line for each request: time, address, method, path, status and seconds.",
    )

    def run(self) -> int:
        from castlm_runtime.server.run import check_port, default_name, serve

        require("serving needs", "starlette", "uvicorn", "prometheus_client")
        check_port(self.host, self.port)  # before the model is loaded
        check_threads(self.threads)
        from castlm.progress import note

        serve(
            *self._opened(),
            self.served_model_name or default_name(self.path),
            host=self.host,
            port=self.port,
            allowed_hosts=self.allowed_hosts,
            kind=self.cache,
            context=self.context or None,
            shares_prefixes=self.prefix_cache,
            api_key=self.api_key,
            has_log=self.access_log,
            say=note,
            ready=to_stdout,
        )
        return 0

    def _opened(self) -> tuple[Model, Tokenizer, Defaults]:
        """The model of a folder without torch; of a GGUF file or the hub through transformers."""
        from castlm_runtime.defaults import Defaults
        from castlm_runtime.model import Model
        from castlm_runtime.tokenizer import Tokenizer

        folder = engine_folder(self.path)
        if folder is not None:
            read = Tokenizer.open(folder)  # before the model: reading it takes 40 MiB for a moment
            return Model.open(folder, self.threads), read, Defaults.open(folder)
        from castlm.models.io import load_weights, open_model
        from castlm.packed.in_engine import model_in_engine, tokenizer_in_engine, why_not_in_engine

        where, config, tokenizer = open_model(self.path)
        model = load_weights(where, config, dtype="auto").eval()
        if reason := why_not_in_engine(model):
            raise InputError(f"castlm serve does not run {self.path}, because {reason}: castlm generate does")
        defaults = Defaults.of(model.generation_config.to_diff_dict())
        return model_in_engine(model, self.threads), tokenizer_in_engine(tokenizer), defaults
