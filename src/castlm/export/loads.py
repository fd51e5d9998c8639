"""Checks that a written model folder can be loaded: by loading it, in a fresh process, as its users will.

Counting the tensors of a packed folder does not show that transformers can load them. Loading them in the process that
wrote them does not either, because that process may hold parts in memory that a reader must find in the folder.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoConfig

from castlm.core.errors import InputError, check_finite, one_line
from castlm.hardware import available_memory
from castlm.models.architecture import auto_class
from castlm.models.io import check_no_kernels, quiet_transformers
from castlm.packed.register import register
from castlm.progress import note

_MEMORY_FACTOR = 1.5  # bytes to load a packed model and to compute with it, in bytes of its files


def check_loads(folder: Path) -> None:
    """Loads the packed folder in a fresh process, and computes the logits of two tokens.

    If memory is short, the model is loaded without its values, and a line reports this.

    Raises:
        InputError: it cannot be loaded, or its logits are not finite.
    """
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    is_small = _MEMORY_FACTOR * num_bytes < available_memory()
    if not is_small:
        note(f"{folder.name} is loaded without its values, because they take {num_bytes / 1e9:.1f} GB of memory")
    device = "cpu" if is_small else "meta"
    code = f"from castlm.export.loads import run; run({str(folder)!r}, {device!r})"
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        *_, reason = ["", *filter(None, map(str.strip, done.stderr.splitlines()))]
        raise InputError(f"the packed model cannot be loaded ({reason or f'its process ended with {done.returncode}'})")


@torch.inference_mode()
def load_and_compute(folder: Path, device: str = "cpu") -> None:
    """Loads a packed folder by transformers, and computes the logits of two tokens; on "meta", without its values."""
    register()
    with quiet_transformers():
        config = AutoConfig.from_pretrained(folder)
        check_no_kernels(config, folder)
        model = auto_class(config).from_pretrained(
            folder, config=config, use_kernels=False, device_map="meta" if device == "meta" else None
        )
    if device != "meta":
        check_finite("the logits of the packed model", model.eval()(torch.tensor([[0, 1]])).logits)


def run(folder: str, device: str) -> None:
    """`load_and_compute` in a process of its own: an error ends it, in one line."""
    try:
        load_and_compute(Path(folder), device)
    except Exception as error:
        sys.exit(one_line(error))
