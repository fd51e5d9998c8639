"""Results are written in the dtype of the source model or the one asked for; what is verified is what is written."""

import json

import pytest
import torch
from safetensors.torch import load_file

from castlm.cli.main import main
from castlm.core.sparsify import prune_, sparse_linears
from castlm.export.hf import export_model
from castlm.models.io import load_model, parameters_in
from tests.tiny import TEXT, tiny_model, tiny_tokenizer


def save_as(folder, dtype, family="llama"):
    tiny_model(family).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def dtypes_in(folder):
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}


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


def test_parameters_are_rounded_and_buffers_are_not(tmp_path):
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.named_buffers()}
    old = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    with parameters_in(model, torch.bfloat16):
        assert model.dtype is torch.bfloat16
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, old.bfloat16().float())
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize(
    ("stored", "option", "written", "method"),
    [("bf16", [], "bf16", "wanda"), ("fp32", ["--save-dtype", "fp16"], "fp16", "magnitude")],
)
def test_prune_writes_the_source_dtype_or_the_one_asked_for(tmp_path, stored, option, written, method):
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    folder = save_as(tmp_path / "m", names[stored])
    (tmp_path / "t.txt").write_text(TEXT)
    options = ["--method", method, "--num-sequences", "4", "--seq-len", "32", *option]
    if method == "wanda":
        options += ["--calibration", str(tmp_path / "t.txt"), "--rotation-iterations", "4"]
    out = tmp_path / "out"
    assert main(["prune", "--model", str(folder), "--output-dir", str(out), *options]) == 0
    assert dtypes_in(out) == {names[written]}
    assert json.loads((out / "castlm.json").read_text())["dtype"] == str(names[written]).removeprefix("torch.")
    assert main(["verify", str(out)]) == 0


def test_perplexity_is_measured_on_the_written_values(tmp_path):
    model = tiny_model("llama")
    prune_(model)
    seen = []

    def measure(one):
        seen.append(one.model.layers[0].mlp.up_proj.weight.detach().clone())
        return 1.0

    _, left_dense = sparse_linears(model)
    export_model(
        model,
        tiny_tokenizer(),
        tmp_path / "out",
        pattern="2:4",
        left_dense=left_dense,
        record={},
        dtype=torch.bfloat16,
        eval_fn=measure,
    )
    assert dtypes_in(tmp_path / "out") == {torch.bfloat16}
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in seen)
    assert torch.equal(*seen)


def test_train_writes_the_source_dtype(tmp_path):
    folder = save_as(tmp_path / "m", torch.bfloat16)
    (tmp_path / "t.txt").write_text(TEXT)
    options = {
        "--model": folder,
        "--dataset": tmp_path / "t.txt",
        "--output-dir": tmp_path / "run",
        "--max-steps": 2,
        "--seq-len": 32,
        "--init-from": "magnitude",
        "--eval-steps": 0,
    }
    assert (
        main(["train", *(str(x) for pair in options.items() for x in pair), "--ignore-decay-budget", "--no-report"])
        == 0
    )
    assert dtypes_in(tmp_path / "run" / "model") == {torch.bfloat16}
    record = json.loads((tmp_path / "run" / "model" / "castlm.json").read_text())
    assert record["proof"]["perplexity_from_disk"] == record["proof"]["perplexity_in_memory"]
