"""Measures castlm on one GPU in under eight minutes; exits with 2 if there is no GPU.

    python -m benchmarks.gpu [--json OUT] [--minutes 8] [--dry-run]

In this order: checks that AdamS and the masks on this device, compiled and sharded over NCCL, are those of plain
tensors, and that the start's parts for a GPU compute what a CPU's do; these parts against what they replace; layers of
7B and 70B models, dense against 2:4, decode and prefill apart; a 7B model's blocks end to end as CUDA graphs; the
optimizer, the mask refresh and a whole training step against their rivals. `--dry-run` walks through everything that
runs without a GPU on a CPU, with tiny shapes and a stub for the sparse kernels; it names the rows, and neither
shows nor writes a ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from tests.stub_backend import StubBackend
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, StaticCache

from benchmarks.adams import step_rows
from benchmarks.caches import cache_keyword
from benchmarks.machine import machine, write_json
from benchmarks.masks import refresh_rows, topk_mask
from benchmarks.rows import Row, interleaved, ratio_row
from castlm.core.adams import AdamS
from castlm.core.cholesky import upper_factor
from castlm.core.nm import NM, nm_mask, pack_mask, refresh_masks_, unpack_mask
from castlm.core.sparsify import prune_
from castlm.hardware import captured
from castlm.oneshot import refine, sparsegpt
from castlm.oneshot.axes import find_permutation
from castlm.oneshot.folder import HiddenStates
from castlm.oneshot.refine import FIRST_PENALTY, LAST_PENALTY, Eigenvectors, Inverses, improve_masks
from castlm.oneshot.solvers import add_hessian, row_energies
from castlm.oneshot.sparsegpt import sparsegpt_by_factor
from castlm.packed.semi_structured import Backend, Cusparselt, to_semi_structured_

SHAPES = {  # (out_features, in_features) of LLaMA-2, and how many of them a block has
    "7B": {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 1},
    "70B": {(8192, 8192): 2, (1024, 8192): 2, (28672, 8192): 2, (8192, 28672): 1},
}
PHASES = {"decode": (1, 16, 64), "prefill": (256, 1024, 4096)}
"""Tokens that a layer sees at once."""
BLOCKS, CONTEXT = 8, 512
"""The end-to-end model: blocks of a 7B LLaMA, which has 32, and tokens in the cache before the decode step."""


def check_nccl() -> None:
    """Three steps of AdamS, compiled, on row shards that NCCL holds together, against plain tensors."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
    try:
        _compare_shards(init_device_mesh("cuda", (1,)))
    finally:
        dist.destroy_process_group()


def _compare_shards(mesh: DeviceMesh) -> None:
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


def check_adams(device: str) -> None:
    """Twelve steps with refreshes, fused against plain: masks as words of 32 weights, and a width without words."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((64, 128), (24, 36)):
        weights = [torch.randn(shape, generator=generator).to(device)]
        weights.append(weights[0].clone())
        params = [nn.Parameter(weight) for weight in weights]
        optimizers = [
            AdamS([{"params": [p], "sparse": True}], lr=1e-3, total_steps=12, mask_interval=4, fused=fused)
            for p, fused in zip(params, (True, False))
        ]
        for _ in range(12):
            gradient = torch.randn(shape, generator=generator).to(device)
            for param, optimizer in zip(params, optimizers):
                param.grad = gradient.clone()
                optimizer.step()
        torch.testing.assert_close(params[0], params[1], rtol=1e-5, atol=1e-6)
        assert torch.equal(optimizers[0].mask(params[0]), optimizers[1].mask(params[1]))


def check_masks(device: str) -> None:
    """Masks made on the device are those of the CPU, ties included; bits come back; the compiled refresh agrees."""
    weight = torch.randint(-3, 4, (96, 128), generator=torch.Generator().manual_seed(0)).float()
    expected = nm_mask(weight.clone())
    found = nm_mask(weight.to(device))
    assert torch.equal(found.cpu(), expected)
    packed = pack_mask(found)
    assert torch.equal(packed.cpu(), pack_mask(expected))
    assert torch.equal(unpack_mask(packed, weight.shape[1]), found)
    flips, has_nan = refresh_masks_([weight.to(device)], [packed], 2, 4, compile=device == "cuda")
    assert (int(flips), has_nan) == (0, False)
    assert torch.equal(found.sum(1), topk_mask(weight.to(device)).sum(1))


def check_sweep(device: str) -> None:
    """SparseGPT's sweep as a CUDA graph selects the masks of a CPU's, also where the last columns are fewer."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2000, 1056, generator=generator), torch.randn(768, 1056, generator=generator)
    factor, _ = upper_factor(x.T @ x, 0.01)
    for n, m in ((2, 4), (8, 16), (16, 32)):
        expected = sparsegpt_by_factor(weight, factor, n, m)
        found = sparsegpt_by_factor(weight.to(device), factor.to(device), n, m).cpu()
        # Rounding decides between weights that cost nearly the same.
        assert ((found != 0) != (expected != 0)).float().mean() < 1e-3
        assert NM(n, m).violations(found) == 0
        assert (found - expected).norm() < 0.05 * expected.norm()


def check_inverses(device: str) -> None:
    """ADMM's systems by Cholesky inverses have the solutions of those by eigenvectors."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 512, generator=generator) @ torch.randn(512, 512, generator=generator)
    weight, target = (torch.randn(64, 512, generator=generator) for _ in range(2))
    penalties = (FIRST_PENALTY, LAST_PENALTY)
    by_vectors = Eigenvectors(_scaled(x.T @ x), penalties)
    by_inverses = Inverses(_scaled(x.T @ x).to(device), penalties)
    for penalty in penalties:
        solutions = []
        for system in (by_vectors, by_inverses):
            here = device if system is by_inverses else "cpu"
            system.begin(penalty)
            solutions.append(system.solve(weight.to(here, copy=True), system.pull(target.to(here))).cpu())
        torch.testing.assert_close(*solutions, rtol=1e-3, atol=1e-3)


def _scaled(gram: Tensor) -> Tensor:
    """A Gram matrix in units in which its diagonal is 1, as ADMM has it."""
    scale = gram.diagonal().sqrt()
    return gram / scale / scale.unsqueeze(1)


def check_gram(device: str) -> None:
    """Gram matrices of bf16 inputs are exact up to sums in fp32."""
    x = torch.randn(3000, 1100, generator=torch.Generator().manual_seed(0)).bfloat16()
    hessian = torch.zeros(1100, 1100, device=device)
    add_hessian(hessian, x.to(device), 2)
    expected = (x.double().T @ x.double()).triu()
    torch.testing.assert_close(hessian.cpu().double().triu(), expected, rtol=1e-4, atol=1e-2)


def check_order(device: str) -> None:
    """An order of columns that is found with costs of this device keeps as much as a CPU's."""
    score, pattern = torch.rand(256, 768, generator=torch.Generator().manual_seed(0)), NM(2, 4)
    kept = []
    for here in ("cpu", device):
        ordered = score[:, find_permutation(score.to(here), pattern, 6)]
        kept.append(float((ordered * pattern.mask(ordered)).sum()))
    assert abs(kept[1] / kept[0] - 1) < 1e-3, kept


def check_states(device: str) -> None:
    """Hidden states in pinned memory come back as they were written, while the GPU still reads the old ones."""
    with tempfile.TemporaryDirectory() as folder:
        states = _states(Path(folder), device, (4, 128, 64), 6)
        for turn in range(4):
            for number, hidden in enumerate(states):
                assert torch.equal(hidden.cpu(), torch.full(states.shape, float(6 * turn + number)))
                states[number] = hidden + 6
            states.flush()
            states.move_on(True)


def _states(folder: Path, device: str, shape: tuple[int, int, int], count: int) -> HiddenStates:
    """Batches full of 0, 1, ...; in pinned memory on a GPU."""
    pinned: dict[int, tuple[int, Tensor]] | None = {} if device == "cuda" else None
    states = HiddenStates(folder, "states", {0: count}, shape, torch.float32, torch.device(device), pinned=pinned)
    states.extend(torch.full(shape, float(number), device=device) for number in range(count))
    return states


@torch.no_grad()
def start_rows(scale: int, device: str) -> Iterator[Row]:
    """Parts of the start for a GPU against what they replace, at the sizes of an 8B model."""
    hidden, inner, tokens = 4096 // scale, 14336 // scale, 8192 // scale
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x, weight = normal(2 * hidden, hidden), normal(inner, hidden)
    gram = x.T @ x
    factor, _ = upper_factor(gram.clone(), 0.01)

    def one_by_one() -> Tensor:
        with mock.patch.object(sparsegpt, "captured", lambda step, device: step):
            return sparsegpt_by_factor(weight, factor, 2, 4)

    times = interleaved({"graph": lambda: sparsegpt_by_factor(weight, factor, 2, 4), "launches": one_by_one}, repeats=3)
    part = f"SparseGPT's sweep, {inner} x {hidden}"
    yield ratio_row(part, "a launch for each operator", times["graph"], times["launches"], ">= 2")

    def masks(system: type[Eigenvectors] | type[Inverses]) -> Tensor:
        with mock.patch.object(refine, "system_of", system):
            return improve_masks(sparse, weight, gram, NM(2, 4), 16)

    sparse = sparsegpt_by_factor(weight, factor, 2, 4)
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    errors = [float(row_energies(weight - masks(system), gram).sum()) for system in (Inverses, Eigenvectors)]
    assert abs(errors[0] / errors[1] - 1) < 1e-2, errors
    times = interleaved({"inverses": lambda: masks(Inverses), "vectors": lambda: masks(Eigenvectors)}, repeats=3)
    part = f"16 iterations of ADMM, {inner} x {hidden}"
    yield ratio_row(part, "by eigenvectors", times["inverses"], times["vectors"], ">= 2")

    narrow, statistic = normal(tokens, inner).bfloat16(), torch.zeros(inner, inner, device=device)
    times = interleaved(
        {
            "bf16": lambda: add_hessian(statistic, narrow, 1),
            "fp32": lambda: add_hessian(statistic, narrow.float(), 1),
        },
        repeats=5,
    )
    yield ratio_row(f"Gram matrix, {tokens} x {inner} bf16", "in fp32", times["bf16"], times["fp32"], ">= 4")

    score = normal(1024, inner).abs()
    on_cpu = score.cpu()
    times = interleaved(
        {
            "device": lambda: find_permutation(score, NM(2, 4), 2),
            "cpu": lambda: find_permutation(on_cpu, NM(2, 4), 2),
        },
        repeats=3,
    )
    part = f"two rounds of the order of {inner} neurons"
    yield ratio_row(part, "with the costs of a CPU", times["device"], times["cpu"], ">= 2")

    with tempfile.TemporaryDirectory() as folder:
        states = _states(Path(folder), device, (1, tokens, hidden), 2)
        from_file = states.of_next_block()
        from_file.pinned, from_file.block_index = None, states.block_index
        times = interleaved({"pinned": lambda: states[1], "file": lambda: from_file[1]}, repeats=5)
    part = f"hidden states to the GPU, {tokens} x {hidden}"
    yield ratio_row(part, "from a file in the page cache", times["pinned"], times["file"], ">= 2")


def layer_rows(size: str, scale: int, device: str, backend: Backend) -> Iterator[Row]:
    """The layers of one block, dense against what `to_semi_structured_` makes of them, and against 2:4 in all."""
    shapes = {(out // scale, into // scale): count for (out, into), count in SHAPES[size].items()}
    for phase, batches in PHASES.items():
        for tokens in (max(1, batch // scale) for batch in batches):
            layers = nn.ModuleDict({str(i): pruned_linear(shape, device) for i, shape in enumerate(shapes)})
            choices = to_semi_structured_(layers, tokens, backend=backend)
            seconds = {"dense": 0.0, "2:4": 0.0, "chosen": 0.0}
            for choice, count in zip(choices, shapes.values()):
                sparse = [value for name, value in choice.seconds.items() if name != "dense"]
                assert sparse, choice.reason
                assert "computes something else" not in choice.reason, choice.reason
                for name, value in (("2:4", min(sparse)), ("dense", choice.seconds["dense"])):
                    seconds[name] += count * value
                seconds["chosen"] += count * choice.seconds[choice.variant]
            part = f"{size} layers, {phase}, {tokens} tokens"
            detail = {"layers": [dataclasses.asdict(choice) for choice in choices], "seconds": seconds}
            ratio = seconds["dense"] / seconds["2:4"]
            yield Row(f"{part}: 2:4 in all", "dense bf16", ratio, ratio, ratio, detail=detail)
            ratio = seconds["dense"] / seconds["chosen"]
            yield Row(f"{part}: to_semi_structured_", "dense bf16", ratio, ratio, ratio, ">= 1")


def pruned_linear(shape: tuple[int, int], device: str) -> nn.Linear:
    """A bf16 layer with random weights, pruned to 2:4."""
    layer = nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.masked_fill_(~nm_mask(layer.weight), 0)
    return layer


def llama(scale: int, device: str) -> PreTrainedModel:
    """The first blocks of a 7B LLaMA with random weights, bf16, pruned to 2:4."""
    hidden = 4096 // scale
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=11008 // scale,
        num_hidden_layers=BLOCKS if scale == 1 else 2,
        num_attention_heads=hidden // 128 or 1,
        vocab_size=32_000 // scale,
        max_position_embeddings=4096 + CONTEXT,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    prune_(model)
    return model


def forward_step(model: PreTrainedModel, batch: int, tokens: int, context: int, device: str) -> Callable[[], Tensor]:
    """A forward pass over `tokens` new tokens of `batch` sequences, after `context` tokens in a static cache."""
    ids = torch.ones(batch, tokens, dtype=torch.long, device=device)
    if not context:

        def prefill() -> Tensor:  # transformers looks for packed sequences, and under capture makes a mask for them
            with mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None):
                return model(input_ids=ids, use_cache=False).logits

        return prefill
    cache = StaticCache(config=model.config, max_cache_len=context + 64)
    model(input_ids=ids.expand(batch, context), use_cache=True, **{cache_keyword(model): cache})
    position = torch.full((batch, tokens), context, device=device)
    return lambda: model(input_ids=ids, position_ids=position, use_cache=True, **{cache_keyword(model): cache}).logits


@torch.no_grad()
def end_to_end_rows(scale: int, device: str, backend: Backend) -> Iterator[Row]:
    """Whole forward passes, attention and head included: a decode step after 512 tokens, and a prefill."""
    cases = {
        "decode, batch 1": (1, 1, CONTEXT // scale),
        "decode, batch 64": (64 // scale or 1, 1, CONTEXT // scale),
        "prefill, 4,096 tokens": (1, 4096 // scale, 0),
    }
    for phase, (batch, tokens, context) in cases.items():
        dense = llama(scale, device)
        sparse = copy.deepcopy(dense)
        choices = to_semi_structured_(sparse, batch * tokens, backend=backend)
        steps = [forward_step(model, batch, tokens, context, device) for model in (dense, sparse)]
        expected, found = (step().float() for step in steps)
        assert (found - expected).norm() <= 0.02 * expected.norm(), "the sparse model computes something else"
        runs = dict(zip(("dense", "sparse"), (captured(step, torch.device(device)) for step in steps)))
        times = interleaved(runs, repeats=10)
        converted = sum(choice.variant != "dense" for choice in choices)
        detail = {"converted_layers": converted, "layers": len(choices)}
        part = f"7B, {len(dense.model.layers)} blocks, {phase}"
        yield ratio_row(part, "dense bf16, CUDA graph", times["sparse"], times["dense"], ">= 0.98", detail=detail)


def training_rows(device: str, quick: bool) -> Iterator[Row]:
    """The optimizer, the refresh, and a whole step of the demo model in bf16 with gradient checkpointing."""
    yield from step_rows(quick=quick, device=device)
    yield from refresh_rows(quick=quick, device=device)
    if quick:
        return
    from benchmarks.__main__ import run_module, throughput_row

    whole = ["--device", "cuda", "--precision", "bf16", "--gradient-checkpointing", "--steps", "10"]
    yield throughput_row(run_module("benchmarks.throughput", [*whole, "--batch", "8", "--seq-len", "512"]))


CHECKS = (check_adams, check_masks, check_sweep, check_inverses, check_gram, check_order, check_states)


@contextlib.contextmanager
def recorded(name: str, failed: dict[str, str]) -> Iterator[None]:
    """Prints an error in the block, keeps it in `failed`, and continues, so that one failure does not waste the GPU's
    time.
    """
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        failed[name] = f"{type(error).__name__}: {error}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="OUT")
    parser.add_argument("--minutes", type=float, default=8, help="parts that have not begun by then are left out")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no CUDA device; run it on a machine with one", file=sys.stderr)
        sys.exit(2)
    from benchmarks.__main__ import show  # here: transformers may print when it is imported

    started, device, scale = time.perf_counter(), "cpu" if options.dry_run else "cuda", 32 if options.dry_run else 1
    failed: dict[str, str] = {}
    checks: list[Callable[[], None]] = [partial(check, device) for check in CHECKS]
    backend: Backend | None = None
    if options.dry_run:
        backend = StubBackend(lambda variant, shape, tokens: 2.0 if variant == "dense" else 1.0)
        print("dry run on a CPU with a stub for the sparse kernels: nothing is measured")
    else:
        with recorded("2:4 kernels", failed):
            backend = Cusparselt(torch.device("cuda"))
        checks.insert(0, check_nccl)
    for check in checks:
        what = (getattr(check, "func", check).__doc__ or "").splitlines()[0]
        with recorded(what, failed):
            check()
            print(f"passed: {what}", flush=True)
    parts: dict[str, Callable[[], Iterator[Row]]] = {"start": partial(start_rows, scale, device)}
    if backend is not None:
        parts |= {f"{size} layers": partial(layer_rows, size, scale, device, backend) for size in SHAPES}
        parts |= {"end to end": partial(end_to_end_rows, scale, device, backend)}
    parts |= {"training": partial(training_rows, device, options.dry_run)}
    rows: list[Row] = []
    left_out: list[str] = []

    def save() -> None:  # after each row: whatever comes later, what was measured stays
        if not options.dry_run:
            table = [dataclasses.asdict(row) | {"met": row.met} for row in rows]
            seconds = time.perf_counter() - started
            found = {"machine": machine(), "seconds": seconds, "left_out": left_out, "failed": failed, "rows": table}
            write_json(options.json, found)

    save()  # a path that cannot be written is known before the work
    for name, part in parts.items():
        if time.perf_counter() - started > 60 * options.minutes:
            left_out.append(name)
            continue
        with recorded(name, failed):
            for row in part():
                rows.append(row)
                if options.dry_run:
                    print(f"ran: {row.part}", flush=True)
                else:
                    show([row], header=len(rows) == 1)
                save()
    save()
    seconds = time.perf_counter() - started
    where = "a CPU, dry run" if options.dry_run else torch.cuda.get_device_name()
    print(f"{seconds:.0f} s on {where}" + (f"; left out for lack of time: {', '.join(left_out)}" if left_out else ""))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
