"""verify against counts made by torch on the same tensors, and against every kind of broken checkpoint."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.core.nm import count_nm_violations, nm_mask
from castlm.core.sparsify import prune_
from castlm.export.folder import StoredUse
from castlm.export.verify import verify
from castlm.export.verify_report import VerifyReport
from castlm.models.io import save_model
from castlm_runtime import stored
from tests.runs import edit_weights
from tests.tiny import linear_model, tiny_tokenizer

Q0, Q1 = (f"model.layers.{block}.self_attn.q_proj.weight" for block in (0, 1))
DOWN0, DOWN1 = (f"model.layers.{block}.mlp.down_proj.weight" for block in (0, 1))
LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 12,
    "architectures": ["LlamaForCausalLM"],
}


def pruned(*shape: int, n: int = 2, m: int = 4, seed: int = 0) -> Tensor:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return weight * nm_mask(weight, n, m)


def save(tensors: dict[str, Tensor], file: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, object] = LLAMA, **castlm: object) -> Path:
    """A model folder."""
    folder.mkdir(exist_ok=True)
    save(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    if castlm:
        (folder / "castlm.json").write_text(json.dumps(castlm))
    return folder


def part(folder: Path, tensors: dict[str, Tensor], **castlm: object) -> Path:
    """One file that holds any layers; no config.json says which there should be."""
    folder.mkdir(exist_ok=True)
    if castlm:
        (folder / "castlm.json").write_text(json.dumps(castlm))
    return save(tensors, folder / "part.safetensors")


def counted(file: Path, pattern: str = "2:4") -> VerifyReport:
    """The report of a file whose 2-D weights all belong to plain linear layers, whatever their names."""
    shapes = {name: tensor.shape for name, tensor in stored.read_header(file).items() if len(tensor.shape) == 2}
    uses = {name: StoredUse(name, 1, shape[1], "a sum over axis -1", True, True) for name, shape in shapes.items()}
    return verify(file, pattern, uses=uses, allow_dense=1.0)


def llama(**changes: Tensor) -> dict[str, Tensor]:
    """A checkpoint of the model that `LLAMA` describes."""
    tensors = {"model.embed_tokens.weight": torch.randn(12, 8), "lm_head.weight": torch.randn(12, 8)}
    tensors["model.norm.weight"] = torch.ones(8)
    shapes = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), (8, 8))
    shapes |= {"mlp.gate_proj": (16, 8), "mlp.up_proj": (16, 8), "mlp.down_proj": (8, 16)}
    for block in (0, 1):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{block}.{norm}.weight"] = torch.ones(8)
        for seed, (name, shape) in enumerate(shapes.items()):
            tensors[f"model.layers.{block}.{name}.weight"] = pruned(*shape, seed=10 * block + seed)
    return tensors | changes


# ---- what is counted


def test_holds_and_reports_each_layer(tmp_path):
    report = verify(write(tmp_path, llama()))
    assert report.ok
    assert report.share == 1.0
    assert report.text().startswith("2:4 in 100.00% of the weights")
    assert len(report.layers) == 14
    assert {report.layers[0].name, report.layers[7].name} == {DOWN0, DOWN1}
    assert [layer.num_groups for layer in report.layers if layer.name in (Q0, DOWN0)] == [32, 16]
    assert report.totals()["weights"] == 2 * (4 * 64 + 3 * 128)
    outside = "outside the transformer blocks"
    assert report.dense == {"model.embed_tokens.weight": outside, "lm_head.weight": outside}
    assert report.totals()["zero_fraction"] == 0.5
    assert "2:4 holds" in report.text()
    assert max(map(len, report.text().splitlines()[:-1])) <= 80


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize(
    ("dtype", "n", "m"),
    [
        *((dtype, 2, 4) for dtype in DTYPES),
        *((torch.float32, n, m) for n, m in ((1, 4), (4, 8), (1, 2), (2, 3), (5, 16))),
    ],
)
def test_counts_equal_torchs_in_every_dtype(tmp_path, dtype, n, m):
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(7))
    weight[weight.abs() < 0.8] = 0
    weight[0, 0], weight[0, 1] = -0.0, 1e-30  # a negative zero, and what underflows to zero in the short dtypes
    weight = weight.to(dtype)
    layer = counted(part(tmp_path, {Q0: weight}), f"{n}:{m}").layers[0]
    wide = weight.double()
    assert layer.num_violations == count_nm_violations(wide, n, m) > 0
    assert layer.max_nonzeros == int(wide.unflatten(-1, (-1, m)).count_nonzero(-1).max())
    assert layer.num_zeros == int((wide == 0).sum())
    assert (layer.num_groups, layer.axis, layer.shape) == (6 * 96 // m, 1, (6, 96))


def test_one_weight_too_many_is_found_where_it_is(tmp_path):
    bad = pruned(8, 8, seed=2)
    bad[5, 4:8] = torch.tensor([1.0, 2.0, 3.0, 0.0])
    report = verify(write(tmp_path, llama(**{Q1: bad})))
    assert not report.ok
    assert {layer.name: layer.num_violations for layer in report.layers if layer.num_violations} == {Q1: 1}
    assert report.text().splitlines()[2].startswith(Q1)  # violations first
    assert "max" in report.text().splitlines()[1]
    assert "DOES NOT HOLD" in report.summary()


def test_gpt2_groups_run_down_the_columns(tmp_path):
    model = linear_model("gpt2")
    prune_(model)
    save_model(model, tiny_tokenizer(), tmp_path)
    report = verify(tmp_path)
    assert report.ok
    assert {layer.axis for layer in report.layers} == {0}
    name = "transformer.h.0.attn.c_attn.weight"  # stored (in, out) = (32, 96)
    wrong = pruned(32, 96, seed=4)
    edit_weights(tmp_path, lambda tensors: tensors.update({name: wrong}))
    (bad,) = [layer for layer in verify(tmp_path).layers if not layer.ok]
    assert bad.num_violations == count_nm_violations(wrong.T.contiguous()) > 0


def test_sharded_equals_single(tmp_path):
    tensors = llama()
    single = verify(write(tmp_path / "single", tensors))
    folder = tmp_path / "sharded"
    folder.mkdir()
    weight_map = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(tensors)}
    one, other = sorted(set(weight_map.values()))
    for file in (one, other):
        save({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "config.json").write_text(json.dumps(LLAMA))

    def index(weight_map: dict[str, str]) -> None:
        content = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    index(weight_map)
    report = verify(folder)
    assert report.layers == single.layers
    assert report.ok
    (folder / other).rename(folder / "elsewhere")
    refused(folder, rf"missing.* {other}")
    (folder / "elsewhere").rename(folder / other)
    refused(folder / one, "one of several files of a model")
    index(weight_map | {"model.layers.7.mlp.up_proj.weight": one})
    refused(folder, r"model.layers.7.mlp.up_proj.weight")
    index({Q0: "../single/model.safetensors"})
    refused(folder, "'../single/model.safetensors'")
    save({Q0: torch.randn(8, 8), **{name: tensors[name] for name in tensors if weight_map[name] == one}}, folder / one)
    index(weight_map | {Q0: other})
    refused(folder, Q0)


def test_width_that_does_not_divide_fails_unless_left_dense(tmp_path):
    tensors = {Q0: torch.randn(8, 6), Q1: pruned(8, 8)}
    report = counted(part(tmp_path / "a", tensors))
    assert [layer.name for layer in report.layers if not layer.ok] == [Q0]
    assert "width of 6 does not divide by 4" in report.text()
    for listed in (Q0, Q0.removesuffix(".weight"), "model.layers.0"):
        report = counted(part(tmp_path / "b", tensors, left_dense={listed: "too odd"}))
        assert report.ok
        assert report.totals()["left_dense"] == 1
        assert "left dense: too odd" in report.text()
    # a layer left dense does not hide a NaN
    tensors[Q0][0, 0] = torch.nan
    assert not counted(part(tmp_path / "b", tensors, left_dense={Q0: "too odd"})).ok


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float8_e4m3fn])  # it has no infinity
def test_non_finite_values_are_counted(tmp_path, dtype):
    weight = pruned(4, 8).double()
    weight[weight != 0] = 3.0
    weight[2] = torch.tensor([torch.nan, torch.inf, 0, 0, 0, 0, 0, -torch.inf])
    report = counted(part(tmp_path, {Q0: weight.to(dtype), Q1: pruned(8, 8)}))
    assert not report.ok
    assert report.layers[0].num_non_finite == 3
    assert report.num_non_finite == 3


def test_non_finite_values_outside_the_layers_are_counted_too(tmp_path):
    embedding = torch.randn(12, 8)
    embedding[3, 3] = torch.nan
    report = verify(write(tmp_path, llama(**{"model.embed_tokens.weight": embedding})))
    assert report.non_finite_elsewhere == {"model.embed_tokens.weight": 1}
    assert not report.ok
    assert all(layer.ok for layer in report.layers)
    largest = torch.finfo(torch.float8_e4m3fn).max
    assert counted(part(tmp_path, {Q0: torch.full((4, 8), largest).to(torch.float8_e4m3fn)})).num_non_finite == 0


def test_exclude(tmp_path):
    folder = write(tmp_path, llama(**{Q0: torch.randn(8, 8)}))
    assert not verify(folder).ok
    with_head = write(tmp_path / "with_head", llama() | {"score.0.weight": torch.randn(16, 16)})
    refused(with_head, "holds score.0.weight, which its config.json does not describe")
    assert verify(with_head, exclude=["score.*"]).dense["score.0.weight"] == "excluded"
    report = verify(folder, exclude=["*.0.self_attn.q*"])
    assert report.ok
    assert report.dense[Q0] == "excluded"
    with pytest.raises(InputError, match="no layer that 2:4 applies to"):
        verify(folder, exclude=["*"])


# ---- what must not be passed over


def test_a_weight_counts_by_its_use_whatever_its_name(tmp_path):
    for name in ("attn.in_proj_weight", "mlp.norm_proj.weight", "embedder.weight", "self_attn.q_norm.weight"):
        report = counted(part(tmp_path, {f"model.layers.0.{name}": torch.randn(8, 8), Q0: pruned(8, 8)}))
        assert not report.ok, name
        assert len(report.layers) == 2


@pytest.mark.parametrize(
    "use",
    [
        StoredUse("", None, 0, "a sum over axis -2 and a sum over axis -1", False, False),
        StoredUse("", None, 0, "einsum", False, False),
        StoredUse("", 0, 8, "a sum over axis -3", True, False),
    ],
)
def test_an_axis_that_is_not_known_makes_the_answer_no_and_left_dense_does_not_hide_it(use, tmp_path):
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {experts: torch.randn(8, 8, 8), Q0: pruned(8, 8)}
    uses = {Q0: StoredUse(Q0, 1, 8, "", True, True), experts: replace(use, parameter=experts)}
    report = verify(part(tmp_path, tensors), uses=uses)
    assert not report.ok
    assert list(report.uncounted) == [experts]
    assert "1 not counted" in report.summary()
    assert experts in report.text()
    file = part(tmp_path, tensors, left_dense={experts: "fused"})
    report = verify(file, uses=uses)
    assert report.dense == {experts: "fused"}
    assert report.share == 64 / 576
    assert not report.ok
    assert verify(file, uses=uses, allow_dense=0.9).ok


def test_a_left_dense_of_the_judged_folder_hides_nothing(tmp_path, capsys):
    dense = {name: torch.randn(tensor.shape) for name, tensor in llama().items() if "mlp" in name}
    listed = dict.fromkeys((name.removesuffix(".weight") for name in dense), "fine")
    folder = write(tmp_path, llama(**dense), left_dense=listed, pattern="2:4")
    report = verify(folder)
    assert not report.ok
    assert report.share == pytest.approx(2 * 4 * 64 / (2 * (4 * 64 + 3 * 128)))
    assert main(["verify", str(folder)]) == 1
    assert "40.00%" in capsys.readouterr().out.splitlines()[0]
    assert main(["verify", str(folder), "--allow-dense", "0.6"]) == 0
    assert report.as_dict()["totals"]["share"] == report.share


@pytest.mark.parametrize(
    "other",
    [
        "model.safetensors.index.json",
        "consolidated.safetensors",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "consolidated.00.pth",
        "model.gguf",
        "tf_model.h5",
        "adapter_model.safetensors",
        "adapter_config.json",
    ],
)
def test_a_folder_with_other_weights_is_refused(tmp_path, other):
    folder = write(tmp_path, llama())
    (folder / "training_args.bin").write_bytes(b"of the trainer, not of the model")
    assert verify(folder).ok
    (folder / other).write_bytes(b"{}")
    refused(folder, "adapter" if other == "adapter_config.json" else f"holds {other} beside model.safetensors")


def loaded_violations(folder: Path) -> int | None:
    """Loads a folder as a user of transformers does; counts the groups of 4 in its blocks that keep more than 2.

    None where transformers loads nothing. A packed folder is unpacked, as a GPU would run it.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        if isinstance(getattr(config, "quantization_config", None), dict):
            config.quantization_config["dequantize"] = True
        model = AutoModelForCausalLM.from_pretrained(folder, config=config)
    except Exception:  # whatever transformers raises
        return None
    weights = [p.detach() for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    assert len(weights) == 14
    return sum(count_nm_violations(weight, 2, 4) for weight in weights)


def check_against_loading(folder: Path) -> bool:
    """Whether `verify` says yes; then what transformers loads must have the pattern."""
    try:
        ok = verify(folder).ok
    except InputError:
        return False
    assert not ok or loaded_violations(folder) == 0
    return ok


AT_TOP = {"transformers_weights": "sub/model.safetensors"}
RENAMED = {"attribute_map": {"transformers_weights": "w"}, "w": "sub/model.safetensors"}
QUANTIZED = {"quant_method": "castlm", "pattern": "2:4", "weights": "sub/castlm.safetensors"}
REDIRECTIONS = {
    "transformers_weights": AT_TOP,
    "in place": {"transformers_weights": "./sub/../sub/model.safetensors"},
    "index": {"transformers_weights": "sub/model.safetensors.index.json"},
    "attribute_map": RENAMED,
    "attribute_map of another name": {"attribute_map": {"transformers_weights": "vocab_file"}}
    | {"vocab_file": "sub/a"},
    "attribute_map of quantization": {"attribute_map": {"quantization_config": "q"}, "q": QUANTIZED},
    "attribute_map of quantization, hidden": {
        "attribute_map": {"quantization_config": "q"},
        "quantization_config": None,
        "q": QUANTIZED,
    },
    "quantization of the text model": {"text_config": {"model_type": "llama", "quantization_config": QUANTIZED}},
    "quantization": {"quantization_config": QUANTIZED},
    "quantization twice": {"quantization_config": QUANTIZED, "text_config": {"quantization_config": QUANTIZED}},
    "configuration_files": {"configuration_files": ["config.4.0.0.json"]},
    "text_config": {"text_config": {"model_type": "llama", **AT_TOP}},
    "another class": {"architectures": ["MistralForCausalLM"]},
    "another family": {"model_type": "mistral"},
    "no model_type": {"model_type": None},
    "name_or_path": {"_name_or_path": "sub", "name_or_path": "sub"},
    "base_model_prefix": {"base_model_prefix": "other", "base_model_tp_plan": {}},
    "subfolder": {"subfolder": "sub", "variant": "sub", "gguf_file": "sub/x.gguf"},
    "extra_files": {"extra_files": ["sub/model.safetensors"]},
    "auto_map": {"auto_map": {"AutoConfig": "other.Config"}, **RENAMED},
    "auto_map and quantization": {"auto_map": {"AutoConfig": "a.B"}, "attribute_map": {"quantization_config": "q"}},
    "key_mapping": {"key_mapping": {"^model": "other"}, "_checkpoint_conversion_mapping": {"^model": "other"}},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("kind", REDIRECTIONS)
def test_no_config_makes_verify_say_yes_of_other_weights_than_are_loaded(tmp_path, kind):
    folder = write(tmp_path / "m", llama())
    dense = {name: torch.rand_like(tensor) + 1 for name, tensor in llama().items()}
    (folder / "sub").mkdir()
    for name in ("model", "castlm", "a"):
        save(dense, folder / f"sub/{name}.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(dense, "model.safetensors")}
    (folder / "sub/model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.4.0.0.json").write_text(json.dumps(LLAMA | AT_TOP))
    assert check_against_loading(folder)
    for config in (LLAMA | REDIRECTIONS[kind], REDIRECTIONS[kind] | LLAMA):
        (folder / "config.json").write_text(json.dumps(config))
        check_against_loading(folder)
    if "transformers_weights" in json.dumps(REDIRECTIONS[kind]):
        (folder / "config.json").write_text(json.dumps(LLAMA | REDIRECTIONS[kind]))
        refused(folder, "config.json")


@pytest.mark.parametrize("kind", ["doubled", "unprefixed", "renamed", "other names", "distributed", "linked"])
def test_no_stored_tensor_hides_another_that_is_loaded(tmp_path, kind):
    folder = write(tmp_path / "m", llama())
    dense = torch.rand(8, 8) + 1
    extra = {
        "doubled": {Q0.removeprefix("model."): dense},
        "unprefixed": {f"model.{Q0}": dense},
        "renamed": {Q0.replace("weight", "gamma"): dense},
        "other names": {f"base_model.model.{Q0}": dense, f"module.{Q0}": dense.clone()},
    }
    if kind in extra:
        for tensors in (llama() | extra[kind], extra[kind] | {k: v for k, v in llama().items() if k != Q0}):
            save(tensors, folder / "model.safetensors")
            check_against_loading(folder)
    elif kind == "distributed":
        part = "shard-00001-model-00001-of-00001.safetensors"
        (folder / "model.safetensors").rename(folder / part)
        index = {"metadata": {}, "weight_map": dict.fromkeys(llama(), part)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(folder, part)
    else:
        outside = write(tmp_path / "outside", {name: torch.rand_like(tensor) for name, tensor in llama().items()})
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(outside / "model.safetensors")
        assert not check_against_loading(folder)


@pytest.mark.parametrize("name", [Q1, DOWN0])
def test_a_missing_or_renamed_layer_is_refused(tmp_path, name):
    tensors = llama()
    held = tensors.pop(name)
    refused(write(tmp_path / "missing", tensors), f"lacks {name} that its config.json asks for")
    tensors[name.replace("_proj", "_project")] = held
    refused(write(tmp_path / "renamed", tensors), f"lacks {name} that its config.json asks for")
    refused(write(tmp_path / "short", llama(), LLAMA | {"num_hidden_layers": 3}), "lacks model.layers.2")
    refused(write(tmp_path / "shape", llama(), LLAMA | {"intermediate_size": 32}), "is stored as")
    refused(write(tmp_path / "more", llama(), LLAMA | {"num_hidden_layers": 1}), "its config.json does not describe")
    refused(write(tmp_path / "none", llama(), LLAMA | {"num_hidden_layers": -1}), "num_hidden_layers = -1")
    refused(write(tmp_path / "huge", llama(), LLAMA | {"num_hidden_layers": 10**9}), "num_hidden_layers = 1000000000")


def test_only_counts_of_layers_and_experts_are_bounded_by_the_number_of_tensors(tmp_path):
    sizes = {"block_size": 2048, "vocab_size_per_layer_input": 262_144, "num_experts": 16_384}
    assert verify(write(tmp_path / "sizes", llama(), LLAMA | sizes)).ok
    for name, count in (("n_layers", 5000), ("num_local_experts", 10**6), ("decoder_layers", 5000)):
        refused(write(tmp_path / name, llama(), LLAMA | {name: count}), f"{name} = {count}")


def test_a_checkpoint_without_the_base_prefix_is_compared_too(tmp_path):
    tensors = {name.removeprefix("model."): tensor for name, tensor in llama().items()}
    assert verify(write(tmp_path / "a", tensors)).ok
    del tensors[Q1.removeprefix("model.")]
    refused(write(tmp_path / "b", tensors), f"lacks {Q1}")


def test_a_folder_whose_model_is_not_known_is_refused(tmp_path):
    refused(write(tmp_path / "own", llama(), {"auto_map": {"AutoConfig": "a.B"}}), "pass trust_remote_code")
    folder = write(tmp_path / "none", llama())
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")


def test_names_are_printed_without_terminal_escapes(tmp_path):
    name = "model.layers.0.\x1b[2K\x1b[1Aevil\u202e.weight"
    report = counted(part(tmp_path, {name: torch.randn(8, 8), Q0: pruned(8, 8)}))
    assert report.layers[0].name == name
    assert "\x1b" not in report.text()
    assert "\\x1b[2K" in report.text()


# ---- what is refused


def refused(path: Path, match: str, pattern: str = "2:4") -> None:
    with pytest.raises(InputError, match=match) as caught:
        verify(path, pattern)
    assert "\n" not in str(caught.value)


def test_nothing_there(tmp_path):
    refused(tmp_path / "no", "No such file")
    refused(tmp_path, "holds no model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    refused(tmp_path, "it holds pytorch_model.bin: .* convert")
    save_file({Q0: pruned(4, 4)}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", "verify a folder with its config.json")
    refused(tmp_path, "it holds a.safetensors: name")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "adapter")


def test_no_linear_layer(tmp_path):
    with pytest.raises(InputError, match="no layer that 2:4 applies to"):
        counted(part(tmp_path, {"model.embed_tokens.weight": torch.randn(8, 8)}))
    with pytest.raises(InputError, match=r"no layer .* 1 left dense"):
        counted(part(tmp_path, {Q0: torch.randn(8, 8)}, left_dense={Q0: "all"}))


ONE = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
HEADERS = [
    b"{not json",
    b"\xff\xfe",
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',  # larger than the file
    ONE + b', "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',  # two tensors that overlap
]


def test_a_file_that_is_cut_extended_corrupt_or_something_else_is_refused(tmp_path):
    file = write(tmp_path, llama()) / "model.safetensors"
    whole = file.read_bytes()
    cuts = [whole[:length] for length in (0, 4, 8, 20, len(whole) // 2, len(whole) - 1)]
    corrupt = [len(header).to_bytes(8, "little") + header + bytes(4) for header in HEADERS]
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for content in (*cuts, whole + b"x", *corrupt, pointer):
        file.write_bytes(content)
        refused(tmp_path, "not a whole safetensors file")
    file.write_bytes(whole)
    assert verify(tmp_path).ok


def test_records_and_configs_that_are_no_such_thing_are_refused(tmp_path):
    folder = write(tmp_path / "m", llama())
    (folder / "castlm.json").write_text("{")
    refused(folder, "castlm.json is not readable JSON")
    (folder / "castlm.json").write_text('{"left_dense": 3}')
    refused(folder, "left_dense is 3, not an object")
    (folder / "config.json").write_text("[]")
    refused(folder, "config.json holds a JSON list")


def test_quantized_checkpoints_are_refused_by_name(tmp_path):
    quantized = LLAMA | {"quantization_config": {"quant_method": "compressed-tensors"}}
    int8 = write(tmp_path / "int8", llama(**{Q0: torch.ones(8, 8, dtype=torch.int8)}), quantized)
    refused(int8, "compressed-tensors")
    int8 = write(tmp_path / "plain int8", llama(**{Q0: torch.ones(8, 8, dtype=torch.int8)}))
    refused(int8, rf"{Q0} \(I8\)")
    packed = "model.layers.0.self_attn.q_proj.qweight"
    refused(write(tmp_path / "float", llama(), quantized), "compressed-tensors")
    gptq = part(tmp_path / "gptq", {packed: torch.ones(8, 8, dtype=torch.int32)})
    refused(gptq, packed)


# ---- what it costs


def test_memory_is_a_few_chunks(tmp_path):
    file = part(tmp_path, {Q0: torch.zeros(4096, 4096)})  # 64 MiB
    tracemalloc.start()
    assert counted(file).ok
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * stored.CHUNK_BYTES
