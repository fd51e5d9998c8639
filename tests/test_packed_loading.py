"""transformers loads packed folders once castlm is imported, and fails without it."""

import math
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.integrations import accelerate

from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.core.sparsify import is_sparse_linear, prune_
from castlm.export.packed import pack_folder, unpack_folder
from castlm.export.verify import verify
from castlm.models.io import load_model
from castlm.packed import generate, native
from castlm.packed.in_engine import Greedy, why_not_in_engine
from castlm.packed.layers import PackedEmbedding, PackedLinear, PackedModule, pack_model_
from castlm_runtime.formats import FORMATS, HEADS
from tests.packed_weights import needs_kernels
from tests.runs import edit_json, edit_weights
from tests.slow import slow, slow_but
from tests.test_packed import pruned_folder
from tests.tiny import FAMILIES, save_tiny, tiny_model

IDS = torch.tensor([[5, 80, 200, 13, 99, 100]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A pruned folder in bf16, and the packed one."""
    source = pruned_folder(tmp_path_factory.mktemp("pruned") / "model")
    pack_folder(source, source.parent / "packed")
    return source, source.parent / "packed"


@needs_kernels
@pytest.mark.parametrize("family", slow_but(("llama", "qwen2", "opt", "gemma"), FAMILIES))
@pytest.mark.parametrize("tied", [True, slow(False)])
def test_a_packed_model_gives_the_logits_and_tokens_of_the_plain_one(family, tied, tmp_path):
    source = pruned_folder(tmp_path / "source", family, tie_word_embeddings=tied)
    pack_folder(source, tmp_path / "packed")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    layers = [module for module in packed.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == {"gpt2": 9, "opt": 13, "gemma": 14}.get(
        family, 15
    )  # Gemma's own embedding stays, and its head
    torch.testing.assert_close(packed(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(packed.generate(IDS, **options), plain.generate(IDS, **options))


@needs_kernels
def test_a_tied_table_is_held_once(folders, tmp_path):
    source = pruned_folder(tmp_path / "source", tie_word_embeddings=True)
    pack_folder(source, tmp_path / "packed")
    for head in HEADS:
        pack_folder(source, tmp_path / head, head=head)
    for name in ("packed", *HEADS):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert isinstance(model.model.embed_tokens, PackedEmbedding)
        assert model.lm_head.packed.data_ptr() == model.model.embed_tokens.packed.data_ptr()
        model.tie_weights()  # as lm-eval does
        assert not [p for p in model.parameters() if p.dim() > 1]
        exact = load_model(tmp_path / name).model
        torch.testing.assert_close(model(IDS).logits, exact(IDS).logits, rtol=0.05, atol=0.05)


@needs_kernels
@pytest.mark.parametrize("head", HEADS)
def test_an_untied_embedding_is_rounded_beside_its_head_and_decodes(head, tmp_path):
    source = pruned_folder(tmp_path / "source", tie_word_embeddings=False)
    pack_folder(source, tmp_path / "packed", head=head)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert (model.lm_head.spec.values, model.model.embed_tokens.spec.values) == (head, head)
    assert model.lm_head.packed.data_ptr() != model.model.embed_tokens.packed.data_ptr()
    assert why_not_in_engine(model) is None
    exact = load_model(tmp_path / "packed").model
    torch.testing.assert_close(model(IDS).logits, exact(IDS).logits, rtol=0.05, atol=0.05)
    verified = verify(tmp_path / "packed")
    assert verified.ok, verified.summary()
    unpack_folder(tmp_path / "packed", tmp_path / "plain")
    table, before = (load_model(folder).model.model.embed_tokens.weight for folder in (tmp_path / "plain", source))
    half_step = float(before.detach().abs().max()) / FORMATS[head].largest / 2
    assert 0 < float((table - before).detach().abs().max()) <= 2 * half_step  # the plain folder is bf16


@needs_kernels
@pytest.mark.parametrize("head", [None, "int8"])
def test_loading_holds_the_stored_tensors_of_one_layer_at_a_time(head, tmp_path, monkeypatch):
    source = pruned_folder(tmp_path / "source", tie_word_embeddings=True)
    pack_folder(source, tmp_path / "packed", head=head)
    stored, repack_ = [], native.repack_

    def repack_and_count(buffer, *tensors):
        assert not [tensor for tensor in stored if tensor() is not None]
        stored.extend(weakref.ref(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor))
        repack_(buffer, *tensors)

    monkeypatch.setattr(native, "repack_", repack_and_count)
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert len(stored) >= 2 * 14 + 1


@needs_kernels
def test_a_model_is_packed_in_memory(folders):
    source = folders[0]
    model = load_model(source).model
    plain = model(IDS).logits
    assert len(pack_model_(model)) == 14
    torch.testing.assert_close(model(IDS).logits, plain, rtol=1e-4, atol=1e-4)
    rounded = load_model(source).model
    pack_model_(rounded, head="int8")
    assert (model.lm_head.spec.values, rounded.lm_head.spec.values) == ("bf16", "int8")
    torch.testing.assert_close(rounded(IDS).logits, plain, rtol=0.05, atol=0.05)
    dense = load_model(source).model
    pack_model_(dense, 0, 0)
    torch.testing.assert_close(dense(IDS).logits, plain, rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("layer", ["lm_head", "model.layers.1.mlp.up_proj"])
def test_a_model_whose_weights_do_not_fit_a_dtype_is_not_packed_in_it(layer):
    model = tiny_model("llama")
    model.get_submodule(layer).weight.data[0, 0] = 1e5
    with pytest.raises(InputError, match=r"1e\+05 .*fp16: pass --dtype bf16"):
        pack_model_(model, 0, 0, dtype=torch.float16)


@needs_kernels
def test_layers_that_are_not_sparse_are_packed_dense_and_others_are_refused_before_any_is_replaced():
    model = tiny_model("llama", intermediate_size=50)
    down = [f"model.layers.{index}.mlp.down_proj" for index in (0, 1)]
    q = "model.layers.1.self_attn.q_proj"
    prune_(model, filter_fn=lambda module, name: is_sparse_linear(module, name) and name != q)
    plain = model(IDS).logits
    with pytest.raises(InputError, match=rf"{q} is not 2:4 in \d+ of its groups"):
        pack_model_(model)
    with pytest.raises(InputError, match=r"dtype is bf16: give torch\.bfloat16"):
        pack_model_(model, dtype="bf16")
    assert not any(isinstance(module, PackedModule) for module in model.modules())
    assert len(pack_model_(model, dtype=torch.float32, left_dense=[q])) == 14
    assert {name: model.get_submodule(name).spec.m for name in (*down, q)} == {**dict.fromkeys(down, 0), q: 0}
    assert model.model.layers[0].self_attn.q_proj.spec.m == 4
    torch.testing.assert_close(model(IDS).logits, plain, rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_a_vision_language_model_is_rounded(tied, tmp_path):
    source = pruned_folder(tmp_path / "source", "qwen2_vl", tie_word_embeddings=tied)
    pack_folder(source, tmp_path / "packed", head="int8")
    packed, plain = (AutoModelForImageTextToText.from_pretrained(tmp_path / name) for name in ("packed", "source"))
    torch.testing.assert_close(packed(IDS).logits, plain.float()(IDS).logits, rtol=0.05, atol=0.05)


@needs_kernels
def test_a_model_without_its_head_leaves_the_packed_head_out(folders, tmp_path):
    pack_folder(folders[0], tmp_path / "packed", head="int8")
    packed, plain = AutoModel.from_pretrained(tmp_path / "packed"), AutoModel.from_pretrained(folders[0])
    states = plain.float()(IDS).last_hidden_state
    torch.testing.assert_close(packed(IDS).last_hidden_state, states, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("family", "over", "reason"),
    [
        ("phi", {"tie_word_embeddings": True}, "a bias"),
        ("gemma", {}, "look up and multiply alone"),
        ("gpt2", {}, r"stores lm_head\.weight"),
    ],
    ids=["a tied head with a bias", "an embedding that scales", "a tied head that is stored too"],
)
def test_a_head_that_is_not_a_product_of_its_own_is_not_rounded(family, over, reason, tmp_path):
    source = pruned_folder(tmp_path / "source", family, **over)
    if family == "gpt2":
        edit_weights(source, lambda w: w.update({"lm_head.weight": w["transformer.wte.weight"].clone()}))
        edit_json(source / "config.json", tie_word_embeddings=True)
    with pytest.raises(InputError, match=reason):
        pack_folder(source, tmp_path / "packed", head="int8")


@needs_kernels
def test_a_layer_says_in_which_dtype_it_computes(tmp_path):
    """Mamba-2 casts its hidden states to the dtype of the head's weight, which is not that of the packed bytes."""
    sizes = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8}
    model = tiny_model("mamba2", **sizes)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    prune_(model, filter_fn=lambda module, name: name in linear and name != "lm_head")
    plain = model(IDS).logits
    pack_model_(model, dtype=torch.float32, filter_fn=lambda module, name: name in linear and name != "lm_head")
    assert model.lm_head.weight.dtype == torch.float32
    torch.testing.assert_close(model(IDS).logits, plain, rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("num_tokens", [6, 200])
def test_a_packed_model_runs_with_gradients_enabled_and_passes_none_on(num_tokens, folders):
    model = AutoModelForCausalLM.from_pretrained(folders[1])
    assert not model(torch.ones(1, num_tokens, dtype=torch.int64)).logits.requires_grad
    states = torch.randn(1, num_tokens, model.config.hidden_size, requires_grad=True)
    with pytest.raises(InputError, match="gradients"):
        model(inputs_embeds=states)


def test_without_kernels_weights_are_unpacked_and_it_is_said(folders, monkeypatch, caplog):
    monkeypatch.setattr(native, "kernels", lambda: None)
    model = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    plain = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert not model.is_quantized  # it is a dense model: it trains, casts and saves as one
    assert model.half().dtype == torch.float16


@needs_kernels
def test_tables_that_scale_what_they_look_up_stay_in_fp32(tmp_path):
    model = load_model(save_tiny(tmp_path, "gemma", tie_word_embeddings=True)).model
    plain = model(IDS).logits
    pack_model_(model, 0, 0)
    assert model(IDS).logits.dtype == torch.float32
    torch.testing.assert_close(model(IDS).logits, plain, rtol=0.02, atol=0.02)


@needs_kernels
def test_a_packed_model_is_not_saved_by_transformers(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders[1])
    with pytest.raises(ValueError, match="castlm"):
        model.save_pretrained(tmp_path / "saved")
    in_memory = load_model(folders[0]).model
    pack_model_(in_memory)
    with pytest.raises(InputError, match="a packed model has no weights to save"):
        in_memory.save_pretrained(tmp_path / "saved")


# ---- text


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("which", [0, 1])
def test_plain_weights_of_16_bits_run_in_fp32_where_that_is_faster(which, is_fast, folders, monkeypatch):
    monkeypatch.setattr(generate, "has_fast_bf16", lambda: is_fast)
    said = []
    stored, _ = generate.load_to_generate(str(folders[which]), say=said.append)
    assert not said
    model, _ = generate.load_to_generate(str(folders[which]), as_stored=False, say=said.append)
    widened = which == 0 and not is_fast
    assert len(said) == widened
    dtype = stored.model.norm.weight.dtype
    assert model.model.norm.weight.dtype == (torch.float32 if widened else dtype)
    assert which == 1 or dtype == torch.bfloat16


@pytest.mark.parametrize("which", [0, 1])
def test_on_a_gpu_a_model_is_moved_there_dense_and_without_accelerate(which, folders, monkeypatch):
    moved, said = [], []
    monkeypatch.setattr(generate, "choose_device", lambda wanted: "cuda")
    monkeypatch.setattr(accelerate, "is_accelerate_available", lambda: False)
    monkeypatch.setattr(PreTrainedModel, "to", lambda self, device: moved.append(device) or self)
    model, _ = generate.load_to_generate(str(folders[which]), say=said.append)
    assert moved == ["cuda"]
    assert not any(isinstance(module, PackedModule) for module in model.modules())
    assert len(said) == which
    assert all("unpacked" in line for line in said)


@pytest.mark.parametrize("which", [0, 1])
def test_generate_prints_text_and_its_speed(folders, which, capsys):
    assert main(["generate", str(folders[which]), "--prompt", "Story", "--max-new-tokens", "6"]) == 0
    output = capsys.readouterr()
    assert output.out.endswith("\n")
    assert "6 new tokens" in output.err
    assert main(["generate", str(folders[which]), "--prompt", "", "--max-new-tokens", "6"]) == 2
    assert main(["generate", str(folders[which]), "--prompt", "a", "--max-new-tokens", "600"]) == 2
    for temperature in ("-1", "inf", "nan"):
        assert main(["generate", str(folders[which]), "--prompt", "a", "--temperature", temperature]) == 2
    assert "unexpected" not in capsys.readouterr().err


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "asks", [{"num_beams": 3, "num_return_sequences": 2}, {"return_dict_in_generate": True}, {"stop_strings": ["####"]}]
)
def test_generate_continues_by_one_sequence_whatever_the_generation_config_says(asks, which, folders, tmp_path, capsys):
    model = shutil.copytree(folders[which], tmp_path / "model")
    edit_json(model / "generation_config.json", **asks)
    assert main(["generate", str(model), "--prompt", "Story", "--max-new-tokens", "6"]) == 0
    assert "6 new tokens" in capsys.readouterr().err
    loaded = load_model(model)
    prompt = torch.tensor([5, 80, 200])
    assert Greedy(loaded.model)(prompt[None], 4).shape == (1, 7)


@pytest.mark.parametrize("which", [0, 1])
def test_a_string_of_the_generation_config_ends_the_text(which, folders, capsys):
    model, tokenizer = generate.load_to_generate(str(folders[which]))
    ids = generate.encode_prompt(tokenizer, "Story", raw=True)
    whole = generate.generate_text(model, tokenizer, ids, max_new_tokens=8).text
    model.generation_config.stop_strings = [whole[2]]
    short = generate.generate_text(model, tokenizer, ids, max_new_tokens=8)
    end = whole.index(whole[2])
    assert short.text == whole[: end + (1 - which)]  # as servers do, the engine leaves the string out
    assert short.new_tokens < 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("model.norm.weight"), "model.norm.weight"),
        (lambda w: w["model.layers.1.mlp.up_proj.weight"][0, :1].fill_(math.nan), "NaN or infinity"),
    ],
)
def test_generate_refuses_weights_that_are_missing_or_not_finite(change, said, folders, tmp_path, capsys):
    """Those of a packed folder are refused by all readers, in test_packed.py."""
    model = shutil.copytree(folders[0], tmp_path / "model")
    edit_weights(model, change)
    assert main(["generate", str(model), "--prompt", "Story", "--max-new-tokens", "6"]) == 2
    assert said in capsys.readouterr().err


def test_generate_takes_no_more_threads_than_there_are_processors(folders, capsys):
    assert main(["generate", str(folders[1]), "--prompt", "a", "--threads", "5000"]) == 2
    assert "--threads 5000" in capsys.readouterr().err
