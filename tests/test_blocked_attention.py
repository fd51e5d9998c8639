"""castlm's attention, in blocks of queries or by documents end to end: torch's results without the forbidden keys."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from castlm.data.packing import document_mask, document_offsets
from castlm.training import attention
from castlm.training.attention import agree_end_to_end, attend, use_attention_
from castlm.training.objective import Objective, as_teacher_, checkpoint_activations_
from tests.tiny import VOCAB_SIZE, tiny_model

TOKENS = 200


def packed(*lengths: int) -> torch.Tensor:
    """The positions (1, tokens) of documents in one sequence."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


def documents(*rows: tuple[int, ...]) -> torch.Tensor:
    return document_mask(torch.cat([packed(*lengths) for lengths in rows]))


def window() -> torch.Tensor:
    ahead = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    return ((ahead >= 0) & (ahead < 50))[None, None]


def padded() -> torch.Tensor:
    """The last 70 queries see nothing, and nobody sees their keys."""
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    mask[-70:] = False
    return mask[None, None]


MASKS = {
    "documents": documents((90, 60, 50), (10, 150, 40)),
    "one row for all": documents((90, 60, 50)),
    "window": window(),
    "padded": padded(),
    "by head": torch.cat([window(), documents((90, 60, 50)), window(), window()], dim=1),
}


def tensors(num_keys: int = 4, tokens: int = TOKENS) -> list[torch.Tensor]:
    """Query (2, 4, tokens, 8), key and value (2, num_keys, tokens, 8), and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, tokens, 8) for heads in (4, num_keys, num_keys, 4)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def module(groups: int = 1) -> SimpleNamespace:
    return SimpleNamespace(num_key_value_groups=groups, is_causal=True)


def output_and_gradients(
    function, mask: torch.Tensor | None = None, num_keys: int = 4, **options
) -> list[torch.Tensor]:
    *inputs, gradient = tensors(num_keys)
    output, _ = function(module(4 // num_keys), *inputs, mask, **options)
    return [output, *torch.autograd.grad(output, inputs, gradient.transpose(1, 2))]


CASES = {name: {"mask": mask} for name, mask in MASKS.items()} | {
    "documents, shared keys": {"mask": MASKS["documents"], "num_keys": 2},
    "causal": {},
    "causal, shared keys": {"num_keys": 2, "scaling": 0.3},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_results_and_gradients_are_those_of_torch(options):
    for ours, theirs in zip(
        *(output_and_gradients(of, **options) for of in (attend, sdpa_attention_forward)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


def read_keys(monkeypatch, inputs, mask=None, **options) -> int:
    """The number of pairs of a query and a key that torch is given; whole sequences are `sdpa_attention_forward`'s."""
    pairs = 0
    plain = attention.scaled_dot_product_attention

    def counted(query, key, *rest, **more):
        nonlocal pairs
        pairs += len(query) * query.shape[-2] * key.shape[-2]
        return plain(query, key, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(attention, "scaled_dot_product_attention", counted)
        attend(module(), *inputs, mask, **options)
    return pairs


def test_keys_of_other_documents_and_later_keys_are_not_read(monkeypatch):
    *inputs, _ = tensors()
    blocks = [(64, 64), (64, 128), (64, 192), (8, 200)]
    assert read_keys(monkeypatch, inputs) == 2 * sum(queries * keys for queries, keys in blocks)
    mask = documents((64, 64, 64, 8), (200,))
    first = 3 * 64 * 64 + 8 * 8
    assert read_keys(monkeypatch, inputs, mask) == first + sum(queries * keys for queries, keys in blocks)


@pytest.mark.parametrize("case", ["short", "floats", "dropout", "bias", "no mask"])
def test_other_calls_are_left_to_torch(case, monkeypatch):
    tokens = 100 if case == "short" else TOKENS
    *inputs, _ = tensors(tokens=tokens)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    floats = torch.zeros(1, 1, tokens, tokens).masked_fill(~mask, float("-inf"))
    options = {
        "short": {"mask": mask},
        "floats": {"mask": floats},
        "dropout": {"mask": mask, "dropout": 0.5},
        "bias": {"mask": mask, "position_bias": floats},
        "no mask": {"is_causal": False},
    }[case]
    assert read_keys(monkeypatch, inputs, **options) == 0


def loss_and_gradients(own_attention: bool, end_to_end: bool = False, saves: bool = False) -> list[torch.Tensor]:
    """Of two rows with other documents, by a student and a teacher."""
    student, teacher = tiny_model("llama").train(), as_teacher_(tiny_model("llama", seed=1), torch.float32)
    if saves:
        checkpoint_activations_(student)
    objective = Objective(student, teacher, 0.5, apart=True, own_attention=own_attention)
    if end_to_end:
        objective.way = "offsets"
    ids = torch.randint(0, VOCAB_SIZE, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([packed(90, 60, 50), packed(10, 190)])
    batch = {"input_ids": ids, "labels": ids.roll(-1), "position_ids": positions}
    loss = objective(num_tokens=2 * TOKENS, **objective.on_device(batch, torch.device("cpu")))
    loss.loss.backward()
    return [loss.loss, *(parameter.grad for parameter in student.parameters())]


def varlen_reference(calls: list[int]):
    """What a GPU's kernel computes, a document at a time."""

    def reference(query, key, value, begin_q, begin_k, longest_q, longest_k, *, scale, window_size, enable_gqa):
        assert (window_size, begin_q.dtype) == ((-1, 0), torch.int32)
        assert longest_q == longest_k == int(begin_q.diff().max())
        assert torch.equal(begin_q, begin_k)
        calls.append(len(begin_q) - 1)
        found = []
        for begin, end in zip(begin_q.tolist(), begin_q.tolist()[1:]):
            one = [
                part[begin:end].transpose(0, 1)[None] for part in (query, key, value)
            ]  # (1, heads, tokens, head_dim)
            output = scaled_dot_product_attention(*one, scale=scale, is_causal=True, enable_gqa=enable_gqa)
            found.append(output[0].transpose(0, 1))
        return torch.cat(found)

    return reference


def test_the_loss_and_its_gradients_are_those_of_whole_attention(monkeypatch):
    expected = loss_and_gradients(False)
    blocked = loss_and_gradients(True)
    assert all(map(torch.equal, blocked, loss_and_gradients(True, saves=True)))  # the second pass is in blocks too
    calls: list[int] = []
    monkeypatch.setattr(attention, "varlen_attn", varlen_reference(calls))
    end_to_end = loss_and_gradients(True, end_to_end=True)
    assert calls == [5] * 4  # documents; 2 blocks of 2 models
    for found in (blocked, end_to_end):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_documents_are_laid_end_to_end_only_if_the_models_compute_the_same_that_way(monkeypatch):
    def agrees(model, kernel) -> bool:
        monkeypatch.setattr(attention, "varlen_attn", kernel)
        use_attention_(model)
        return agree_end_to_end([model])

    def whole(query, *rest, **options):
        return reference(query, *rest, **options) * 1.5

    reference = varlen_reference([])
    assert agrees(tiny_model("llama"), reference)
    assert not agrees(tiny_model("llama"), whole)
    assert not agrees(tiny_model("llama"), torch.nn.attention.varlen.varlen_attn)  # a CPU has no such kernel
    assert not agrees(tiny_model("mistral", sliding_window=4), reference)
    assert not agrees(tiny_model("gpt2", attn_pdrop=0.1), reference)


def test_the_arguments_are_those_of_torchs_operator(monkeypatch):
    positions = torch.tensor([[*range(11)], [*range(5), *range(6)]])
    documents = document_offsets(positions)

    def attended(device: str, *inputs: torch.Tensor, **scaling: float) -> torch.Tensor:
        inputs = inputs or tuple(torch.empty(2, heads, 11, 8, device=device) for heads in (4, 2, 2))
        options = attention.of_documents(documents, inputs[0].device)
        return attend(module(2), *inputs, options.pop("attention_mask"), **scaling, **options)[0]

    with FakeTensorMode(allow_non_fake_inputs=True):
        assert attended("cuda").shape == (2, 11, 4, 8)
    monkeypatch.setattr(attention, "varlen_attn", varlen_reference([]))
    with torch.autocast("cpu", torch.bfloat16):
        assert attended("cpu").dtype == torch.bfloat16
    *inputs, _ = tensors(2, tokens=11)
    expected, _ = sdpa_attention_forward(module(2), *inputs, document_mask(positions), scaling=0.3)
    torch.testing.assert_close(attended("cpu", *inputs, scaling=0.3), expected)


def test_a_model_whose_code_asks_for_the_name_of_its_attention_keeps_it():
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.DeepseekV32ForCausalLM(transformers.DeepseekV32Config(**sizes))
    before = model.config._attn_implementation
    assert not attention.use_attention_(model)
    assert model.config._attn_implementation == before
