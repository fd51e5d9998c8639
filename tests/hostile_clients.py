"""Ten hostile clients against `castlm serve`, and a good one: python -m tests.hostile_clients MODEL --minutes 10.

The hostile ones are one process, which may use a whole core. All come from the address of the good one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import multiprocessing
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

GOOD = {"prompt": "Once upon a time", "max_tokens": 32, "temperature": 0}
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def request(body: bytes, length: int | None = None, path: str = "/v1/completions") -> bytes:
    """A POST in bytes, whose head may tell another length."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    return f"{head}{len(body) if length is None else length}\r\n\r\n".encode() + body


class Hostile:
    """The ten clients; `counts` holds what became of their requests."""

    def __init__(self, port: int, until: float):
        self.port, self.until = port, until
        self.counts: Counter[str] = Counter()

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Stream]:
        # A stream of 300 tokens that has come whole before it is read is longer than asyncio's limit.
        opening = asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
        reader, writer = await asyncio.wait_for(opening, 20)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def send(self, name: str, content: bytes) -> None:
        """Sends bytes and reads the status."""
        async with self.connected() as (reader, writer):
            writer.write(content)
            status = await asyncio.wait_for(reader.readline(), 120)
            self.counts[f"{name}: {status.decode('latin1').strip()[9:12] or 'cut'}"] += 1

    async def half_open(self, draw: random.Random) -> None:
        starts = [
            b"",
            b"P",
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX: ",
            b"\x16\x03\x01\x02",
            request(b"", 99),
        ]
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(60):
                _, writer = await stack.enter_async_context(self.connected())
                writer.write(draw.choice(starts))
            await asyncio.sleep(3 * draw.random())
        self.counts["half open: opened"] += 60

    async def connects(self, draw: random.Random) -> None:
        async with self.connected():
            self.counts["connects: opened"] += 1

    async def slow_body(self, draw: random.Random) -> None:
        async with contextlib.AsyncExitStack() as stack:
            writers = [(await stack.enter_async_context(self.connected()))[1] for _ in range(20)]
            for writer in writers:
                writer.write(request(b'{"prompt": "', 60_000))
            for _ in range(int(20 * draw.random())):
                await asyncio.sleep(0.5)
                for writer in writers:
                    writer.write(b"a" * draw.randint(1, 500))
            self.counts["slow bodies: sent"] += len(writers)

    async def huge_body(self, draw: random.Random) -> None:
        await self.send("huge bodies", request(b"x" * draw.choice([100_000, 1_000_000, 8_000_000])))

    async def garbage(self, draw: random.Random) -> None:
        post = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        kinds = [
            b"GET / HTTP/9.9\r\n\r\n",
            draw.randbytes(300) + b"\r\n\r\n",
            b"GET http://evil/ HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
            post + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF\r\n" + b"x" * 70_000,
            post + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
            b"GET /v1/models/%00%ff%2e%2e/../ HTTP/1.1\r\nHost: localhost\r\n\r\n",
            post + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n",
            b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20_000,
        ]
        await self.send("garbage", draw.choice(kinds))

    async def bad_json(self, draw: random.Random) -> None:
        field = draw.choice(
            ["stop", "temperature", "top_p", "seed", "stream", "x", "logit_bias", "model", "max_tokens"]
        )
        value = draw.choice([-1, "x", [], {}, 1e300, "\ud800"])
        bodies = [b"{", b"[" * 50_000, draw.randbytes(500), b'{"prompt":' + b"9" * 5000 + b"}"]
        bodies += [b'{"prompt":"a","max_tokens":NaN}', json.dumps({"prompt": "a", field: value}).encode()]
        await self.send("bad JSON", request(draw.choice(bodies)))

    async def long_prompts(self, draw: random.Random) -> None:
        """Of as many bytes as are read, and far more tokens than fit."""
        body = json.dumps({"prompt": "".join(draw.choices("abc d", k=60_000)), "max_tokens": 1}).encode()
        await self.at_once(8, "long prompts", lambda: self.send("long prompts", request(body)))

    async def long_answers(self, draw: random.Random) -> None:
        body = json.dumps({"prompt": "a" * draw.randint(1, 40), "max_tokens": 400}).encode()
        await self.at_once(16, "long answers", lambda: self.send("long answers", request(body)))

    async def streams(self, draw: random.Random) -> None:
        async def one() -> None:
            tokens, leaves = draw.randint(1, 300), draw.random() < 0.5
            async with self.connected() as (reader, writer):
                writer.write(request(json.dumps({"prompt": "a", "max_tokens": tokens, "stream": True}).encode()))
                status = (await asyncio.wait_for(reader.readline(), 120)).decode("latin1")[9:12]
                if leaves or status != "200":
                    self.counts[f"streams: {status or 'cut'}{', left' if status == '200' else ''}"] += 1
                    return
                text = await asyncio.wait_for(reader.readuntil(b"[DONE]"), 120)
                self.counts["streams: 200" if text else "streams: cut"] += 1

        await self.at_once(16, "streams", one)

    async def short_answers(self, draw: random.Random) -> None:
        body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
        await self.at_once(16, "short answers", lambda: self.send("short answers", request(body)))

    async def at_once(self, number: int, name: str, one: Callable[[], Awaitable[None]]) -> None:
        """Several connections, each of which asks again as soon as it is answered."""

        async def again() -> None:
            while time.time() < self.until:
                await self.guarded(name, one())

        await asyncio.gather(*(again() for _ in range(number)))

    async def guarded(self, name: str, work: Awaitable[None]) -> None:
        try:
            await work
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            self.counts[f"{name}: {type(error).__name__}"] += 1
            await asyncio.sleep(0.01)

    async def run(self) -> None:
        clients = [self.half_open, self.connects, self.slow_body, self.huge_body, self.garbage, self.bad_json]
        clients += [self.long_prompts, self.long_answers, self.streams, self.short_answers]

        async def client(number: int, act: Callable[[random.Random], Awaitable[None]]) -> None:
            draw = random.Random(number)
            while time.time() < self.until:
                await self.guarded(act.__name__.replace("_", " "), act(draw))

        everyone = asyncio.gather(*(client(number, act) for number, act in enumerate(clients)))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(everyone, self.until - time.time() + 5)


def be_hostile(port: int, until: float, counts: Any) -> None:
    hostile = Hostile(port, until)
    asyncio.run(hostile.run())
    counts.put(dict(hostile.counts))


class Good:
    """A client that asks for 32 tokens, waits 0.2 seconds, and asks again, over one connection as long as it lasts."""

    def __init__(self, port: int):
        self.port, self.connection = port, http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        self.seconds: list[float] = []
        self.outcomes: Counter[str] = Counter()
        self.texts: set[str] = set()

    def ask(self) -> None:
        started = time.monotonic()
        is_kept = self.connection.sock is not None
        try:
            self.connection.request("POST", "/v1/completions", json.dumps(GOOD), {"Content-Type": "application/json"})
            answer = self.connection.getresponse()
            content = json.loads(answer.read())
        except (OSError, http.client.HTTPException) as error:
            self.connection.close()
            # As every client does where the server has closed a connection that was not in use.
            self.outcomes["closed while not in use" if is_kept else type(error).__name__] += 1
            return
        self.outcomes[str(answer.status)] += 1
        if answer.status == 200:
            self.seconds.append(time.monotonic() - started)
            self.texts.add(content["choices"][0]["text"])
        time.sleep(1 if answer.status == 429 else 0.2)

    def quantiles(self) -> str:
        if not self.seconds:
            return "no answer"
        ordered = sorted(self.seconds)
        at = {"median": 0.5, "0.95": 0.95}
        shown = ", ".join(f"{name} {ordered[int(share * (len(ordered) - 1))]:.2f} s" for name, share in at.items())
        return f"{len(ordered)} answers, mean {statistics.mean(ordered):.2f} s, {shown}, longest {ordered[-1]:.2f} s"


def resident(pid: int) -> float:
    """MiB."""
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def attack(model: str, seconds: float, folder: Path) -> dict[str, Any]:
    """Serves `model`, asks it alone for a tenth of the time, then among hostile clients; what became of it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = [sys.executable, "-m", "castlm", "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    with open(folder / "log", "w") as log:
        environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
        server = subprocess.Popen([*arguments, "--threads", "1"], stdout=log, stderr=log, env=environment)
    try:
        while True:
            with contextlib.suppress(OSError):
                http.client.HTTPConnection("127.0.0.1", port).connect()
                break
            assert server.poll() is None, (folder / "log").read_text()
            time.sleep(0.2)
        alone, among, memory = Good(port), Good(port), []
        until = time.time() + max(2, seconds / 10)
        while time.time() < until:
            alone.ask()
        before = resident(server.pid)
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        until = time.time() + seconds
        attackers = context.Process(target=be_hostile, args=(port, until, queue), daemon=True)
        attackers.start()
        time.sleep(1)
        while time.time() < until:
            among.ask()
            memory.append(resident(server.pid))
        counts = queue.get(timeout=60)
        attackers.join(20)
        time.sleep(1)
        after = Good(port)
        for _ in range(5):
            after.ask()
    finally:
        server.send_signal(signal.SIGTERM)
        began = time.monotonic()
        try:
            code = server.wait(120)
        except subprocess.TimeoutExpired:
            server.send_signal(signal.SIGABRT)  # the log has the stack of each thread then
            code = server.wait(60)
    return {
        "seconds_to_end": time.monotonic() - began,
        "alone": alone,
        "among": among,
        "after": after,
        "counts": dict(sorted(counts.items())),
        "memory_mib": {"before": before, "most": max(memory), "end": memory[-1]},
        "exit_code": code,
        "log": (folder / "log").read_text(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = attack(arguments.model, 60 * arguments.minutes, Path(folder))
    for when in ("alone", "among", "after"):
        good = found[when]
        print(f"{when}: {dict(good.outcomes)}, {good.quantiles()}, {len(good.texts)} different texts")
    for name in ("counts", "memory_mib", "exit_code", "seconds_to_end"):
        print(f"{name}: {found[name]}")
    print(f"log: {len(found['log'].splitlines())} lines, {found['log'].count('Traceback')} tracebacks")
    if found["exit_code"] != 128 + signal.SIGTERM:
        print(found["log"][-5000:])


if __name__ == "__main__":
    main()
