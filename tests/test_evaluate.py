"""Perplexity against the straightforward computation from full logits, for both conventions and every family."""

import hashlib
import importlib.metadata
import json
import math
from pathlib import Path

import pytest
import torch

from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.data.documents import open_documents
from castlm.data.scored import ScoredText, scored_sequences
from castlm.data.tokens import Encoder, token_ids
from castlm.evaluation.answers import ask
from castlm.evaluation.perplexity import evaluate_text, perplexity
from castlm.facts import Facts
from castlm.models.io import load_model
from castlm.training.metrics import sequences
from castlm.training.train import train
from castlm.world import World
from tests.refusals import refusal, refused
from tests.runs import small
from tests.slow import slow
from tests.tiny import FAMILIES, TEXT, tiny_model, tiny_tokenizer


def test_options_of_a_text_without_a_text_are_refused(capsys):
    assert "--stride = 5 has an effect only with a text" in refused(
        ["eval", "model", "--tasks", "piqa", "--stride", "5"], capsys
    )


@pytest.mark.parametrize(
    "over", [{}, {"eval_dataset": ("a.txt", "b.txt"), "eval_tokens": 200}], ids=["held out", "texts"]
)
def test_a_run_repeats_its_own_figure(over, llama, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        Path(name).write_text(TEXT[: len(TEXT) // 2] if name == "a.txt" else TEXT[len(TEXT) // 2 :])
    train(small(llama, text, tmp_path / "run", init_from="magnitude", max_steps=2, decay_end=1.0, **over))
    facts = Facts.read(tmp_path / "run" / "model")
    assert main(["eval", "run", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"] == pytest.approx(facts.perplexity.final, rel=1e-4)
    assert (found["seq_len"], found["stride"], found["text"]) == (32, 32, facts.measured.text)
    assert found["text_sha256"] == facts.measured.text_sha256
    assert main(["eval", "run", "--seq-len", "16"]) == 0
    assert f"of {facts.measured.text}, context 16, stride 16" in capsys.readouterr().out
    assert "--eval-tokens = 5 has an effect only with a text" in refused(["eval", "run", "--eval-tokens", "5"], capsys)
    if over:
        Path("a.txt").write_text("another text\n" * 20)
        assert "has changed: give --text FILE" in refused(["eval", "run"], capsys)
    assert "nothing to evaluate on" in refused(["eval", llama], capsys)


def some_ids(count, seed=0):
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def hugging_face_sliding_window(model, ids, seq_len, stride):
    """The loop of https://huggingface.co/docs/transformers/perplexity, summed instead of averaged: (nats, tokens)."""
    nats, tokens, previous_end = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + seq_len, len(ids))
        sequence, targets = ids[None, begin:end], ids[None, begin:end].clone()
        targets[:, : -(end - previous_end)] = -100
        if (targets[:, 1:] != -100).any():
            count = int((targets[:, 1:] != -100).sum())
            nats += float(model(sequence, labels=targets).loss) * count
            tokens += count
        previous_end = end
        if end == len(ids):
            break
    return nats, tokens


LENGTHS = [2, 32, 33, 34, 101]
"""The last window is the whole text, the same length as the others, a token that nothing precedes, two tokens, or 5."""


@pytest.mark.parametrize(
    ("family", "length", "stride"),
    [
        *[(family, 150, 64) for family in ("llama", "gpt2", "gemma2")],
        *[slow(family, 150, 64) for family in (*FAMILIES, "cohere") if family not in ("llama", "gpt2")],
        *[("llama", length, 32) for length in LENGTHS],
        *[("llama", 101, stride) for stride in (1, 10, 31)],
    ],
)
def test_windows_are_scored_as_by_hugging_face(family, length, stride):
    model, ids, seq_len = tiny_model(family), some_ids(length), max(stride, 32)
    nats, tokens = hugging_face_sliding_window(model, ids, seq_len, stride)
    result = perplexity(model, ids, seq_len=seq_len, stride=stride, batch_size=3)
    assert result.loss == pytest.approx(nats / tokens, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert (result.num_tokens, result.seq_len, result.stride) == (tokens, min(seq_len, length), stride)
    if stride < seq_len:
        assert tokens == length - 1  # every token but the first, once


@pytest.mark.parametrize(("length", "num_batches"), [(2, 1), (41, 1), (48, 1), (49, 1), (50, 2), (100, 3)])
def test_ranks_share_the_windows_of_a_run(length, num_batches):
    """Two ranks, 3 windows of 8 tokens a batch: each scored token once, a tail of one token is no window."""
    ids = torch.arange(length)
    scored = []
    for rank in range(2):
        batches = list(sequences(ScoredText.of(ids), 8, 3, World(rank, 2, torch.device("cpu"), None)))
        assert len(batches) == num_batches
        for batch in batches:
            assert [*batch] == ["input_ids", "labels"]
            real = batch["labels"] != -100
            assert torch.equal(batch["labels"][real], batch["input_ids"][real] + 1)
            scored += batch["labels"][real].tolist()
    expected = [t for found in scored_sequences(length, 8, 8) for t in range(found.first_scored, found.end)]
    assert sorted(scored) == expected == [t for t in range(length) if t % 8]


def test_the_model_comes_back_as_it_was_also_after_an_error():
    model = tiny_model("gpt2", embd_pdrop=0.5, resid_pdrop=0.5)
    expected = perplexity(model, some_ids(40), seq_len=32).loss
    model.train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    assert perplexity(model, some_ids(40), seq_len=32).loss == expected  # no dropout
    assert [module.training for module in model.modules()] == before
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="nan in tokens 0 to 32"):
        perplexity(model, some_ids(40), seq_len=32)
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_autocast_and_progress():
    model, ids, calls = tiny_model("llama"), some_ids(100), []
    exact = perplexity(model, ids, seq_len=32, batch_size=2, progress=lambda *counts: calls.append(counts))
    assert calls == [(2, 4), (4, 4)]
    rough = perplexity(model, ids, seq_len=32, autocast_dtype=torch.bfloat16)
    assert rough.loss == pytest.approx(exact.loss, rel=0.02)
    assert rough.loss != exact.loss


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (some_ids(1), {}, "1 tokens.*at least 2"),
        (some_ids(0), {}, "0 tokens.*at least 2"),
        (some_ids(9) + 260, {}, "outside the model's vocabulary of 264"),
        (some_ids(9) - 260, {}, "id -[0-9]+ is outside the model's vocabulary"),
        (some_ids(9).float(), {}, "torch.float32"),
        (some_ids(9), {"seq_len": 257}, "seq_len is 257 .* 256"),
        (some_ids(9), {"seq_len": 1}, "seq_len is 1"),
        (some_ids(9), {"seq_len": 8, "stride": 9}, "stride is 9"),
        (some_ids(9), {"seq_len": 8, "stride": 0}, "stride is 0"),
        (some_ids(9), {"seq_len": "x"}, "seq_len = 'x'"),
        (some_ids(9), {"stride": 2.5}, "stride = 2.5"),
        (some_ids(9), {"batch_size": 0}, "batch_size = 0"),
        (some_ids(9), {"batch_size": -1}, "batch_size = -1"),
        (some_ids(9), {"batch_size": None}, "batch_size = null"),
    ],
)
def test_refusals_are_one_line_with_the_value(ids, options, message):
    with refusal(message):
        perplexity(tiny_model("llama"), ids, **{"seq_len": 8, **options})


def test_evaluate_text_records_what_the_figure_depends_on(tmp_path):
    text = "Once upon a time, there was a héron.\n" * 9
    file = tmp_path / "story.txt"
    file.write_text(text, encoding="utf-8")
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    tokenizer.name_or_path = "some/tokenizer"
    record = json.loads(
        json.dumps(evaluate_text(model, open_documents(file), Encoder(tokenizer), seq_len=64, stride=48))
    )
    ids = torch.tensor(tokenizer(text)["input_ids"])
    assert torch.equal(token_ids(file, tokenizer), ids)
    assert record["perplexity"] == perplexity(model, ids, seq_len=64, stride=48).perplexity
    assert record["text_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert (record["seq_len"], record["stride"], record["num_tokens"]) == (64, 48, len(ids) - 1)
    assert (record["text"], record["text_tokens"], record["tokenizer"]) == ("story.txt", len(ids), "some/tokenizer")
    assert record["dtype"] == "float32"
    assert record["versions"]["torch"] == importlib.metadata.version("torch")


def test_answers_are_measured_by_their_repetition_and_by_a_teacher(llama, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("Story one\n\nanother story\n")
    arguments = ["eval", llama, "--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "12", "--device", "cpu"]
    assert main([*arguments, "--teacher", llama, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)["answers"]
    assert found["num_answers"] == 2
    assert 0 <= found["repetition"] < 1
    loaded = load_model(llama)
    answers = ask(loaded.model, loaded.tokenizer, ["Story one", "another story"], max_new_tokens=12)
    total = 0.0
    for answer in answers:
        ids = torch.cat([answer.prompt, torch.tensor([answer.ids])], dim=1)
        labels = torch.cat([torch.full_like(answer.prompt, -100), torch.tensor([answer.ids])], dim=1)
        total += loaded.model(input_ids=ids, labels=labels).loss.item() * len(answer.ids)
    assert found["teacher_nats"] == pytest.approx(total / sum(len(answer.ids) for answer in answers), rel=1e-4)
    assert main(arguments) == 0
    assert "4-grams" in capsys.readouterr().out
