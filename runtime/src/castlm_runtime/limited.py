"""Runs a function in a process of its own, with a limit on the memory and the processor time of each call.

A chat template or the decoder of an image may take any memory and any time, and a single operation in C cannot be
stopped by a thread. The process starts with the first call, answers one after another, and starts again after one that
had to be ended. It imports the module of the function alone. Requests and replies are JSON and bytes, each after its
length (8 bytes, little-endian).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from castlm_runtime.errors import InputError, one_line
from castlm_runtime.machine import address_space

_WALL_FACTOR = 12  # of the processor time, for a machine that others use, and for the start of the process
_MAX_SECONDS = 86_400.0


class CallError(Exception):
    """The function has raised an error, whose message this is, or has ended its process."""


class OutOfTimeError(CallError):
    """The call exceeds its processor time."""


class LimitedProcess:
    """A process that calls one function.

    Args:
        function: "package.module:name" of a function of a request (a dict of JSON) and bytes that returns a value of
            JSON and bytes.
        what: names it in messages, such as "the chat template".
    """

    def __init__(self, function: str, what: str) -> None:
        self.function, self.what = function, what
        self._lock = threading.Lock()
        self._process: tuple[int, subprocess.Popen[bytes]] | None = None  # with the id of the process that started it

    def start(self) -> None:
        """Starts the process, so that the first call does not wait for it."""
        with self._lock:
            self._running()

    def call(
        self, request: Mapping[str, Any], payload: bytes = b"", *, num_bytes: int, seconds: float
    ) -> tuple[Any, bytes]:
        """Calls the function.

        Args:
            request: what is no JSON becomes a placeholder.
            num_bytes: most memory, beside that of the process before its first call; on Linux alone.
            seconds: most processor time.

        Raises:
            CallError: the function's own error, or the end of its process.
            OutOfTimeError: it takes longer.
            MemoryError: it takes more memory.
            InputError: the process cannot be started.
        """
        seconds = min(seconds, _MAX_SECONDS)
        content = json.dumps(
            {"request": request, "num_bytes": num_bytes, "seconds": seconds},
            default=lambda value: f"<{type(value).__name__}>",
        )
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            until = time.monotonic() + _WALL_FACTOR * seconds
            try:
                _write(process.stdin, content.encode(), payload)
                reply, returned = (_read_part(process.stdout, until) for _ in range(2))
            except BaseException as error:  # Ctrl-C too: a reply that nobody read would be taken for the next one
                _end(process)
                if isinstance(error, TimeoutError) or process.returncode == -signal.SIGPROF:
                    raise OutOfTimeError(f"it takes longer than {seconds:g} seconds; see document_limit") from None
                if isinstance(error, EOFError | OSError):
                    raise CallError(f"the process of {self.what} ended with {process.returncode}") from None
                raise
        answer = json.loads(reply)
        if answer.get("is_memory"):
            raise MemoryError
        if "error" in answer:
            raise CallError(answer["error"])
        return answer["value"], returned

    def _running(self) -> subprocess.Popen[bytes]:
        """The process, started if there is none of this process's own."""
        if self._process is None or self._process[0] != os.getpid() or self._process[1].poll() is not None:
            packages = {"castlm_runtime", self.function.partition(".")[0]}
            roots = [str(Path(str(importlib.import_module(name).__file__)).parents[1]) for name in sorted(packages)]
            # behind the standard library, which a module beside a package must not hide
            program = f"import sys; sys.path += {roots}; from {__name__} import serve; serve()"
            try:
                started = subprocess.Popen(
                    [sys.executable, "-P", "-c", program, self.function],  # -P: nothing of the working folder
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
            except OSError as error:
                raise InputError(f"cannot start a process for {self.what}: {one_line(error)}") from error
            self._process = (os.getpid(), started)
        return self._process[1]


def _write(stream: IO[bytes], *parts: bytes) -> None:
    for part in parts:
        stream.write(len(part).to_bytes(8, "little"))
        stream.write(part)
    stream.flush()


def _read_part(stream: IO[bytes], until: float) -> bytes:
    """One part of a reply; raises TimeoutError, or EOFError if the process ends."""
    return _read(stream, int.from_bytes(_read(stream, 8, until), "little"), until)


def _read(stream: IO[bytes], size: int, until: float) -> bytes:
    parts, left = [], size
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while left:
            if not selector.select(max(0.0, until - time.monotonic())):
                raise TimeoutError
            part = os.read(stream.fileno(), min(left, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            left -= len(part)
    return b"".join(parts)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process, if it has not ended, and sets its `returncode`."""
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that has closed its pipes ends by itself
        process.wait(0.2)
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with contextlib.suppress(OSError):
            stream.close()


# ---- in the process


def serve() -> None:
    """Answers calls of the function that the command line names, until stdin ends."""
    module, _, name = sys.argv[1].partition(":")
    function = getattr(importlib.import_module(module), name)
    own_bytes = address_space()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes stdin
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    while head := requests.read(8):
        call = json.loads(requests.read(int.from_bytes(head, "little")))
        payload = requests.read(int.from_bytes(requests.read(8), "little"))
        _limit_memory(own_bytes + call["num_bytes"])
        signal.setitimer(signal.ITIMER_PROF, call["seconds"])  # of processor time; SIGPROF ends this process
        answer = b""
        try:
            value, answer = function(call["request"], payload)
            reply = json.dumps({"value": value})
        except MemoryError:
            reply = json.dumps({"is_memory": True})
        except BaseException as error:  # the function runs a program of others and may raise anything
            reply = json.dumps({"error": str(error) or type(error).__name__})
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(replies, reply.encode(), answer)


def _limit_memory(num_bytes: int) -> None:
    """Makes an allocation beyond an address space of `num_bytes` fail with a MemoryError, on Linux."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
