"""GGUF files for the peers that read them: made by llama.cpp's converter, and counted.

The converter is no part of llama-cpp-python. It lies in a checkout of the sources
(https://github.com/ggml-org/llama.cpp), or below `vendor/` in the source archive of llama-cpp-python, and needs
sentencepiece.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from castlm.core.errors import InputError


def convert(model_folder: str | Path, sources: str | Path, file: Path, dtype: str = "bf16") -> Path:
    """Writes the model as a GGUF file with matrices in `dtype`, as `convert_hf_to_gguf.py` in `sources` does.

    Raises:
        InputError: no converter in `sources`, or the converter failed; the message ends with its last line.
    """
    script = Path(sources) / "convert_hf_to_gguf.py"
    if not script.is_file():
        raise InputError(f"{sources} has no convert_hf_to_gguf.py: name a checkout of llama.cpp")
    command = [sys.executable, str(script), str(model_folder), "--outfile", str(file), "--outtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{script} could not convert {model_folder}: {done.stderr.strip().splitlines()[-1]}")
    return file


def tensor_bytes(file: Path) -> int:
    """Bytes of all tensors of a GGUF file, without its vocabulary."""
    from gguf import GGUFReader  # an extra of castlm

    return sum(int(tensor.n_bytes) for tensor in GGUFReader(file).tensors)
