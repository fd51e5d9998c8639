"""Which models `castlm generate` and `castlm serve` run in the engine of castlm-runtime; found without torch."""

from __future__ import annotations

import os
from pathlib import Path

from castlm_runtime import library
from castlm_runtime.families import why_not
from castlm_runtime.reading import read_record

_WEIGHTS = ("castlm.safetensors", "castlm.safetensors.index.json", "model.safetensors", "model.safetensors.index.json")


def engine_folder(path: str) -> Path | None:
    """The folder of a model that the engine runs, in a run of `castlm train` too; None for any other model."""
    from castlm.models.locate import locate

    where = locate(path)
    folder = Path(where.target)
    if where.is_hub or where.gguf or library.kernels() is None or not (folder / "tokenizer.json").is_file():
        return None
    has_weights = any((folder / name).is_file() for name in _WEIGHTS)
    return folder if has_weights and why_not(read_record(folder / "config.json")) is None else None


def has_gpu() -> bool:
    """Whether the system has an NVIDIA GPU, on which torch runs a model."""
    return os.path.exists("/dev/nvidiactl")
