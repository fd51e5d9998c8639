"""Renders chat templates in a process of its own, with a limit on its memory and on its time.

A chat template is a program by the model's author. It may build a text of any length, or never end, and a single
operation on large integers takes hours inside Python, where no thread can stop it. One process renders for all
conversations of this one. It starts with the first, and again after a rendering that had to be ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from castlm_runtime.errors import InputError, one_line

_WALL_FACTOR = 12  # of the processor time, for a machine that others use, and for the start of the process
_lock = threading.Lock()
_process: tuple[int, subprocess.Popen[bytes]] | None = None  # with the id of the process that started it


class RenderError(Exception):
    """The template refuses the messages."""


class EndlessError(RenderError):
    """The template exceeds its time."""


class RenderedText(NamedTuple):
    """A conversation as text, and the spans of characters inside the generation marks of the template."""

    text: str
    spans: list[tuple[int, int]]


def render_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Any,
    reply: bool,
    marks: bool,
    variables: Mapping[str, Any],
    num_bytes: int,
    seconds: float,
) -> RenderedText:
    """Renders messages as transformers does.

    Args:
        template: a Jinja template.
        messages: each with a role and its content, a text or a list of parts; what is no JSON becomes a placeholder.
        tools: JSON schemas, or None.
        reply: add the header that asks the assistant for an answer.
        marks: find the generation marks.
        variables: more variables of the template, such as the special tokens.
        num_bytes: most memory.
        seconds: most processor time.

    Raises:
        RenderError: the template's own error.
        EndlessError: it takes longer.
        MemoryError: it takes more memory.
        InputError: the process cannot be started.
    """
    request = {
        **variables,
        "messages": messages,
        "tools": tools,
        "documents": None,
        "template": template,
        "add_generation_prompt": reply,
        "marks": marks,
        "num_bytes": num_bytes,
        "seconds": min(seconds, 86_400.0),
    }
    content = json.dumps(request, default=lambda value: f"<{type(value).__name__}>").encode()
    with _lock:
        process = _running()
        try:
            answer = _ask(process, content, _WALL_FACTOR * request["seconds"])
        except BaseException as error:  # Ctrl-C too: a reply that nobody read would be taken for the next one
            _end(process)
            if isinstance(error, TimeoutError) or process.returncode == -signal.SIGPROF:
                raise EndlessError(f"it takes longer than {seconds:g} seconds; see document_limit") from None
            if isinstance(error, EOFError | OSError):
                raise RenderError(f"the process that renders it ended with {process.returncode}") from None
            raise
        found = json.loads(answer)
        if "text" not in found:
            if found.get("is_memory"):
                raise MemoryError
            raise RenderError(found["error"])
    return RenderedText(found["text"], [(begin, end) for begin, end in found["spans"]])


def start() -> None:
    """Starts the process, so that the first rendering does not wait for it."""
    with _lock:
        _running()


def _running() -> subprocess.Popen[bytes]:
    """The process, started if there is none of this process's own."""
    global _process
    if _process is None or _process[0] != os.getpid() or _process[1].poll() is not None:
        worker = Path(__file__).with_name("template_worker.py")
        try:
            started = subprocess.Popen(
                [sys.executable, "-P", str(worker)],  # -P: the modules beside it are not its own
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise InputError(f"cannot start a process for the chat template: {one_line(error)}") from error
        _process = (os.getpid(), started)
    return _process[1]


def _ask(process: subprocess.Popen[bytes], content: bytes, seconds: float) -> bytes:
    """Sends a request and returns the reply; raises TimeoutError, or EOFError if the process ends."""
    assert process.stdin is not None
    assert process.stdout is not None
    until = time.monotonic() + seconds
    process.stdin.write(len(content).to_bytes(8, "little") + content)
    process.stdin.flush()
    size = int.from_bytes(_read(process.stdout, 8, until), "little")
    return _read(process.stdout, size, until)


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
