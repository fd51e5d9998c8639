"""The C++ engine gives the logits of transformers in every family, cache, head width and instruction set."""

import ctypes

import numpy as np
import pytest
import torch

from castlm.packed import native
from castlm_runtime.model import BLOCK
from tests.engine_model import ERRORS, Engine, difference, ids_of, packed_model
from tests.packed_weights import kernels_of, needs_kernels

pytestmark = needs_kernels

FAMILIES = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 4}),
    ("ministral", {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 70, "max_window_layers": 1}),
    ("qwen3", {}),
    ("seed_oss", {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}),
    ("smollm3", {"no_rope_layers": [1, 0]}),
]


@pytest.mark.parametrize(("family", "over"), FAMILIES)
def test_logits_are_those_of_transformers_in_every_family(family, over):
    model, ids = packed_model(family, **over), ids_of(210)
    with torch.inference_mode():
        exact = model(ids[None]).logits[0]
        for lengths in ([210], [1, 4, 90, 2, 1, 1, 111], [64, 64, 64, 3, 3, 3, 3, 3, 3]):
            found = Engine(model).read(ids, lengths, [9, 2, 40, 11])
            assert difference(found, exact) < ERRORS["fp32"]


@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads"),
    [(64, 3, 1), (80, 4, 4), (96, 4, 2), (128, 16, 1), (256, 6, 2), (8, 5, 1), (34, 2, 1)],
)
def test_attention_of_prompts_and_of_tokens_is_that_of_transformers(level, kind, head_dim, heads, kv_heads):
    sizes = {
        "head_dim": head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": 16 * heads,
    }
    with kernels_of(level), torch.inference_mode():
        model, ids = packed_model("llama", num_hidden_layers=1, max_position_embeddings=1024, **sizes), ids_of(600)
        exact = model(ids[None]).logits[0]
        found = Engine(model, kind).read(ids, [300, 65, 1, 1, 2, 1, 220, *[1] * 10], list(range(10)))
        assert difference(found, exact) < ERRORS[kind]


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("window", [None, 100])
def test_the_bits_do_not_depend_on_the_number_of_threads(kind, window):
    model, ids = packed_model("mistral", sliding_window=window, max_position_embeddings=1024), ids_of(620)
    lengths = [90, 500, 5, 16, 1, 1, 1, 4, 1, 1]
    with torch.inference_mode():
        alone = Engine(model, kind).read(ids, lengths, list(range(10)))
        for threads in (2, 3, 4, 8):
            assert torch.equal(Engine(model, kind).read(ids, lengths, list(range(10)), threads), alone)


def test_sequences_in_one_pass_do_not_see_each_other():
    model = packed_model("llama", max_position_embeddings=1024)
    prompts = [ids_of(count, count) for count in (3, 130, 64, 300, 1)]
    tables = [[20 + 6 * i + j for j in range(6)] for i in range(len(prompts))]
    with torch.inference_mode():
        exact = [model(ids[None]).logits[0] for ids in prompts]
        engine = Engine(model)
        first = engine.forward([(ids, 0, table) for ids, table in zip(prompts[:3], tables)], 2)
        for found, logits in zip(first, exact):
            assert difference(found[0], logits[-1]) < ERRORS["fp32"]
        # Single tokens beside two prompts, one of which is new.
        new = torch.tensor([7])
        parts = [(new, len(ids), table) for ids, table in zip(prompts[:3], tables)]
        parts += [(ids, 0, table) for ids, table in zip(prompts[3:], tables[3:])]
        mixed = engine.forward(parts, 2)
        for found, ids in zip(mixed[:3], prompts):
            assert difference(found[0], model(torch.cat([ids, new])[None]).logits[0, -1]) < ERRORS["fp32"]
        for found, logits in zip(mixed[3:], exact[3:]):
            assert difference(found[0], logits[-1]) < ERRORS["fp32"]


@pytest.mark.parametrize("kind", ERRORS)
def test_a_block_forgets_what_an_older_sequence_left_in_it(kind):
    model = packed_model("llama")
    with torch.inference_mode():
        clean = Engine(model, kind).read(ids_of(70), [64, 5, 1], [0, 1])
        engine = Engine(model, kind)
        norm = next(kept for kept in engine.model._kept if getattr(kept, "dtype", None) == np.float32)
        before = norm.copy()
        norm.fill(np.inf)
        engine.read(ids_of(128), [128], [0, 1])
        norm[:] = before
        assert torch.equal(engine.read(ids_of(70), [64, 5, 1], [0, 1]), clean)


def test_sequences_share_the_blocks_of_a_common_prefix():
    model, prefix = packed_model("llama"), ids_of(2 * BLOCK)
    with torch.inference_mode():
        engine = Engine(model, "bf16")
        engine.read(prefix, [2 * BLOCK], [3, 5])
        for seed in (1, 2):
            rest = ids_of(20, seed)
            shared = engine.forward([(rest, 2 * BLOCK, [3, 5, 10 + seed])], every=True)[0]
            own = Engine(model, "bf16").read(torch.cat([prefix, rest]), [2 * BLOCK, 20], [0, 1, 2])[2 * BLOCK :]
            assert torch.equal(shared, own)


def test_a_token_takes_at_most_five_barriers_a_layer():
    engine = Engine(packed_model("llama", num_hidden_layers=4))
    engine.forward([(ids_of(30), 0, [0])], 2)
    engine.forward([(ids_of(1), 30, [0])], 2)
    barriers = native.built().castlm_model_barriers
    barriers.argtypes, barriers.restype = [ctypes.c_void_p], ctypes.c_int64
    assert 0 < barriers(engine.model._handle) <= 5 * 4


def test_what_a_pass_cannot_take_is_refused():
    engine = Engine(packed_model("llama", max_position_embeddings=128), num_blocks=4)
    good = (torch.tensor([1, 2]), 0, [0])
    engine.forward([good])
    bad = [
        (torch.tensor([264]), 0, [0]),
        (torch.tensor([-1]), 0, [0]),
        (torch.tensor([1]), 128, [0, 1, 2]),
        (torch.tensor([1]), -1, [0]),
        (torch.tensor([1]), 0, [4]),
        (torch.tensor([1]), 64, [0, -1]),
        (torch.tensor([], dtype=torch.int32), 0, [0]),
    ]
    for part in bad:
        with pytest.raises(AssertionError, match="refused a pass"):
            engine.forward([good, part])
    with pytest.raises(AssertionError, match="refused a pass"):
        engine.forward([])
