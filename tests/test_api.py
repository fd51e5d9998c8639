"""The calls of `castlm.api`: their options are those of the commands."""

import inspect
import json
import re
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM

import castlm
from castlm.core.errors import InputError
from castlm.core.nm import is_nm_sparse
from castlm.training.trainer import Trainer
from tests.slow import slow
from tests.tiny import TEXT, save_tiny, tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def test_signatures_at_run_time_have_the_options_with_their_defaults():
    for name, default in {"train": ("eta", 2 / 3), "prune": ("damping", 0.01), "pack": ("head", None)}.items():
        assert inspect.signature(getattr(castlm, name)).parameters[default[0]].default == default[1]
    assert "init_from" not in inspect.signature(castlm.finetune).parameters
    assert "lora_r" not in inspect.signature(castlm.train).parameters


def test_the_stub_for_editors_has_the_public_names():
    stub = (ROOT / "src" / "castlm" / "__init__.pyi").read_text(encoding="utf-8")
    listed = re.findall(r"^from (castlm\.\S+) import (\w+) as (\w+)$", stub, re.M)
    assert {name: module for module, name, _ in listed} == castlm._MODULE_OF
    assert all(name == alias for _, name, alias in listed)


def test_every_public_name_is_there():
    for name in castlm.__all__:
        assert getattr(castlm, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        castlm.no_such_name  # noqa: B018


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: castlm.train("m", "t", output_dir="o", learning_rat=1), "learning_rate"),
        (lambda: castlm.train("m", output_dir="o"), "dataset is missing"),
        (lambda: castlm.train(castlm.TrainConfig.of("m", "t", "o"), "t"), "config alone"),
        (lambda: castlm.prune("m", output_dir="o"), "give calibration FILE, or solver magnitude"),
        (
            lambda: castlm.prune("m", "t", output_dir="o", solver="magnitude"),
            "calibration = t has an effect only with a solver",
        ),
        (lambda: castlm.evaluate("m"), "give text FILE, tasks"),
        (lambda: castlm.evaluate("m", tasks="piqa", seq_len=8), "seq_len = 8 has an effect only with a text"),
        (lambda: castlm.pack("m", output_dir="o", head="int9"), "int9"),
        (lambda: castlm.sample("m", num_tokens=0), "num_tokens"),
        (lambda: castlm.sample("m", top_p=2), "top_p"),
        (lambda: castlm.finetune("demo", "t", output_dir="o"), "demo is a dense model"),
    ],
)
def test_bad_calls_name_the_value_as_python_writes_it(call, named):
    with pytest.raises(InputError, match=named):
        call()


# ---- models and texts in memory

SMALL = {"seq_len": 16, "calibration_sequences": 4, "rotate": "off", "permute": False}
RUN = {"max_steps": 2, "seq_len": 16, "per_device_train_batch_size": 2, "eval_tokens": 64, "save_steps": 0}
RUN |= {"init_from": "magnitude", "report_to": "none"}
TEXTS = [story for story in TEXT.split("\n\n") if story.strip()]


def written(folder: Path) -> str:
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(file)


def of_kind(kind: str):
    if kind == "Dataset":
        return datasets.Dataset.from_dict({"text": TEXTS})
    if kind == "IterableDataset":
        return datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    return {"list": TEXTS, "generator": (text for text in TEXTS), "rows": [{"text": text} for text in TEXTS]}[kind]


@pytest.mark.parametrize("kind", ["list", "generator", "rows", "Dataset", "IterableDataset"])
def test_a_model_and_a_text_in_memory_are_pruned_like_their_files(kind, tmp_path):
    folder = save_tiny(tmp_path / "dense")
    castlm.prune(folder, written(tmp_path), output_dir=tmp_path / "named", **SMALL)
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = castlm.prune(model, of_kind(kind), **SMALL)  # its tokenizer is found where it was loaded from
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "named").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.model.state_dict().items())
    assert found.folder is None
    assert found.facts.base_model == str(folder)
    assert found.facts.pattern == "2:4"
    assert len(found.report.layers) == 14
    assert found.tokenizer.encode("a b") == tiny_tokenizer().encode("a b")
    assert {entry.name for entry in tmp_path.iterdir()} == {"dense", "named", "texts.jsonl"}


@pytest.mark.parametrize("family", ["llama", slow("gpt2"), slow("gpt_oss")])
def test_a_run_in_memory_is_the_run_of_its_files(family, tmp_path):
    folder = save_tiny(tmp_path / "dense", family)
    options = {**RUN, "cross_document_attention": family == "gpt_oss"}  # which cannot keep documents apart
    named = castlm.train(folder, written(tmp_path), output_dir=tmp_path / "named", **options)
    loaded = castlm.load_model(folder)
    found = castlm.train(loaded, TEXTS, **options)
    assert named.folder == tmp_path / "named" / "model"
    for name, value in named.model.state_dict().items():
        assert torch.equal(value, found.model.state_dict()[name]), name
    assert found.perplexity == named.perplexity
    assert found.verdict.ok == named.verdict.ok
    assert not list(tmp_path.glob("*.given"))


def test_results_go_from_call_to_call(tmp_path):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    pruned = castlm.prune(model, TEXTS, pattern="1:4", tokenizer=tokenizer, **SMALL)
    tuned = castlm.finetune(pruned, TEXTS, max_steps=2, seq_len=16, per_device_train_batch_size=2, save_steps=0)
    assert tuned.facts.pattern == "1:4"  # of the result before
    assert [step.method for step in tuned.facts.earlier] == ["sparsegpt"]
    rounded = castlm.quantize(tuned, kind="int8")
    packed = castlm.pack(rounded, head="int8", output_dir=tmp_path / "packed")
    assert packed.report.bytes_after < packed.report.bytes_before
    plain = castlm.unpack(packed)
    assert is_nm_sparse(plain.model.model.layers[0].mlp.up_proj.weight, 1, 4)
    scores = [castlm.evaluate(each, TEXTS, seq_len=32).perplexity for each in (rounded, packed, plain)]
    assert scores == pytest.approx([scores[0]] * 3, rel=0.05)
    text = castlm.generate(packed, "The", max_new_tokens=4)
    assert text.new_tokens == 4
    assert castlm.generate(plain.model, "The", tokenizer=tokenizer, max_new_tokens=4).new_tokens == 4


def test_what_a_model_writes_is_a_text_for_the_next_call():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    texts = castlm.sample(model, num_tokens=400, tokenizer=tokenizer, max_new_tokens=40, batch_size=4)
    assert all(text["text"].strip() for text in texts)
    assert texts == castlm.sample(model, num_tokens=400, tokenizer=tokenizer, max_new_tokens=40, batch_size=4)
    assert castlm.prune(model, texts, tokenizer=tokenizer, **SMALL).facts.pattern == "2:4"


def test_a_run_of_objects_is_resumed_by_the_same_call(tmp_path, monkeypatch):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    options = {**RUN, "max_steps": 4, "save_steps": 2, "tokenizer": tokenizer}
    straight = castlm.train(model, TEXTS, output_dir=tmp_path / "straight", **options)
    train_step = Trainer.train_step

    def stopped(trainer):
        if trainer.step == 2:
            raise KeyboardInterrupt
        return train_step(trainer)

    monkeypatch.setattr(Trainer, "train_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        castlm.train(model, TEXTS, output_dir=tmp_path / "run", **options)
    monkeypatch.undo()
    other = castlm.train(model, TEXTS, output_dir=tmp_path / "run", resume=True, **options)
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    assert {entry.name for entry in tmp_path.iterdir()} == {"straight", "run"}


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda model: castlm.prune(model.model.layers[0].mlp, TEXTS), "not the LlamaMLP .*filter_fn"),
        (lambda model: castlm.prune(3, TEXTS), "model must be .*, not the int 3"),
        (lambda model: castlm.prune("m", TEXTS, tokenizer=tiny_tokenizer()), "name m"),
        (lambda model: castlm.prune(model, TEXTS), "give tokenizer="),
        (lambda model: castlm.train(model, 3, tokenizer=tiny_tokenizer()), "text must be .*, not the int 3"),
        (lambda model: castlm.train(model, ["a", 3], tokenizer=tiny_tokenizer()), "document 2 of text"),
        (lambda model: castlm.train(model, [], tokenizer=tiny_tokenizer(), seq_len=16), "no document with text"),
        (lambda model: castlm.train(model, [{"text": object()}], tokenizer=tiny_tokenizer()), "document 1 of text"),
        (lambda model: castlm.generate(model, 3, tokenizer=tiny_tokenizer()), "prompt must be text"),
        (lambda model: castlm.generate(None, "a"), "model must be a name"),
    ],
)
def test_objects_that_cannot_be_used_are_refused_with_a_way_out(call, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=named) as caught:
        call(tiny_model("llama"))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_ranks_share_files_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    for call in (
        lambda: castlm.train(model, "t", output_dir=tmp_path / "o", tokenizer=tokenizer),
        lambda: castlm.train("m", ["a text"], output_dir=tmp_path / "o"),
        lambda: castlm.prune("m", "t"),
    ):
        with pytest.raises(InputError, match="2 ranks, which share files alone"):
            call()


@pytest.mark.parametrize("given", ["demo", None, 3, torch.ones(4, 4)], ids=["name", "None", "int", "tensor"])
def test_functions_of_a_model_in_memory_name_what_they_were_given(given, tmp_path):
    ids, tokenizer = torch.zeros(1, 8, dtype=torch.long), tiny_tokenizer()
    calls = {
        "sparse_linears": lambda: castlm.sparse_linears(given),
        "sparse_param_groups": lambda: castlm.sparse_param_groups(given),
        "prune_": lambda: castlm.prune_(given),
        "prune_oneshot_": lambda: castlm.prune_oneshot_(given, "wanda", calibration=ids),
        "add_weight_scaling": lambda: castlm.add_weight_scaling(given),
        "fold_weight_scaling": lambda: castlm.fold_weight_scaling(given),
        "linearize_experts_": lambda: castlm.linearize_experts_(given),
        "keep_pattern_": lambda: castlm.keep_pattern_(given),
        "pack_model_": lambda: castlm.pack_model_(given),
        "to_semi_structured_": lambda: castlm.to_semi_structured_(given, 4),
        "calibration_length": lambda: castlm.calibration_length(given),
        "perplexity": lambda: castlm.perplexity(given, ids[0]),
        "export_model": lambda: castlm.export_model(given, tokenizer, tmp_path / "out"),
        "save_model": lambda: castlm.save_model(given, tokenizer, tmp_path / "out"),
        "nm_mask": lambda: castlm.nm_mask(given if given is None else str(given)),
    }
    for name, call in calls.items():
        with pytest.raises(
            castlm.InputError, match=r"must be .*, not the (str|NoneType|int|Tensor) .*: pass"
        ) as caught:
            call()
        assert "\n" not in str(caught.value), name
    sections = dict.fromkeys(castlm.TrainConfig.sections(), given)
    with pytest.raises(castlm.InputError, match=r"section model must be ModelOptions.*TrainConfig\.of"):
        castlm.TrainConfig(**sections)
    with pytest.raises(castlm.InputError, match="tokenizer"):
        castlm.save_model(tiny_model("llama"), given, tmp_path / "out")
    model = tiny_model("llama")
    with pytest.raises(castlm.InputError, match="text must be"):
        castlm.perplexity(model, "a text")
    with pytest.raises(castlm.InputError, match=r"shape \(1, 8\)"):
        castlm.perplexity(model, ids)
    with pytest.raises(castlm.InputError, match="masks must"):
        castlm.prune_(model, masks=[ids])
    for name in ("basis", "refinements"):
        with pytest.raises(castlm.InputError, match=f"{name} must be"):
            castlm.prune_oneshot_(model, "wanda", calibration=ids, **{name: given})
    assert not any(tmp_path.iterdir())
