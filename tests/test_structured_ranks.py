"""Structured patterns on several gloo ranks, whose rows are gathered for the masks: the same as on one rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from castlm.core.adams import AdamS
from castlm.core.sparsify import sparse_param_groups
from castlm.distributed.world import close_world, init_world
from castlm.export.verify import verify
from castlm.patterns import parse_pattern
from castlm.training.train import train
from tests.ranks import assert_pruned_alike, masks_after_steps, run_ranks, small
from tests.runs import assert_same_runs_but_for_sums, train_until
from tests.slow import slow
from tests.tiny import tiny_model


def train_on_dtensors(text: str) -> None:
    """AdamS and prune_ on row shards, bit for bit as on the whole weights."""
    world = init_world("cpu", "full")
    plain, sharded = tiny_model("llama"), tiny_model("llama")
    for layer in [module for module in sharded.modules() if isinstance(module, nn.Linear | nn.Embedding)]:
        fully_shard(layer, mesh=world.mesh)
    fully_shard(sharded, mesh=world.mesh)
    optimizers = [
        AdamS(sparse_param_groups(model, parse_pattern(text)), lr=1e-2, total_steps=8, mask_interval=2, decay_end=1.0)
        for model in (plain, sharded)
    ]
    one, other = masks_after_steps(plain, sharded, optimizers, world.mesh, 5)
    flips = world.sum(torch.tensor(float(optimizers[1].flips())))
    assert int(flips) == optimizers[0].flips()
    optimizers[1].load_state_dict(optimizers[1].state_dict())
    assert_pruned_alike(plain, sharded, (one, other), text)
    close_world(world)


@pytest.mark.parametrize("text", ["channels:0.5", slow("heads:0.5+2:4")])
def test_adams_on_shards_is_adams_on_whole_weights(text, tmp_path):
    run_ranks(train_on_dtensors, 3, text, folder=tmp_path)


@pytest.mark.parametrize(
    ("fields", "ranks"),
    [
        slow({"pattern": "channels:0.5", "init_from": "magnitude"}, 3),
        slow({"pattern": "heads:0.5", "init_from": "flap", "method": "finetune"}, 1),
        ({"pattern": "channels:0.5", "init_from": "taylor"}, 1),
    ],
)
def test_ranks_are_one_rank_and_a_run_is_resumed_on_another_number(fields, ranks, gemma, text, tmp_path):
    train(small(gemma, text, tmp_path / "one", 1, **fields))
    two = small(gemma, text, tmp_path / "two", 2, save_steps=4, **fields)
    run_ranks(train_until, 2, two, 4, folder=tmp_path)
    others = small(gemma, text, tmp_path / "two", ranks, save_steps=4, resume=True, **fields)
    if ranks == 1:
        train(others)
    else:
        run_ranks(train, ranks, others, folder=tmp_path)
    assert verify(tmp_path / "two" / "model", fields["pattern"]).ok
    assert_same_runs_but_for_sums(tmp_path / "one" / "model", tmp_path / "two" / "model")
