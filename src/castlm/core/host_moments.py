"""Moments in the memory of the host, of which a few are copied to their device for an update.

A GPU copies them in a stream of its own, beside the work of the passes. The stream keeps its copies in order, so the
moments of the next step are read after those of this one were written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from castlm.core.moments import MOMENT_KEYS


class HostMoments:
    """The moments that are on their device at present, by parameter; all others are on the host alone."""

    def __init__(self) -> None:
        self._there: dict[Tensor, dict[str, Tensor]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"_there": {}, "_streams": {}}  # copies that an update would make again

    @staticmethod
    def on_host(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`moments` in host memory, from which a GPU copies without the processor's help."""
        return {key: tensor.cpu().pin_memory() if tensor.is_cuda else tensor for key, tensor in moments.items()}

    def fetch(self, param: Tensor, state: Mapping[str, Tensor]) -> None:
        """Begins to copy the moments of a parameter to its device; no effect if that has begun."""
        if param not in self._there:
            with self._beside(param.device):
                self._there[param] = {
                    key: torch.empty_like(state[key], device=param.device).copy_(state[key], non_blocking=True)
                    for key in MOMENT_KEYS
                    if key in state
                }

    def take(self, param: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The moments of a parameter on its device, to be changed in place; see `give_back`."""
        self.fetch(param, state)
        if param.is_cuda:
            stream = torch.cuda.current_stream(param.device)
            stream.wait_stream(self._streams[param.device])
            for tensor in self._there[param].values():
                tensor.record_stream(stream)  # they were allocated for the other one
        return self._there[param]

    def give_back(self, param: Tensor, state: Mapping[str, Tensor]) -> None:
        """Begins to copy the moments of a parameter to the host, and frees those on the device."""
        changed = self._there.pop(param)
        with self._beside(param.device, after_passes=True):
            for key, tensor in changed.items():
                state[key].copy_(tensor, non_blocking=True)

    def wait(self) -> None:
        """Waits until the host has all moments that were given back."""
        for stream in self._streams.values():
            stream.synchronize()

    @contextlib.contextmanager
    def _beside(self, device: torch.device, after_passes: bool = False) -> Iterator[None]:
        """Inside the context, a GPU copies in the stream of copies.

        Args:
            after_passes: begin when the work that was queued for the passes is done.
        """
        if device.type != "cuda":
            yield
            return
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        if after_passes:
            stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield
