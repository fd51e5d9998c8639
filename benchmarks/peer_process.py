"""Runs a model in a peer, in a process of another environment: see `peer.py`."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

_ROOT = Path(__file__).parents[1]


class MissingPeerError(Exception):
    """A peer that is not installed, and the remedy."""


def has_packages(python: str, names: str) -> bool:
    """Whether the environment of a Python has packages, as "openvino, nncf"."""
    return subprocess.run([python, "-c", f"import {names}"], capture_output=True).returncode == 0


class PeerProcess:
    """The model in every format of a peer, converted from `source` to `folder` unless it is there.

    Attributes:
        sizes: bytes of the weights by format.

    Raises:
        RuntimeError: the peer could not convert the model; the message ends with its last line.
    """

    def __init__(self, peer: str, python: str, threads: int, source: Path, folder: Path):
        command = [python, "-P", "-m", f"benchmarks.{peer}"]
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        options: dict[str, Any] = {"env": os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, "text": True}
        if not (folder / "sizes.json").exists():
            done = subprocess.run([*command, "make", str(source), str(folder)], capture_output=True, **options)
            if done.returncode:
                raise RuntimeError(f"{peer} could not convert the model: {done.stderr.strip().splitlines()[-1]}")
        self.sizes: dict[str, int] = json.loads((folder / "sizes.json").read_text())
        command += ["answer", str(folder), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)
        atexit.register(self._process.kill)

    def ask(self, form: str, what: str, ids: Tensor | np.ndarray, **options: int) -> dict[str, Any]:
        """The answer to one request."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"format": form, "what": what, "ids": ids.tolist(), **options}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())
