"""Messages and bytes of one rank among many: opening, a training step, a checkpoint and the files of the result.

Run: `python -m benchmarks.ranks [--ranks 8 64 256] [--hidden 256] [--layers 8] [--json OUT]`. One process is a rank of
torch's fake process group, which sends nothing, and goes through castlm's loop with its share of a random model; what
it hands to the collectives is counted. So figures say what a rank sends, and nothing about time. A start is not
counted: this run begins from magnitude, which needs none.

Bytes are those that arrive at the rank (all-gather, objects) or leave it (gradients), in a ring: of a tensor of B
bytes on N ranks, B (N - 1) / N; a sum over ranks both ways. Rank 0 writes the only file of the result, so it receives
all gathered rows. Messages are collectives, of tensors and of Python objects.
"""

from __future__ import annotations

import argparse
import pickle
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from tests.tiny import TEXT, save_tiny
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.machine import machine, write_json
from castlm.distributed import export
from castlm.training.config import TrainConfig
from castlm.training.finish import sharded_result
from castlm.training.trainer import Trainer
from castlm.world import World

KIB = 2**10
PHASES = ("opening", "step", "checkpoint", "result")
COLLECTIVES = {"allgather", "reduce_scatter", "alltoall", "allreduce", "gather", "broadcast", "objects"}
"""On CPUs gradients are exchanged by an all-to-all, with as many bytes as the reduce-scatter of GPUs."""


class Counted(TorchDispatchMode):
    """Counts the collectives of torch's process groups. `messages` and `bytes` are by phase and kind."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.phase = ranks, PHASES[0]
        self.messages: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def count(self, kind: str, num_bytes: float) -> None:
        self.messages[self.phase, kind] += 1
        self.bytes[self.phase, kind] += round(num_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1].strip("_").removesuffix("_base_").removesuffix("_")
            kind = next((known for known in COLLECTIVES if name.startswith(known)), None)
            if kind is None:
                raise NotImplementedError(f"what {func} sends is not counted")
            share = (self.ranks - 1) / self.ranks
            sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            num_bytes = max(sizes) * share  # the whole tensor is the largest argument
            if kind == "allreduce":
                num_bytes *= 2
            elif kind == "gather":  # the receiver has a part for each rank, and its own; a sender only the latter
                num_bytes = sizes[0] * max(1, len(sizes) - 2)
            self.count(kind, num_bytes)
            if kind == "reduce_scatter":  # the fake group leaves the result as it was allocated
                output, source = (leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
                output.copy_(source.view(-1)[: output.numel()].view_as(output))
            elif kind == "alltoall":
                output, source = (leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
                output.copy_(source)
        return made

    @contextmanager
    def objects(self) -> Iterator[None]:
        """Counts Python objects, which the fake group cannot carry: every rank has what this one has."""
        gather, broadcast, barrier = dist.all_gather_object, dist.broadcast_object_list, dist.monitored_barrier

        def gathered(found: list[Any], value: Any, group: Any = None) -> None:
            found[:] = [value] * len(found)
            self.count("objects", len(pickle.dumps(value)) * (len(found) - 1))

        def sent(values: list[Any], src: int = 0, group: Any = None) -> None:
            self.count("objects", len(pickle.dumps(values)))

        dist.all_gather_object, dist.broadcast_object_list = gathered, sent
        dist.monitored_barrier = lambda *rest, **options: self.count("objects", 0)
        try:
            yield
        finally:
            dist.all_gather_object, dist.broadcast_object_list, dist.monitored_barrier = gather, broadcast, barrier


def count_here(ranks: int, hidden: int, layers: int, folder: Path) -> Counted:
    """Goes through a run as rank 0 of `ranks`."""
    # Sizes that 256 divides: the fake group's sums take every rank to hold as many rows as this one.
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": hidden // 4}
    with redirect_stderr(StringIO()):
        model = save_tiny(folder / "model", "llama", **sizes, **heads)
    (folder / "text.txt").write_text(TEXT * 20)
    config = TrainConfig.of(
        str(model),
        str(folder / "text.txt"),
        str(folder / "run"),
        seq_len=64,
        per_device_train_batch_size=1,
        max_steps=10,
        eval_tokens=64 * ranks,
        save_steps=0,
        init_from="magnitude",
        learning_rate=3e-4,
        ignore_decay_budget=True,
        report_to=("none",),
    )
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
    world = World(0, ranks, torch.device("cpu"), mesh, dist.group.WORLD, dist.group.WORLD)
    counted = Counted(ranks)
    with counted.objects(), counted, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        run = Trainer(config, world)
        with run.recording():
            counted.phase = "step"  # as in `Trainer.train`
            world.meet("step 1")
            run.log(run.train_step())
            world.any(False)
            counted.phase = "checkpoint"
            run.save()
            run.saver.finish()
            counted.phase = "result"
            run.method.fold_()
            (folder / "result").mkdir()
            result = sharded_result(run)
            parts = SimpleNamespace(model=result.model, world=world, dtype=result.dtype)
            export._write_weights(parts, folder / "result")
    return counted


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--json", metavar="OUT")
    args = parser.parse_args(arguments)
    rows = []
    if len(args.ranks) > 1:  # a process has one group
        for ranks in args.ranks:
            options = ["--ranks", str(ranks), "--hidden", str(args.hidden), "--layers", str(args.layers)]
            subprocess.run([sys.executable, "-m", "benchmarks.ranks", *options], check=True)
        return
    (ranks,) = args.ranks
    with tempfile.TemporaryDirectory() as folder:
        counted = count_here(ranks, args.hidden, args.layers, Path(folder))
    for phase, kind in counted.messages:
        rows.append({"ranks": ranks, "phase": phase, "kind": kind})
        rows[-1] |= {"messages": counted.messages[phase, kind], "bytes": counted.bytes[phase, kind]}
        print(f"{ranks:>6} {phase:<12} {kind:<16}{rows[-1]['messages']:>8}{rows[-1]['bytes'] / KIB:>14,.1f} KiB")
    write_json(args.json, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
