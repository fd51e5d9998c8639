"""Runs a model in OpenVINO, in a process of another environment: see `openvino_peer.py`."""

from __future__ import annotations

import atexit
import json
import subprocess
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.rows import Elsewhere
from castlm.models.io import Loaded, save_model

_PEER = Path(__file__).with_name("openvino_peer.py")


def is_installed(python: str) -> bool:
    """Whether the environment of a Python has what the peer needs."""
    command = [python, "-c", "import openvino, nncf, optimum.intel"]
    return subprocess.run(command, capture_output=True).returncode == 0


class OpenVino:
    """The model in every format of `openvino_peer.FORMATS`, converted below `folder` unless it is there.

    Attributes:
        sizes: bytes of the weights by format.
    """

    def __init__(self, python: str, loaded: Loaded, threads: int, folder: Path):
        made = folder / "openvino"
        if not (made / "sizes.json").exists():
            save_model(loaded.model, loaded.tokenizer, folder / "model")
            command = [python, "-P", str(_PEER), "make", str(folder / "model"), str(made)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"OpenVINO could not convert the model: {done.stderr.strip().splitlines()[-1]}")
        self.sizes: dict[str, int] = json.loads((made / "sizes.json").read_text())
        command = [python, "-P", str(_PEER), "answer", str(made), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(self._process.kill)

    def ask(self, form: str, what: str, ids: Tensor, **options: int) -> dict[str, Any]:
        """The answer to one request."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"format": form, "what": what, "ids": ids.tolist(), **options}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def time(self, form: str, what: str, ids: Tensor, **options: int) -> Elsewhere:
        return Elsewhere(**self.ask(form, what, ids, **options))
