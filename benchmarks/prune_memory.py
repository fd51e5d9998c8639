"""`plan memory --prune` against what `castlm prune --memory block` takes: the peak of resident memory.

Run: `python -m benchmarks.prune_memory [--shape NAME] [--layers N] [--case NAME ...] [--json OUT]` (Linux: the peak is
read from /proc). The model has random bf16 weights in the shape of a Llama, one file a transformer block. Each case is
a process of its own on the CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tests.tiny import tiny_tokenizer
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.machine import machine, proc_status, write_json

GIB = 2**30
SEQUENCES, SEQ_LEN = 4, 256


class Shape(NamedTuple):
    """Of a Llama with 8 KV heads and tied embeddings."""

    hidden: int
    inner: int
    heads: int
    vocab: int


SHAPES = {"0.3B": Shape(1024, 2816, 16, 32_000), "3B": Shape(3072, 8192, 24, 128_256)}

AS_PUBLISHED = {"rotate": "off", "permute": False, "mask_iterations": 0, "refit_iterations": 0}
CASES: dict[str, dict[str, Any]] = {
    "SparseGPT as published": AS_PUBLISHED,
    "refit": {"mask_iterations": 0, "refit_iterations": 2},
    "the default": {},
    "shifted targets": {**AS_PUBLISHED, "target_asymmetry": 0.01, "stream_correction": 0.01},
    "reconstruction": {**AS_PUBLISHED, "reconstruct_epochs": 2, "reconstruct_rate": 1e-5},
}


def write_model(folder: Path, shape: Shape, num_layers: int) -> None:
    """A model folder that is read, and was made, one transformer block at a time."""
    head_dim = shape.hidden // shape.heads
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=num_layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=8,
        head_dim=head_dim,
        vocab_size=shape.vocab,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    where, total = {}, 0
    for number, tensors in enumerate(_shards(shape, num_layers)):
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _shards(shape: Shape, num_layers: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def weight(*size: int) -> Tensor:
        return torch.empty(size).normal_(std=0.02, generator=generator).bfloat16()

    def gains(*names: str) -> dict[str, Tensor]:
        return {name: torch.ones(shape.hidden, dtype=torch.bfloat16) for name in names}

    yield {"model.embed_tokens.weight": weight(shape.vocab, shape.hidden), **gains("model.norm.weight")}
    keys = 8 * shape.hidden // shape.heads
    sizes = {
        "self_attn.q_proj": (shape.hidden, shape.hidden),
        "self_attn.k_proj": (keys, shape.hidden),
        "self_attn.v_proj": (keys, shape.hidden),
        "self_attn.o_proj": (shape.hidden, shape.hidden),
        "mlp.gate_proj": (shape.inner, shape.hidden),
        "mlp.up_proj": (shape.inner, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.inner),
    }
    for index in range(num_layers):
        block = f"model.layers.{index}."
        norms = gains(f"{block}input_layernorm.weight", f"{block}post_attention_layernorm.weight")
        yield {f"{block}{name}.weight": weight(*size) for name, size in sizes.items()} | norms


def predicted_peak(model: Path, options: dict[str, Any]) -> int:
    from castlm.oneshot.options import BasisOptions, Refinements
    from castlm.planning.prune_memory import plan_prune_memory

    basis = {name: options[name] for name in ("rotate", "permute") if name in options}
    rest = {name: value for name, value in options.items() if name not in basis}
    return plan_prune_memory(
        model,
        memory="block",
        num_sequences=SEQUENCES,
        seq_len=SEQ_LEN,
        basis=BasisOptions(**basis),
        refinements=Refinements(**rest),
    ).peak


def measured_peak(model: Path, text: Path, out: Path, options: dict[str, Any]) -> tuple[int, float]:
    """Bytes and seconds of `castlm prune`. Exits where it fails."""
    command = ["prune", "--model", str(model), "--calibration", str(text), "--output-dir", str(out)]
    command += ["--num-sequences", str(SEQUENCES), "--seq-len", str(SEQ_LEN), "--memory", "block", "--device", "cpu"]
    for name, value in options.items():
        option = name.replace("_", "-")
        command += [f"--no-{option}"] if value is False else [f"--{option}", str(value)]
    started = time.perf_counter()
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.prune_memory", "--child", *command], stdout=subprocess.PIPE
    )
    if child.returncode:
        sys.exit(f"castlm {' '.join(command)} ended with {child.returncode}")
    return int(child.stdout.split()[-1]), time.perf_counter() - started


def prune_here(command: list[str]) -> int:
    """The child's part: prints the peak of its resident memory. That of a child that the system tells the parent counts
    what the parent held when it started it."""
    from castlm.cli.main import main as castlm

    code = castlm(command)
    print(proc_status("VmHWM"))
    return code


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.3B")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--folder", help="for the model and the results; a temporary one by default")
    parser.add_argument("--json", metavar="OUT")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        sys.exit(prune_here(args.child))
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch)
        model, text = folder / "model", folder / "text.txt"
        model.mkdir()
        letters = torch.randint(97, 123, (40_000,), generator=torch.Generator().manual_seed(0))
        text.write_bytes(bytes(letters.tolist()))
        write_model(model, SHAPES[args.shape], args.layers)
        print(f"{'case':<30}{'predicted':>12}{'measured':>12}{'ratio':>8}{'seconds':>10}")
        for number, name in enumerate(args.case):
            predicted = predicted_peak(model, CASES[name])
            measured, seconds = measured_peak(model, text, folder / str(number), CASES[name])
            ratio = predicted / measured
            print(
                f"{name:<30}{predicted / GIB:>8.2f} GiB{measured / GIB:>8.2f} GiB{ratio:>8.3f}{seconds:>10.0f}",
                flush=True,
            )
            rows.append({"case": name, "predicted": predicted, "measured": measured, "seconds": seconds})
    write_json(args.json, {"machine": machine(), "shape": args.shape, "layers": args.layers, "rows": rows})


if __name__ == "__main__":
    main()
