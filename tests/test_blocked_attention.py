"""Attention in blocks of queries: the results are torch's, and only keys that a block may see are read."""

import copy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from castlm.data.packing import document_mask
from castlm.training import attention
from castlm.training.attention import BlockedAttention
from castlm.training.objective import Objective, as_teacher_
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


def output_and_gradients(**options) -> list[torch.Tensor]:
    *inputs, gradient = tensors(2 if options.get("enable_gqa") else 4)
    output = scaled_dot_product_attention(*inputs, **options)
    return [output, *torch.autograd.grad(output, inputs, gradient)]


@pytest.mark.parametrize(
    "options",
    [{"attn_mask": mask} for mask in MASKS.values()]
    + [{"is_causal": True}, {"is_causal": True, "enable_gqa": True, "scale": 0.3}],
    ids=[*MASKS, "causal", "causal, shared keys"],
)
def test_results_and_gradients_are_those_of_torch(options):
    expected = output_and_gradients(**options)
    with BlockedAttention():
        found = output_and_gradients(**options)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


def read_keys(monkeypatch, inputs, **options) -> int:
    """The number of pairs of a query and a key that torch is given."""
    pairs = 0
    plain = attention.scaled_dot_product_attention

    def counted(query, key, *rest, **more):
        nonlocal pairs
        pairs += len(query) * query.shape[-2] * key.shape[-2]
        return plain(query, key, *rest, **more)

    mode = BlockedAttention()
    monkeypatch.setattr(attention, "scaled_dot_product_attention", counted)
    mode._attend(*inputs, **options)
    monkeypatch.setattr(attention, "scaled_dot_product_attention", plain)
    return pairs


def test_keys_of_other_documents_and_later_keys_are_not_read(monkeypatch):
    *inputs, _ = tensors()
    blocks = [(64, 64), (64, 128), (64, 192), (8, 200)]
    assert read_keys(monkeypatch, inputs, is_causal=True) == 2 * sum(queries * keys for queries, keys in blocks)
    mask = documents((64, 64, 64, 8), (200,))
    first = 3 * 64 * 64 + 8 * 8
    assert read_keys(monkeypatch, inputs, attn_mask=mask) == first + sum(queries * keys for queries, keys in blocks)


@pytest.mark.parametrize("case", ["short", "floats", "dropout", "no mask"])
def test_other_calls_are_left_to_torch(case, monkeypatch):
    tokens = 100 if case == "short" else TOKENS
    *inputs, _ = tensors(tokens=tokens)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    options = {
        "short": {"attn_mask": mask},
        "floats": {"attn_mask": torch.zeros(1, 1, tokens, tokens).masked_fill(~mask, float("-inf"))},
        "dropout": {"attn_mask": mask, "dropout_p": 0.5},
        "no mask": {},
    }[case]
    assert read_keys(monkeypatch, inputs, **options) == 2 * tokens * tokens


def test_the_loss_and_its_gradients_are_those_of_whole_attention():
    model = tiny_model("llama")
    teacher = as_teacher_(tiny_model("llama", seed=1), torch.float32)
    ids = torch.randint(0, VOCAB_SIZE, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    results = []
    for blocked in (False, True):
        student = copy.deepcopy(model).train()
        objective = Objective(student, teacher, 0.5, 1.0, apart=True, blocked_attention=blocked)
        loss = objective(ids, ids.roll(-1), TOKENS, position_ids=packed(90, 60, 50))
        loss.loss.backward()
        results.append([loss.loss, *(parameter.grad for parameter in student.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
