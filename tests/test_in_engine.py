"""Models, folders and tokenizers in castlm-runtime: logits and tokens are those of transformers in every family."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.core.sparsify import prune_
from castlm.export import packed
from castlm.packed import native
from castlm.packed.generate import generate_text
from castlm.packed.in_engine import model_in_engine, session_of, why_not_in_engine
from castlm.packed.layers import pack_model_
from castlm.packed.register import register
from castlm_runtime import families
from castlm_runtime.families import FAMILIES, describe
from castlm_runtime.generate import Session
from castlm_runtime.model import Cache, Model, Part
from castlm_runtime.tokenizer import Tokenizer
from tests.packed_weights import kernels_of
from tests.refusals import refusal
from tests.tiny import TEXT, save_tiny, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(native.kernels() is None, reason=native.NOT_BUILT)

IDS = torch.tensor([[5, 80, 200, 13, 99, 100]])
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, "original_max_position_embeddings": 64},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
CASES = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    ("llama", {"rope_parameters": YARN}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 4}),
    ("ministral", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("qwen3", {}),
    ("cwm", {"sliding_window": 4}),
    ("seed_oss", {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}),
    ("smollm3", {"no_rope_layers": [1, 0]}),
    ("smollm3", {}),
    ("phi3", {}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ("olmo2", {}),
    ("granite", {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.4}),
    ("gemma3_text", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    ("gemma3_text", {"final_logit_softcapping": 3.0}),
    ("mixtral", {"num_local_experts": 7, "num_experts_per_tok": 3}),
    ("mixtral", {"sliding_window": 4, "num_experts_per_tok": 1}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 4}),
    ("qwen3_moe", {"num_experts": 6, "decoder_sparse_step": 2, "num_experts_per_tok": 6}),
    ("olmoe", {}),
    ("olmoe", {"norm_topk_prob": True}),
    ("granitemoe", {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.4}),
    ("gpt_neox", {}),
    ("gpt_neox", {"use_parallel_residual": False, "hidden_act": "gelu_new", "attention_bias": False}),
    ("phi", {}),
    ("stablelm", {"use_qkv_bias": True}),
    ("starcoder2", {"sliding_window": 4}),
    ("starcoder2", {"use_bias": False, "tie_word_embeddings": False}),
]
EXPERTS = [family for family, of in FAMILIES.items() if of.experts]


def packed_model(family: str, n: int = 2, m: int = 4, **over) -> PreTrainedModel:
    model = tiny_model(family, **over)
    prune_(model)
    pack_model_(model, n, m, dtype=torch.float32)
    return model


def check_logits(found: np.ndarray, exact: torch.Tensor) -> None:
    torch.testing.assert_close(torch.from_numpy(found), exact, rtol=1e-4, atol=1e-4)


def in_parts(model: Model, ids: list[int], sizes: list[int], kind: str = "fp32") -> np.ndarray:
    """The logits after each part of a sequence, (parts, vocabulary)."""
    cache = Cache(model, kind, 8)
    found, done = np.empty((len(sizes), model.vocabulary), np.float32), 0
    for row, size in zip(found, sizes):
        blocks = range(7, 7 - -(-(done + size) // 64), -1)  # in any order
        model.forward(cache, [Part(ids[done : done + size], done, blocks, row)])
        done += size
    cache.close()
    return found


@pytest.mark.parametrize(("family", "over"), CASES)
def test_logits_and_tokens_are_those_of_transformers_in_every_family(family, over):
    plain = tiny_model(family, **over)
    with torch.inference_mode():
        exact = plain(IDS).logits[0]
    engine = model_in_engine(plain)
    check_logits(engine.logits(IDS[0].tolist()), exact)
    check_logits(in_parts(engine, IDS[0].tolist(), [1, 4, 1]), exact[[0, 4, 5]])
    expected = plain.generate(IDS, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None)
    session = session_of(plain, tiny_tokenizer(), kind="fp32")
    done = session.generate(IDS[0].tolist(), max_new_tokens=24, ignores_end=True)
    assert list(done.tokens) == expected[0, IDS.shape[1] :].tolist()


@pytest.mark.parametrize("family", [family for family, of in FAMILIES.items() if not (of.is_fused or of.experts)])
def test_packed_layers_share_their_buffers_with_the_engine(family):
    model = packed_model(family)
    with torch.inference_mode():
        check_logits(model_in_engine(model).logits(IDS[0].tolist()), model(IDS).logits[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_lacks_is_what_transformers_takes(family):
    """The defaults of the table are those of the configuration classes, and angles are those of their models."""
    standard = CONFIG_MAPPING[family]()
    for key, value in FAMILIES[family].defaults.items():
        # Some classes change a value that they were given, as Qwen2 does with its window.
        is_of_rope = key in ("rope_theta", "partial_rotary_factor")
        found = standard.rope_parameters[key] if is_of_rope else getattr(CONFIG_MAPPING[family], key)
        assert found == value, key
    model = tiny_model(family)
    config = json.loads(model.config.to_json_string(use_diff=False))
    own = describe(config)
    for name in ("head_dim", "layer_types", "num_key_value_heads"):  # what it derives, left out
        config.pop(name, None)
    if family not in ("gemma3_text",):
        assert (
            describe({**config, "head_dim": own.head_dim, "num_key_value_heads": own.kv_heads}).windows == own.windows
        )
    rotary = model.base_model.rotary_emb
    for layer, rope in enumerate(own.ropes):
        kind = getattr(model.config, "layer_types", None)
        name = f"{kind[layer]}_inv_freq" if kind and hasattr(rotary, f"{kind[layer]}_inv_freq") else "inv_freq"
        if rope is not None:
            exact = getattr(rotary, name).numpy()
            np.testing.assert_allclose(rope.frequencies, exact, rtol=3e-7)


@pytest.mark.parametrize("family", [*EXPERTS, "gpt_neox"])
@pytest.mark.parametrize(
    ("pattern", "kind"),
    [("2:4", None), ("8:16", "int8"), ("4:8", "int4"), ("2:4", "int3"), (None, "int4"), (None, "int8")],
)
def test_packed_folders_of_all_formats_have_the_logits_of_their_plain_ones(
    family, pattern, kind, tmp_path, monkeypatch
):
    """In one token at a time and in prompts, with each cache and the kernels of each level."""
    monkeypatch.setattr(packed, "check_loads", lambda folder: None)  # in a fresh process
    source = save_tiny(tmp_path / "dense", family, hidden_size=64, intermediate_size=64)
    if pattern:
        options = ["--solver", "magnitude", "--pattern", pattern]
        assert main(["prune", "--model", str(source), "--output-dir", str(tmp_path / "sparse"), *options]) == 0
        source = tmp_path / "sparse"
    rounded = ["pack", str(source)]
    if kind:
        rounded = ["quantize", str(source), "--packed", "--head", "source", "--kind", kind]
    if kind == "int3":
        (tmp_path / "text.txt").write_text(TEXT)
        rounded += ["--calibration", str(tmp_path / "text.txt"), "--calibration-sequences", "4", "--seq-len", "64"]
    assert main([*rounded, "--output-dir", str(tmp_path / "packed")]) == 0
    packed.unpack_folder(tmp_path / "packed", tmp_path / "plain")
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    ids = torch.randint(256, (1, 100), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = exact(ids).logits[0]

    def check(found: np.ndarray, exact: torch.Tensor, is_exact: bool) -> None:
        """Integers round activations to 8 bits, and a cache rounds keys: some tokens then choose another of two experts
        that are nearly equal, so that the error of a usual token is looked at."""
        logits = torch.from_numpy(found)
        errors = (logits - exact).norm(dim=1) / exact.norm(dim=1)
        assert float(errors.max() if is_exact else errors.median()) < (1e-4 if is_exact else 0.15)

    sizes = [1, 1, 70, 3, 1, 20, 4]
    ends = np.cumsum(sizes) - 1
    for level in native.levels():
        with kernels_of(level):
            engine = Model.open(tmp_path / "packed", threads=2)
        for cache in ("fp32", "bf16", "int8"):
            check(in_parts(engine, ids[0].tolist(), sizes, cache), expected[ends], kind is None and cache == "fp32")
        check(engine.logits(ids[0].tolist()), expected, kind is None)


@pytest.mark.parametrize("family", [*EXPERTS, "gpt_neox", "phi", "stablelm"])
def test_the_bits_of_experts_and_layer_norms_do_not_depend_on_the_number_of_threads(family, tmp_path):
    save_tiny(tmp_path, family, num_experts_per_tok=3)
    ids = torch.randint(256, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    sizes = [1, 100, 4, 20, 1, 1, 23]
    alone = Model.open(tmp_path, threads=1)
    engine = Model.open(tmp_path, threads=1)
    for kind in ("fp32", "bf16", "int8"):
        expected = in_parts(alone, ids, sizes, kind)
        for threads in (2, 3, 5, 8):  # more than there are processors, too
            engine.threads = threads
            assert np.array_equal(in_parts(engine, ids, sizes, kind), expected)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_packed_experts_in_memory_run_in_the_engine(family, tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "check_loads", lambda folder: None)
    save_tiny(tmp_path / "dense", family)
    options = ["--solver", "magnitude", "--output-dir", str(tmp_path / "sparse")]
    assert main(["prune", "--model", str(tmp_path / "dense"), *options]) == 0
    assert main(["pack", str(tmp_path / "sparse"), "--output-dir", str(tmp_path / "packed")]) == 0
    register()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert why_not_in_engine(model) is None
    with torch.inference_mode():
        exact = model(IDS).logits[0]
    check_logits(model_in_engine(model).logits(IDS[0].tolist()), exact)
    expected = generate_text(model, tiny_tokenizer(), IDS, max_new_tokens=9, say=pytest.fail)
    assert (
        Session.open(tmp_path / "packed", kind="fp32").generate(IDS[0].tolist(), max_new_tokens=9).text == expected.text
    )


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_that_are_stored_stacked_have_the_tokens_of_transformers(family, tmp_path, monkeypatch):
    """As transformers 5 has them in memory: plain, packed, and from memory."""
    monkeypatch.setattr(packed, "check_loads", lambda folder: None)
    dense, sparse, folder = tmp_path / "dense", tmp_path / "sparse", tmp_path / "packed"
    tiny_model(family).save_pretrained(dense, save_original_format=False)
    tiny_tokenizer().save_pretrained(dense)
    assert main(["prune", "--model", str(dense), "--solver", "magnitude", "--output-dir", str(sparse)]) == 0
    assert main(["pack", str(sparse), "--output-dir", str(folder)]) == 0
    register()
    for source, opened in ((dense, dense), (sparse, sparse), (sparse, folder)):
        exact, in_memory = AutoModelForCausalLM.from_pretrained(source), AutoModelForCausalLM.from_pretrained(opened)
        expected = exact.generate(IDS, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert why_not_in_engine(in_memory) is None
        for session in (Session.open(opened, kind="fp32"), session_of(in_memory, tiny_tokenizer(), kind="fp32")):
            done = session.generate(IDS[0].tolist(), max_new_tokens=24, ignores_end=True)
            assert list(done.tokens) == expected[0, IDS.shape[1] :].tolist()


@pytest.mark.parametrize("is_stacked", [False, True])
def test_damaged_experts_are_refused_by_name(is_stacked, tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path, save_original_format=not is_stacked)
    stored = load_file(tmp_path / "model.safetensors")
    router = "model.layers.1.mlp.gate.weight" if is_stacked else "model.layers.1.block_sparse_moe.gate.weight"
    experts = ["mlp.experts.down_proj"] if is_stacked else [f"block_sparse_moe.experts.{e}.w2.weight" for e in (0, 3)]
    for name in (router, *(f"model.layers.1.{name}" for name in experts)):
        weight = stored[name]
        damaged = weight.clone()
        damaged[-1, -1] = float("nan")
        for values in (damaged, None, weight[..., :-1].contiguous(), weight[:-1].contiguous()):
            changed = {key: tensor for key, tensor in stored.items() if key != name}
            save_file(changed if values is None else {**changed, name: values}, tmp_path / "model.safetensors")
            with refusal(name.removesuffix(".weight")):
                Model.open(tmp_path)


def test_a_number_of_experts_that_makes_no_sense_is_refused(tmp_path):
    save_tiny(tmp_path, "qwen3_moe")
    config = json.loads((tmp_path / "config.json").read_text())
    for each, count in ((0, 4), (5, 4), (2, 0)):
        with refusal(f"{each} of {count} experts"):
            describe({**config, "num_experts_per_tok": each, "num_local_experts": count})
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_local_experts": 3}))
    with refusal("4 x 32"):
        Model.open(tmp_path)


@pytest.mark.parametrize("parameters", [YARN, LLAMA3])
def test_scaled_frequencies_are_those_of_transformers(parameters):
    for dim in (8, 64, 128):
        model = tiny_model("llama", head_dim=dim, rope_parameters=parameters, num_hidden_layers=1)
        rope = families.make_rope({**parameters}, dim, 256)
        np.testing.assert_allclose(rope.frequencies, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)
        assert rope.factor == pytest.approx(model.model.rotary_emb.attention_scaling)


@pytest.mark.parametrize(
    ("family", "over"), [("llama", {"attention_bias": True}), ("mistral", {"sliding_window": 4}), ("qwen3", {})]
)
def test_sequences_in_one_pass_have_the_logits_that_each_has_alone(family, over):
    """Parts of prompts and single tokens together."""
    model = packed_model(family, **over)
    engine = model_in_engine(model)
    prompts = [IDS[:, :2], IDS, IDS[:, :4], IDS[:, :1], IDS[:, 2:]]
    cache = Cache(engine, "fp32", 5)
    first = np.empty((5, engine.vocabulary), np.float32)
    engine.forward(cache, [Part(ids[0].tolist(), 0, [i], row) for i, (ids, row) in enumerate(zip(prompts, first))])
    more = [[1], [2, 3, 4], [5], [6, 7], [8]]
    second = np.empty((5, engine.vocabulary), np.float32)
    parts = [Part(new, ids.shape[1], [i], row) for i, (ids, new, row) in enumerate(zip(prompts, more, second))]
    engine.forward(cache, parts)
    with torch.inference_mode():
        for ids, new, before, after in zip(prompts, more, first, second):
            exact = model(torch.cat([ids, torch.tensor([new])], 1)).logits[0]
            check_logits(np.stack([before, after]), exact[[ids.shape[1] - 1, -1]])


def test_the_packed_table_refuses_other_ids_and_is_traced():
    model = tiny_model("llama", tie_word_embeddings=True)
    prune_(model)
    pack_model_(model)
    table = model.get_input_embeddings()
    found = torch.compile(table, fullgraph=True, backend="eager")(IDS)
    assert torch.equal(found, table(IDS))
    for wrong in (-1, table.spec.rows):
        with pytest.raises(IndexError, match=f"not all of the rows {wrong} to"):
            table(torch.tensor([[wrong]]))


def test_a_token_that_the_model_lacks_is_refused_by_name():
    """As of a tokenizer with more tokens than the model."""
    for model in (packed_model("llama"), tiny_model("llama")):
        ids = IDS.clone()
        ids[0, 1] = model.config.vocab_size
        with refusal(f"token id {model.config.vocab_size} .*vocabulary"):
            generate_text(model, tiny_tokenizer(), ids, max_new_tokens=2)


@pytest.mark.parametrize("packed", [True, False])
def test_text_is_streamed(packed):
    model, pieces = packed_model("llama") if packed else tiny_model("llama"), []
    before = torch.get_rng_state()
    done = generate_text(model, tiny_tokenizer(), IDS, max_new_tokens=9, write=pieces.append, say=pytest.fail)
    assert torch.equal(torch.get_rng_state(), before)
    assert "".join(pieces) == done.text
    assert done.new_tokens == 9
    assert done.tokens_per_second > 0


DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("family", "over", "reason"),
    [
        ("gemma", {}, "'gemma'"),
        ("llama", {"hidden_act": "relu"}, "'relu'"),
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual"),
        ("llama", {"rope_parameters": DYNAMIC}, "'dynamic'"),
    ],
)
def test_other_models_are_left_to_transformers_with_a_reason(family, over, reason):
    said: list[str] = []
    for model in (tiny_model(family, **over), packed_model(family, **over)):
        assert reason in (why_not_in_engine(model) or "")
        assert generate_text(model, tiny_tokenizer(), IDS, max_new_tokens=2, say=said.append).new_tokens == 2
    assert len(said) == 1  # a plain model has no faster way here
    assert reason in said[0]


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text", "granitemoe", "gpt_neox"])
def test_a_plain_folder_runs_without_transformers(family, tmp_path):
    model = tiny_model(family)
    save_tiny(tmp_path, family)
    with torch.inference_mode():
        check_logits(Model.open(tmp_path).logits(IDS[0].tolist()), model(IDS).logits[0])
    expected = generate_text(model, tiny_tokenizer(), IDS, max_new_tokens=9)
    assert Session.open(tmp_path, kind="fp32").generate(IDS[0].tolist(), max_new_tokens=9).text == expected.text
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value, named in (("intermediate_size", 31, "31|62|248"), ("vocab_size", 1000, "1000")):
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(InputError, match=named):
            Model.open(tmp_path)


def test_tokens_and_text_are_those_of_transformers(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    exact, own = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.open(tmp_path)
    for text in ("Story: one, two.", "  spaces  ", "", "ü€🙂", "a\n\nb"):
        ids = exact(text)["input_ids"]
        assert own.encode(text) == ids
        assert own.encode(text, add_special_tokens=False) == exact(text, add_special_tokens=False)["input_ids"]
        assert own.decode(ids) == exact.decode(ids, skip_special_tokens=True)
    assert own.eos_token_id == exact.eos_token_id
    assert own.special_tokens_map == exact.special_tokens_map


def test_the_config_of_every_family_is_read_from_its_file_as_from_memory(tmp_path):
    for family in FAMILIES:
        config = tiny_model(family).config
        config.save_pretrained(tmp_path)
        read = describe(json.loads((tmp_path / "config.json").read_text()))
        whole = describe(AutoConfig.from_pretrained(tmp_path).to_dict())
        assert repr(read) == repr(whole), family
