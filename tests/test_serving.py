"""`castlm serve`: every request is answered with a status and a sentence, and good ones as `castlm generate` does."""

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from multiprocessing.process import BaseProcess
from pathlib import Path

import httpx2 as httpx
import pytest
import torch

from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.core.sparsify import prune_
from castlm.packed.generate import generate_text
from castlm.packed.in_engine import model_in_engine, tokenizer_in_engine
from castlm.packed.layers import pack_model_
from castlm_runtime import engine as engine_module
from castlm_runtime.defaults import Defaults
from castlm_runtime.engine import Answer, Batch, BusyError, Engine
from castlm_runtime.machine import address_space, available_memory
from castlm_runtime.model import block_bytes
from castlm_runtime.server import app as app_module
from castlm_runtime.server import connections
from castlm_runtime.server.app import make_app
from castlm_runtime.server.run import default_name
from tests.ranks import free_port, start_command, wait_ranks
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def model_and_tokenizer(packed: bool = True):
    model, tokenizer = tiny_model("llama", max_position_embeddings=256).eval(), tiny_tokenizer()
    if packed:
        prune_(model)
        pack_model_(model, 2, 4, dtype=torch.float32)
    return model, tokenizer


def engine_of(model, tokenizer, **options) -> Engine:
    """An engine whose tokens are those of transformers."""
    defaults = Defaults.of(model.generation_config.to_diff_dict())
    return Engine(model_in_engine(model), tokenizer_in_engine(tokenizer), defaults, kind="fp32", **options)


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = model_and_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


@pytest.fixture
def engine(loaded) -> Iterator[Engine]:
    with closing(engine_of(*loaded)) as engine:
        yield engine


JSON = {"Content-Type": "application/json"}


def ask(engine: Engine, *requests: tuple[str, str, object]) -> list[httpx.Response]:
    """The responses to requests that are sent at the same time: method, path, and JSON or bytes."""

    async def send() -> list[httpx.Response]:
        transport = httpx.ASGITransport(make_app(engine, "tiny"), raise_app_exceptions=True)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://localhost", headers=JSON, timeout=60
        ) as client:
            return await asyncio.gather(
                *(
                    client.request(method, path, content=body if isinstance(body, bytes) else json.dumps(body).encode())
                    for method, path, body in requests
                )
            )

    return asyncio.run(send())


def head_of(length: int, *more: str) -> bytes:
    """The head of a completion in bytes, with a body of `length`."""
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", *more]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def is_idle(engine: Engine) -> bool:
    """Whether the engine lets go of all answers within a minute: it does so a moment after clients hear their end."""
    deadline = time.monotonic() + 60
    while (engine.num_running or engine._line.served() or engine._line.waiting()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not engine.batch.blocks.num_used


def complete(engine: Engine, **body: object) -> httpx.Response:
    return ask(engine, ("POST", "/v1/completions", {"model": "tiny", "prompt": "Story", "temperature": 0} | body))[0]


@pytest.mark.parametrize("family", ["packed", "gemma3_text"])
def test_answers_are_those_of_generate(family):
    """Of models in memory, packed and plain."""
    if family == "packed":
        model, tokenizer = model_and_tokenizer()
    else:
        model, tokenizer = tiny_model(family, max_position_embeddings=256).eval(), tiny_tokenizer()
    prompts = ["Story 1", "a", "Once upon a time " * 3, "xyz" * 20, "Story", "b" * 90]
    expected = [
        generate_text(model, tokenizer, tokenizer(prompt, return_tensors="pt")["input_ids"], max_new_tokens=20 + i)
        for i, prompt in enumerate(prompts)
    ]
    bodies = [{"prompt": p, "max_tokens": 20 + i, "temperature": 0} for i, p in enumerate(prompts)]
    with closing(engine_of(model, tokenizer)) as engine:
        found = [r.json() for r in ask(engine, *(("POST", "/v1/completions", body) for body in bodies))]
    assert [r["usage"]["completion_tokens"] for r in found] == [e.new_tokens for e in expected]
    assert [r["choices"][0]["text"] for r in found] == [e.text for e in expected]
    assert all(r["choices"][0]["finish_reason"] in ("length", "stop") for r in found)


def test_a_long_prompt_is_read_in_parts(monkeypatch, loaded, engine):
    monkeypatch.setattr(engine_module, "_PROMPT_PART", 16)
    model, tokenizer = loaded
    ids = tokenizer("abcdefgh " * 12, return_tensors="pt")["input_ids"]
    expected = generate_text(model, tokenizer, ids, max_new_tokens=8)
    assert complete(engine, prompt=ids[0].tolist(), max_tokens=8).json()["choices"][0]["text"] == expected.text


def test_a_stream_holds_the_same_text(engine):
    whole = complete(engine, max_tokens=12).json()
    streamed = complete(engine, max_tokens=12, stream=True, stream_options={"include_usage": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert chunks.pop()["usage"] == whole["usage"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_chat_and_models(engine):
    body = {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "seed": 3}
    one, other, stream, models, model, health = ask(
        engine,
        ("POST", "/v1/chat/completions", body | {"max_completion_tokens": 9}),
        ("POST", "/v1/chat/completions", body | {"max_tokens": 9}),
        ("POST", "/v1/chat/completions", body | {"max_tokens": 9, "stream": True}),
        ("GET", "/v1/models", {}),
        ("GET", "/v1/models/tiny", {}),
        ("GET", "/health", {}),
    )
    answer = one.json()["choices"][0]["message"]
    assert answer["role"] == "assistant"
    assert answer == other.json()["choices"][0]["message"]  # the seed decides
    deltas = [json.loads(e[6:])["choices"][0]["delta"] for e in stream.text.split("\n\n")[:-2]]
    assert "".join(delta.get("content", "") for delta in deltas) == answer["content"]
    assert models.json()["data"][0]["id"] == model.json()["id"] == "tiny"
    assert health.status_code == 200


def test_top_k_and_repetition_penalty_are_those_of_generate(loaded, engine):
    model, tokenizer = loaded
    hot = {"max_tokens": 20, "temperature": 2, "seed": 3}
    plain = complete(engine, max_tokens=20, temperature=0).json()["choices"][0]["text"]
    assert complete(engine, **hot, top_k=1).json()["choices"][0]["text"] == plain
    assert complete(engine, **hot, top_k=-1).json() != complete(engine, **hot, top_k=2).json()
    prompt = tokenizer("Story", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=20, do_sample=False, repetition_penalty=3.0)[0]
    expected = tokenizer.decode(tokens[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert expected != plain
    for name in ("repetition_penalty", "repeat_penalty"):
        assert complete(engine, max_tokens=20, temperature=0, **{name: 3}).json()["choices"][0]["text"] == expected
    assert complete(engine, repetition_penalty=2, repeat_penalty=2).status_code == 400


def test_stop_texts_end_an_answer_and_are_no_part_of_it(engine):
    text = complete(engine, max_tokens=20).json()["choices"][0]["text"]
    stop = text[5:8]
    for stream in (False, True):
        found = complete(engine, max_tokens=20, stop=["never", stop], stream=stream)
        events = [json.loads(e[6:]) for e in found.text.split("\n\n")[:-2]] if stream else [found.json()]
        assert "".join(event["choices"][0]["text"] for event in events) == text[: text.index(stop)]
        assert events[-1]["choices"][0]["finish_reason"] == "stop"


GOOD = {"prompt": "a", "max_tokens": 2}
REFUSED = {
    "prompt": (
        *(None, "", [], ["a", 3], [["a"]], [[]], [[1], []], ["a"] * 65, [10**9], [-1], [1.5], [True], {"a": 1}),
        "a" * 500,
    ),
    "max_tokens": (0, -1, 1.5, "9", 10**9, 1 << 70, True, [1], float("nan")),
    "temperature": (-1, 3, "hot", float("nan"), float("inf"), [0], True),
    "top_p": (-1, 1.1, "a", float("nan")),
    "top_k": (-2, 1.5, "a", 1 << 40, True),
    "repetition_penalty": (0, -1, 11, "a", float("nan"), True),
    "repeat_penalty": (0,),
    "min_p": (-0.1, 2, "a", float("nan")),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), (2.1, -3, "a", float("nan"), True)),
    "logit_bias": ([5], {"5": 101}, {"5": "a"}, {"5": float("nan")}, {"-1": 1}, {"a": 1}, {"99999": 1}, {"²": 1}),
    "seed": (-1, 1.5, "a", 1 << 70),
    "n": (0, 65, 1.5, "a", True),
    "stop_token_ids": (3, [-1], [1.5], ["a"], [10**9], [1] * 65),
    **dict.fromkeys(("ignore_eos", "echo"), (1, "yes", [])),
    "logprobs": (-1, 21, 1.5, "a", True),
    "response_format": (
        *("json", {"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"name": "a"}}),
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}},
        {"type": "json_object", "schema": {}},
    ),
    **dict.fromkeys(("tools", "chat_template_kwargs", "top_logprobs"), (1,)),
    "stop": ("", [""], [1], 3, ["a"] * 9, ["a" * 2000], {}),
    "stream": (1, "yes", []),
    "best_of": (2,),
    "stream_options": ([], {"include_usage": "yes"}, {"other": True}, {"include_usage": True}),
    "suffix": ("b",),
    "temprature": (1,),
}
"""Values of the fields of a completion."""

BAD = [
    *((body, 400) for body in (b"{", b"", b"[1]", b'"a"', b"\xff\xfe", b"[" * 60_000, {})),
    (b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", 400),
    (b"x" * 70_000, 413),
    ({"prompt": "a" * 70_000}, 413),
    (b'{"prompt": "\\ud800"}', 400),
    (b'{"\\ud800": 1, "prompt": "a"}', 400),
    (b'{"model": "\\ud800", "prompt": "a"}', 404),
    *((GOOD | {"model": model}, 404) for model in ("other", ["tiny"])),
    *((GOOD | {field: value}, 400) for field, values in REFUSED.items() for value in values),
]
USER = {"role": "user", "content": "a"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"id": "b", "type": "function", "function": {"name": "look", "arguments": "{}"}}
IMAGE = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
BAD_CHAT = [
    {},
    *(
        {"messages": given}
        for given in (None, [], "hi", ["hi"], [{"role": "user"}], [USER | {"role": 1}], [USER] * 1001)
    ),
    *(
        {"messages": [USER | {"content": content}]}
        for content in (3, [IMAGE], [{"type": "text", "text": 3}], "a" * 400, "\ud800")
    ),
    *({"messages": [USER], "tools": tools} for tools in (3, ["a"], [{"type": "function"}], [TOOL])),  # no form for it
    *({"messages": [USER], "tools": [TOOL], "tool_choice": choice} for choice in ("required", {"type": "function"})),
    {"messages": [USER], "tool_choice": "auto"},
    {"messages": [USER], "tools": [{**TOOL, "function": TOOL["function"] | {"strict": True}}], "tool_choice": "none"},
    {"messages": [USER], "max_tokens": 3, "max_completion_tokens": 3},
    {"messages": [USER], "stream": True, "stream_options": {"include_obfuscation": True}},
    *({"messages": [USER], "chat_template_kwargs": given} for given in ([], {"a-b": 1}, {"messages": 1}, {"other": 1})),
    {"messages": [USER], "top_logprobs": 3},
    *({"messages": [USER], "logprobs": given} for given in (3, "yes")),
    {"messages": [USER], "logprobs": True, "top_logprobs": 21},
    {"messages": [USER], "prompt": "a"},
    {"messages": [USER], "echo": True},
    # What a template leaves out is not silently left out.
    *({"messages": [USER | {name: "b"}]} for name in ("name", "reasoning_content", "tool_call_id", "tool_calls", "x")),
    {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]},
    {"messages": [USER, {"role": "tool", "content": "a", "tool_call_id": "b"}]},
    {"messages": [USER, {"role": "tool", "content": "a"}]},
    {"messages": [USER, {"role": "assistant", "content": None}]},
]


def test_bad_requests_are_answered_with_a_sentence_before_the_model_runs(engine, monkeypatch):
    monkeypatch.setattr(engine, "submit", lambda answer: pytest.fail("it reached the model"))
    requests = [("POST", "/v1/completions", body) for body, _ in BAD]
    requests += [("POST", "/v1/chat/completions", body) for body in BAD_CHAT]
    requests += [("GET", "/v1/completions", {}), ("POST", "/v1/models", {}), ("GET", "/no", {}), ("GET", "/", {})]
    expected = [status for _, status in BAD] + [400] * len(BAD_CHAT) + [405, 405, 404, 404]
    for request, response, status in zip(requests, ask(engine, *requests), expected):
        assert response.status_code == status, (request, response.text)
        assert len(response.json()["error"]["message"].split()) > 3
        assert "Traceback" not in response.text
        assert (status == 405) == ("Allow" in response.headers)


def test_what_fails_in_the_model_ends_one_request_and_not_the_engine(engine, monkeypatch):
    def fail(*args: object) -> None:
        raise RuntimeError("secret of the machine")

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "step", fail)
        response = complete(engine)
        assert response.status_code == 500
        assert "secret" not in response.text
        assert "secret" not in complete(engine, stream=True).text
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "choose", fail)
        assert complete(engine).status_code == 500
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_take", lambda *_: fail_by_its_weights())
        assert complete(engine).status_code == 500  # and not 400: the request was good
    with monkeypatch.context() as patch:
        patch.setattr(Answer, "take", panic)
        assert complete(engine).status_code == 500
    assert complete(engine).status_code == 200


def fail_by_its_weights() -> None:
    raise InputError("the weights are damaged")


def panic(*arguments: object) -> None:
    """As a tokenizer does in Rust."""
    raise type("PanicException", (BaseException,), {})("index out of bounds")


def test_an_engine_that_breaks_answers_every_request(engine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_next", panic)
        patch.setattr("threading.excepthook", lambda _: None)
        assert complete(engine).status_code == 503
        engine._thread.join(20)
    later, health = ask(engine, ("POST", "/v1/completions", GOOD), ("GET", "/health", {}))
    assert (later.status_code, health.status_code) == (503, 503)


def test_a_context_that_memory_cannot_hold_is_cut_or_refused(monkeypatch):
    model, tokenizer = model_and_tokenizer(packed=False)
    token_bytes = block_bytes(model_in_engine(model), "fp32") / 64
    said: list[str] = []

    def opened(tokens: int, **options: int) -> Engine:
        monkeypatch.setattr(engine_module, "available_memory", lambda: 2.5 * tokens * token_bytes / 0.8 + 1)
        return engine_of(model, tokenizer, say=said.append, **options)

    for tokens, expected in ((1000, 256), (100, 100)):
        with closing(opened(tokens)) as engine:
            assert engine.context == expected
            assert complete(engine, max_tokens=150).status_code == (200 if expected > 150 else 400)
    assert sum("100 of the model's 256 tokens" in line for line in said) == 1
    with closing(opened(1000, context=80)) as engine:
        assert engine.context == 80
    for tokens, context, named in ((1000, 300, "300"), (100, 120, "120"), (3, None, "7 tokens")):
        with pytest.raises(InputError, match=named):
            opened(tokens, context=context)


def test_the_queue_and_the_caches_are_bounded(engine, monkeypatch):
    seen = []
    step = Batch.step

    def watched(batch, sequences):
        seen.append((len(sequences), batch.blocks.num_used))
        return step(batch, sequences)

    monkeypatch.setattr(Batch, "step", watched)
    monkeypatch.setattr(engine._line, "most_waiting", 20)
    ids, answers, refused = [5, 6, 7], [], 0
    for _ in range(40):
        answer = Answer(ids, 60)
        try:
            engine.submit(answer)
            answers.append(answer)
        except BusyError:
            refused += 1
    assert is_idle(engine)
    assert {answer.reason for answer in answers} == {"length"}
    assert len(answers) + refused == 40
    assert 1 < max(count for count, _ in seen) <= engine_module.MAX_TOGETHER
    assert max(blocks for _, blocks in seen) <= engine.batch.blocks.num_blocks
    assert {tuple(answer.tokens) for answer in answers} == {tuple(answers[0].tokens)}


def test_a_short_request_is_answered_before_the_long_ones_that_fill_the_machine(monkeypatch):
    monkeypatch.setattr(engine_module, "MAX_TOGETHER", 8)
    with closing(engine_of(*model_and_tokenizer())) as engine:
        engine.defaults = Defaults()  # a random model may end at any token
        ended: list[str] = []

        def submit(name: str, max_new_tokens: int) -> None:
            answer = Answer([5, 6, 7], max_new_tokens, address="here")
            answer.heard = lambda text: None if text else ended.append(name)
            engine.submit(answer)

        for number in range(12):
            submit(f"long {number}", 250)
        submit("short", 5)
        assert is_idle(engine)
        assert ended.index("short") == 0
        assert len(ended) == 13


def test_a_request_that_begins_as_one_before_it_reads_the_rest_alone(engine):
    """Whatever is shared, the answers are the same."""
    long = "Once upon a time there was a fox. " * 4
    first, second = (complete(engine, prompt=long, max_tokens=9).json() for _ in range(2))
    assert first["choices"][0]["text"] == second["choices"][0]["text"]
    assert engine.batch.blocks.num_hits == len(long) // 64 * 64
    other = complete(engine, prompt=long[:100] + "wolf " + long[105:], max_tokens=9).json()
    with closing(engine_of(*model_and_tokenizer(), shares_prefixes=False)) as alone:
        assert complete(alone, prompt=long, max_tokens=9).json()["choices"] == first["choices"]
        found = complete(alone, prompt=long[:100] + "wolf " + long[105:], max_tokens=9).json()
        assert found["choices"] == other["choices"]
        assert alone.batch.blocks.num_hits == 0


def test_a_request_that_is_refused_for_others_is_told_when_to_ask_again(engine, monkeypatch):
    monkeypatch.setattr(engine, "_next", lambda: None)  # nothing is taken in
    monkeypatch.setattr(engine._line, "most_work", 250)
    bodies = [{"prompt": "a", "max_tokens": 200, "stream": stream} for stream in (True, False)]

    async def send() -> list[httpx.Response]:
        transport = httpx.ASGITransport(make_app(engine, "tiny"))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=20) as client:
            posts = [asyncio.ensure_future(client.post("/v1/completions", json=body)) for body in bodies]
            await asyncio.wait(posts, return_when=asyncio.FIRST_COMPLETED, timeout=20)  # two are too much
            posts.append(asyncio.ensure_future(client.post("/v1/completions", json={"prompt": "a", "max_tokens": 60})))
            while sum(post.done() for post in posts) < 2:
                await asyncio.sleep(0.01)
            posts.pop().cancel()  # it waits
            return [post.result() for post in posts]

    refused = asyncio.run(send())
    assert [response.status_code for response in refused] == [429, 429]
    assert all(response.headers["Retry-After"] == "5" for response in refused)
    assert all(len(response.json()["error"]["message"].split()) > 3 for response in refused)


def start_serving(folder: Path, port: int | None = None) -> tuple[str, BaseProcess]:
    """`castlm serve` in a process, and its address; `folder` has its log, and may have a model, "small"."""
    port = port or free_port()
    if not (folder / "small").exists():
        save_tiny(folder / "small")
    arguments = (str(folder / "small"), "--port", str(port), "--threads", "1")
    process = start_command("castlm", "serve", *arguments, log=folder / "log")
    url = f"http://localhost:{port}"
    for _ in range(600):
        assert process.is_alive(), (folder / "log").read_text()
        try:
            httpx.get(f"{url}/health")
            return url, process
        except httpx.ConnectError:
            time.sleep(0.1)
    pytest.fail("the server does not start")


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[str, BaseProcess]]:
    url, process = start_serving(tmp_path_factory.mktemp("served"))
    yield url, process
    os.kill(process.pid, signal.SIGINT)
    assert wait_ranks([process], 30) == [130]


def test_sigterm_ends_open_streams_with_an_error_and_leaves_no_traceback(tmp_path):
    url, process = start_serving(tmp_path)
    body = json.dumps({"prompt": "a", "max_tokens": 250, "stream": True}).encode()
    streams = []
    for _ in range(40):  # eight are answered at a time, so that some are open whenever the signal comes
        streams.append(socket.create_connection(("localhost", int(url.rsplit(":", 1)[1]))))
        streams[-1].sendall(head_of(len(body), "Connection: close") + body)
    assert streams[0].recv(12) == b"HTTP/1.1 200"
    os.kill(process.pid, signal.SIGTERM)
    ends = []
    for stream in streams:
        stream.settimeout(30)
        with stream, stream.makefile("rb") as answer:
            text = answer.read()
        is_told = any(code in text for code in (b'"code": 503', b'"code":503'))
        ends.append("error" if is_told else "done" if b"[DONE]" in text else text)
    assert set(ends) <= {"done", "error"}
    assert "error" in ends
    assert wait_ranks([process], 30) == [143]
    assert "Traceback" not in (tmp_path / "log").read_text()


def post_of(**body: object) -> bytes:
    content = json.dumps({"prompt": "a", "temperature": 0} | body).encode()
    return head_of(len(content), "Connection: close") + content


def open_stream(url: str, num_tokens: int) -> socket.socket:
    """A stream of so many tokens, once it has begun."""
    stream = socket.create_connection(("localhost", int(url.rsplit(":", 1)[1])), timeout=60)
    stream.sendall(post_of(max_tokens=num_tokens, stream=True, ignore_eos=True))
    assert stream.recv(12) == b"HTTP/1.1 200"
    return stream


def rest_of(stream: socket.socket) -> bytes:
    """What comes until the other side ends the connection, by whatever means."""
    parts = []
    with stream, contextlib.suppress(ConnectionResetError):
        while part := stream.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def children(process: int) -> list[int]:
    files = Path(f"/proc/{process}/task").glob("*/children")
    return [int(number) for file in files for number in file.read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes in /proc")
def test_a_server_that_is_killed_in_an_answer_leaves_nothing_and_starts_again(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE  # so that a process renders it
    tiny_model("llama", max_position_embeddings=8192).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "small").rglob("*")}

    url, process = start_serving(tmp_path)
    stream, others = open_stream(url, 8000), children(process.pid)
    assert len(others) == 1
    os.kill(process.pid, signal.SIGKILL)
    assert b"[DONE]" not in rest_of(stream)
    assert wait_ranks([process], 30) == [-signal.SIGKILL]
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{other}").exists() and "Z" not in state_of(other) for other in others):
        assert time.monotonic() < deadline, "a process outlives its server"
        time.sleep(0.05)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "small").rglob("*")} == files

    url, process = start_serving(tmp_path, int(url.rsplit(":", 1)[1]))
    assert b"[DONE]" in rest_of(open_stream(url, 20))
    os.kill(process.pid, signal.SIGTERM)
    assert wait_ranks([process], 30) == [143]


def state_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_a_prompt_that_memory_cannot_hold_ends_alone(engine, monkeypatch):
    expected = complete(engine, prompt="a", max_tokens=40, ignore_eos=True).json()["choices"]
    forward = engine.model.forward

    def limited(cache: object, parts: list) -> None:
        if sum(len(part.tokens) for part in parts) > 60:
            raise MemoryError
        forward(cache, parts)

    monkeypatch.setattr(engine.model, "forward", limited)
    short = {"prompt": "a", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    bodies = [short, {"prompt": "b" * 100, "max_tokens": 5}, short, {"prompt": "c" * 120, "max_tokens": 5}]
    found = ask(engine, *(("POST", "/v1/completions", body) for body in bodies))
    assert [response.status_code for response in found] == [200, 503, 200, 503]
    assert all(response.json()["choices"] == expected for response in (found[0], found[2]))
    assert is_idle(engine)


def test_a_server_under_a_memory_limit_takes_a_cache_that_fits(monkeypatch):
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = address_space() + (100 << 20)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, most))
    assert available_memory() <= 100 << 20


def test_the_openai_client_is_answered(server):
    import openai

    client = openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0)
    assert client.models.list().data[0].id == "small"
    answer = client.completions.create(model="small", prompt="Story", max_tokens=5, temperature=0)
    assert answer.usage.completion_tokens == 5
    pieces = client.completions.create(model="small", prompt="Story", max_tokens=5, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == answer.choices[0].text
    with pytest.raises(openai.NotFoundError, match="'small'"):
        client.completions.create(model="large", prompt="Story")
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="small", messages=[{"role": "user", "content": "a"}])


def test_a_client_that_goes_away_ends_its_request(server):
    """Sixty long answers that nobody waits for: most end before their last token."""
    port = int(server[0].rsplit(":", 1)[1])

    def metric(start: str) -> float:
        lines = httpx.get(f"{server[0]}/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start))

    whole = [f'castlm_answers_total{{reason="{reason}"}}' for reason in ("stop", "length")]
    before = sum(map(metric, whole))
    for stream in (False, True) * 30:
        body = json.dumps({"prompt": "a", "max_tokens": 250, "stream": stream}).encode()
        with socket.create_connection(("localhost", port)) as connection:
            connection.sendall(head_of(len(body)) + body)
    response = httpx.post(f"{server[0]}/v1/completions", json={"prompt": "a", "max_tokens": 2}, timeout=60)
    assert response.status_code == 200
    deadline = time.monotonic() + 60
    while metric("castlm_requests_") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sum(map(metric, whole)) - before <= 30


@pytest.fixture
def listening(engine, monkeypatch) -> Iterator[tuple[int, connections.Server]]:
    """A server in this process with short deadlines: its port."""
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 1.0)
    monkeypatch.setattr(connections, "READ_SECONDS", 1.0)
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 20)
    port = free_port()
    server = connections.Server(make_app(engine, "tiny"), engine, "localhost", port)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield port, server
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def is_cut(connection: socket.socket, seconds: float) -> bool:
    """Whether the server ends a connection in time, whatever it sends before."""
    connection.settimeout(seconds)
    with contextlib.suppress(ConnectionResetError):
        while True:
            try:
                if not connection.recv(1 << 16):
                    return True
            except TimeoutError:
                return False
    return True


HALF = [b"", b"G", b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-", head_of(100), head_of(100) + b"{"]


def test_the_oldest_connections_without_a_whole_request_give_way(listening, monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 3600.0)
    port, _ = listening
    opened = []
    for number in range(60):
        opened.append(socket.create_connection(("localhost", port)))
        opened[-1].sendall(HALF[number % len(HALF)])
    with httpx.Client(headers=JSON, timeout=20) as client:
        for _ in range(3):
            assert client.post(f"http://localhost:{port}/v1/completions", json=GOOD).status_code == 200
    assert all(is_cut(connection, 5) for connection in opened[:40])
    for connection in opened:
        connection.close()


@pytest.mark.parametrize("half", [b"", HALF[2], HALF[4]])
def test_a_connection_without_a_whole_request_is_cut_at_its_deadline(half, listening, monkeypatch):
    monkeypatch.setattr(app_module, "_BODY_SECONDS", 1.0)
    with socket.create_connection(("localhost", listening[0])) as connection:
        connection.sendall(half)
        assert is_cut(connection, 60)


def test_a_client_that_does_not_read_is_cut(listening):
    port, server = listening
    with socket.create_connection(("localhost", port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        while not server.server_state.connections:
            time.sleep(0.01)
        (other_end,) = server.server_state.connections
        other_end.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            connection.sendall(b"GET /no HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1_000_000)


@pytest.mark.parametrize("path", ["v1/completions", "no"])
def test_a_body_that_is_no_http_ends_its_connection_and_leaves_no_traceback(path, listening, caplog):
    """A chunk without a length, before the answer (400) and after it (404)."""
    port, server = listening
    with socket.create_connection(("localhost", port)) as connection:
        head = f"POST /{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        connection.settimeout(20)
        status = b"" if path != "no" else connection.recv(1 << 16)
        connection.sendall(b"zz\r\n")
        assert (status or connection.recv(1 << 16))[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 404")
        deadline = time.monotonic() + 10
        while server.server_state.connections and time.monotonic() < deadline:
            time.sleep(0.01)  # the client keeps its end open
        assert not server.server_state.connections
        assert not server.server_state.tasks
    assert caplog.records == []


def test_requests_before_the_answer_to_the_first_one_are_not_read(listening):
    with socket.create_connection(("localhost", listening[0])) as connection:
        connection.settimeout(20)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(1 << 16):
                answer += part
    assert answer.count(b"HTTP/1.1 200") == 1


@pytest.mark.parametrize("head", [head_of(8 << 20, "Connection: close"), head_of(8 << 20)])
def test_a_body_that_is_too_long_is_answered_so_that_its_client_can_read_it(head, listening):
    with socket.create_connection(("localhost", listening[0])) as connection:
        connection.settimeout(20)
        connection.sendall(head + b"x" * (8 << 20))  # all of it, as most clients do before they read
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413 ")
    with socket.create_connection(("localhost", listening[0])) as connection:
        connection.sendall(head_of(8 << 20, "Expect: 100-continue"))
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413 ")  # instead of 100


def test_what_a_web_page_can_send_does_not_reach_the_model(engine, monkeypatch):
    """A page of another site sends text or forms, or JSON under a name that it has given this machine's address."""
    app = make_app(engine, "tiny", ("Model.lan", "0.0.0.0"))
    body = json.dumps(GOOD).encode()

    async def statuses(cases: list[tuple[str, dict[str, str]]]) -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            post = [client.post("/v1/completions", content=body, headers={"Host": h} | more) for h, more in cases]
            return [response.status_code for response in await asyncio.gather(*post)]

    ours = [
        "localhost",
        "LOCALHOST:8000",
        "localhost.:1",
        "127.0.0.1:8000",
        "[::1]:8000",
        "192.168.7.3",
        "model.lan:80",
    ]
    theirs = ["evil.example", "localhost.evil.example", "evil.example:8000", "127.0.0.1.evil.example", "a:b", "[::1"]
    assert asyncio.run(statuses([(host, JSON) for host in ours])) == [200] * len(ours)
    kinds = ["application/json; charset=utf-8", "Application/JSON"]
    assert asyncio.run(statuses([("localhost", {"Content-Type": kind}) for kind in kinds])) == [200, 200]
    monkeypatch.setattr(engine, "submit", lambda answer: pytest.fail("it reached the model"))
    assert asyncio.run(statuses([(host, JSON) for host in theirs])) == [403] * len(theirs)
    kinds = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", "", "text/json"]
    assert asyncio.run(statuses([("localhost", {"Content-Type": kind}) for kind in kinds])) == [415] * len(kinds)
    assert asyncio.run(statuses([("localhost", {})])) == [415]


def test_a_chat_template_that_does_not_end_holds_up_no_completion(engine, monkeypatch):
    monkeypatch.setattr("castlm_runtime.chat.TEMPLATE_SECONDS", 0.5)
    monkeypatch.setattr("castlm_runtime.server.app._MAX_READ", 1)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr(engine.tokenizer, "_templates", {"default": endless})
    chats = [("POST", "/v1/chat/completions", {"messages": [USER]})] * 4
    *found, good = ask(engine, *chats, ("POST", "/v1/completions", GOOD))
    assert good.status_code == 200
    assert sorted(response.status_code for response in found) == [400, 400, 429, 429]
    assert all("longer than 0.5 seconds" in found.text for found in found if found.status_code == 400)


def test_names_of_served_models(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    assert [default_name(name) for name in (".", f"{tmp_path}/run/", "org/model")] == ["run", "run", "org/model"]


def test_serve_refuses_an_address_before_it_loads_a_model(tmp_path, capsys):
    with socket.create_server(("localhost", 0)) as taken:
        for options in (
            ["--port", "99999"],
            ["--port", str(taken.getsockname()[1])],
            ["--host", "no.such.host.invalid"],
            ["--host", "a..b"],
            ["--host", "a" * 70],
        ):
            assert main(["serve", str(tmp_path), *options]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "--port = 99999 is out of range" in said[0]
    assert all("cannot listen on" in line for line in said[1:])
    assert len(said) == 5


def test_serve_names_the_packages_that_are_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve", str(tmp_path)]) == 2
    assert "pip install starlette uvicorn prometheus_client" in capsys.readouterr().err


@pytest.mark.parametrize("as_tokens", [True, False])
def test_lm_eval_measures_what_is_served_as_castlm_eval_does(server, tmp_path, as_tokens):
    """Its model `local-completions` asks for the log probabilities of prompts, by `echo` and `logprobs`."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    folder = save_tiny(tmp_path / "small")  # as the server's
    pairs = [("Once upon a time", " there was"), ("A", " b"), ("x" * 90, "yz"), ("two", " " + "words " * 9)]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    served = LocalCompletionsAPI(
        base_url=f"{server[0]}/v1/completions",
        model="small",
        tokenizer=str(folder),
        tokenizer_backend="huggingface",
        tokenized_requests=as_tokens,
        batch_size=3,
    )
    expected = HFLM(pretrained=tiny_model("llama").eval(), tokenizer=tiny_tokenizer()).loglikelihood(requests)
    for (value, is_greedy), (exact, is_exact) in zip(served.loglikelihood(requests), expected, strict=True):
        assert value == pytest.approx(exact, rel=2e-2)  # the cache is bf16
        assert is_greedy == is_exact
