"""Packed folders of models with experts: bit for bit, and the kernels compute what transformers does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.core.experts import linearize_experts_
from castlm.core.sparsify import prune_, sparse_linears
from castlm.export.hf import export_model
from castlm.export.packed import pack_folder, unpack_folder
from castlm.export.verify import verify
from castlm.inference import native
from castlm.inference.formats import FILE, PackedSpec, read_specs, to_metadata
from castlm.models.io import load_model
from tests.slow import slow
from tests.tiny import EXPERTS, tiny_model, tiny_tokenizer

needs_kernels = pytest.mark.skipif(native.kernels() is None, reason="the kernels were not built")


@pytest.fixture(scope="module", params=[*EXPERTS, slow("aria_text"), slow("granitemoehybrid")])
def folders(request, tmp_path_factory) -> tuple[Path, Path]:
    """A 2:4 model and the same packed."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_model(request.param)
    linearize_experts_(model)
    prune_(model)
    left_dense = sparse_linears(model)[1]
    export_model(model, tiny_tokenizer(), folder / "plain", pattern="2:4", left_dense=left_dense, record={})
    pack_folder(folder / "plain", folder / "packed")
    return folder / "plain", folder / "packed"


def ids() -> torch.Tensor:
    return torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


def test_packing_and_unpacking_give_the_same_files(folders, tmp_path):
    plain, packed = folders
    report = verify(packed)
    assert report.ok
    assert report.totals()["weights"] == verify(plain).totals()["weights"]
    assert unpack_folder(packed, tmp_path / "again") == len(report.sparse_layers)
    one, other = (load_file(folder / "model.safetensors") for folder in (plain, tmp_path / "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_experts_in_some_blocks_only_are_packed(tmp_path):
    model = tiny_model("qwen3_moe", mlp_only_layers=[0])
    linearize_experts_(model)
    prune_(model)
    left_dense = sparse_linears(model)[1]
    export_model(model, tiny_tokenizer(), tmp_path / "plain", pattern="2:4", left_dense=left_dense, record={})
    pack_folder(tmp_path / "plain", tmp_path / "packed")
    unpack_folder(tmp_path / "packed", tmp_path / "again")
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("plain", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    report = verify(tmp_path / "packed")
    assert report.ok
    assert report.compared_with == "transformers"

    file, lacking = tmp_path / "packed" / FILE, "model.layers.1.mlp.experts.2.up_proj"
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(f"{lacking}.")}
    specs = {name: spec for name, spec in read_specs([file]).items() if name != lacking}
    save_file(kept, file, metadata={"format": "pt", **to_metadata(specs)})
    with pytest.raises(InputError, match="experts"):
        verify(tmp_path / "packed")


@needs_kernels
def test_the_kernels_compute_what_transformers_does(folders):
    plain, packed = folders
    expected = AutoModelForCausalLM.from_pretrained(plain)(ids()).logits
    model = AutoModelForCausalLM.from_pretrained(packed)
    experts = [name for name, _ in model.named_parameters() if "experts" in name and "bias" not in name]
    assert experts == []  # all are packed
    torch.testing.assert_close(model(ids()).logits, expected, rtol=1e-4, atol=1e-4)
    one = model.generate(ids()[:1, :8], max_new_tokens=4, do_sample=False)
    other = AutoModelForCausalLM.from_pretrained(plain).generate(ids()[:1, :8], max_new_tokens=4, do_sample=False)
    assert torch.equal(one, other)


def test_load_model_unpacks_to_the_plain_model(folders):
    plain, packed = (load_model(folder).model for folder in folders)
    for (name, one), (other_name, other) in zip(plain.state_dict().items(), packed.state_dict().items()):
        assert name == other_name
        assert torch.equal(one, other), name
    torch.testing.assert_close(packed(ids()).logits, plain(ids()).logits, rtol=0, atol=0)


def test_an_expert_that_is_not_sparse_is_not_packed(folders, tmp_path):
    plain, _ = folders
    for file in plain.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(plain / "model.safetensors")
    down = ("experts.3.w2.weight", "down_proj", "3.down_proj.weight", "experts.fc2.weight", "output_linear.weight")
    name = next(name for name in tensors if name.endswith(down))
    tensors[name].view(-1, tensors[name].shape[-1])[:4, :4] = 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{re.escape(name)}: a weight of shape .* is not 2:4"):
        pack_folder(tmp_path, tmp_path / "packed")


def test_the_metadata_of_stacked_experts_are_checked(folders):
    _, packed = folders
    specs = read_specs(packed.glob("*.safetensors"))
    stacked = {name: spec for name, spec in specs.items() if spec.experts}
    is_together, is_transposed = (
        any(family in str(packed) for family in families)
        for families in (("gpt_oss", "aria_text", "granitemoe"), ("gpt_oss", "aria_text"))
    )
    assert len(stacked) == (4 if is_together else 0)
    for spec in stacked.values():
        assert json.loads(json.dumps(spec.as_dict()))["experts"] == 4
        matrix = (spec.rows // 4, spec.columns)
        assert spec.unpacked_shape == (4, *(matrix[::-1] if is_transposed else matrix))
    assert PackedSpec(8, 4, 2, 4, "bf16").as_dict().keys() == {"shape", "pattern", "values", "transposed"}


@needs_kernels
@pytest.mark.parametrize("kind", [slow("int8"), "int4"])
def test_experts_are_quantized_into_the_packed_folder(kind, folders, text, tmp_path):
    plain, _ = folders
    arguments = [str(plain), "--kind", kind, "--output-dir"]
    calibration = ["--calibration", text, "--num-sequences", "4", "--seq-len", "32"] if kind == "int4" else []
    calibration += ["--device", "cpu"]
    assert main(["quantize", *arguments, str(tmp_path / "plain"), *calibration]) == 0
    assert main(["quantize", *arguments, str(tmp_path / "packed"), "--packed", *calibration]) == 0
    report = verify(tmp_path / "packed")
    assert report.ok
    assert {layer.dtype for layer in report.layers} == {kind}
    before, after = load_model(plain).model, load_model(tmp_path / "plain").model
    block = "block_sparse_moe" if "granitemoe" in str(plain) else "mlp"
    name = f"model.layers.1.{block}.experts.down_proj"
    one, other = (model.get_submodule(name).weight for model in (before, after))
    assert not torch.equal(one, other)
    assert torch.equal(one == 0, other == 0) or kind == "int4"  # int4 may round a kept weight to zero
    assert bool((other[one == 0] == 0).all())
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(9, 32, generator=generator), torch.rand(9, 2, generator=generator)
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(9)])
    experts = name.removesuffix(".down_proj")
    ours, theirs = (m.get_submodule(experts)(x, chosen, weights).detach() for m in (packed, after))
    assert float((ours - theirs).norm() / theirs.norm()) < 0.03  # the kernels round what they multiply by, too
    unpacked = load_model(tmp_path / "packed").model.get_submodule(name).weight
    torch.testing.assert_close(unpacked, other, rtol=1e-6, atol=0)
