"""What a GPU has to show, on one card and in under eight minutes; exits with 2 where there is none.

    python -m benchmarks.gpu [--json OUT]

In this order: AdamS on FSDP2 shards over NCCL equals AdamS on whole weights; the optimizer and the mask refresh against
their rivals; a whole step of the demo model in bf16, compiled, with gradient checkpointing, against a bare loop; and
what 2:4 brings at inference, `to_sparse_semi_structured` on this model's layer shapes, prefill and decode apart.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.sparse import to_sparse_semi_structured

from benchmarks.adams import step_rows
from benchmarks.machine import machine, write_json
from benchmarks.masks import refresh_rows
from benchmarks.rows import Row, interleaved, ratio_row
from castlm.core.adams import AdamS
from castlm.core.pattern import nm_mask

SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536)]  # SmolLM2-135M's layers (out, in)
BATCHES = {"decode": (1, 16, 64), "prefill": (1024, 8192, 32_768)}  # tokens in one call
CALLS = 50  # one timing is of this many


def check_nccl() -> None:
    """Three steps of AdamS, compiled, on row shards that NCCL holds together, against plain tensors."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
    mesh = init_device_mesh("cuda", (1,))
    plain = nn.Linear(64, 32, bias=False, device="cuda")
    sharded = copy.deepcopy(plain)
    fully_shard(sharded, mesh=mesh)
    optimizers = [
        AdamS([{"params": [layer.weight], "sparse": True}], lr=1e-2, total_steps=4, mask_interval=2, fused=True)
        for layer in (plain, sharded)
    ]
    for _ in range(3):
        plain.weight.grad = torch.randn_like(plain.weight)
        sharded.weight.grad = distribute_tensor(plain.weight.grad, mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    assert isinstance(sharded.weight, DTensor)
    assert torch.equal(sharded.weight.full_tensor(), plain.weight)
    assert torch.equal(optimizers[1].mask(sharded.weight).full_tensor(), optimizers[0].mask(plain.weight))
    dist.destroy_process_group()


@torch.no_grad()
def inference_rows() -> list[Row]:
    """The sum of the times of all layer shapes, dense against 2:4, in bf16."""
    weights = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in SHAPES]
    pruned = [weight * nm_mask(weight) for weight in weights]
    sparse = [to_sparse_semi_structured(weight) for weight in pruned]
    rows = []
    for phase, batches in BATCHES.items():
        for tokens in batches:
            inputs = [torch.randn(tokens, weight.shape[1], device="cuda", dtype=torch.bfloat16) for weight in weights]
            for x, small, dense in zip(inputs, sparse, pruned):
                torch.testing.assert_close(F.linear(x, small), F.linear(x, dense), rtol=2e-2, atol=0.5)

            def run(layers: list[torch.Tensor], inputs: list[torch.Tensor] = inputs) -> None:
                for _ in range(CALLS):
                    for x, weight in zip(inputs, layers):
                        F.linear(x, weight)

            times = interleaved({"2:4": lambda run=run: run(sparse), "dense": lambda run=run: run(pruned)}, repeats=7)
            part = f"{phase}, {tokens} tokens: speed-up of 2:4"
            rows.append(ratio_row(part, "dense bf16, the same layers", times["2:4"], times["dense"], ">= 1"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="OUT")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no CUDA device; run it on a machine with one", file=sys.stderr)
        sys.exit(2)
    from benchmarks.__main__ import run_module, show, throughput_row  # here: transformers may print when it is imported

    started = time.perf_counter()
    check_nccl()
    print("NCCL: AdamS on shards equals AdamS on whole weights", flush=True)
    rows = step_rows(quick=False, device="cuda") + refresh_rows(quick=False, device="cuda") + inference_rows()
    whole = ["--device", "cuda", "--precision", "bf16", "--gradient-checkpointing", "--steps", "10"]
    rows.append(throughput_row(run_module("benchmarks.throughput", [*whole, "--batch", "8", "--seq-len", "512"])))
    show(rows)
    print(f"{time.perf_counter() - started:.0f} s on {torch.cuda.get_device_name()}")
    table = [dataclasses.asdict(row) | {"met": row.met} for row in rows]
    write_json(options.json, {"machine": machine(), "rows": table})


if __name__ == "__main__":
    main()
