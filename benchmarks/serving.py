"""Tokens per second of `castlm serve`, for clients at the same time and in conversations, and its memory under load.

    python -m benchmarks.serving MODEL [--threads N] [--new-tokens N] [--turns 8] [--temperature 0.7] [--minutes 10]
                                 [--llama-server PROGRAM --gguf FILE] [--rounds 3] [--json OUT]

The speed: OpenAI's client streams answers, sampled at `--temperature`, in as many threads as there are clients. Each
has a prompt of its own of some 250 tokens. Tokens are counted per second, and per second of processor time of the
server, which other work on the machine hardly changes. `castlm generate` runs in this process on as many threads.
llama.cpp's `llama-server` is asked the same in turns with castlm, with flash attention, a slot for each client and a
context as long as castlm's; each figure is the median of `--rounds`.
The conversation, if the model has a chat template: a user asks `--turns` times, and each request holds all that was
said before; of each turn the time to the first text, and the speed of the rest. The load, for `--minutes`: ten clients
at the same time; half of them send requests that must be refused (a body that is too long, no JSON, a prompt beyond the
context, numbers that make no sense) or go away in the middle of an answer. Every good request must be answered. One
process serves from the beginning to the end; its resident memory is printed once in a tenth of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, write_json

PROMPT = "Once upon a time there was a little girl who lived near the forest, and one day"
LONG_PROMPT = f"{PROMPT} she met a fox that could speak. " * 9
QUESTION = (
    "Please tell me more about it: who was there, what did they see on their way, what did they say to each other, and "
    "how did it end? Name each animal that they met, and say what it had to eat. "
)
CLIENTS = (1, 4, 8)
BAD: list[bytes] = [
    b"{",
    b"\xff" * 100,
    b"x" * 1_000_000,
    json.dumps({"prompt": "word " * 20_000, "max_tokens": 5}).encode(),
    json.dumps({"prompt": "a", "max_tokens": -1}).encode(),
    json.dumps({"prompt": "a", "max_tokens": 10**9}).encode(),
    json.dumps({"prompt": "a", "temperature": "hot"}).encode(),
    json.dumps({"prompt": "a", "model": "another"}).encode(),
    json.dumps({"prompt": [10**9]}).encode(),
]


Command = Callable[[int], list[str]]
"""The command of a server on a port."""


def castlm_command(model: str, threads: int) -> Command:
    return lambda port: [
        *(sys.executable, "-m", "castlm", "serve", model, "--port", str(port), "--threads", str(threads)),
    ]


def llama_command(program: str, file: str, threads: int) -> Command:
    """llama.cpp's server with flash attention and its cache of f16, one slot for each client."""
    return lambda port: [
        *(program, "--model", file, "--port", str(port), "--threads", str(threads), "--flash-attn", "on"),
        *("--parallel", str(max(CLIENTS)), "--ctx-size", "8192", "--kv-unified", "--log-disable"),
    ]


@contextlib.contextmanager
def served(command: Command, env: Mapping[str, str] | None = None, ready: str = "/health") -> Iterator[tuple[int, int]]:
    """Starts a server; yields its port and process id once the path `ready` is answered."""
    with socket.create_server(("localhost", 0)) as found:
        port = int(found.getsockname()[1])
    process = subprocess.Popen(command(port), stdout=subprocess.DEVNULL, env=env)
    try:
        while True:
            assert process.poll() is None, "the server has ended"
            with contextlib.suppress(OSError):
                if status(port, ready) == 200:
                    break
            time.sleep(0.2)
        yield port, process.pid
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:  # what was measured is not lost for a server that does not end
            process.kill()
            process.wait()


def post(port: int, body: bytes) -> tuple[int, dict[str, Any]]:
    """The status and the JSON of the answer to a completion."""
    connection = http.client.HTTPConnection("localhost", port, timeout=600)
    try:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def status(port: int, path: str) -> int:
    """The status of an answer whose body may be empty."""
    connection = http.client.HTTPConnection("localhost", port, timeout=600)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def good(tokens: int) -> bytes:
    return json.dumps({"prompt": PROMPT, "max_tokens": tokens, "temperature": 0}).encode()


Speed = tuple[float, float]
"""New tokens per second, and per second of processor time, prompts included."""


def serving_speed(port: int, pid: int, clients: int, tokens: int, temperature: float = 0.7) -> Speed:
    """Speed over all clients, which begin at the same time with prompts of their own."""
    client, model = client_of(port)
    counts = []

    def ask(number: int) -> None:
        options = {"max_tokens": tokens, "temperature": temperature, "seed": number}
        usage = {"stream_options": {"include_usage": True}}
        prompt = f"{number + 1}. {LONG_PROMPT}"
        *_, last = client.completions.create(model=model, prompt=prompt, stream=True, **options, **usage)
        counts.append(last.usage.completion_tokens)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    started, used = time.perf_counter(), processor_seconds(pid)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - started), sum(counts) / (processor_seconds(pid) - used)


def client_of(port: int) -> tuple[Any, str]:
    """OpenAI's client, and the name of the model."""
    from openai import OpenAI

    client = OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)
    return client, client.models.list().data[0].id


@dataclass(frozen=True)
class Turn:
    """A turn of a conversation: tokens of the prompt and of the answer, and seconds by the clock."""

    prompt_tokens: int
    new_tokens: int
    seconds_to_first: float
    seconds: float
    """From the first text to the last one."""

    @property
    def tokens_per_second(self) -> float:
        """Of the answer, after its first text."""
        return (self.new_tokens - 1) / self.seconds if self.seconds else 0.0


def conversation(port: int, turns: int, tokens: int, temperature: float = 0.7) -> list[Turn]:
    """The turns of a conversation that grows; none of a model without a chat template."""
    from openai import BadRequestError

    client, model = client_of(port)
    messages: list[dict[str, str]] = []
    found = []
    for number in range(turns):
        messages.append({"role": "user", "content": (PROMPT + "? " if number == 0 else "") + QUESTION})
        options = {"max_tokens": tokens, "temperature": temperature, "seed": number, "stream": True}
        usage = {"stream_options": {"include_usage": True}}
        text, times, started = "", [], time.perf_counter()
        try:
            for chunk in client.chat.completions.create(model=model, messages=messages, **options, **usage):
                if chunk.choices and chunk.choices[0].delta.content:
                    times.append(time.perf_counter())
                    text += chunk.choices[0].delta.content
        except BadRequestError:
            return []
        first, last = (times[0], times[-1]) if times else (time.perf_counter(),) * 2
        sizes = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
        found.append(Turn(*sizes, seconds_to_first=first - started, seconds=last - first))
        messages.append({"role": "assistant", "content": text})
    return found


def generate_speed(model: str, threads: int, tokens: int) -> Speed:
    """Speed of `castlm generate`, without loading."""
    import torch

    from castlm.packed.generate import generate_text, load_to_generate

    torch.set_num_threads(threads)
    loaded, tokenizer = load_to_generate(model, as_stored=False)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    generate_text(loaded, tokenizer, ids, max_new_tokens=8)  # warms up
    started, used = time.perf_counter(), time.process_time()
    count = generate_text(loaded, tokenizer, ids, max_new_tokens=tokens).new_tokens
    return count / (time.perf_counter() - started), count / (time.process_time() - used)


def processor_seconds(pid: int) -> float:
    """Seconds of processor time that a process and its running children have used."""
    with open(f"/proc/{pid}/stat") as stat:
        ticks = stat.read().rpartition(")")[2].split()[11:13]  # of itself and of the kernel for it
    children = [child for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]
    of_children = sum(processor_seconds(int(child)) for child in children)
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK") + of_children


def resident(pid: int) -> float:
    """MiB of memory of a process."""
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def load(port: int, pid: int, minutes: float, tokens: int) -> dict[str, Any]:
    """Ten clients with mixed requests: the answers, and the memory of the server over time."""
    until = time.monotonic() + 60 * minutes
    statuses: Counter[str] = Counter()

    def client(number: int) -> None:
        turn = number
        while time.monotonic() < until:
            turn += 1
            if number % 2 == 0:
                statuses[f"good {post(port, good(tokens))[0]}"] += 1
            elif turn % 4 == 0:  # goes away in the middle
                with socket.create_connection(("localhost", port)) as connection:
                    body = good(tokens)
                    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    head += f"Content-Length: {len(body)}\r\n\r\n"
                    connection.sendall(head.encode() + body)
                    time.sleep(0.2)
                statuses["gone"] += 1
            else:
                try:
                    statuses[f"bad {post(port, BAD[turn % len(BAD)])[0]}"] += 1
                except OSError:  # the server closed the connection before the whole of a long body was sent
                    statuses["bad closed"] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    memory = []
    for _ in range(10):
        time.sleep(6 * minutes)
        memory.append(round(resident(pid)))
        print(
            f"{len(memory) * minutes / 10:5.1f} min  {memory[-1]:6,} MiB  {dict(sorted(statuses.items()))}", flush=True
        )
    for thread in threads:
        thread.join()
    if refused := [status for status in statuses if status.startswith("good") and status != "good 200"]:
        sys.exit(f"good requests were answered by {', '.join(refused)} in place of 200")
    return {"minutes": minutes, "answers": dict(sorted(statuses.items())), "memory_mib": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-server", metavar="PROGRAM", help="of llama.cpp, compiled for this processor")
    parser.add_argument("--gguf", metavar="FILE", help="the model of llama-server")
    parser.add_argument("--json")
    options = parser.parse_args()
    if (options.llama_server is None) != (options.gguf is None):
        parser.error("--llama-server and --gguf go together")
    result: dict[str, Any] = {"machine": machine(), "columns": ["a second", "a second of processor time"]}

    def show(name: str, speed: Speed) -> None:
        result[name] = speed
        print(f"{name}: {speed[0]:.1f} tokens a second, {speed[1]:.1f} a second of processor time", flush=True)

    show("castlm generate", generate_speed(options.model, options.threads, options.new_tokens))
    commands = {"castlm serve": castlm_command(options.model, options.threads)}
    if options.llama_server:
        commands["llama-server"] = llama_command(options.llama_server, options.gguf, options.threads)
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(served(command)) for name, command in commands.items()}
        for port, pid in servers.values():
            serving_speed(port, pid, 1, 8)  # warms up
        for clients in CLIENTS:
            speeds: dict[str, list[Speed]] = {name: [] for name in servers}
            for _ in range(options.rounds):
                for name, (port, pid) in servers.items():
                    speeds[name].append(serving_speed(port, pid, clients, options.new_tokens, options.temperature))
            for name, found in speeds.items():
                medians = [statistics.median(column) for column in zip(*found)]
                show(f"{name}, {clients} clients", (medians[0], medians[1]))
        for name, (port, _) in servers.items():
            turns = conversation(port, options.turns, options.new_tokens, options.temperature)
            result[f"conversation, {name}"] = [asdict(turn) for turn in turns]
            for number, turn in enumerate(turns, 1):
                print(
                    f"{name}, turn {number}: {turn.prompt_tokens:,} tokens of prompt, {turn.seconds_to_first:.2f} s to "
                    f"the first text, then {turn.tokens_per_second:.1f} tokens a second",
                    flush=True,
                )
        if options.minutes:
            result["load"] = load(*servers["castlm serve"], options.minutes, options.new_tokens // 4)
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
