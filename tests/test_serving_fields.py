"""Fields of requests: log probabilities, several texts, JSON, calls of tools; asked by the client of OpenAI."""

import asyncio
import json
import math
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
import torch

from castlm_runtime import engine as engine_module
from castlm_runtime.defaults import Defaults
from castlm_runtime.engine import Engine
from castlm_runtime.sampler import Chosen
from castlm_runtime.server.app import make_app
from castlm_runtime.server.tools import CallReader
from tests.test_serving import ask, complete, engine_of, model_and_tokenizer

TOOLS_TEMPLATE = (
    "{% if tools %}{{ tools[0].function.name }}: <tool_call>{}</tool_call>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if thinking %}<think>{% endif %}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = model_and_tokenizer()
    tokenizer.chat_template = TOOLS_TEMPLATE
    return model, tokenizer


@pytest.fixture
def engine(loaded) -> Iterator[Engine]:
    with closing(engine_of(*loaded)) as engine:
        yield engine


def with_client(engine: Engine, use: Any, **options: Any) -> Any:
    """What `use` returns of OpenAI's client for a server of the engine."""

    async def run() -> Any:
        transport = httpx.ASGITransport(make_app(engine, "tiny", **options))
        async with httpx.AsyncClient(transport=transport, timeout=60) as http:
            key = options.get("api_key", "none")
            client = openai.AsyncOpenAI(base_url="http://localhost/v1", api_key=key, http_client=http, max_retries=0)
            return await use(client)

    return asyncio.run(run())


def create(engine: Engine, **body: Any) -> Any:
    return with_client(
        engine, lambda c: c.completions.create(**{"model": "tiny", "prompt": "Story", "temperature": 0} | body)
    )


def chat(engine: Engine, **body: Any) -> Any:
    return with_client(
        engine, lambda c: c.chat.completions.create(**{"model": "tiny", "messages": [USER], "max_tokens": 5} | body)
    )


def chunks(engine: Engine, **body: Any) -> list[Any]:
    """The chunks of a streamed chat."""

    async def use(client: openai.AsyncOpenAI) -> list[Any]:
        body.setdefault("messages", [USER])
        return [chunk async for chunk in await client.chat.completions.create(model="tiny", stream=True, **body)]

    return with_client(engine, use)


def write(engine: Engine, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Makes the model write a text, whatever it is asked."""
    tokens = [*engine.tokenizer.encode(text), engine.tokenizer.eos_token_id]

    def chosen(logits: np.ndarray, choosers: list, threads: int) -> Chosen:
        places = [len(chooser_tokens(chooser)) for chooser in choosers]
        nothing = np.zeros((len(choosers), 1), np.float32), np.zeros((len(choosers), 0), np.int32)
        return Chosen([tokens[place] for place in places], {}, *nothing)

    def chooser_tokens(chooser: Any) -> range:
        return range(chooser.num_tokens - chooser._spec.num_prompt)

    monkeypatch.setattr(engine_module, "choose", chosen)


def exact_logprobs(loaded, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return loaded[0](torch.tensor([ids])).logits[0].double().log_softmax(-1)


def test_log_probabilities_of_prompt_and_answer_are_those_of_the_model(loaded, engine, monkeypatch):
    monkeypatch.setattr(engine_module, "_SCORED_PART", 5)
    prompt = "Once upon a time"
    found = create(engine, prompt=prompt, max_tokens=4, logprobs=3, echo=True).choices[0]
    ids = engine.tokenizer.encode(prompt)
    assert found.text.startswith(prompt)
    assert "".join(found.logprobs.tokens[: len(ids)]) == prompt
    assert found.logprobs.token_logprobs[0] is None
    assert found.logprobs.top_logprobs[0] is None
    tokens = ids + [engine.tokenizer.encode(text)[0] if text else 0 for text in found.logprobs.tokens[len(ids) :]]
    exact = exact_logprobs(loaded, ids)
    for place in range(1, len(ids)):
        assert found.logprobs.token_logprobs[place] == pytest.approx(float(exact[place - 1, tokens[place]]), abs=1e-4)
        best = max(found.logprobs.top_logprobs[place].values())
        assert best == pytest.approx(float(exact[place - 1].max()), abs=1e-4)
    # The answer is greedy: its tokens are the most probable ones.
    for place in range(len(ids), len(ids) + 4):
        assert found.logprobs.token_logprobs[place] == max(found.logprobs.top_logprobs[place].values())
    assert found.logprobs.text_offset[len(ids)] == len(prompt)
    assert len(found.logprobs.tokens) == len(ids) + 4


def test_a_prompt_can_be_scored_without_an_answer(engine):
    found = create(engine, prompt="Story", max_tokens=0, logprobs=0, echo=True)
    assert (found.choices[0].text, found.usage.completion_tokens) == ("Story", 0)
    assert len(found.choices[0].logprobs.token_logprobs) == 5
    assert complete(engine, max_tokens=0, echo=True).status_code == 400
    assert complete(engine, max_tokens=0).status_code == 400


def test_a_prompt_in_the_cache_is_scored_all_the_same(engine):
    long = "abcdefgh" * 20
    first, again = (create(engine, prompt=long, max_tokens=1, logprobs=1, echo=True) for _ in range(2))
    assert first.choices == again.choices
    assert len(again.choices[0].logprobs.tokens) == len(long) + 1


def test_log_probabilities_of_a_chat_come_with_bytes_and_in_a_stream(engine):
    whole = chat(engine, logprobs=True, top_logprobs=2, seed=4, max_tokens=6).choices[0].logprobs.content
    assert len(whole) == 6
    for entry in whole:
        assert len(entry.top_logprobs) == 2
        assert len(entry.bytes) <= 1 or entry.token == "<|endoftext|>"
    streamed = [
        entry
        for chunk in chunks(engine, logprobs=True, top_logprobs=2, seed=4, max_tokens=6)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert [entry.model_dump() for entry in streamed] == [entry.model_dump() for entry in whole]
    assert chat(engine).choices[0].logprobs is None


def test_several_prompts_and_several_texts_of_each(engine):
    hot = {"temperature": 1.5, "seed": 7, "max_tokens": 8}
    found = create(engine, prompt=["Story", "Other"], n=3, **hot)
    assert [choice.index for choice in found.choices] == list(range(6))
    alone = [create(engine, prompt=prompt, **hot | {"seed": 7 + i}) for prompt in ("Story", "Other") for i in range(3)]
    assert [choice.text for choice in found.choices] == [one.choices[0].text for one in alone]
    assert len({choice.text for choice in found.choices}) == 6
    assert found.usage.prompt_tokens == 10
    assert found.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    ids = [engine.tokenizer.encode(text) for text in ("Story", "Other")]
    assert [c.text for c in create(engine, prompt=ids, n=3, **hot).choices] == [c.text for c in found.choices]

    async def streamed(client: openai.AsyncOpenAI) -> dict[int, str]:
        texts: dict[int, str] = {}
        stream = await client.completions.create(model="tiny", prompt=["Story", "Other"], n=3, stream=True, **hot)
        async for chunk in stream:
            texts[chunk.choices[0].index] = texts.get(chunk.choices[0].index, "") + chunk.choices[0].text
        return texts

    assert with_client(engine, streamed) == {choice.index: choice.text for choice in found.choices}


def test_a_request_of_many_texts_is_refused_as_a_whole(engine, monkeypatch):
    monkeypatch.setattr(engine._line, "most_waiting", 3)
    monkeypatch.setattr(engine, "_next", lambda: None)  # nothing is taken in
    assert complete(engine, n=8).status_code == 429
    assert engine.num_waiting == 0


def test_penalties_and_biases_count(engine):
    plain = create(engine, max_tokens=20).choices[0].text
    token = engine.tokenizer.encode("q")[0]
    assert create(engine, max_tokens=5, logit_bias={str(token): 100}).choices[0].text == "qqqqq"
    assert create(engine, max_tokens=40, frequency_penalty=2).choices[0].text != plain
    many = create(engine, max_tokens=60, presence_penalty=2, logit_bias={str(token): 1.9}).choices[0].text
    assert many.count("q") <= 2
    hot = {"temperature": 2, "seed": 1, "max_tokens": 20}
    assert create(engine, **hot, extra_body={"min_p": 1}).choices[0].text == plain


def test_stop_tokens_and_ends(engine):
    body = {"max_tokens": 20}
    text = create(engine, **body).choices[0].text
    token = engine.tokenizer.encode(text[4])[0]
    found = create(engine, **body, extra_body={"stop_token_ids": [token]})
    assert found.choices[0].text == text[: text.index(text[4])]
    assert found.choices[0].finish_reason == "stop"
    end = str(engine.tokenizer.eos_token_id)
    assert create(engine, **body, logit_bias={end: 100}).usage.completion_tokens == 1
    on = create(engine, **body, logit_bias={end: 100}, extra_body={"ignore_eos": True})
    assert (on.usage.completion_tokens, on.choices[0].finish_reason) == (20, "length")


def test_usage_is_null_in_chunks_and_a_fingerprint_names_the_server(engine):
    found = complete(engine, max_tokens=3, stream=True, stream_options={"include_usage": True})
    events = [json.loads(event[6:]) for event in found.text.split("\n\n")[:-2]]
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["usage"]["completion_tokens"] == 3
    assert {event["system_fingerprint"] for event in events} == {create(engine, max_tokens=1).system_fingerprint}


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_follows_a_json_schema(engine, temperature):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    found = chat(engine, response_format=form, n=4, seed=1, temperature=temperature, max_tokens=200)
    for choice in found.choices:
        person = json.loads(choice.message.content)
        assert person["name"] in ("Ann", "Bob")
        assert 0 <= person["age"] <= 99
        assert choice.finish_reason == "stop"
    short = chat(engine, response_format={"type": "json_object"}, max_tokens=30)
    assert short.choices[0].message.content.startswith("{")


def test_a_schema_that_nothing_follows_is_refused(engine):
    pytest.importorskip("llguidance")
    for schema in ({"type": "nothing"}, {"$ref": "http://localhost/a"}, {"type": "string", "pattern": "(?=a)"}, False):
        with pytest.raises(openai.BadRequestError, match="response_format"):
            chat(engine, response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})


def test_calls_of_tools(engine, monkeypatch):
    call = '<tool_call>\n{"name": "look", "arguments": {"at": "sea"}}\n</tool_call>'
    write(engine, monkeypatch, f"I look.\n{call}\n{call}")
    body = {"messages": [USER], "tools": [TOOL], "max_tokens": 180}
    choice = chat(engine, **body).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content.strip() == "I look."
    assert [c.function.name for c in choice.message.tool_calls] == ["look", "look"]
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"at": "sea"}
    streamed = [chunk.choices[0] for chunk in chunks(engine, **body)]
    calls = [c for choice in streamed for c in choice.delta.tool_calls or []]
    assert [(c.index, c.function.name) for c in calls] == [(0, "look"), (1, "look")]
    assert "".join(choice.delta.content or "" for choice in streamed).strip() == "I look."
    assert streamed[-1].finish_reason == "tool_calls"
    # Without tools it is text.
    assert "<tool_call>" in chat(engine, messages=[USER], max_tokens=200).choices[0].message.content
    none = chat(engine, **body, tool_choice="none")
    assert "<tool_call>" in none.choices[0].message.content
    assert none.usage.prompt_tokens < chat(engine, **body).usage.prompt_tokens


def test_the_answers_of_tools_reach_the_template(engine):
    called = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sea"}'}}
    talk = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "c1", "content": "blue"},
    ]
    text = '<user>Hi<assistant><tool_call>{"name": "look", "arguments": {"at": "sea"}}</tool_call><tool>blue<assistant>'
    assert chat(engine, messages=talk).usage.prompt_tokens == len(text)
    for bad in (talk[:1] + talk[2:], [USER, talk[1] | {"tool_calls": [{"id": "c1"}]}]):
        with pytest.raises(openai.BadRequestError, match="call"):
            chat(engine, messages=bad)


def test_variables_of_the_template(engine):
    plain = chat(engine).usage.prompt_tokens
    more = chat(engine, extra_body={"chat_template_kwargs": {"thinking": True}}).usage.prompt_tokens
    assert more == plain + len("<think>")
    with pytest.raises(openai.BadRequestError, match="'other'"):
        chat(engine, extra_body={"chat_template_kwargs": {"other": True}})


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("text", "said", "names"),
    [
        ("plain text", "plain text", []),
        ('a <tool_call>{"name": "f"}</tool_call>', "a", ["f"]),
        ("a <tool_call>no JSON</tool_call> b", "a <tool_call>no JSON</tool_call> b", []),
        (
            'a <tool_call>{"name": "f", "arguments": 3}</tool_call>',
            'a <tool_call>{"name": "f", "arguments": 3}</tool_call>',
            [],
        ),
        ('<tool_call>{"name": "f"}', "", ["f"]),
        ("a <tool", "a <tool", []),
        ("a <tool_call>half", "a <tool_call>half", []),
        ("<<tool_call>[]</tool_call>", "<<tool_call>[]</tool_call>", []),
    ],
)
def test_text_is_divided_into_what_is_said_and_what_is_called(text, said, names, cut):
    reader = CallReader()
    found = [reader.put(text[at : at + cut]) for at in range(0, len(text), cut)]
    found.append(reader.put("", is_last=True))
    assert "".join(found).strip() == said
    assert [call.name for call in reader.calls] == names


def test_a_key_is_asked_for(engine):
    async def use(client: openai.AsyncOpenAI) -> None:
        assert (await client.models.list()).data[0].id == "tiny"
        with pytest.raises(openai.AuthenticationError, match="API key"):
            await client.with_options(api_key="none").models.list()
        for wrong in (b"", b"Bearer", b"Bearer secre", b"Bearer secret2", b"Basic secret", b"Bearer s\xe9"):
            found = await client._client.get("http://localhost/v1/models", headers={b"authorization": wrong})
            assert found.status_code == 401
        health = await client._client.get("http://localhost/health")
        assert health.status_code == 200

    with_client(engine, use, api_key="secret")


def test_metrics_and_the_log(engine, monkeypatch):
    monkeypatch.setattr(engine, "defaults", Defaults())  # a random model may end at any token
    lines: list[str] = []

    async def use(client: openai.AsyncOpenAI) -> str:
        await client.completions.create(model="tiny", prompt="Story", max_tokens=7, n=2)
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="tiny\n", prompt="Story")
        await client._client.get("http://localhost/v1/a%0Ab")
        async with asyncio.timeout(60):
            while engine.num_running:  # an answer leaves a moment after its client hears of its end
                await asyncio.sleep(0.01)
        return (await client._client.get("http://localhost/metrics")).text

    found = with_client(engine, use, log=lines.append)
    values = dict(line.rsplit(" ", 1) for line in found.splitlines() if not line.startswith("#"))
    assert float(values["castlm_generated_tokens_total"]) == 14
    assert float(values["castlm_prompt_tokens_total"]) == 10
    assert float(values['castlm_answers_total{reason="length"}']) == 2
    assert float(values['castlm_http_responses_total{status="404"}']) == 2
    assert float(values["castlm_first_text_seconds_count"]) <= 2
    assert float(values["castlm_requests_running"]) == 0
    assert any('kind="fp32"' in name for name in values)
    assert [line.split()[2:5] for line in lines[:2]] == [
        ["POST", "/v1/completions", status] for status in ("200", "404")
    ]
    assert all("\n" not in line for line in lines)
    assert math.isfinite(float(lines[0].split()[-2]))


def test_a_model_without_tools_in_its_template_is_not_asked_for_them():
    model, tokenizer = model_and_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with closing(engine_of(model, tokenizer)) as engine:
        (response,) = ask(
            engine, ("POST", "/v1/chat/completions", {"messages": [USER], "tools": [TOOL], "tool_choice": "auto"})
        )
    assert response.status_code == 400
    assert "tools" in response.json()["error"]["message"]
