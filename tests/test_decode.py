"""Decoding in one call per token gives the tokens of transformers, and leaves other models to transformers."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from castlm.core.sparsify import prune_
from castlm.runtime import native
from castlm.runtime.decode import (
    DecoderState,
    TokenTimes,
    cache_keyword,
    cache_of,
    decoding_method,
    greedy,
    prompt_rows,
    step_together,
)
from castlm.runtime.generate import generate_text
from castlm.runtime.layers import PackedLinear, pack_model_
from tests.fused import threads
from tests.packed_weights import buffer_of, kernels_of, random_packed
from tests.refusals import refusal
from tests.slow import slow_but
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(native.kernels() is None, reason=native.NOT_BUILT)

IDS = torch.tensor([[5, 80, 200, 13, 99, 100]])
CASES = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 4}),
    ("ministral", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("qwen3", {}),
    ("cwm", {"sliding_window": 4}),
    ("seed_oss", {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}),
    ("smollm3", {"no_rope_layers": [1, 0]}),
]


def packed_model(family: str, n: int = 2, m: int = 4, **over) -> PreTrainedModel:
    model = tiny_model(family, **over)
    prune_(model)
    pack_model_(model, n, m, dtype=torch.float32)
    return model


def generate(model: PreTrainedModel, fast: bool, **over) -> Tensor:
    torch.manual_seed(0)
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0} | over
    mask = torch.ones_like(IDS)
    return model.generate(
        input_ids=IDS, attention_mask=mask, custom_generate=decoding_method(model) if fast else None, **options
    )


@pytest.mark.parametrize(("family", "over"), CASES)
def test_logits_and_tokens_are_those_of_transformers_in_every_family(family, over):
    model = packed_model(family, **over)
    assert decoding_method(model) is not None
    with torch.inference_mode():
        exact = model(IDS).logits[0]
        state = DecoderState(model, cache_of(model(IDS[:, :2], use_cache=True)), IDS.shape[1])
        for i in range(2, IDS.shape[1]):
            torch.testing.assert_close(state.step(IDS[0, i : i + 1])[0], exact[i], rtol=1e-4, atol=1e-4)
        state = DecoderState(model, None, IDS.shape[1])
        for part in (IDS[:, :1], IDS[:, 1:5], IDS[:, 5:]):
            found = state.read(part)[0]
            torch.testing.assert_close(found, exact[state.length - 1], rtol=1e-4, atol=1e-4)
    assert torch.equal(generate(model, True), generate(model, False))


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ((2, 4), {}),
        ((0, 0), {}),
        ((2, 4), {"do_sample": True, "temperature": 0.8, "top_k": 20}),
        ((2, 4), {"repetition_penalty": 1.5}),
        ((2, 4), {"eos_token_id": list(range(0, 256, 5))}),
        ((2, 4), {"max_new_tokens": 1}),
    ],
)
def test_tokens_are_those_of_transformers_under_every_option_dense_too(pattern, options):
    model = packed_model("llama", *pattern)
    assert torch.equal(generate(model, True, **options), generate(model, False, **options))


def test_the_packed_table_refuses_other_ids_and_is_traced():
    model = tiny_model("llama", tie_word_embeddings=True)
    prune_(model)
    pack_model_(model)
    table = model.get_input_embeddings()
    found = torch.compile(table, fullgraph=True, backend="eager")(IDS)
    assert torch.equal(found, table(IDS))
    for wrong in (-1, table.spec.rows):
        with pytest.raises(IndexError, match=f"the table has {table.spec.rows} rows"):
            table(torch.tensor([[wrong]]))


@pytest.mark.parametrize("level", [level for level in native.levels() if level not in ("avx512", "amx")])
@pytest.mark.parametrize("group", slow_but((1, 4, 9), [1, 2, 3, 4, 5, 7, 9]))
@pytest.mark.parametrize("head_dim", slow_but((6, 64), [6, 8, 20, 64]))
def test_attention_of_heads_that_share_keys_is_that_of_torch(level, group, head_dim):
    """Any number of query heads to a key, head widths that are no whole vectors, and any length."""
    over = {"num_attention_heads": 2 * group, "num_key_value_heads": 2, "head_dim": head_dim, "hidden_size": 16 * group}
    with kernels_of(level):
        model = packed_model("llama", num_hidden_layers=1, **over)
        with torch.inference_mode():
            cache = cache_of(model(IDS, use_cache=True))
            for length in (IDS.shape[1], 63, 64, 130):
                layer = cache.layers[0]
                for name, scale in (("keys", 4.0), ("values", 1.0)):
                    setattr(layer, name, scale * torch.randn(1, 2, length, head_dim))
                state = DecoderState(model, cache, length + 1)
                step = state.step(IDS[0, :1])
                exact = model(IDS[:, :1], use_cache=True, **{cache_keyword(model): cache}).logits[0]
                torch.testing.assert_close(step, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("level", [level for level in native.levels() if level != "amx"])
@pytest.mark.parametrize(("group", "head_dim"), [(3, 64), (1, 6), (4, 20)])
@pytest.mark.parametrize("window", [None, 70])
def test_a_prompt_of_several_blocks_has_the_logits_of_transformers(level, group, head_dim, window):
    """In one part and in several, whose borders are no multiples of a block, on any number of threads."""
    over = {"num_attention_heads": 2 * group, "num_key_value_heads": 2, "head_dim": head_dim, "hidden_size": 16 * group}
    ids = torch.randint(256, (1, 201), generator=torch.Generator().manual_seed(0))
    with kernels_of(level), torch.inference_mode():
        model = packed_model("mistral", num_hidden_layers=2, max_position_embeddings=256, sliding_window=window, **over)
        exact = model(ids).logits[0]
        whole = DecoderState(model, None, 201)
        torch.testing.assert_close(whole.read(ids)[0], exact[-1], rtol=1e-4, atol=1e-4)
        state = DecoderState(model, None, 201)
        for part in ids.split([7, 64, 129, 1], 1):
            with threads(2):
                found = state.read(part)[0]
            torch.testing.assert_close(found, exact[state.length - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif("avx512" not in native.levels(), reason="needs AVX-512")
@pytest.mark.parametrize(("group", "head_dim", "window"), [(3, 64, None), (1, 6, 70), (4, 20, 70)])
def test_prompts_of_integers_have_the_logits_of_transformers_within_their_rounding(group, head_dim, window):
    """Also where attention multiplies bf16, whatever is masked, and however keys divide into pairs and blocks."""
    over = {"num_attention_heads": 2 * group, "num_key_value_heads": 2, "head_dim": head_dim, "hidden_size": 16 * group}
    ids = torch.randint(256, (1, 201), generator=torch.Generator().manual_seed(0))
    with kernels_of("avx512"), torch.inference_mode():
        model = packed_model("mistral", num_hidden_layers=2, max_position_embeddings=256, sliding_window=window, **over)
        for layer in [m for m in model.model.layers.modules() if isinstance(m, PackedLinear)]:
            packed = random_packed("int8", 0, 0, layer.out_features, layer.in_features)
            packed.scales.mul_(2e-3)
            layer.share_(buffer_of(packed))
        exact = model(ids).logits[0]
        state = DecoderState(model, None, 201)
        for part in ids.split([7, 64, 129, 1], 1):
            with threads(2):
                found = state.read(part)[0]
            worst = (found - exact[state.length - 1]).abs().max() / exact.abs().max()
            assert worst < 2e-2


def test_prompts_of_integers_are_read_by_the_kernels_and_those_of_floats_by_the_gemm():
    with kernels_of("avx2"):
        model = packed_model("llama")
        assert not prompt_rows(model)
        for layer in [m for m in model.model.layers.modules() if isinstance(m, PackedLinear)]:
            layer.share_(buffer_of(random_packed("int8", 2, 4, layer.out_features, layer.in_features)))
        assert prompt_rows(model)
        with torch.inference_mode():
            exact = model(IDS).logits[:, -1]
            found = DecoderState(model, None, IDS.shape[1]).read(IDS)
        torch.testing.assert_close(found, exact, rtol=2e-2, atol=2e-2 * float(exact.abs().max()))
        assert generate(model, True).shape == generate(model, False).shape


@pytest.mark.parametrize(
    ("family", "over"), [("llama", {"attention_bias": True}), ("mistral", {"sliding_window": 4}), ("qwen3", {})]
)
def test_sequences_decoded_together_have_the_logits_that_each_has_alone(family, over):
    model = packed_model(family, **over)
    prompts = [IDS[:, :2], IDS, IDS[:, :4], IDS[:, :1], IDS[:, 2:]]

    def states() -> list[DecoderState]:
        return [DecoderState(model, cache_of(model(ids, use_cache=True)), 12) for ids in prompts]

    with torch.inference_mode():
        alone, together = states(), states()
        for token in ([1, 2, 3, 4, 5], [200, 13, 99, 7, 8]):
            each = torch.cat([state.step(torch.tensor([t])) for state, t in zip(alone, token)])
            torch.testing.assert_close(step_together(together, torch.tensor(token)), each, rtol=1e-5, atol=1e-5)
        assert [state.length for state in together] == [4, 8, 6, 3, 6]


def test_attention_does_not_depend_on_threads():
    model = packed_model("llama", hidden_size=56, num_attention_heads=14, num_key_value_heads=2, head_dim=64)
    length = 1100  # long enough for several threads
    with torch.inference_mode():
        cache = cache_of(model(IDS, use_cache=True))
        for layer in cache.layers:
            layer.keys, layer.values = torch.randn(2, 1, 2, length, 64).unbind(0)
        state, found = DecoderState(model, cache, length + 1), []
        for number in (1, 2, 3, 4):
            state.length = length
            with threads(number):
                found.append(state.step(IDS[0, :1]))
    assert all(torch.equal(logits, found[0]) for logits in found)


def test_a_token_that_the_model_lacks_is_refused_by_name():
    """As of a tokenizer with more tokens than the model."""
    for model in (packed_model("llama"), tiny_model("llama")):
        ids = IDS.clone()
        ids[0, 1] = model.config.vocab_size
        with refusal(f"token id {model.config.vocab_size} .*vocabulary"):
            generate_text(model, tiny_tokenizer(), ids, max_new_tokens=2)


def test_text_is_streamed():
    model, pieces = packed_model("llama"), []
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
        ("gemma", {}, "smollm3, not those of GemmaForCausalLM"),
        ("llama", {"hidden_act": "gelu"}, "computes silu, not gelu"),
        ("llama", {"rope_parameters": DYNAMIC}, "the dynamic rotary embedding changes with the length"),
    ],
)
def test_other_models_are_left_to_transformers_with_a_reason(family, over, reason):
    said: list[str] = []
    assert decoding_method(tiny_model(family, **over), say=said.append) is None
    assert said == []  # a plain model has no other loop
    assert decoding_method(packed_model(family, **over), say=said.append) is None
    assert len(said) == 1
    assert said[0].startswith("castlm's decoder is not used, which makes decoding slower: ")
    assert reason in said[0]


def test_the_beams_of_a_generation_config_do_not_matter_for_one_sequence():
    model = packed_model("llama")
    expected = greedy(model, IDS, 8)
    model.generation_config.num_beams = 3
    assert decoding_method(model) is None
    assert decoding_method(model, num_beams=1) is not None
    assert torch.equal(greedy(model, IDS, 8), expected)


@pytest.mark.parametrize("packed", [True, False])
def test_the_times_of_tokens_give_their_rate(packed, monkeypatch):
    clock = iter(float(number**2) for number in range(100))
    monkeypatch.setattr("castlm.runtime.decode.time.perf_counter", lambda: next(clock))
    came = TokenTimes()
    greedy(packed_model("llama") if packed else tiny_model("llama"), IDS, 4, came)
    assert came.times == [0.0, 1.0, 4.0, 9.0, 16.0]  # the prompt, and four tokens
    assert came.prompt_seconds == 1.0
    assert came.tokens_per_second == 3 / 15
    came.times = came.times[:2]
    assert came.tokens_per_second == 0  # a single token comes with the prompt


@pytest.mark.parametrize(
    "options",
    [{"num_return_sequences": 2, "do_sample": True}, {"return_dict_in_generate": True}, {"dola_layers": "low"}],
)
def test_several_samples_dictionaries_and_contrastive_layers_are_left_to_transformers(options):
    model = packed_model("llama")
    if "dola_layers" in options:
        model.generation_config.dola_layers, options = options["dola_layers"], {}
    assert decoding_method(model, **options) is None
