"""Quantizing: zeros stay, verify holds, int4 uses the calibration text, the command writes a folder."""

import copy
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.core.nm import is_nm_sparse, nm_mask
from castlm.core.scaling import add_weight_scaling
from castlm.core.sparsify import prune_, sparse_linears
from castlm.data import calibration as calibration_module
from castlm.data.calibration import draw_calibration
from castlm.data.documents import open_documents
from castlm.data.options import DEFAULTS
from castlm.data.tokens import text_encoder
from castlm.export import quantized
from castlm.export.head import head_hessian
from castlm.export.packed import pack_folder, unpack_folder
from castlm.export.quantized import quantize_folder
from castlm.export.verify import verify
from castlm.formats import rounding
from castlm.formats.rounding import round_in_groups, round_rows, round_table
from castlm.models.architecture import linearize_conv1d_
from castlm.models.io import load_model
from castlm.oneshot.draw import Draw
from castlm.oneshot.folder import StartFolder
from castlm.oneshot.steps.round import quantize_
from castlm.packed.tensor import pack_integers, unpack
from castlm_runtime.packed import read_specs
from castlm_runtime.stored import read_header
from tests.chats import CHATML, chat_tokenizer, save_chat_model, talks, write_rows
from tests.refusals import assert_refused
from tests.runs import assert_equal_weights, edit_json, killed_in, prune_to, record_of, weights
from tests.slow import slow
from tests.tiny import TEXT, save_tiny, tiny_model, tiny_tokenizer

GPTQ = ("int4", "int3")
"""The kinds that read a calibration text."""


def pruned_model(family="llama", dtype=torch.float32):
    model = tiny_model(family)
    prune_(model)
    return model.to(dtype)


def draw_of(text):
    """A draw of 19 sequences of a text."""
    return Draw(documents=open_documents(text), num_sequences=19, seq_len=64, precision="fp32")


def calibration():
    ids = torch.tensor(tiny_tokenizer()(TEXT)["input_ids"])
    return draw_calibration(ids, 8, 64)


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        *(("int8", "llama"), ("fp8", "llama"), ("int4", "gpt2"), ("int3", "llama")),
        *(slow("int8", "gpt2"), slow("fp8", "gpt2"), slow("int4", "llama")),
    ],
)
def test_zeros_stay_and_the_report_holds_what_the_model_computes(kind, family):
    model = tiny_model(family)
    linearize_conv1d_(model)
    prune_(model)
    before = copy.deepcopy(model)
    report = quantize_(model, kind, calibration=calibration() if kind in GPTQ else None)
    layers, _ = sparse_linears(model)
    assert set(report.layers) == set(layers)
    for name, layer in layers.items():
        old = before.get_submodule(name).weight
        assert (layer.weight[old == 0] == 0).all()
        assert is_nm_sparse(layer.weight)
        assert torch.equal(report.layers[name].dequantized(), layer.weight)
        assert not torch.equal(layer.weight, old)
    assert torch.equal(model.get_input_embeddings().weight, before.get_input_embeddings().weight)
    limit = {"int8": 1e-4, "fp8": 2e-3, "int4": 2e-2, "int3": 1e-1}[kind]
    assert 0 < report.mean_error < limit


def test_int4_fits_the_calibration_text_better_than_the_nearest_grid_points():
    tokens = calibration()
    dense, model = pruned_model(), pruned_model()
    quantize_(model, "int4", calibration=tokens)
    nearest = pruned_model()
    report = quantize_(nearest, "int4")
    layers = sparse_linears(nearest)[0]
    assert all(torch.equal(report.layers[name].dequantized(), layer.weight) for name, layer in layers.items())
    assert all(is_nm_sparse(layer.weight) for layer in layers.values())
    with torch.no_grad():
        expected = dense(tokens).logits
        by_gptq, by_nearest = ((m(tokens).logits - expected).norm() for m in (model, nearest))
    assert by_gptq < by_nearest


def test_bad_input_is_named():
    model = pruned_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"model.layers.1.mlp.up_proj.*NaN"):
        quantize_(model, "fp8")
    with pytest.raises(InputError, match="no linear layer to quantize"):
        quantize_(pruned_model(), "int8", filter_fn=lambda module, fqn: False)
    model = pruned_model()
    add_weight_scaling(model, 2)
    with pytest.raises(InputError, match="fold_weight_scaling"):
        quantize_(model, "int8")


def prune_tiny(folder, family="llama", **over):
    """Prunes a tiny model by magnitude with the command, and returns the folder of the result."""
    return prune_to(folder / "sparse", save_tiny(folder / "dense", family, **over))


@pytest.mark.parametrize("kind", ["int8", "int4", "int3"])
@pytest.mark.parametrize("family", ["llama", slow("gpt2")])
def test_both_folders_are_verified_and_the_packed_one_unpacks_to_the_plain_one(kind, family, text, tmp_path, capsys):
    sparse = prune_tiny(tmp_path, family)
    command = ["quantize", str(sparse), "--kind", kind]
    command += ["--calibration", text, "--seq-len", "64", "--calibration-sequences", "4"] if kind in GPTQ else []
    for name, options in (("plain", []), ("packed", ["--packed", "--head", "source"])):
        assert main([*command, "--output-dir", str(tmp_path / name), *options]) == 0
        assert "2:4 verified" in capsys.readouterr().out
        assert verify(tmp_path / name).ok
    before, after = verify(sparse), verify(tmp_path / "plain")
    assert all(new.num_zeros >= old.num_zeros for old, new in zip(before.layers, after.layers))
    packed = {layer.name: layer.num_zeros for layer in verify(tmp_path / "packed").sparse_layers}
    assert packed == {layer.name: layer.num_zeros for layer in after.sparse_layers}
    record = record_of(tmp_path / "plain")
    assert (record["quantized"]["kind"], record["pattern"], record["method"]) == (kind, "2:4", "magnitude")
    assert record["quantized"]["layers"] == len(before.sparse_layers)
    assert ("text_sha256" in record["quantized"]) == (kind in GPTQ)
    unpack_folder(tmp_path / "packed", tmp_path / "unpacked")
    assert_equal_weights(tmp_path / "plain", tmp_path / "unpacked")
    files = {path.name for path in (tmp_path / "packed").iterdir()}
    assert "castlm.safetensors" in files
    assert not [name for name in files if name.startswith("model")]
    stored = load_file(tmp_path / "packed" / "castlm.safetensors")
    values = [tensor for name, tensor in stored.items() if name.endswith(".values")]
    assert {tensor.dtype for tensor in values} == {torch.int8 if kind == "int8" else torch.uint8}
    assert not list(tmp_path.glob(".*"))


def test_a_layer_whose_width_does_not_divide_is_packed_as_it_is(tmp_path):
    dense = save_tiny(tmp_path / "dense", "llama", intermediate_size=90)
    sparse = prune_to(tmp_path / "sparse", dense, allow_dense=0.5)
    command = ["quantize", sparse, "--kind", "int8", "--output-dir"]
    assert main([*command, str(tmp_path / "plain")]) == 0
    assert main([*command, str(tmp_path / "packed"), "--packed", "--head", "source"]) == 0
    unpack_folder(tmp_path / "packed", tmp_path / "unpacked")
    assert_equal_weights(tmp_path / "plain", tmp_path / "unpacked")


@pytest.mark.parametrize(("sizes", "head"), [({}, "int6"), ({"intermediate_size": 4096}, None)])
def test_a_large_head_becomes_int6_beside_integers(sizes, head, tmp_path, capsys):
    dense = save_tiny(tmp_path / "dense", "llama", **sizes)
    quantize_folder(str(dense), tmp_path / "packed", "int8", pattern=None, packed=True, say=print)
    assert record_of(tmp_path / "packed")["packed"].get("head") == head
    assert ("become int6: --head source" in capsys.readouterr().out) == (head is not None)
    pack_folder(dense, tmp_path / "floats", None)
    assert record_of(tmp_path / "floats")["packed"].get("head") is None


def quantize(model, folder, text, kind, *options) -> None:
    """Quantizes with the command; int4 with a calibration text."""
    read = ["--calibration", text, "--seq-len", "64", "--calibration-sequences", "19"] if kind in GPTQ else []
    assert main(["quantize", str(model), "--kind", kind, *read, "--output-dir", str(folder), *options]) == 0


@pytest.mark.parametrize(
    ("kind", "family", "options"),
    [
        ("int4", "llama", ["--packed"]),
        ("int8", "gpt2", []),
        slow("fp8", "llama", []),
        slow("int3", "gpt2", ["--packed"]),
    ],
)
def test_one_block_in_memory_gives_what_the_whole_model_gives(kind, family, options, text, tmp_path, monkeypatch):
    """Also after a kill; a model in bf16 that is rounded to the nearest is held as it is stored."""
    dense, sparse = save_tiny(tmp_path / "dense", family), tmp_path / "sparse"
    tiny_model(family).bfloat16().save_pretrained(dense)
    prune_to(sparse, dense)
    with monkeypatch.context() as patch:
        patch.setattr(quantized, "load_model", None)
        with killed_in(StartFolder, "record"):
            quantize(sparse, tmp_path / "block", text, kind, *options)
        quantize(sparse, tmp_path / "block", text, kind, *options)
    asked = []

    def load(*arguments, **keywords):
        asked.append(keywords["dtype"])
        return load_model(*arguments, **keywords)

    monkeypatch.setattr(quantized, "open_sharded", lambda *arguments, **keywords: None)
    monkeypatch.setattr(quantized, "load_model", load)
    quantize(sparse, tmp_path / "whole", text, kind, *options)
    assert asked == [torch.float32 if kind in GPTQ else None]
    assert not list(tmp_path.glob("*.partial"))
    found, expected = weights(tmp_path / "block"), weights(tmp_path / "whole")
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in expected.items()}
    assert_equal_weights(tmp_path / "block", tmp_path / "whole")
    records = [record_of(tmp_path / name)["quantized"] for name in ("block", "whole")]
    assert records[0]["layers"] == records[1]["layers"]
    errors = [record["mean_relative_error"] for record in records]
    # a model that is held in bf16 also counts the rounding of its values
    assert errors[0] == pytest.approx(errors[1], rel=1e-6 if kind in GPTQ else 0.3)


def test_int4_without_a_calibration_text_says_that_one_would_lose_less(sparse, tmp_path, capsys):
    assert main(["quantize", sparse, "--kind", "int4", "--packed", "--output-dir", str(tmp_path / "out")]) == 0
    assert "--calibration TEXT loses less" in capsys.readouterr().err
    assert verify(tmp_path / "out", "2:4").ok


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--kind", "fp8", "--packed"], "does not hold fp8"),
        (["--head", "int8"], "--head int8"),
        (["--kind", "int3"], "--calibration"),
        (["--calibration", "x.txt"], "int8"),
        (["--damping", "2"], "damping = 2.0"),
        (["--column", "story"], "--column"),
        (["--chat-template-path", "no.jinja"], "no.jinja"),
        (["--pattern", "1:4"], "is not 1:4 in model.layers.0.self_attn.q_proj"),
        (["--pattern", "4:2"], "4:2"),
        (["--seq-len", "128"], "--seq-len"),
        (["--calibration-sequences", "0"], "--calibration-sequences = 0"),
    ],
)
def test_the_command_complains_in_one_line_and_writes_nothing(options, named, sparse, tmp_path, capsys):
    assert_refused([(["quantize", sparse, "--output-dir", str(tmp_path / "out"), *options], named)], capsys)
    assert not list((tmp_path / "out").glob("*"))


def test_int4_calibrates_on_a_column_or_on_conversations_in_a_given_template(tmp_path, monkeypatch):
    dense = save_chat_model(tmp_path / "dense", template=None)
    sparse, template = prune_to(tmp_path / "sparse", dense), tmp_path / "mine.jinja"
    template.write_text(CHATML)
    chat = write_rows(tmp_path / "c.jsonl", [{"messages": talk, "story": TEXT[:300]} for talk in talks(30)])
    read, tokens_of = [], calibration_module.draw_calibration

    def seen(ids, *args):
        read.append(chat_tokenizer().decode(ids[:40]))
        return tokens_of(ids, *args)

    monkeypatch.setattr(calibration_module, "draw_calibration", seen)
    command = [
        "quantize",
        sparse,
        "--kind",
        "int4",
        "--calibration",
        chat,
        "--seq-len",
        "64",
        "--calibration-sequences",
        "4",
    ]
    assert main([*command, "--output-dir", str(tmp_path / "a"), "--column", "story"]) == 0
    given = ["--chat-template-path", str(template)]
    assert main([*command, "--output-dir", str(tmp_path / "b"), "--column", "messages", *given]) == 0
    assert main([*command, "--output-dir", str(tmp_path / "c"), "--packed", *given]) == 0
    assert read[0] == TEXT[:40]
    assert all(text.startswith("<|im_start|>user") for text in read[1:])
    for folder in ("b", "c"):
        assert (tmp_path / folder / "chat_template.jinja").read_text() == CHATML
    assert not (tmp_path / "a" / "chat_template.jinja").exists()


def test_a_run_does_not_lose_its_model_to_a_quantized_one(sparse, tmp_path, capsys):
    sparse = shutil.copytree(sparse, tmp_path / "run" / "model")
    (tmp_path / "run" / "config.yaml").write_text("model: x\n")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    before = (sparse / "model.safetensors").read_bytes()
    assert main(["quantize", str(tmp_path / "run"), "--output-dir", str(sparse), "--overwrite"]) == 2
    assert "output_dir" in capsys.readouterr().err
    assert (sparse / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(("kind", "head"), [slow("int8", "int8"), ("int4", "int4"), slow("int8", "int6")])
def test_a_dense_model_is_quantized_packed_with_its_head_and_runs(kind, head, llama, text, tmp_path, capsys):
    packed = tmp_path / "packed"
    command = ["quantize", llama, "--kind", kind, "--packed", "--head", head, "--output-dir", str(packed)]
    if head != "int8":
        command += ["--calibration", text, "--seq-len", "64", "--calibration-sequences", "4"]
    assert main(command) == 0
    assert "dense" in capsys.readouterr().out
    assert record_of(packed)["pattern"] is None
    specs = read_specs(read_header(packed / "castlm.safetensors"))
    assert {spec.pattern for spec in specs.values()} == {"dense"}
    tables = {"lm_head", "model.embed_tokens"}
    assert {spec.values for stem, spec in specs.items() if stem not in tables} == {kind}
    assert {specs[table].values for table in tables} == {head}
    eval_options = ["--text", text, "--seq-len", "64"]
    figures = []
    for folder in (llama, packed):
        assert main(["eval", str(folder), *eval_options, "--json", str(tmp_path / "e.json")]) == 0
        figures.append(json.loads((tmp_path / "e.json").read_text())["perplexity"])
    assert abs(figures[1] / figures[0] - 1) < 0.05
    assert main(["generate", str(packed), "--prompt", "Once", "--max-new-tokens", "4"]) == 0
    assert main(["quantize", llama, "--output-dir", str(tmp_path / "plain")]) == 0
    assert record_of(tmp_path / "plain")["quantized"]["kind"] == "int8"
    assert not list(packed.glob(".*"))


def test_a_packed_folder_with_an_int8_head_is_measured_as_generate_computes_it_and_close_to_its_unpacked_weights(
    sparse, text, tmp_path
):
    packed = tmp_path / "packed"
    assert main(["quantize", sparse, "--packed", "--head", "int8", "--output-dir", str(packed)]) == 0
    assert verify(packed).ok
    assert load_file(packed / "castlm.safetensors")["lm_head.values"].dtype == torch.int8
    command = ["eval", str(packed), "--text", text, "--seq-len", "64", "--eval-tokens", "64"]
    assert main([*command, "--json", str(tmp_path / "e.json")]) == 0
    ids = tiny_tokenizer()(TEXT, return_tensors="pt")["input_ids"][:, :64]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(packed)(ids).logits
        unpacked = load_model(packed).model(ids).logits
    expected = F.cross_entropy(logits[0, :-1], ids[0, 1:]).exp().item()
    assert json.loads((tmp_path / "e.json").read_text())["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert float((logits - unpacked).abs().max() / unpacked.abs().max()) < 0.02


def test_a_2_4_model_without_a_record_is_found_to_be_one(sparse, tmp_path, capsys):
    sparse = shutil.copytree(sparse, tmp_path / "sparse")
    (sparse / "castlm.json").unlink()
    assert main(["quantize", str(sparse), "--output-dir", str(tmp_path / "out")]) == 0
    assert "2:4 verified" in capsys.readouterr().out
    assert main(["quantize", str(sparse), "--pattern", "dense", "--output-dir", str(tmp_path / "other")]) == 0
    assert "2:4" not in capsys.readouterr().out


# ---- the rounding itself


def sparse_weight(rows=24, columns=160, seed=0):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return weight.masked_fill(~nm_mask(weight), 0)


def correlated_inputs(columns=160, tokens=2000, seed=1):
    """Most of the variance in 20 directions, as in the inputs of a language model's layers."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, 20, generator=generator) @ torch.randn(20, columns, generator=generator)
    return shared + 0.3 * torch.randn(tokens, columns, generator=generator)


def plain_gptq(weight, hessian, scales, damping=0.01):
    """GPTQ as published, one row and one column at a time, with the given scales (rows, groups)."""
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True)
    left, kept, codes = weight.double().clone(), weight != 0, torch.zeros_like(weight, dtype=torch.int8)
    for j in range(weight.shape[1]):
        scale = scales[:, j // 64].double()
        code = (left[:, j] / scale).round().clamp(-8, 7) * kept[:, j]
        codes[:, j] = code.to(torch.int8)
        error = (left[:, j] - code * scale) / upper[j, j]
        left[:, j:] -= error.unsqueeze(1) * upper[j, j:]
    return codes


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_every_zero_is_positive_whatever_the_sign_of_its_scale(kind):
    weight = sparse_weight()
    weight[:, ::7] = -0.0
    weight[3] = 0
    rounded = round_in_groups(weight) if kind == "int4" else round_rows(weight, kind)
    found = rounded.dequantized()
    assert kind != "int4" or (rounded.scales < 0).any()
    assert not torch.signbit(found[found == 0]).any()
    assert not found[3].any()
    assert found.isfinite().all()
    if kind != "fp8":
        scales = rounded.scales.bfloat16() if kind == "int4" else rounded.scales
        unpacked = unpack(pack_integers(rounded.codes, scales, kind, 2, 4))
        assert torch.equal(unpacked.view(torch.int32), found.view(torch.int32))


def test_int8_errs_by_half_a_step_and_fp8_by_a_sixteenth():
    weight = sparse_weight()
    int8 = round_rows(weight, "int8")
    assert ((int8.dequantized() - weight).abs() <= int8.scales / 2 + 1e-7).all()
    fp8 = round_rows(weight, "fp8")
    assert ((fp8.dequantized() - weight).abs() <= weight.abs() / 16 + fp8.scales * 2**-10 + 1e-7).all()


@pytest.mark.parametrize(("kind", "largest"), [("int6", 31), ("int4", 7), ("int3", 3)])
def test_scales_of_groups_are_exact_in_bf16_and_codes_in_range(kind, largest):
    rounded = round_in_groups(sparse_weight(), kind=kind)
    assert rounded.scales.shape == (24, 3)
    assert torch.equal(rounded.scales.bfloat16().float(), rounded.scales)
    assert rounded.codes.min() == -largest - 1
    assert rounded.codes.max() == largest


@pytest.mark.parametrize("kind", ["int4", "int3"])
def test_without_a_text_each_scale_is_the_best_of_a_search_and_each_weight_the_nearest_code_to_it(kind):
    weight = sparse_weight()
    end = {"int4": 8, "int3": 4}[kind]
    rounded = round_in_groups(weight, kind=kind)
    for row in range(len(weight)):
        for group, columns in enumerate((slice(0, 64), slice(64, 128), slice(128, 192))):
            w, chosen = weight[row, columns], rounded.scales[row, group]
            extreme = w[w.abs().argmax()]

            def lost(scale, w=w):
                error = ((w / scale).round().clamp(-end, end - 1) * scale - w).square()
                return float((error * w.abs()).sum() if kind == "int4" else error.sum())

            tried = [extreme * shrink / at for at in (end - 1, -end) for shrink in (1, 0.95, 0.9, 0.85, 0.8, 0.7)]
            assert lost(chosen) <= min(lost(scale.bfloat16().float()) for scale in tried) * (1 + 1e-5)
            assert torch.equal(rounded.codes[row, columns], (w / chosen).round().clamp(-end, end - 1).to(torch.int8))
    assert not rounded.codes[weight == 0].any()
    assert (rounded.codes == -end).any()
    assert (rounded.scales < 0).any()


def test_gptq_is_the_published_loop():
    weight, x = sparse_weight(), correlated_inputs()
    rounded = round_in_groups(weight, x.T @ x, passes=0)
    expected = plain_gptq(weight, x.T @ x, rounded.scales)
    assert (rounded.codes == expected).float().mean() > 0.995  # ties of the rounding apart


def test_gptq_loses_less_of_the_output_than_the_nearest_and_every_pass_of_descent_less_still():
    weight, x = sparse_weight(), correlated_inputs()
    hessian = x.T @ x
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))

    def lost(rounded):
        error = rounded.dequantized() - weight
        return float((error @ damped * error).sum())

    nearest = lost(round_in_groups(weight))
    by_passes = [lost(round_in_groups(weight, hessian.clone(), passes=passes)) for passes in (0, 1, 2, 4)]
    assert by_passes[0] < 0.6 * nearest
    assert by_passes == sorted(by_passes, reverse=True)
    assert by_passes[3] < 0.4 * by_passes[0]


def test_a_table_is_rounded_in_parts_of_its_rows_each_by_the_hessian(monkeypatch):
    weight, x = sparse_weight(), correlated_inputs()
    hessian = x.T @ x
    whole = round_in_groups(weight, hessian.clone(), damping=0.1, kind="int6")
    monkeypatch.setattr(rounding, "_TABLE_ROWS", 10)
    in_parts = round_table(weight, "int6", hessian)
    assert torch.equal(in_parts.codes, whole.codes)
    assert torch.equal(in_parts.scales, whole.scales)


def test_columns_that_no_input_reaches_are_rounded_to_the_nearest():
    weight, x = sparse_weight(), correlated_inputs()
    x[:, 10:20] = 0
    rounded = round_in_groups(weight, x.T @ x).dequantized()
    assert rounded.isfinite().all()
    step = round_in_groups(weight, x.T @ x).scales[:, :1].abs()
    assert ((rounded - weight)[:, 10:20].abs() <= 1.5 * step).all()


def test_a_model_with_its_own_code_is_not_packed_and_says_so_first(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "model", "llama")
    code = {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.OwnModel"}
    edit_json(folder / "config.json", model_type="own", architectures=["OwnModel"], auto_map=code)
    (folder / "code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Own(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = Own\n"
    )
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("castlm.export.quantized.open_sharded", lambda *_, **__: pytest.fail("the weights are read"))
    with pytest.raises(InputError, match="own code, which the packed format"):
        quantized.quantize_folder(
            str(folder), tmp_path / "out", "int8", pattern=None, packed=True, trust_remote_code=True
        )


@pytest.mark.parametrize("family", ["llama", slow("gpt2")])
def test_the_hessian_of_a_head_is_of_the_hidden_states_that_the_model_gives_it(family, text, tmp_path, monkeypatch):
    """With one block in memory as with the whole model; nothing of the model changes."""
    folder = save_tiny(tmp_path / "model", family)
    draw = draw_of(text)
    by_block = head_hessian(str(folder), draw)
    model = load_model(str(folder)).model
    drawn = draw.text(model, {}, text_encoder(tiny_tokenizer(), DEFAULTS), model.device)
    with torch.no_grad():
        hidden = model.base_model(drawn.sequences)[0].flatten(0, 1)  # (19, 64, 32) -> (1216, 32)
    expected = hidden.T @ hidden
    monkeypatch.setattr("castlm.export.head.open_sharded", lambda *_, **__: None)
    whole = head_hessian(str(folder), draw)
    assert torch.equal(by_block, whole)
    factor = whole.diagonal().sum() / expected.diagonal().sum()
    torch.testing.assert_close(whole, expected * factor)


@pytest.mark.parametrize("kind", ["int4", slow("int6")])
def test_pack_with_a_calibration_text_rounds_the_head_by_it_and_the_embedding_to_the_nearest(kind, text, tmp_path):
    folder = save_tiny(tmp_path / "model", "llama")
    command = ["pack", str(folder), "--head", kind, "--output-dir"]
    read = ["--calibration", text, "--seq-len", "64", "--calibration-sequences", "19"]
    assert main([*command, str(tmp_path / "nearest")]) == 0
    assert main([*command, str(tmp_path / "by-text"), *read]) == 0
    nearest, by_text = (load_file(tmp_path / name / "castlm.safetensors") for name in ("nearest", "by-text"))
    changed = {name for name in nearest if not torch.equal(nearest[name], by_text[name])}
    assert changed
    assert all(name.startswith("lm_head.") for name in changed)
    hessian = head_hessian(str(folder), draw_of(text))
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    rounded = round_table(head, kind, hessian)
    assert torch.equal(by_text["lm_head.scales"].float(), rounded.scales)


@pytest.mark.parametrize("kind", ["int4", slow("int3")])
def test_pack_stores_the_codes_of_a_plain_folder_that_quantize_wrote(kind, llama, text, tmp_path):
    read = ("--calibration", text, "--calibration-sequences", "4", "--seq-len", "32")
    assert main(["quantize", str(llama), "--kind", kind, *read, "--output-dir", str(tmp_path / "plain")]) == 0
    assert main(["pack", str(tmp_path / "plain"), "--output-dir", str(tmp_path / "packed"), "--head", "source"]) == 0
    specs = read_specs(read_header(tmp_path / "packed" / "castlm.safetensors"))
    assert {spec.values for spec in specs.values()} == {kind}
    unpack_folder(str(tmp_path / "packed"), tmp_path / "again")
    assert_equal_weights(tmp_path / "plain", tmp_path / "again")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--calibration", "x.txt"], "--head int6 or int4"),
        (["--head", "int8", "--calibration", "x.txt"], "--head int6 or int4"),
        (["--head", "int4", "--seq-len", "64"], "a calibration text"),
        (["--head", "int4", "--calibration", "no.txt"], "no.txt"),
    ],
)
def test_pack_refuses_a_calibration_text_without_use(options, named, llama, tmp_path, capsys):
    assert_refused([(["pack", llama, "--output-dir", str(tmp_path / "out"), *options], named)], capsys)
    assert not (tmp_path / "out").exists()
