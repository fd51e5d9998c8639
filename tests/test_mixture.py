"""Several texts in one run: their shares, an exact position, and figures of each evaluation text."""

import json

import pytest
import torch
from datasets import Dataset

from castlm.core.errors import InputError
from castlm.data.calibration import calibration_sequences
from castlm.data.columns import Columns
from castlm.data.documents import Documents, HubDocuments, Mixture
from castlm.data.packing import BatchLoader, MixedSequences, PackedSequences
from castlm.data.tokens import Encoder, Tokens
from castlm.training import text as text_module
from castlm.training.config import TrainConfig
from castlm.training.text import open_training_text
from castlm.training.train import train
from castlm.world import init_world
from tests.runs import metrics, small, stop_and_resume
from tests.tiny import EOS, TEXT, tiny_tokenizer


def texts(letter: str, sizes: list[int]) -> Documents:
    return Documents.from_texts([letter * size for size in sizes], name=letter)


def mixture(*weights: float) -> Mixture:
    parts = [texts("a", [30, 50, 20] * 7), texts("b", [10, 90]), texts("c", [200, 1, 5])]
    return Mixture(parts[: len(weights)], weights)


def sequences(*weights: float) -> MixedSequences:
    parts = mixture(*weights).parts
    return MixedSequences(
        [PackedSequences(part, Encoder(tiny_tokenizer()), seq_len=16, seed=0) for part in parts], weights
    )


def letters(rows: list[Tokens]) -> list[str]:
    """Which text each sequence is of."""
    return [tiny_tokenizer().decode(row.ids.tolist()).replace(EOS, "")[0] for row in rows]


def test_shares_of_the_tokens_hold_at_every_point_however_long_the_documents_are():
    found, used = letters(sequences(0.5, 0.3, 0.2).take(200)), {"a": 0, "b": 0, "c": 0}
    for number, letter in enumerate(found, 1):
        used[letter] += 1
        for other, share in zip("abc", (0.5, 0.3, 0.2)):
            assert abs(used[other] - share * number) <= 1
    assert letters(sequences(0.98, 0.01, 0.01).take(20)) == ["a"] * 20


def test_calibration_takes_from_each_text_its_share_of_the_sequences_in_turns():
    drawn, _ = calibration_sequences(mixture(2, 1, 1), Encoder(tiny_tokenizer()), 8, 16)
    words = [tiny_tokenizer().decode(row.tolist()).replace(EOS, "")[0] for row in drawn]
    assert "".join(words) == "abcaabca"
    with pytest.raises(InputError, match=r"b: .* 10.* 200"):
        calibration_sequences(mixture(1, 1), Encoder(tiny_tokenizer()), 8, 200)


def test_sequences_of_a_mixture_resume_exactly_on_any_number_of_ranks():
    straight = sequences(2, 1, 1)
    straight.take(28)
    loader = BatchLoader(sequences(2, 1, 1), rows_per_rank=4, prefetch=True)
    for _ in range(7):
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    assert state["sequences"] == 28
    ranks = [BatchLoader(sequences(2, 1, 1), rows_per_rank=3, rank=rank, world_size=2) for rank in (0, 1)]
    for rank in ranks:
        rank.load_state_dict(state)
    for _ in range(10):
        expected, found = straight.batch(straight.take(6)), [next(rank) for rank in ranks]
        assert all(torch.equal(torch.cat([rows[name] for rows in found]), expected[name]) for name in expected)


def test_weights_are_read_from_the_names():
    def of(*names: str) -> dict[str, float]:
        return TrainConfig.of("m", names, "o").data.datasets

    assert of("a.txt:0.7", "b.jsonl:3") == {"a.txt": 0.7, "b.jsonl": 3.0}
    assert of("a.txt", "owner/name:en@v1:0.5") == {"a.txt": 1.0, "owner/name:en@v1": 0.5}
    assert of("a.txt", "owner/name:20231101.en") == {"a.txt": 1.0, "owner/name:20231101.en": 1.0}
    assert TrainConfig.of("m", ["a:1"], "o").data.dataset == "a:1"  # a single text has no weight
    for names, message in ((("a", "a:2"), "names a text twice"), (("a", ""), "is not text or a list"), ((), "dataset")):
        with pytest.raises(InputError, match=message):
            of(*names)
    for weight in (0, -2):
        with pytest.raises(InputError, match=r"dataset .*above 0"):
            of(f"a.txt:{weight}", "b.txt")


def test_a_run_on_a_mixture_resumes_bit_for_bit_and_reports_each_evaluation_text(llama, text, tmp_path):
    names = []
    for name in ("one", "two"):
        file = tmp_path / f"{name}.jsonl"
        rows = [TEXT[at : at + 300] for at in range(0, 9000, 300)]
        file.write_text("".join(json.dumps({"text": f"{name} {row}"}) + "\n" for row in rows))
        names.append(str(file))
    fields = {"eval_dataset": tuple(names), "save_steps": 2, "max_steps": 4, "eval_steps": 4}
    mixed = (f"{names[0]}:0.75", f"{names[1]}:0.25", text)
    straight = small(llama, mixed, tmp_path / "straight", **fields)
    facts = train(straight)
    assert facts.dataset.name == " + ".join([*names, text])
    killed = stop_and_resume(straight, 3)
    rows = metrics(killed)
    last = next(row for row in reversed(rows) if "perplexity" in row)
    parts = [last["perplexity/one.jsonl"], last["perplexity/two.jsonl"]]
    assert min(parts) < last["perplexity"] < max(parts)


def text_of(config):
    world = init_world("cpu", "full")
    return open_training_text(
        config.model, config.data, config.evaluation, tiny_tokenizer(), 264, world, rows_per_rank=4
    )


def test_evaluation_texts_of_one_name_are_told_apart_by_their_paths(llama, text, tmp_path):
    names = []
    for name in ("one/same.txt", "two/same.txt", "other.txt"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"{name} {TEXT[:400]}")
        names.append(str(file))
    config = small(llama, text, tmp_path / "run", eval_dataset=tuple(names))
    found = text_of(config)
    assert list(found.eval_parts) == [names[0], names[1], "other.txt"]


def test_the_held_out_tokens_of_a_hub_dataset_are_the_same_for_every_seed(llama, tmp_path, monkeypatch):
    def stream():
        return Dataset.from_list([{"text": f"<{number:04}>"} for number in range(300)]).to_iterable_dataset()

    documents = HubDocuments(stream, Columns("text", False), "name", "identity")
    monkeypatch.setattr(text_module, "open_documents", lambda *args, **kwargs: documents)
    found = [text_of(small(llama, "name", tmp_path / "run", seed=seed, eval_tokens=300)) for seed in (0, 1)]
    assert found[0].eval_sha256 == found[1].eval_sha256
    assert found[0].held_out.ids.equal(found[1].held_out.ids)
