"""llama.cpp reads what castlm writes: its converter takes a cut model, and its logits are those of transformers.

Runs where llama-cpp-python is installed and LLAMA_CPP names a checkout of llama.cpp; CI has neither.
"""

import json
import os

import pytest
import torch

from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.evaluation.perplexity import perplexity
from castlm.models.io import load_model
from tests.tiny import TEXT

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
from benchmarks import frontier, llamacpp

IDS = torch.tensor([1, 403, 407, 261, 378, 383, 269, 413, 286, 261, 265, 267, 408, 419, 270, 299])


@pytest.fixture(scope="module")
def sources():
    folder = os.environ.get("LLAMA_CPP")
    if not folder:
        pytest.skip("LLAMA_CPP does not name a checkout of llama.cpp")
    return folder


@pytest.mark.parametrize("pattern", ["channels:0.5", "heads:0.5", "channels:0.75+2:4"])
def test_a_cut_model_is_converted_and_computes_the_same_logits(stories260k, sources, tmp_path, pattern):
    folder = tmp_path / "cut"
    command = ["prune", "--model", str(stories260k), "--method", "magnitude", "--pattern", pattern]
    assert main([*command, "--output-dir", str(folder)]) == 0
    file = llamacpp.convert(folder, sources, tmp_path / "cut.gguf", dtype="f32")
    runner, model = llamacpp.LlamaCpp(file, 32, 1), load_model(str(folder)).model
    with torch.no_grad():
        expected = model(IDS[None]).logits[0]
    assert float((runner.logits(IDS) - expected).abs().max() / expected.abs().max()) < 0.002  # keys and values are fp16
    assert runner.perplexity(IDS) == pytest.approx(perplexity(model, IDS, seq_len=32).perplexity, rel=0.002)
    ids = model.generate(IDS[None], max_new_tokens=8, do_sample=False)[0, len(IDS) :]
    assert runner.greedy(IDS, 8) == ids.tolist()


def test_llama_cpp_rounds_to_the_formats_of_the_frontier(stories260k, sources, tmp_path):
    source = llamacpp.convert(stories260k, sources, tmp_path / "bf16.gguf")
    sizes = [llamacpp.tensor_bytes(source)]
    for form in llamacpp.FORMATS:
        file = llamacpp.quantize(source, form, tmp_path / f"{form}.gguf")
        sizes.append(llamacpp.tensor_bytes(file))
        rounded = perplexity(load_model(str(file)).model, IDS, seq_len=32).perplexity
        assert llamacpp.LlamaCpp(file, 32, 1).perplexity(IDS) == pytest.approx(rounded, rel=0.05)
    assert sizes == sorted(sizes, reverse=True)


def test_the_frontier_has_rows_of_llama_cpp(stories260k, sources, tmp_path, monkeypatch):
    monkeypatch.setattr(frontier, "NEW_TOKENS", 2)
    (tmp_path / "t.txt").write_text(TEXT)
    text, out = str(tmp_path / "t.txt"), str(tmp_path / "out.json")
    sizes = ["--sequences", "2", "--eval-tokens", "256", "--seq-len", "64", "--calibration-len", "64", "--rounds", "1"]
    options = ["--text", text, "--calibration", text, "--llama-cpp", sources, "--plot", str(tmp_path / "plot.svg")]
    frontier.main(["--model", str(stories260k), *options, *sizes, "--json", out])
    points = {point["name"]: point for point in json.loads((tmp_path / "out.json").read_text())["points"]}
    assert all(points[f"dense {form}, llama.cpp"]["tokens_per_second"] > 0 for form in llamacpp.FORMATS)
    dense = points["dense bf16"]["perplexity"]
    assert points["dense Q8_0, llama.cpp"]["perplexity"] == pytest.approx(dense, rel=0.1)


def test_a_folder_without_the_converter_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no convert_hf_to_gguf\.py: name a checkout of llama\.cpp"):
        llamacpp.convert("model", tmp_path, tmp_path / "x.gguf")
