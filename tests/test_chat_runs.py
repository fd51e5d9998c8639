"""Runs on conversations: the loss is over the tokens of the assistant, on any ranks, resumed, from a cache, in eval."""

import json

import pytest
import torch
from torch.nn.functional import log_softmax

from castlm.cli.main import main
from castlm.distributed.world import init_world
from castlm.training.objective import Objective
from castlm.training.train import train
from tests.chats import CHATML, MARKED, chat_tokenizer, save_chat_model, talks, turn, write_rows, write_talks
from tests.ranks import run_ranks
from tests.refusals import assert_refused
from tests.runs import (
    assert_equal_weights,
    assert_same_runs_but_for_sums,
    begin_run,
    metrics,
    small,
    stop_and_resume,
    train_until,
)
from tests.tiny import TEXT, tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    return save_chat_model(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> str:
    return write_talks(tmp_path_factory.mktemp("chat") / "talks.jsonl", talks(60))


def of_chat(llama, chat, folder, **over):
    return small(llama, chat, folder, **{"seq_len": 96, "max_steps": 6, "eval_fraction": 0.1, **over})


def test_the_loss_is_that_of_the_assistants_tokens_by_hand(llama, chat, tmp_path):
    run = begin_run(of_chat(llama, chat, tmp_path / "run"), init_world("cpu", "full"))
    student, teacher = tiny_model("llama", seed=1), tiny_model("llama")
    objective = Objective(student, teacher, 0.5, 2.0, apart=True)
    batch = next(run.text.loader)
    ids, labels, positions = batch["input_ids"], batch["labels"], batch["position_ids"]
    real = labels != -100
    assert 0.1 < real.float().mean() < 0.8
    found = objective(ids, labels, int(real.sum()), positions)
    with torch.no_grad():
        logits, taught = (model(input_ids=ids, position_ids=positions).logits[real] for model in (student, teacher))
    ce = -log_softmax(logits, -1).gather(1, labels[real][:, None]).mean()
    p, q = log_softmax(logits / 2, -1), log_softmax(taught / 2, -1)
    kl = 4 * (q.exp() * (q - p)).sum(-1).mean()
    assert found.ce.item() == pytest.approx(ce.item(), rel=1e-5)
    assert found.kl.item() == pytest.approx(kl.item(), rel=1e-4)
    assert found.loss.item() == pytest.approx((0.5 * kl + 0.5 * ce).item(), rel=1e-4)


def test_what_the_user_says_last_changes_no_loss_and_what_the_assistant_says_does(llama, tmp_path):
    def losses(name, user, assistant):
        conversations = [[*talk, turn("user", user)] for talk in talks(60)]
        conversations[0] = [turn("user", "a"), turn("assistant", assistant)]
        path = write_talks(tmp_path / f"{name}.jsonl", conversations)
        held_out = write_talks(tmp_path / "held_out.jsonl", talks(5, seed=1))
        train(
            of_chat(llama, path, tmp_path / name, eval_dataset=held_out, calibration_sequences=1, init_from="magnitude")
        )
        return [row["loss"] for row in metrics(tmp_path / name) if "loss" in row]

    first = losses("one", "xyz", "b")
    assert losses("two", "uvw", "b") == first
    assert losses("three", "xyz", "c") != first


def test_a_resumed_run_is_the_straight_run_bit_for_bit(llama, chat, tmp_path):
    straight = of_chat(llama, chat, tmp_path / "straight", save_steps=2)
    record = train(straight)
    assert record["measured"]["tokens"] == "assistant"
    assert "| scored tokens |" in (tmp_path / "straight" / "model" / "README.md").read_text()
    assert record["perplexity"]["pruned"] == pytest.approx(record["proof"]["perplexity_from_disk"], rel=1e-5)
    last = metrics(stop_and_resume(straight, 3))[-2]
    assert last["tokens"] == 6 * 4 * 96
    assert 0 < last["loss_tokens"] < 4 * 96


@pytest.mark.slow
def test_accumulation_is_one_large_batch(llama, chat, tmp_path):
    common = {"max_steps": 4, "decay_end": 1.0}
    train(of_chat(llama, chat, tmp_path / "a", per_device_train_batch_size=8, **common))
    train(of_chat(llama, chat, tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=8, **common))
    assert_same_runs_but_for_sums(tmp_path / "a" / "model", tmp_path / "b" / "model")


@pytest.mark.slow
def test_two_ranks_are_one_rank(llama, chat, tmp_path):
    for ranks in (1, 2):
        config = of_chat(llama, chat, tmp_path / str(ranks), per_device_train_batch_size=8 // ranks, device="cpu")
        run_ranks(train, ranks, config, folder=tmp_path)
    assert_same_runs_but_for_sums(tmp_path / "1" / "model", tmp_path / "2" / "model")
    for mine, theirs in zip(metrics(tmp_path / "1"), metrics(tmp_path / "2")):
        for key in ("loss", "loss_tokens", "tokens", "perplexity"):
            assert mine.get(key, 0) == pytest.approx(theirs.get(key, 0), rel=1e-4)


@pytest.mark.slow
def test_a_teacher_cache_serves_another_labelling_of_the_same_text_and_no_other_template(llama, chat, tmp_path, capsys):
    """The teacher's tokens are kept at every position, and not only where they counted in the run that wrote them."""
    fields = {"teacher_top_k": 8, "teacher_cache": str(tmp_path / "cache")}
    train(of_chat(llama, chat, tmp_path / "one", **fields))
    capsys.readouterr()
    everything = of_chat(llama, chat, tmp_path / "two", assistant_only_loss=False, **fields)
    train(everything)
    assert "no teacher is loaded" in capsys.readouterr().err
    train(everything.changed(output_dir=str(tmp_path / "three"), teacher_cache=None, hidden_weight=0.0))
    assert_equal_weights(tmp_path / "two" / "model", tmp_path / "three" / "model")
    (tmp_path / "other.jinja").write_text(CHATML.replace("system", "s").replace("'\n'", "'\n\n'"))
    train(of_chat(llama, chat, tmp_path / "four", chat_template_path=str(tmp_path / "other.jinja"), **fields))
    assert "missing sequences are added" in capsys.readouterr().err


@pytest.mark.slow
def test_another_template_is_not_resumed_and_a_given_one_is_saved(llama, chat, tmp_path):
    (tmp_path / "marked.jinja").write_text(MARKED)
    config = of_chat(llama, chat, tmp_path / "run", save_steps=2, chat_template_path=str(tmp_path / "marked.jinja"))
    train_until(config, 3)
    (tmp_path / "marked.jinja").write_text(MARKED + " ")
    with pytest.raises(Exception, match="chat_template_sha256"):
        train(config.changed(resume=True))
    (tmp_path / "marked.jinja").write_text(MARKED)
    train(config.changed(resume=True))
    assert type(chat_tokenizer()).from_pretrained(tmp_path / "run" / "model").chat_template == MARKED


@pytest.mark.slow
def test_options_of_conversations_are_reported_where_every_text_is_plain(llama, chat, text, tmp_path, capsys):
    (tmp_path / "mine.jinja").write_text(CHATML)
    options = {"assistant_only_loss": False, "chat_template_path": str(tmp_path / "mine.jinja")}
    lines = ("no effect: assistant_only_loss = False", f"no effect: chat_template_path = {tmp_path / 'mine.jinja'}")
    for name, dataset, held_out in (("a", text, text), ("b", text, chat), ("c", chat, text)):
        begin_run(of_chat(llama, dataset, tmp_path / name, eval_dataset=held_out, **options), init_world("cpu", "full"))
        said = capsys.readouterr().err
        assert [line in said for line in lines] == [name == "a"] * 2


def test_a_mixture_of_conversations_and_plain_text_trains(llama, chat, tmp_path):
    plain = write_rows(tmp_path / "plain.jsonl", [{"text": TEXT[at : at + 300]} for at in range(0, 9000, 300)])
    record = train(of_chat(llama, (f"{chat}:0.5", f"{plain}:0.5"), tmp_path / "run", eval_tokens=300))
    assert record["measured"]["tokens"] == "assistant and all"
    last = metrics(tmp_path / "run")[-1]
    parts = last["perplexity/talks.jsonl"], last["perplexity/plain.jsonl"]
    assert min(parts) < last["perplexity"] < max(parts)


def test_eval_says_which_tokens_it_scored(llama, chat, tmp_path, capsys):
    assert main(["eval", llama, "--text", chat, "--seq-len", "96", "--json", str(tmp_path / "a.json")]) == 0
    assert "assistant tokens of" in capsys.readouterr().out
    found = json.loads((tmp_path / "a.json").read_text())
    assert main(["eval", llama, "--text", chat, "--seq-len", "96", "--no-assistant-only-loss"]) == 0
    assert "assistant" not in capsys.readouterr().out.replace("--no-assistant-only-loss", "")
    assert found["tokens"] == "assistant"
    assert found["num_tokens"] < found["text_tokens"] / 2


def test_prune_calibrates_on_conversations(llama, chat, tmp_path):
    command = ["prune", "--model", llama, "--calibration", chat, "--num-sequences", "4", "--seq-len", "32"]
    assert main([*command, "--output-dir", str(tmp_path / "pruned"), "--rotation-iterations", "4"]) == 0


def test_a_bad_conversation_ends_a_command_with_one_line(llama, tmp_path, capsys):
    bad = write_rows(tmp_path / "bad.jsonl", [{"messages": [turn("user", "a"), turn("gpt", "b")]}])
    run = ["train", "--model", llama, "--dataset", bad, "--seq-len", "64", "--output-dir", str(tmp_path / "run")]
    prune = ["prune", "--model", llama, "--calibration", bad, "--output-dir", str(tmp_path / "pruned")]
    message = 'line 1: message 2 is {"role": "gpt"'
    assert_refused([(command, message) for command in (run, ["eval", llama, "--text", bad], prune)], capsys)
    assert not (tmp_path / "run").exists()
