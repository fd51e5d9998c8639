"""verify against counts made by torch on the same tensors, and against every kind of broken checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from castlm.core.blocks import is_block_linear
from castlm.core.errors import InputError
from castlm.core.pattern import count_nm_violations, nm_mask
from castlm.export import stored
from castlm.export.verify import verify
from castlm.layout import guess_model_type, stored_transposed

Q0, Q1, UP1 = (f"model.layers.{name}.weight" for name in ("0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.up_proj"))


def pruned(*shape: int, n: int = 2, m: int = 4, seed: int = 0) -> Tensor:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return weight * nm_mask(weight, n, m)


def write(folder: Path, tensors: dict[str, Tensor], model_type: str | None = "llama", **castlm: object) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if castlm:
        (folder / "castlm.json").write_text(json.dumps(castlm))
    return folder


def llama(**changes: Tensor) -> dict[str, Tensor]:
    tensors = {
        "model.embed_tokens.weight": torch.randn(12, 8),
        "lm_head.weight": torch.randn(12, 8),
        "model.layers.0.input_layernorm.weight": torch.ones(8),
        Q0: pruned(8, 8, seed=1),
        Q1: pruned(16, 8, seed=2),
        UP1: pruned(8, 16, seed=3),
    }
    return tensors | changes


# ---- what is counted


def test_holds_and_reports_each_layer(tmp_path):
    report = verify(write(tmp_path, llama()))
    assert report.ok
    assert [layer.name for layer in report.layers] == [Q0, UP1, Q1]
    assert [layer.num_groups for layer in report.layers] == [16, 32, 32]
    assert report.totals()["weights"] == 64 + 128 + 128
    assert report.totals()["zero_fraction"] == 0.5
    assert "2:4 holds" in report.text()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (2, 3), (5, 16)])
def test_counts_equal_torchs_in_every_dtype(tmp_path, dtype, n, m):
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(7))
    weight[weight.abs() < 0.8] = 0
    weight[0, 0], weight[0, 1] = -0.0, 1e-30  # a negative zero, and what underflows to zero in the short dtypes
    weight = weight.to(dtype)
    layer = verify(write(tmp_path, {Q0: weight}), f"{n}:{m}").layers[0]
    wide = weight.double()
    assert layer.num_violations == count_nm_violations(wide, n, m) > 0
    assert layer.max_nonzeros == int(wide.unflatten(-1, (-1, m)).count_nonzero(-1).max())
    assert layer.num_zeros == int((wide == 0).sum())
    assert (layer.num_groups, layer.axis, layer.shape) == (6 * 96 // m, 1, (6, 96))


def test_one_weight_too_many_is_found_where_it_is(tmp_path):
    bad = pruned(16, 8, seed=2)
    bad[5, 4:8] = torch.tensor([1.0, 2.0, 3.0, 0.0])
    report = verify(write(tmp_path, llama(**{Q1: bad})))
    assert not report.ok
    assert {layer.name: layer.num_violations for layer in report.layers} == {Q0: 0, UP1: 0, Q1: 1}
    assert report.text().splitlines()[1].startswith(Q1)  # violations first
    assert "DOES NOT HOLD" in report.summary()


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_layers_without_weights_hold(tmp_path, shape):
    for model_type, name in (("llama", Q0), ("gpt2", "h.0.mlp.c_fc.weight")):
        report = verify(write(tmp_path, {name: torch.zeros(shape)}, model_type))
        assert report.ok
        assert report.layers[0].num_groups == 0


def test_groups_of_zeros_and_ties_hold(tmp_path):
    weight = torch.full((4, 8), 0.5) * nm_mask(torch.full((4, 8), 0.5))
    weight[0] = 0
    report = verify(write(tmp_path, {Q0: weight}))
    assert report.ok
    assert report.layers[0].max_nonzeros == 2


def test_gpt2_groups_run_down_the_columns(tmp_path):
    right = pruned(24, 8).T  # stored (in, out) = (8, 24)
    wrong = pruned(8, 24, seed=4)
    name = "transformer.h.0.attn.c_attn.weight"
    assert not count_nm_violations(right.T.contiguous())
    good, bad = (verify(write(tmp_path / key, {name: w}, "gpt2")) for key, w in (("a", right), ("b", wrong)))
    assert good.ok
    assert good.layers[0].axis == 0
    assert not bad.ok
    assert bad.layers[0].num_violations == count_nm_violations(wrong.T.contiguous())
    # the same name over nn.Linear, as GPT-BigCode has it
    assert verify(write(tmp_path / "c", {name: wrong}, "gpt_bigcode")).ok
    # without a config.json, the shape of the fused projection tells
    assert verify(write(tmp_path / "d", {name: right}, None)).ok
    assert verify(tmp_path / "d" / "model.safetensors").ok


def test_chunks_do_not_change_the_counts(tmp_path, monkeypatch):
    weight = torch.randn(24, 64)
    tensors = {Q0: weight, "transformer.h.0.mlp.c_fc.weight": torch.randn(64, 24)}
    folder = write(tmp_path, tensors, "gpt2")
    whole = verify(folder).as_dict()
    monkeypatch.setattr(stored, "CHUNK_BYTES", 100)  # less than the (4, 24) floats of a Conv1D step
    assert verify(folder).as_dict() == whole


def test_sharded_equals_single(tmp_path):
    tensors = llama()
    single = verify(write(tmp_path / "single", tensors))
    folder = tmp_path / "sharded"
    folder.mkdir()
    weight_map = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    report = verify(folder)
    assert report.layers == single.layers
    assert report.ok
    (folder / "model-00002-of-00002.safetensors").rename(folder / "elsewhere")
    with pytest.raises(InputError, match=r"names 1 missing files, first model-00002"):
        verify(folder)
    (folder / "elsewhere").rename(folder / "model-00002-of-00002.safetensors")
    weight_map["model.layers.7.mlp.up_proj.weight"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=r"lack, first model.layers.7.mlp.up_proj.weight"):
        verify(folder)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {Q0: "../single/model.safetensors"}})
    )
    with pytest.raises(InputError, match="outside its folder"):
        verify(folder)


def test_width_that_does_not_divide_fails_unless_left_dense(tmp_path):
    tensors = llama(**{Q0: torch.randn(8, 6)})
    report = verify(write(tmp_path / "a", tensors))
    assert [layer.name for layer in report.layers if not layer.ok] == [Q0]
    assert "width of 6 does not divide by 4" in report.text()
    for listed in (Q0, Q0.removesuffix(".weight"), "model.layers.0"):
        report = verify(write(tmp_path / "b", tensors, left_dense={listed: "too odd"}))
        assert report.ok
        assert report.totals()["left_dense"] == 1
        assert "left dense: too odd" in report.text()
    # a layer left dense does not hide a NaN
    tensors[Q0][0, 0] = torch.nan
    assert not verify(write(tmp_path / "b", tensors, left_dense={Q0: "too odd"})).ok


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_are_counted(tmp_path, dtype, value):
    weight = pruned(4, 8).double()
    weight[weight != 0] = 3.0
    weight[2] = torch.tensor([value, value, 0, 0, 0, 0, 0, value])
    report = verify(write(tmp_path, llama(**{Q0: weight.to(dtype)})))
    assert not report.ok
    assert report.layers[0].num_non_finite == 3
    assert report.num_non_finite == 3


def test_non_finite_values_outside_the_layers(tmp_path):
    embedding = torch.randn(12, 8)
    embedding[3, 3] = torch.nan
    report = verify(write(tmp_path, llama(**{"model.embed_tokens.weight": embedding})))
    assert report.non_finite_elsewhere == {"model.embed_tokens.weight": 1}
    assert not report.ok
    assert all(layer.ok for layer in report.layers)
    largest = torch.finfo(torch.float8_e4m3fn).max
    assert verify(write(tmp_path, {Q0: torch.full((4, 8), largest).to(torch.float8_e4m3fn)})).num_non_finite == 0


def test_fused_experts_are_reported_as_not_checked(tmp_path):
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    report = verify(write(tmp_path, llama(**{experts: torch.randn(2, 8, 8)})))
    assert report.ok
    assert report.unchecked == {experts: "3-D of shape 2x8x8, F32"}
    assert "1 not checked" in report.summary()


def test_include_and_exclude(tmp_path):
    folder = write(tmp_path, llama(**{Q0: torch.randn(8, 8)}))
    assert not verify(folder).ok
    report = verify(folder, exclude=["*.0.self_attn.*"])
    assert report.ok
    assert report.unchecked == {Q0: "excluded"}
    assert [layer.name for layer in verify(folder, include=["lm_head.*"]).layers] == ["lm_head.weight"]
    with pytest.raises(InputError, match="no layer to hold to 2:4"):
        verify(folder, include=["nothing*"])


def test_report_is_plain_json(tmp_path):
    content = json.loads(json.dumps(verify(write(tmp_path, llama())).as_dict()))
    assert content["ok"] is True
    assert content["pattern"] == "2:4"
    assert content["layers"][0]["zero_fraction"] == 0.5
    assert content["totals"]["violations"] == 0


def test_real_model_is_dense_until_pruned(tmp_path, stories260k):
    report = verify(stories260k)
    assert not report.ok
    assert report.totals()["layers"] == 5 * 7
    tensors = load_file(stories260k / "model.safetensors")
    for layer in report.layers:
        assert layer.num_violations == count_nm_violations(tensors[layer.name])
        tensors[layer.name] *= nm_mask(tensors[layer.name])
    assert verify(write(tmp_path, tensors)).ok


# ---- what is refused


def refused(path: Path, match: str, pattern: str = "2:4") -> None:
    with pytest.raises(InputError, match=match) as caught:
        verify(path, pattern)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("n", "m"), [(4, 2), (0, 4), (4, 4), (-1, 4)])
def test_bad_patterns(tmp_path, n, m):
    refused(write(tmp_path, llama()), rf"pattern '?{n}:{m}", f"{n}:{m}")


def test_nothing_there(tmp_path):
    refused(tmp_path / "no", "does not exist")
    refused(tmp_path, "holds no .safetensors file")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    refused(tmp_path, "found pytorch_model.bin: convert")
    save_file({Q0: pruned(4, 4)}, tmp_path / "a.safetensors")
    assert verify(tmp_path).ok
    save_file({Q0: pruned(4, 4)}, tmp_path / "b.safetensors")
    refused(tmp_path, "2 safetensors files and no model.safetensors.index.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "adapter")


def test_no_linear_layer(tmp_path):
    refused(write(tmp_path, {"model.embed_tokens.weight": torch.randn(8, 8)}), "no layer to hold to 2:4")
    refused(write(tmp_path, {Q0: torch.randn(8, 8)}, left_dense={Q0: "all"}), r"no layer .* 1 left dense")


def test_every_truncation_is_noticed(tmp_path):
    file = write(tmp_path, llama()) / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 4, 8, 20, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        refused(tmp_path, r"not a whole safetensors file|header says")
    file.write_bytes(whole + b"x")
    refused(tmp_path, "header says")
    file.write_bytes(whole)
    assert verify(tmp_path).ok


@pytest.mark.parametrize(
    "header",
    [
        b"{not json",
        b"[1, 2]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
        b'{"a": {"dtype": "F32", "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}',
        b"\xff\xfe",
    ],
)
def test_corrupt_headers(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refused(file, r"corrupt|hole")


def test_overlapping_tensors(tmp_path):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refused(file, "overlaps")


def test_files_of_other_kinds(tmp_path):
    pointer = tmp_path / "model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(pointer, "not a whole safetensors file")
    folder = write(tmp_path / "m", llama())
    (folder / "castlm.json").write_text("{")
    refused(folder, "castlm.json is not readable JSON")
    (folder / "castlm.json").write_text('{"left_dense": 3}')
    refused(folder, "left_dense is a int")
    (folder / "config.json").write_text("[]")
    refused(folder, "config.json holds a JSON list")


def test_quantized_checkpoints_are_refused_by_name(tmp_path):
    int8 = write(tmp_path / "int8", llama(**{Q0: torch.ones(8, 8, dtype=torch.int8)}))
    (int8 / "config.json").write_text('{"quantization_config": {"quant_method": "compressed-tensors"}}')
    refused(int8, rf"{Q0} is stored as I8 \(compressed-tensors\)")
    packed = "model.layers.0.self_attn.q_proj.qweight"
    gptq = write(tmp_path / "gptq", {packed: torch.ones(8, 8, dtype=torch.int32)})
    refused(gptq, f"{packed} is a packed weight")


# ---- what it costs


def test_imports_neither_torch_nor_transformers(tmp_path):
    folder = write(tmp_path, llama())
    code = (
        "import sys\nfrom castlm.export.verify import verify\n"
        f"assert verify({str(folder)!r}).ok\n"
        "print([name for name in ('torch', 'transformers', 'safetensors', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_memory_is_a_few_chunks(tmp_path):
    folder = write(tmp_path, {Q0: torch.zeros(4096, 4096)})  # 64 MiB
    tracemalloc.start()
    assert verify(folder).ok
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * stored.CHUNK_BYTES


# ---- layout


def test_layout():
    assert stored_transposed("gpt2", "transformer.h.3.mlp.c_fc.weight")
    assert stored_transposed("gpt2", "h.3.attn.c_attn.weight")
    assert not stored_transposed("llama", "model.layers.3.mlp.c_fc.weight")
    assert not stored_transposed("gpt2", "lm_head.weight")
    assert guess_model_type({"h.0.attn.c_attn.weight": (24, 8)}) is None
    for name in (
        "model.layers.0.mlp.up_proj",
        "transformer.h.11.attn.c_attn",
        "h.0.mlp.c_fc",
        "gpt_neox.layers.1.mlp.x",
    ):
        assert is_block_linear(f"{name}.weight", (4, 4))
    for name in ("lm_head", "model.embed_tokens", "transformer.wte", "model.layers.0.input_layernorm", "h.0.ln_1"):
        assert not is_block_linear(f"{name}.weight", (4, 4))
    assert not is_block_linear("model.layers.0.self_attn.q_proj.bias", (4,))
    assert not is_block_linear("backbone.layers.0.mixer.A_log", (4, 4))
