"""llama.cpp reads what castlm writes, a folder through its converter and a GGUF file, and has the logits of castlm.

Runs where llama-cpp-python is installed and, for the converter, LLAMA_CPP names a checkout of llama.cpp, as in CI.
"""

import os

import pytest
import torch

from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.evaluation.perplexity import perplexity
from castlm.models.io import load_model

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
from benchmarks import gguf_files, llamacpp

from tests.tiny import tiny_model, write_gguf

IDS = torch.tensor([1, 403, 407, 261, 378, 383, 269, 413, 286, 261, 265, 267, 408, 419, 270, 299])


@pytest.fixture(scope="module")
def sources():
    folder = os.environ.get("LLAMA_CPP")
    if not folder:
        pytest.skip("LLAMA_CPP does not name a checkout of llama.cpp")
    return folder


@pytest.mark.parametrize("units", ["channels:0.5", "heads:0.5"])
def test_a_cut_model_is_converted_and_computes_the_same_logits(stories260k, sources, tmp_path, units):
    folder = tmp_path / "cut"
    command = ["cut", "--model", str(stories260k), "--score", "magnitude", "--units", units]
    assert main([*command, "--output-dir", str(folder)]) == 0
    file = gguf_files.convert(folder, sources, tmp_path / "cut.gguf", dtype="f32")
    runner, model = llamacpp.LlamaCpp(file, 32, 1), load_model(str(folder)).model
    with torch.no_grad():
        expected = model(IDS[None]).logits[0]
    assert float((runner.logits(IDS) - expected).abs().max() / expected.abs().max()) < 0.002  # keys and values are fp16
    assert runner.perplexity(IDS) == pytest.approx(perplexity(model, IDS, seq_len=32).perplexity, rel=0.002)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_a_gguf_file_of_castlm_has_the_logits_that_castlm_computes_from_it(tmp_path, kind):
    write_gguf(tmp_path / "source.gguf", tiny_model("llama", hidden_size=64, intermediate_size=96, head_dim=16))
    file = tmp_path / "out.gguf"
    assert main(["quantize", str(tmp_path / "source.gguf"), "--kind", kind, "--gguf", str(file)]) == 0
    runner, model = llamacpp.LlamaCpp(file, 32, 1), load_model(file).model
    ids = IDS % model.config.vocab_size
    with torch.no_grad():
        expected = model(ids[None]).logits[0].float()
    assert float((runner.logits(ids) - expected).norm() / expected.norm()) < 0.05  # it rounds activations to int8


def test_a_folder_without_the_converter_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"convert_hf_to_gguf\.py"):
        gguf_files.convert("model", tmp_path, tmp_path / "x.gguf")
