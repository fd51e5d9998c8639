"""`castlm sample --teacher-cache`: what it leaves behind is what the first epoch of a run would have written."""

import json
from pathlib import Path

import pytest

import castlm.training.train as training
from castlm.cli.main import main
from castlm.data.columns import Kind
from castlm.data.documents import open_documents
from castlm.training.config import TrainConfig
from castlm.training.train import fill_teacher_cache, train
from tests.refusals import assert_refused
from tests.runs import assert_equal_weights, small
from tests.slow import slow


@pytest.fixture(scope="module")
def own(chat_llama, tmp_path_factory) -> str:
    """A text of a few hundred tokens that the model has written."""
    path = tmp_path_factory.mktemp("own") / "own.jsonl"
    assert main(command(chat_llama, path)) == 0
    return str(path)


def command(chat_llama, path, *more):
    options = ("--num-tokens", "900", "--max-new-tokens", "40", "--batch-size", "4", "--seed", "3", *more)
    return ["sample", chat_llama, "--output-file", str(path), *options]


def cached(tmp_path, *more):
    sizes = ("--teacher-top-k", "8", "--seq-len", "32", "--per-device-train-batch-size", "4")
    return ("--teacher-cache", str(tmp_path / "cache"), *sizes, *more)


def run_on(chat_llama, own, tmp_path, name="run", **over) -> TrainConfig:
    fields = {"teacher_top_k": 8, "teacher_cache": str(tmp_path / "cache"), "seed": 3, "max_steps": 300}
    fields["init_from"] = "magnitude"
    return small(chat_llama, str(own), tmp_path / name, **{**fields, "ignore_decay_budget": True, **over})


def content(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


# The cache


@pytest.mark.parametrize(
    "more",
    [
        pytest.param((), id="text"),
        slow(("--precision", "bf16"), id="in bf16"),
        slow(("--chat", "--batch-size", "64"), id="chat"),
    ],
)
def test_the_cache_is_that_of_the_first_epoch_and_a_run_needs_no_teacher(chat_llama, tmp_path, lessons, more):
    path = tmp_path / "own.jsonl"
    assert main(command(chat_llama, path, *cached(tmp_path, *more))) == 0
    assert (open_documents(path).kind is Kind.CHAT) == ("--chat" in more)
    from_sample, num_read = content(tmp_path / "cache"), len(lessons)
    assert num_read > 5
    over = {"precision": "bf16" if "bf16" in more else "auto", "max_steps": num_read}
    train(run_on(chat_llama, path, tmp_path, "cached", **over))
    assert len(lessons) == num_read
    train(run_on(chat_llama, path, tmp_path, "taught", **over, teacher_cache=str(tmp_path / "written")))
    assert len(lessons) == 2 * num_read
    assert content(tmp_path / "written") == from_sample
    assert_equal_weights(tmp_path / "cached" / "model", tmp_path / "taught" / "model")


def test_a_stopped_pass_goes_on_with_what_is_missing(chat_llama, tmp_path, lessons, capsys, monkeypatch):
    path, check = tmp_path / "own.jsonl", training.check_vocabulary

    def stopped(ids, vocab):
        if len(lessons) == 3:
            raise KeyboardInterrupt
        check(ids, vocab)

    with monkeypatch.context() as patch:
        patch.setattr(training, "check_vocabulary", stopped)
        assert main(command(chat_llama, path, *cached(tmp_path))) == 130
    assert "the same command with --resume continues" in capsys.readouterr().err
    (known,) = (tmp_path / "cache").glob("coverage-*.json")
    assert json.loads(known.read_text()) == {"blocks": 12}
    text = path.read_bytes()
    assert main(command(chat_llama, path, *cached(tmp_path), "--resume")) == 0
    assert path.read_bytes() == text
    num_read = len(lessons)
    fill_teacher_cache(run_on(chat_llama, path, tmp_path, teacher_cache=str(tmp_path / "whole")))
    assert len(lessons) == 2 * num_read  # no batch was read twice before
    assert content(tmp_path / "whole") == content(tmp_path / "cache")


def test_a_finished_text_gets_its_cache_later_and_the_printed_command_trains_without_a_teacher(
    chat_llama, own, tmp_path, lessons, capsys
):
    held_out, before = tmp_path / "held_out.txt", Path(own).read_bytes()
    held_out.write_text("a text that is not in the sample\n")
    arguments = command(chat_llama, own, *cached(tmp_path, "--eval-dataset", str(held_out)), "--resume")
    assert main(arguments) == 0
    assert Path(own).read_bytes() == before
    num_read = len(lessons)
    assert main(arguments) == 0
    assert len(lessons) == num_read > 0
    printed = capsys.readouterr().out.rpartition("castlm train ")[2].split()
    printed[printed.index("RUN")] = str(tmp_path / "run")
    more = (
        "--max-steps",
        "20",
        "--init-from",
        "magnitude",
        "--save-steps",
        "0",
        "--no-report",
        "--ignore-decay-budget",
    )
    assert main(["train", *printed, *more]) == 0
    assert len(lessons) == num_read
    assert "no teacher is loaded" in capsys.readouterr().err


def test_bad_input_is_one_line(chat_llama, own, tmp_path, capsys):
    changed = tmp_path / "changed.jsonl"
    changed.write_bytes(Path(own).read_bytes() + b"\n")
    record = Path(own).with_name("own.jsonl.castlm.json")
    changed.with_name("changed.jsonl.castlm.json").write_bytes(record.read_bytes())
    cache = cached(tmp_path)
    cases = [
        (
            command(chat_llama, tmp_path / "a.jsonl", "--seq-len", "32"),
            "--seq-len = 32 has an effect only with --teacher-cache",
        ),
        (command(chat_llama, tmp_path / "a.jsonl", *cache, "--teacher-top-k", "0"), "set teacher_top_k"),
        (command(chat_llama, tmp_path / "a.jsonl", *cache, "--seq-len", "999"), "exceeds the model's 256 positions"),
        (command(chat_llama, tmp_path / "a.jsonl", *cache, "--teacher-top-k", "999"), "teacher_top_k 999 exceeds"),
        (command(chat_llama, tmp_path / "a.jsonl", *cache, "--eval-dataset", "none.txt"), "none.txt: no such file"),
        (
            command(
                chat_llama,
                tmp_path / "a.jsonl",
                *cached(Path(own).parents[1])[2:],
                "--teacher-cache",
                str(Path(own).parent),
            ),
            "teacher_cache",
        ),
        (command(chat_llama, own, *cache, "--resume", "--top-p", "0.5"), "was sampled differently (top_p 1.0 -> 0.5)"),
        (command(chat_llama, changed, *cache, "--resume"), "was changed since"),
    ]
    assert_refused(cases, capsys)
    assert not (tmp_path / "a.jsonl.part").exists()
