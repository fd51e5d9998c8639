"""Perplexity of a GGUF file rounded by castlm and by llama.cpp, in the same bytes: for users of llama.cpp.

    python -m benchmarks.gguf_quality --text TEXT --calibration TEXT [--model demo] [--scratch FOLDER] [--json OUT]

Rows: the file as it is; its layers in Q4_0 by llama.cpp (`allow_requantize`), without and with an importance matrix of
the sequences that castlm draws from the calibration text, and by `castlm quantize --gguf` to the nearest, by the
calibration text, and with 100 steps of the scales on that text; Q8_0 of both. Embedding and head stay as they are in
every row. Each file is measured in llama.cpp, which rounds activations to int8, and by castlm from the same file, in
fp32. `--scratch` keeps the files, and takes those that are there.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks import gguf_files, llamacpp
from benchmarks.machine import machine, write_json
from castlm.cli.main import main as castlm
from castlm.data.documents import open_documents
from castlm.data.options import DEFAULTS
from castlm.data.tokens import open_encoder, token_ids
from castlm.evaluation.perplexity import perplexity
from castlm.export.head import CalibrationOptions
from castlm.models.gguf import gguf_weights
from castlm.models.io import load_model
from castlm.models.locate import locate
from castlm.oneshot.steps.round import layers_to_round


@torch.no_grad()
def importance_of(source: Path, calibration: str) -> dict[str, torch.Tensor]:
    """The mean square of the inputs of each layer on the sequences of `castlm quantize`, by the name of its tensor."""
    loaded = load_model(source, dtype=torch.float32)
    documents = open_documents(calibration)
    encoder = open_encoder([documents], loaded.tokenizer, str(source), DEFAULTS)
    tokens = CalibrationOptions(calibration).draw(documents, encoder, loaded.model, print)
    weights = gguf_weights(source, loaded.model)
    assert weights is not None
    found: dict[str, torch.Tensor] = {}

    def see(name: str) -> Callable[..., None]:
        def add(layer: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            found[name] = found.get(name, torch.zeros(())) + inputs[0][0].square().mean(0) / len(tokens)

        return add

    for layer, module in layers_to_round(loaded.model).items():
        module.register_forward_pre_hook(see(weights.tensor(f"{layer}.weight").name))
    for sequence in tokens:
        loaded.model(sequence[None], logits_to_keep=1)
    return found


def made(source: Path, model: str, calibration: str, folder: Path) -> dict[str, Path]:
    """The files, by the name of their row."""
    import llama_cpp

    files = {"as it is": source}
    kept = {"token_embedding_type": llama_cpp.GGML_TYPE_Q8_0, "output_tensor_type": llama_cpp.GGML_TYPE_Q8_0}
    for name, form, has_matrix in (
        ("Q4_0 of llama.cpp", "Q4_0", False),
        ("Q4_0 of llama.cpp, importance matrix", "Q4_0", True),
        ("Q8_0 of llama.cpp", "Q8_0", False),
    ):
        file = files[name] = folder / f"llama.cpp-{form}{'-importance' * has_matrix}.gguf"
        if not file.exists():
            matrix = importance_of(source, calibration) if has_matrix else None
            llamacpp.quantize(source, form, file, matrix, allow_requantize=True, **kept)
    rounded = {
        "Q4_0 of castlm, to the nearest": ("int4", []),
        "Q4_0 of castlm, calibrated": ("int4", ["--calibration", calibration]),
        "Q4_0 of castlm, scales trained": ("int4", ["--calibration", calibration, "--train-steps", "100"]),
        "Q8_0 of castlm": ("int8", []),
    }
    for name, (kind, more) in rounded.items():
        file = files[name] = folder / f"castlm-{kind}{'-calibrated' * bool(more)}{'-trained' * (len(more) > 2)}.gguf"
        if not file.exists() and castlm(["quantize", model, "--kind", kind, "--gguf", str(file), *more]):
            raise SystemExit(2)
    return files


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a GGUF file whose embedding and head are in Q8_0")
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--scratch", metavar="FOLDER")
    parser.add_argument("--json", metavar="OUT")
    options = parser.parse_args(arguments)
    where = locate(options.model)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.scratch or scratch)
        files = made(Path(where.target) / where.gguf["gguf_file"], options.model, options.calibration, folder)
        for name, file in files.items():
            loaded = load_model(file, dtype=torch.float32)
            text = token_ids(options.text, loaded.tokenizer, limit=options.eval_tokens)
            own = perplexity(loaded.model, text, seq_len=options.seq_len).perplexity
            del loaded
            runner = llamacpp.LlamaCpp(file, options.seq_len, torch.get_num_threads())
            rows.append([name, gguf_files.tensor_bytes(file) / 1e6, runner.perplexity(text), own])
            print("{:32} {:8.1f} MB   llama.cpp {:.3f}   castlm {:.3f}".format(*rows[-1]), flush=True)
    write_json(options.json, {"machine": machine(), "options": vars(options), "rows": rows})


if __name__ == "__main__":
    main()
