"""Conversations: which columns hold them, which tokens count, how they are packed, and every one that is refused."""

import json
import re
import resource
import sys
import threading
from pathlib import Path

import pytest
import torch

from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.data.chat import Chat
from castlm.data.columns import Document, Kind
from castlm.data.documents import open_documents, split_documents
from castlm.data.options import TextOptions
from castlm.data.packing import PackedSequences
from castlm.data.scored import ScoredText, scored_text
from castlm.data.tokens import Encoder, token_ids
from castlm.evaluation.perplexity import perplexity
from castlm.training.train import train
from tests.chats import (
    CHATML,
    MARKED,
    REWRITING,
    STRICT,
    chat_tokenizer,
    talk,
    talks,
    turn,
    write_rows,
    write_talks,
)
from tests.refusals import refusal
from tests.runs import metrics, small, stop_and_resume, train_until
from tests.texts import sequences
from tests.tiny import EOS_ID, tiny_model

TOKENIZER = chat_tokenizer()
PLAIN = turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "Bye")
TALK = [*PLAIN, turn("assistant", "See you")]


def counted(document, template=CHATML, **options):
    """The text of the tokens that count, in runs."""
    tokenizer = chat_tokenizer(template)
    found = Chat(tokenizer, **options)(json.dumps(document))
    runs, before = [], False
    for token, counts in zip(found.ids, found.counts):
        if counts and not before:
            runs.append([])
        if counts:
            runs[-1].append(token)
        before = counts
    return [tokenizer.decode(run) for run in runs]


# Which tokens count


TURNS = ["Hello<|im_end|>", "See you<|im_end|>"]


@pytest.mark.parametrize(
    ("document", "template", "expected"),
    [
        *[({"messages": TALK}, template, TURNS) for template in (CHATML, MARKED)],
        *[({"messages": [*TALK, turn("user", "?")]}, template, TURNS) for template in (CHATML, MARKED)],
        *[({"prompt": [*PLAIN], "completion": TALK[4:]}, template, TURNS[1:]) for template in (CHATML, MARKED)],
        ({"prompt": "2 + 2 =", "completion": " 4"}, None, [" 4"]),
    ],
)
def test_the_assistants_turns_and_completions_count_with_the_token_that_ends_them(document, template, expected):
    assert counted(document, template) == expected


def called(content):
    """A conversation with a call of a tool, beside which the assistant says `content`."""
    call = {**turn("assistant", content), "tool_calls": [{"name": "add"}]}
    return [turn("user", "1 + 1"), call, turn("tool", "2"), turn("assistant", "It is 2.")]


def test_tools_and_calls_reach_the_template(tmp_path):
    turns = (
        "{% for m in messages %}[{{ m.role }} {{ m.tool_calls | length if m.tool_calls else m.content }}]{% endfor %}"
    )
    path = write_rows(tmp_path / "a.jsonl", [{"messages": called(None), "tools": json.dumps([{"name": "add"}])}])
    (piece,) = open_documents(path).pieces(None)
    tokenizer = chat_tokenizer("{{ tools | length }}" + turns)
    found = Chat(tokenizer, assistant_only=False)(piece.text)
    assert tokenizer.decode(found.ids) == "1[user 1 + 1][assistant 1][tool 2][assistant It is 2.]"


WITHOUT_SYSTEM = CHATML.replace("for message in messages", "for message in messages if message['role'] != 'system'")
CALLS_ALONE = "{% for m in messages %}[{{ m.tool_calls | tojson if m.tool_calls else m.content }}]{% endfor %}"


@pytest.mark.parametrize(
    ("template", "messages", "named"),
    [
        (WITHOUT_SYSTEM, TALK, r"message 1 \(system"),
        (CHATML.replace("in messages", "in messages[-2:]"), TALK, r"message 1 \(system"),
        (MARKED.replace("in messages", "in messages[1:]"), TALK, "message 1"),
        (CALLS_ALONE, called("I add."), r"message 2 \(assistant\)"),
    ],
)
def test_a_template_that_leaves_out_a_message_is_refused(template, messages, named):
    for assistant_only in (True, False):
        with pytest.raises(InputError, match=named):
            counted({"messages": messages}, template, assistant_only=assistant_only)


CONTENT, IN_ORDER = "message['content']", "for message in messages"


@pytest.mark.parametrize(
    ("place", "other"),
    [
        *((CONTENT, f"({CONTENT} {change})") for change in ("| upper", "| tojson", "| trim", ".split('</think>')[-1]")),
        (IN_ORDER, f"{IN_ORDER}[::-1]"),
    ],
)
def test_a_template_may_render_a_message_differently_or_elsewhere(place, other):
    document = {"messages": talk(' a "b"\n', "<think>c</think>d")}
    (found,) = counted(document, CHATML.replace(place, other), assistant_only=False)
    assert found.count("<|im_end|>") == 2


def trl_template(name):
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    path = folder / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"this version of trl has no template {name}")
    return path.read_text()


@pytest.mark.parametrize("name", ["cohere2", "gemma3", "llama3", "qwen3_instruct_2507"])
def test_without_marks_the_tokens_are_those_that_the_marks_of_trl_name(name):
    messages = talk("Hi", "Hello", "Bye", "See you")
    plain, marked = ("".join(counted({"messages": messages}, trl_template(n))) for n in (name, f"{name}_training"))
    assert plain.replace("\n", "") == marked.replace("\n", "")  # TRL counts the line break after a turn, too
    assert "See you" in plain


@pytest.mark.parametrize("name", ["qwen3", "phi3", "gptoss"])
def test_templates_that_rewrite_the_history_need_marks(name):
    messages = talk("Hi", "Hello", "Bye", "See you")
    with pytest.raises(InputError, match="has no generation marks, and turn 2"):
        counted({"messages": messages}, trl_template(name))
    assert "Hello" in counted({"messages": messages}, trl_template(f"{name}_training"))[0]


# Columns and files


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK, "prompt": "as in UltraChat"},
        {"prompt": PLAIN, "completion": TALK[4:]},
        {"prompt": "2 + 2 =", "completion": " 4"},
    ],
)
def test_columns_are_recognized_alike_in_json_lines_gzip_and_parquet(row, tmp_path):
    files = [write_rows(tmp_path / name, [row] * 7) for name in ("a.jsonl", "a.parquet", "b.jsonl.gz")]
    texts = [[piece.text for piece in open_documents(file).pieces(None)] for file in files]
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == 7
    assert all(piece.kind is Kind.CHAT for piece in open_documents(tmp_path).pieces(1))
    assert counted(json.loads(texts[0][0]))


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_rows_of_nulls_do_not_decide_what_a_column_holds(tmp_path, suffix):
    rows = [{"chat": None, "text": None}] * 4 + [{"chat": TALK, "text": None}] * 2
    path = write_rows(tmp_path / f"a.{suffix}", rows)
    pieces = list(open_documents(path, TextOptions(column="chat")).pieces(None))
    assert len(pieces) == 2
    assert all(piece.kind is Kind.CHAT for piece in pieces)


def test_text_and_messages_in_different_rows_are_refused(tmp_path):
    rows = [{"messages": None, "text": None}, {"messages": None, "text": "a"}, {"messages": TALK, "text": None}]
    assert len(open_documents(write_rows(tmp_path / "a.jsonl", rows[:2]))) == 1
    assert open_documents(write_rows(tmp_path / "a.jsonl", [rows[0], rows[2]])).kind is Kind.CHAT
    for order in (rows, rows[::-1]):
        with pytest.raises(InputError, match=r"line [23]: .*column"):
            open_documents(write_rows(tmp_path / "a.jsonl", order))


def test_a_column_can_be_named(tmp_path):
    both = write_rows(tmp_path / "a.jsonl", [{"text": "plain", "messages": TALK, "chat": TALK[:3]}])
    assert [piece.text for piece in open_documents(both, TextOptions(column="text")).pieces(None)] == ["plain"]
    (piece,) = open_documents(both, TextOptions(column="chat")).pieces(None)
    assert len(json.loads(piece.text)["messages"]) == 3
    with pytest.raises(InputError, match=r"'text' .*'messages'.*column"):
        open_documents(both)


GOOD = {"messages": talk("a", "b")}
BAD_ROWS = {
    "wrong role": ({"messages": [turn("human", "a"), turn("gpt", "b")]}, 'message 1 is .*"human".*assistant'),
    "other keys": ({"messages": [{"from": "user", "value": "a"}]}, 'message 1 is .*"from".*role'),
    "a number": ({"messages": [turn("user", 3)]}, "message 1 is .*3.*content"),
    "empty turn": ({"messages": talk("a", " ")}, r'message 2 is .*" "'),
    "no assistant": ({"messages": [turn("user", "a")]}, "no message of the assistant"),
    "not a list": ({"messages": "a"}, 'message 1 is "a"'),
    "not messages": ({"messages": ["a"]}, 'message 1 is "a"'),
    "parts": ({"messages": [turn("user", [{"type": "text"}])]}, 'message 1 is .*"text"'),
    "mixed columns": ({"text": "a"}, "no column 'messages'; there are: text"),
    "tools": (GOOD | {"tools": "{"}, 'tools is "{"'),
}
BAD_PAIRS = {
    "mixed types": ({"prompt": "a", "completion": talk("a")}, r'prompt is "a" and completion \[.*text'),
    "no completion": ({"prompt": "a", "completion": " "}, 'completion " "'),
    "two turns": ({"prompt": talk("a"), "completion": talk("a", "b")}, "one message of the assistant"),
    "no prompt": ({"prompt": [], "completion": [turn("assistant", "b")]}, r"prompt is \[\]"),
    "nothing beside it": ({"prompt": talk("a", "b")}, "completion null"),
}


@pytest.mark.parametrize("case", [*BAD_ROWS, *BAD_PAIRS])
def test_a_bad_row_is_refused_with_its_line_and_what_was_found(case, tmp_path):
    row, message = (BAD_ROWS | BAD_PAIRS)[case]
    first = GOOD if case in BAD_ROWS else {"prompt": "a", "completion": "b"}
    with refusal(rf"a\.jsonl, line 3: .*{message}"):
        open_documents(write_rows(tmp_path / "a.jsonl", [first, first, row]))


def test_a_bad_row_of_a_parquet_file_is_found_before_the_run(tmp_path):
    rows = [{"messages": talk("a", "b")}] * 5 + [{"messages": talk("a", "")}]
    with pytest.raises(InputError, match=r"a\.parquet, row 5: message 2"):
        open_documents(write_rows(tmp_path / "a.parquet", rows))
    with pytest.raises(InputError, match='message 1 is "a"'):
        open_documents(write_rows(tmp_path / "b.parquet", [{"messages": "a"}]))


def test_plain_text_and_conversations_are_two_datasets(tmp_path):
    write_talks(tmp_path / "a.jsonl", [TALK])
    write_rows(tmp_path / "b.jsonl", [{"text": "plain"}])
    with pytest.raises(InputError, match=r"a\.jsonl .*b\.jsonl"):
        open_documents(tmp_path)


def test_empty_conversations_are_dropped_and_counted_as_blank_documents_are(tmp_path):
    documents = open_documents(write_rows(tmp_path / "a.jsonl", [GOOD, {"messages": []}, {"messages": None}]))
    assert len(documents) == 1
    with pytest.raises(InputError, match=r"0\.5 of it"):
        split_documents(documents, 0.5, seed=0)


REFUSED = {
    "no template": (None, TALK, "has no chat template, which conversations need: give one with chat_template_path"),
    "a template that rewrites": (REWRITING, talk("a", "<b>c", "d", "e"), "no generation marks, and turn 2 of it"),
    "the template refuses": (STRICT, [*TALK], r"begins 'Be brief\.'.*\(roles system, .*\): Conversation roles"),
    "a broken template": ("{% for %}", TALK, "conversation that begins 'Be brief.': the chat template cannot render"),
    "marks around nothing": (
        "{% generation %}{% endgeneration %}x",
        TALK,
        "generation marks of the chat template cover",
    ),
    "the assistant first": (CHATML, [turn("assistant", "a")], "conversation that begins 'a': .*turn 1 of it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_that_does_not_fit_is_refused_with_what_was_found(case, tmp_path):
    template, messages, message = REFUSED[case]
    documents = open_documents(write_talks(tmp_path / "a.jsonl", [messages]))
    with refusal(message):
        PackedSequences(documents, Encoder(chat_tokenizer(template)), seq_len=4, seed=0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the memory of a process is limited on Linux alone")
@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**10 }}",
        "{{ 'a' | center(10**10) }}",
        "{% for m in messages if m.role == 'assistant' %}{{ m.content * 10**10 }}{% endfor %}",
    ],
)
def test_a_template_that_takes_all_memory_is_refused(template):
    limit = resource.getrlimit(resource.RLIMIT_AS)
    chat, said = Chat(chat_tokenizer(template), assistant_only=False), []

    def render() -> None:
        with pytest.raises(InputError, match=r"512 MiB.*document_limit") as caught:
            chat(json.dumps(GOOD))
        said.append(str(caught.value))

    render()
    thread = threading.Thread(target=render)  # as in `castlm serve`
    thread.start()
    thread.join()
    assert len(said) == 2
    assert resource.getrlimit(resource.RLIMIT_AS) == limit


def test_a_template_that_does_not_end_is_refused_and_the_next_one_is_rendered(monkeypatch):
    monkeypatch.setattr("castlm_runtime.chat.TEMPLATE_SECONDS", 0.4)
    for template in (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% generation %}{{ (9 ** (9 ** 9)) % 7 }}{% endgeneration %}",  # one operation, which no thread can stop
    ):
        with pytest.raises(InputError, match=r"longer than 0\.4 seconds; see document_limit"):
            Chat(chat_tokenizer(template))(json.dumps(GOOD))
    assert Chat(chat_tokenizer(), document_limit=1e300)(json.dumps(GOOD)).ids


def test_a_conversation_of_thousands_of_messages_is_refused_where_it_would_take_minutes():
    messages = [{"role": role, "content": f"{role} {i}"} for i in range(600) for role in ("user", "assistant")]
    document = json.dumps({"messages": messages})
    with pytest.raises(InputError, match=r"1,200.*512.*document_limit"):
        Chat(chat_tokenizer())(document)
    small = json.dumps({"messages": messages[:30]})
    with pytest.raises(InputError, match="more than 26"):
        Chat(chat_tokenizer(), document_limit=0.05)(small)
    assert sum(Chat(chat_tokenizer(), document_limit=0.1)(small).counts) > 15
    assert len(Chat(chat_tokenizer(), assistant_only=False)(document).ids) > 1200
    assert sum(Chat(chat_tokenizer(MARKED))(document).counts) > 600


# Packing


def packed(path, seq_len=64, assistant_only=True, **options):
    encoder = Encoder(TOKENIZER, assistant_only=assistant_only)
    return PackedSequences(open_documents(path), encoder, seq_len=seq_len, seed=3, **options)


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> str:
    return write_talks(tmp_path_factory.mktemp("chat") / "talks.jsonl", talks(60))


def test_each_conversation_lies_in_one_sequence_and_is_a_document_of_its_own(tmp_path):
    conversations = talks(40, longest=6)
    path = write_talks(tmp_path / "a.jsonl", conversations)
    found, rows = [], sequences(packed(path, 128), 30)
    for row in rows:
        begins = (row["position_ids"] == 0).nonzero()[:, 0].tolist()
        for begin, end in zip(begins, [*begins[1:], 128]):
            assert row["position_ids"][begin:end].tolist() == list(range(end - begin))
            ids, labels = row["input_ids"][begin:end].tolist(), row["labels"][begin:end].tolist()
            if set(ids) == {EOS_ID}:
                assert set(labels) <= {-100}  # what fills a sequence
                continue
            assert ids[-1] == EOS_ID
            kept = TOKENIZER.decode([label for label in labels if label != -100])
            found.append((TOKENIZER.decode(ids[:-1]), kept))
    expected = {}
    for messages in conversations:
        text = TOKENIZER.apply_chat_template(messages, tokenize=False)
        expected[text] = "".join(f"{m['content']}<|im_end|>" for m in messages if m["role"] == "assistant")
    assert {text for text, _ in found} == set(expected)
    assert all(expected[text] == kept for text, kept in found)


def test_a_conversation_of_100k_tokens_goes_through_its_sequences_with_one_line(tmp_path):
    long = talk(*(f"turn {number} " + "x" * 1000 for number in range(100)))
    path, said = write_talks(tmp_path / "a.jsonl", [talk("a", "b"), long, long]), []
    stream = packed(path, 256, say=said.append)
    rows = sequences(stream, stream.tokens_per_epoch() // 256)
    assert len(rows) * 256 > 200_000
    (line,) = said
    assert re.search(r"10\d,\d+ tokens.*seq_len 256", line)
    total = sum(int((row["labels"] != -100).sum()) for row in rows)
    turns = sum(len(message["content"]) + 1 for message in long if message["role"] == "assistant")
    assert 0 <= 2 * turns + 2 - total <= 256  # no token of the assistant is lost, but in the incomplete last sequence


# Evaluation


def test_perplexity_is_over_the_assistants_tokens_of_each_conversation_by_itself(tmp_path):
    model, conversations = tiny_model("llama"), talks(5)
    path = write_talks(tmp_path / "a.jsonl", conversations)
    text = scored_text(open_documents(path), Encoder(TOKENIZER))
    result = perplexity(model, text, seq_len=200, batch_size=3)
    total, count = 0.0, 0
    for messages in conversations:
        found = Chat(TOKENIZER)(json.dumps({"messages": messages}))
        ids = torch.tensor([found.ids])
        nll = -model(ids).logits.detach()[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        counts = torch.tensor(found.counts[1:])
        total, count = total + float(nll[counts].double().sum()), count + int(counts.sum())
    assert result.num_tokens == count
    assert result.loss == pytest.approx(total / count, rel=1e-5)
    all_count = Encoder(TOKENIZER, assistant_only=False)
    everything = perplexity(model, scored_text(open_documents(path), all_count), seq_len=200)
    assert everything.num_tokens > 2 * count
    assert (text.tokens, text.by_document) == ("assistant", True)


def test_plain_text_and_conversations_are_scored_as_by_themselves(chat):
    model, plain = tiny_model("llama"), ScoredText.of(torch.arange(100) % 250)
    said = scored_text(open_documents(chat), Encoder(TOKENIZER), limit=400)
    one, other, both = (perplexity(model, t, seq_len=64) for t in (plain, said, ScoredText.joined([plain, said])))
    assert both.num_tokens == one.num_tokens + other.num_tokens
    mean = (one.loss * one.num_tokens + other.loss * other.num_tokens) / both.num_tokens
    assert both.loss == pytest.approx(mean, rel=1e-6)
    assert ScoredText.joined([plain, plain]).stretches == [(0, 100), (100, 200)]
    assert ScoredText.joined([plain, said]).tokens == "all and assistant"


def test_the_end_of_text_of_a_template_is_not_repeated():
    ends = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    for assistant_only in (True, False):
        encoder = Encoder(chat_tokenizer(ends), assistant_only=assistant_only)
        tokens = encoder.conversation(Document(json.dumps({"messages": TALK})))
        ids, labels = list(tokens.ids), list(tokens.labels)
        assert ids[-1] == EOS_ID
        assert ids[-2] != EOS_ID
        assert labels[-1] == EOS_ID


def test_text_without_a_token_of_the_assistant_is_refused(tmp_path):
    path = write_talks(tmp_path / "a.jsonl", [talk("a" * 100, "b")])
    with pytest.raises(InputError, match="first 20"):
        scored_text(open_documents(path), Encoder(TOKENIZER), limit=20)


def test_calibration_text_is_rendered(chat):
    text = TOKENIZER.decode(token_ids(chat, TOKENIZER))
    assert text.startswith("<|im_start|>user\n")
    assert text.count("<|endoftext|>") == 60


# Runs of castlm train, and commands


def of_chat(chat_llama, chat, folder, **over):
    fields = {"seq_len": 96, "max_steps": 6, "init_from": "magnitude", "eval_fraction": 0.1}
    return small(chat_llama, chat, folder, **{**fields, **over})


def test_a_resumed_run_is_the_straight_run_bit_for_bit(chat_llama, chat, tmp_path):
    straight = of_chat(chat_llama, chat, tmp_path / "straight", save_steps=2, max_steps=4, init_from=None)
    facts = train(straight)
    assert facts.measured.tokens == "assistant"
    assert "| scored tokens |" in (tmp_path / "straight" / "model" / "README.md").read_text()
    assert facts.perplexity.pruned == pytest.approx(facts.proof.perplexity_from_disk, rel=1e-5)
    last = metrics(stop_and_resume(straight, 3))[-2]
    assert last["tokens"] == 4 * 4 * 96
    assert 0 < last["loss_tokens"] < 4 * 96


@pytest.mark.slow
def test_another_template_is_not_resumed_and_a_given_one_is_saved(chat_llama, chat, tmp_path):
    (tmp_path / "marked.jinja").write_text(MARKED)
    marked = str(tmp_path / "marked.jinja")
    config = of_chat(chat_llama, chat, tmp_path / "run", save_steps=2, chat_template_path=marked, init_from=None)
    train_until(config, 3)
    (tmp_path / "marked.jinja").write_text(MARKED + " ")
    with pytest.raises(Exception, match="chat_template_sha256"):
        train(config.changed(resume=True))
    (tmp_path / "marked.jinja").write_text(MARKED)
    train(config.changed(resume=True))
    assert type(chat_tokenizer()).from_pretrained(tmp_path / "run" / "model").chat_template == MARKED


def test_eval_says_which_tokens_it_scored(chat_llama, chat, tmp_path, capsys):
    assert main(["eval", chat_llama, "--text", chat, "--seq-len", "96", "--json", str(tmp_path / "a.json")]) == 0
    assert "assistant tokens of" in capsys.readouterr().out
    found = json.loads((tmp_path / "a.json").read_text())
    assert main(["eval", chat_llama, "--text", chat, "--seq-len", "96", "--no-assistant-only-loss"]) == 0
    assert "assistant" not in capsys.readouterr().out.replace("--no-assistant-only-loss", "")
    assert found["tokens"] == "assistant"
    assert found["num_tokens"] < found["text_tokens"] / 2
