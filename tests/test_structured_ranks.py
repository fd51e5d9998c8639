"""Structured patterns on several gloo ranks, whose rows are gathered for the masks: the same as on one rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from castlm.core.adams import AdamS
from castlm.core.errors import InputError
from castlm.core.shards import whole
from castlm.core.sparsify import prune_, sparse_param_groups
from castlm.distributed.world import close_world, init_world
from castlm.export.verify import verify
from castlm.training.loop import train
from tests.ranks import run_ranks
from tests.runs import train_until, weights
from tests.test_distributed import small
from tests.tiny import save_tiny, tiny_model


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> str:
    """Tied embeddings, and grouped keys: rows that do not divide by 3."""
    return str(save_tiny(tmp_path_factory.mktemp("gemma"), "gemma"))


def train_on_dtensors(text: str) -> None:
    """AdamS and prune_ on row shards, bit for bit as on the whole weights."""
    world = init_world("cpu", "full")
    plain, sharded = tiny_model("llama"), tiny_model("llama")
    for layer in [module for module in sharded.modules() if isinstance(module, nn.Linear | nn.Embedding)]:
        fully_shard(layer, mesh=world.mesh)
    fully_shard(sharded, mesh=world.mesh)
    optimizers = [
        AdamS(sparse_param_groups(model, text), lr=1e-2, total_steps=8, mask_interval=2, decay_end=1.0)
        for model in (plain, sharded)
    ]
    for step in range(5):
        torch.manual_seed(step)
        for p, q in zip(plain.parameters(), sharded.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = distribute_tensor(p.grad, world.mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    one, other = (optimizer.masks() for optimizer in optimizers)
    for mask, shard in zip(one.values(), other.values()):
        assert torch.equal(whole(shard), mask)
    flips = world.sum(torch.tensor(float(optimizers[1].flips())))
    assert int(flips) == optimizers[0].flips()
    optimizers[1].load_state_dict(optimizers[1].state_dict())
    first = next(iter(other))
    with pytest.raises(InputError, match="together"):
        prune_(sharded, text, masks={**other, first: torch.ones_like(other[first])})
    prune_(plain, text, masks=one)
    prune_(sharded, text, masks=other)
    for p, q in zip(plain.parameters(), sharded.parameters()):
        assert torch.equal(whole(q), p)
    close_world(world)


@pytest.mark.parametrize("text", ["channels:0.5", "heads:0.5+2:4", "blocks:8x16:0.5"])
def test_adams_on_shards_is_adams_on_whole_weights(text, tmp_path):
    run_ranks(train_on_dtensors, 3, text, folder=tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"pattern": "channels:0.5", "init_from": "magnitude"},
        {"pattern": "heads:0.5", "init_from": "flap", "method": "finetune"},
        {"pattern": "blocks:8x16:0.5", "init_from": "taylor"},
    ],
)
def test_ranks_are_one_rank_and_a_run_is_resumed_on_another_number(fields, gemma, text, tmp_path):
    fields = {**fields, "max_steps": 8, "eval_steps": 8}
    run_ranks(train, 1, small(gemma, text, tmp_path / "one", 1, **fields), folder=tmp_path)
    two = small(gemma, text, tmp_path / "two", 2, save_steps=5, **fields)
    run_ranks(train_until, 2, two, 5, folder=tmp_path)
    three = small(gemma, text, tmp_path / "two", 3, save_steps=5, **fields)
    run_ranks(train, 3, replace(three, resume=True), folder=tmp_path)
    assert verify(tmp_path / "two" / "model", fields["pattern"]).ok
    one, other = weights(tmp_path / "one" / "model"), weights(tmp_path / "two" / "model")
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
