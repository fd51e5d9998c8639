"""`castlm sample` writes the text that transformers generates, and a stopped start continues bit for bit."""

import json
import re
import shutil

import pytest
import torch
from transformers import GenerationMixin

from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.data.columns import Kind
from castlm.data.documents import open_documents
from castlm.data.options import SamplingOptions, TextOptions
from castlm.lab.sampling import Sampler, fill, open_samples, read_prompts
from tests.chats import CHATML, chat_tokenizer, write_rows
from tests.ranks import start_command, wait_for
from tests.refusals import assert_refused
from tests.slow import slow
from tests.tiny import EOS_ID, tiny_model, tiny_tokenizer


def sampler_of(tokenizer=None, prompts=None, chat=False, model=None, **options):
    options = SamplingOptions(**{"max_new_tokens": 12, "batch_size": 4, **options})
    model = model or tiny_model("llama")
    return Sampler(model, tokenizer or tiny_tokenizer(), options, prompts=prompts, chat=chat)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Scripted(GenerationMixin, torch.nn.Module):
    """Generates the given token ids, whatever it is given."""

    def __init__(self, *answers):
        super().__init__()
        self.real, self.answers, self.asked = tiny_model("llama"), list(answers), []
        self.config, self.generation_config = self.real.config, self.real.generation_config
        self.device = torch.device("cpu")

    def generate(self, input_ids, attention_mask, generation_config):
        self.asked.append([row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask)])
        return torch.cat([input_ids, torch.tensor(self.answers.pop(0))], dim=1)


# What is sampled


def test_a_batch_depends_on_its_number_and_seed_alone_and_leaves_the_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = sampler_of().batch(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert sampler_of().batch(0) == first
    assert sampler_of().batch(1) != first
    assert sampler_of(seed=1).batch(0) != first
    assert len({sample.row["text"] for sample in first}) == 4


def test_a_low_temperature_and_top_p_write_the_most_probable_tokens():
    model, ids = tiny_model("llama"), [EOS_ID]
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = tiny_tokenizer().decode(ids[1:])
    for options in ({"temperature": 1e-4}, {"top_p": 1e-6}):
        (found, *_) = sampler_of(max_new_tokens=6, **options).batch(0)
        assert found.row["text"] == expected


def test_prompts_of_unequal_length_are_continued_as_if_alone():
    prompts = ["a", "a much longer prompt", "b c"]
    together = sampler_of(prompts=prompts, temperature=1e-4, batch_size=3).batch(0)
    for prompt, found in zip(prompts, together):
        (alone,) = sampler_of(prompts=[prompt], temperature=1e-4, batch_size=1).batch(0)
        assert found == alone
        assert found.row["text"].startswith(prompt)


def test_a_text_ends_where_the_model_ends_it():
    ids = [[97, 98, EOS_ID, 99], [97, 98, 99, 100]]
    found = sampler_of(model=Scripted(ids), batch_size=2).batch(0)
    assert [sample.num_tokens for sample in found] == [3, 5]
    assert [sample.row["is_cut"] for sample in found] == [False, True]
    assert [sample.row["text"] for sample in found] == [tiny_tokenizer().decode(row) for row in ([97, 98], ids[1])]


def test_a_conversation_is_the_users_turn_and_then_the_answer_in_the_template():
    tokenizer = chat_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    said = [tokenizer("Hi", add_special_tokens=False)["input_ids"] + [end], [end] * 3, [97, 97, 97]]
    answers = [[*tokenizer("Yo", add_special_tokens=False)["input_ids"], end]]
    model = Scripted(said, answers)
    found = sampler_of(tokenizer, chat=True, model=model, batch_size=3).batch(0)
    assert found[0].row == {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    assert found[1:] == [None, None]  # an empty turn, and one that does not end: neither is answered
    assert tokenizer.decode(model.asked[0][0]) == "<|im_start|>user\n"
    assert tokenizer.decode(model.asked[1][0]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


# The file


def written(path, sampler, num_tokens=150, stop_after=None, **options):
    options = {"dedup_prefix": 5, "prompts": sampler.prompts, **options}
    with open_samples(path, {"seed": 0}, **options) as file:
        add = file.add

        def add_until(*batch):
            count = add(*batch)
            if file.batches == stop_after:
                raise KeyboardInterrupt
            return count

        file.add = add_until
        fill(file, sampler, num_tokens=num_tokens)
    return json.loads(path.with_name(f"{path.name}.castlm.json").read_text())


@pytest.fixture
def stopped(tmp_path):
    """The path of a file whose sampling was stopped after two batches."""
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "a.jsonl", sampler_of(), stop_after=2)
    return tmp_path / "a.jsonl"


@pytest.mark.parametrize("prompts", [slow(None), ["a", "bc", "a"]])
def test_a_stopped_start_goes_on_bit_for_bit(prompts, tmp_path):
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    record = written(whole, sampler_of(prompts=prompts, max_new_tokens=6), dedup_prefix=1)
    assert record["duplicates"] > 0
    for stop in (1, 4):
        with pytest.raises(KeyboardInterrupt):
            written(
                parts, sampler_of(prompts=prompts, max_new_tokens=6), stop_after=stop, dedup_prefix=1, resume=stop > 1
            )
        with (tmp_path / "parts.jsonl.part").open("a") as file:
            file.write('{"text": "half a row')  # as a kill in the middle of a write leaves it
        assert not parts.exists()
    again = written(parts, sampler_of(prompts=prompts, max_new_tokens=6), dedup_prefix=1, resume=True)
    assert parts.read_bytes() == whole.read_bytes()
    assert again == record
    assert not (tmp_path / "parts.jsonl.part").exists()


def test_answers_to_given_questions_are_recognized_as_conversations(chat_llama, tmp_path):
    (tmp_path / "q.txt").write_text("What?\nWhy?\n")
    chat = ["sample", chat_llama, "--chat", "--prompts", str(tmp_path / "q.txt"), "--num-tokens", "100"]
    assert main([*chat, "--max-new-tokens", "200", "--output-file", str(tmp_path / "c.jsonl")]) == 0
    assert open_documents(tmp_path / "c.jsonl").kind is Kind.CHAT


def test_duplicates_are_left_out_whole_and_by_their_beginning(tmp_path):
    def model():
        return Scripted(*[[tiny_tokenizer()(text)["input_ids"] for text in ("abc", "abc", "abd", "ebc")]] * 3)

    for prefix, count in ((0, 3), (2, 2)):
        path = tmp_path / f"{prefix}.jsonl"
        found = written(path, sampler_of(model=model(), max_new_tokens=3), num_tokens=4 * count, dedup_prefix=prefix)
        assert (found["samples"], found["duplicates"]) == (count, 4 - count)
        assert len({row["text"][: prefix or None] for row in lines(path)}) == count
    with pytest.raises(InputError, match=r"20 batches .* 3"):
        written(tmp_path / "c.jsonl", sampler_of(model=Scripted(*model().answers * 9)), num_tokens=99, dedup_prefix=0)


# The command


def command(chat_llama, path, *more):
    return ["sample", chat_llama, "--output-file", str(path), "--max-new-tokens", "8", "--batch-size", "4", *more]


def test_a_killed_command_is_resumed_to_the_same_file(chat_llama, tmp_path):
    straight, killed = tmp_path / "straight.jsonl", tmp_path / "killed.jsonl"
    more = ("--num-tokens", "800")
    assert main(command(chat_llama, straight, *more)) == 0
    process = start_command("castlm", *command(chat_llama, killed, *more), log=tmp_path / "log")
    assert wait_for((tmp_path / "killed.jsonl.castlm.json").exists, [process]), (tmp_path / "log").read_text()
    process.kill()
    process.join()
    assert not killed.exists()
    assert main(command(chat_llama, killed, *more, "--resume")) == 0
    assert killed.read_bytes() == straight.read_bytes()


def test_a_small_context_needs_no_option_and_a_start_without_a_text_leaves_no_trace(chat_llama, tmp_path, monkeypatch):
    """The tiny model has a context of 256 tokens."""
    sizes, path = [], tmp_path / "a.jsonl"
    run = ["sample", chat_llama, "--output-file", str(path), "--num-tokens", "1", "--batch-size", "1"]

    def stopped(self, number):
        sizes.append(self._num_new)
        raise InputError("stopped")

    monkeypatch.setattr(Sampler, "batch", stopped)
    for more in ([], ["--chat"], ["--max-new-tokens", "7"], ["--max-new-tokens", "256"]):
        assert main([*run, *more]) == 2
        assert list(tmp_path.iterdir()) == []
    assert sizes == [255, 125, 7]


def test_ctrl_c_says_what_is_saved_and_how_to_go_on(chat_llama, tmp_path, capsys, monkeypatch):
    batch = Sampler.batch

    def stopped(self, number):
        if number == 2:
            raise KeyboardInterrupt
        return batch(self, number)

    monkeypatch.setattr(Sampler, "batch", stopped)
    assert main(command(chat_llama, tmp_path / "a.jsonl")) == 130
    said = capsys.readouterr().err
    assert "8 texts" in said
    assert "--resume" in said


def test_bad_input_is_one_line_and_nothing_is_overwritten(chat_llama, tmp_path, capsys):
    path, other = tmp_path / "a.jsonl", tmp_path / "mine.jsonl"
    assert main(command(chat_llama, path, "--num-tokens", "50")) == 0
    other.write_text('{"text": "mine"}\n')
    bare = tmp_path / "bare"
    shutil.copytree(chat_llama, bare)
    (bare / "chat_template.jinja").unlink()
    ends_without = tmp_path / "plain.jinja"
    ends_without.write_text(CHATML.replace("'<|im_end|>'", "' END'"))
    (tmp_path / "empty.txt").write_text("\n")
    talks = write_rows(
        tmp_path / "t.jsonl", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    )
    cases = [
        (command(chat_llama, path), "already exists: name another file"),
        (command(chat_llama, other, "--overwrite"), "was changed since"),
        (command(chat_llama, path, "--resume", "--num-tokens", "10000"), "lower num_tokens, or overwrite it"),
        (command(chat_llama, other, "--resume"), "was changed since"),
        (command(chat_llama, path, "--resume", "--overwrite"), "exclude each other"),
        (command(chat_llama, tmp_path / "b.txt"), "ends in .jsonl"),
        (command(chat_llama, tmp_path / "no" / "b.jsonl"), "in an existing folder"),
        (command(chat_llama, tmp_path / "b.jsonl", "--temperature", "0"), "temperature = 0.0 is out of range"),
        (command(chat_llama, tmp_path / "b.jsonl", "--top-p", "2"), "--top-p = 2.0 is out of range"),
        (command(chat_llama, tmp_path / "b.jsonl", "--max-new-tokens", "256"), "context of 256"),
        (command(str(bare), tmp_path / "b.jsonl", "--chat"), "has no chat template"),
        (
            command(chat_llama, tmp_path / "b.jsonl", "--chat", "--chat-template-path", str(ends_without)),
            "does not end a user's turn with a special token",
        ),
        (command(chat_llama, tmp_path / "b.jsonl", "--prompts", str(tmp_path / "empty.txt")), "holds no prompt"),
        (command(chat_llama, tmp_path / "b.jsonl", "--prompts", talks), "or name a column of texts"),
    ]
    assert_refused(cases, capsys)
    assert other.read_text() == '{"text": "mine"}\n'
    assert not (tmp_path / "b.jsonl.part").exists()
    assert not list(tmp_path.glob(".*.lock"))


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_file_of_others_at_the_name_of_the_output_is_never_overwritten(when, stopped, tmp_path):
    if when == "before":
        stopped.write_text("mine")
        with pytest.raises(InputError, match="was changed since"):
            written(stopped, sampler_of(), resume=True)
    else:
        with open_samples(stopped, {"seed": 0}, dedup_prefix=5, resume=True) as file:
            stopped.write_text("mine")
            with pytest.raises(InputError, match="move it away"):
                fill(file, sampler_of(), num_tokens=150)
    assert stopped.read_text() == "mine"
    stopped.unlink()
    written(stopped, sampler_of(), resume=True)
    written(tmp_path / "straight.jsonl", sampler_of())
    assert stopped.read_bytes() == (tmp_path / "straight.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["a.jsonl.castlm.json", "a.jsonl.part", ".a.jsonl.lock", "a.jsonl"])
def test_files_of_others_beside_the_output_or_behind_a_link_stay(name, tmp_path):
    path, mine = tmp_path / name, tmp_path / "mine.json"
    for way in ("link", "file"):
        mine.write_text('{"mine": 1}')
        path.symlink_to(mine) if way == "link" else path.write_bytes(mine.read_bytes())
        for options in ({}, {"overwrite": True}, {"resume": True}):
            if way == "link" or "lock" not in name:
                with pytest.raises(InputError, match=re.escape(name)):
                    written(tmp_path / "a.jsonl", sampler_of(), **options)
                assert path.read_text() == mine.read_text() == '{"mine": 1}'
        path.unlink()


def test_two_processes_do_not_write_one_file(tmp_path):
    one, other = (open_samples(tmp_path / "a.jsonl", {}, dedup_prefix=0) for _ in range(2))
    with one, pytest.raises(InputError, match="is in use by process"):
        other.__enter__()


def test_prompts_are_lines_or_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    assert read_prompts(tmp_path / "a.txt", TextOptions()) == ["one", "two"]
    path = write_rows(tmp_path / "a.jsonl", [{"question": "  one "}, {"question": "two\n"}])
    assert read_prompts(path, TextOptions(column="question")) == ["  one ", "two\n"]
