"""Families with weights that other code than a layer multiplies by, or that are stored in another form.

The tests of a command run on families that it handles in the usual way. These are the others: recurrent blocks, latent
attention, tensors that are split while they are loaded, and experts of each construction.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from castlm.cli.main import main
from castlm.core.blocks import is_tower
from castlm.core.errors import InputError
from castlm.export import packed as packed_module
from castlm.export.packed import unpack_folder
from castlm.export.verify import verify
from castlm.models.architecture import backbone, check_head
from castlm.packed.register import register
from tests.packed_weights import needs_kernels
from tests.runs import assert_equal_weights
from tests.slow import slow
from tests.tiny import save_tiny, tiny_model

IDS = torch.arange(1, 33)[None]


def logits(folder) -> torch.Tensor:
    register()
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@needs_kernels
@pytest.mark.parametrize(
    ("family", "share"),
    [
        *(("lara_mini", 0.98), ("mamba", 1.0), ("sarvam_moe", 0.99), ("exaone", 1.0)),
        *(slow("falcon_mamba", 1.0), slow("deepseek_v4", 0.85), slow("longcat_flash", 0.98), slow("llama4_text", 0.98)),
        *(slow("dbrx", 0.98), slow("jetmoe", 0.98)),
    ],
)
def test_a_family_walks_through_every_command(family, share, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        packed_module, "check_loads", lambda folder: None
    )  # in a fresh process; here it is loaded below
    dense, sparse = str(save_tiny(tmp_path / "dense", family)), str(tmp_path / "sparse")
    command = ["prune", "--model", dense, "--output-dir", sparse, "--solver", "magnitude", "--allow-dense"]
    assert main([*command, "1.0"]) == 0
    report = verify(sparse, allow_dense=1.0)
    assert report.ok
    assert report.share >= share
    assert main(["pack", sparse, "--output-dir", str(tmp_path / "packed")]) == 0
    assert (
        main(
            [
                "quantize",
                sparse,
                "--kind",
                "int8",
                "--packed",
                "--head",
                "source",
                "--output-dir",
                str(tmp_path / "int8"),
            ]
        )
        == 0
    )
    for folder in ("packed", "int8"):
        assert verify(tmp_path / folder, allow_dense=1.0).ok
    expected = logits(sparse)
    torch.testing.assert_close(logits(tmp_path / "packed"), expected, rtol=1e-3, atol=1e-3)
    assert float((logits(tmp_path / "int8") - expected).norm() / expected.norm()) < 0.2
    unpack_folder(tmp_path / "packed", tmp_path / "again")
    assert_equal_weights(sparse, tmp_path / "again")
    assert "unexpected" not in capsys.readouterr().err


def test_the_backbone_of_llama_4_gives_what_its_head_reads():
    model = tiny_model("llama4_text")
    assert backbone(model) is model.model
    check_head(model)
    with pytest.raises(InputError, match="LlamaModel"):
        backbone(tiny_model("llama").model)


def test_the_tower_of_a_model_stays_dense_whatever_its_name():
    for name in ("vit", "visual", "vision_tower", "image_encoder"):
        assert is_tower(f"model.{name}.encoder.layers.0.mlp.fc1")
    assert not is_tower("model.layers.0.self_attn.vit_proj")
