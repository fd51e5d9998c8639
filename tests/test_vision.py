"""Vision-language models: the language model becomes n:m by text, the tower stays as it is, and so does the class."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from castlm.cli.main import main
from castlm.core.blocks import is_block_linear, is_tower
from castlm.core.errors import InputError
from castlm.core.nm import is_nm_sparse
from castlm.core.sparsify import prune_, sparse_linears
from castlm.export.verify import verify
from castlm.models.architecture import auto_class, check_head, is_vision_language
from castlm.models.io import load_model
from castlm.oneshot.methods import change_basis_
from castlm.packed import native
from tests.runs import assert_equal_weights, edit_json, prune_to, record_of, small_command
from tests.slow import slow_but
from tests.tiny import VISION, save_tiny, tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {family: save_tiny(folder / family, family) for family in VISION}
    for path in made.values():
        (path / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    return made


def assert_same_tower(folder: Path, source: Path) -> None:
    """The class is that of the source, its language model is 2:4, and its tower is untouched."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    dense = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    assert type(model) is type(dense)
    towers = {name: p for name, p in dense.named_parameters() if is_tower(name)}
    assert len(towers) > 20
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in towers.items())
    layers, _ = sparse_linears(model)
    assert len(layers) == 14
    assert all("language_model" in name and is_nm_sparse(layer.weight) for name, layer in layers.items())
    report = verify(folder)
    assert report.ok
    assert {layer.name.replace("language_model.", "").replace("model.", "") for layer in report.sparse_layers} == {
        f"layers.{i}.{part}_proj.weight"
        for i in (0, 1)
        for part in (*(f"self_attn.{x}" for x in "qkvo"), *(f"mlp.{x}" for x in ("gate", "up", "down")))
    }
    assert (folder / "preprocessor_config.json").read_text() == (source / "preprocessor_config.json").read_text()


@pytest.mark.parametrize("family", VISION)
def test_the_language_model_is_what_becomes_sparse(family, models):
    model = load_model(models[family]).model
    assert is_vision_language(model.config)
    assert auto_class(model.config) is AutoModelForImageTextToText
    sparse, dense = sparse_linears(model)
    assert all(name.startswith("model.language_model.layers.") for name in sparse)
    assert {reason for name, reason in dense.items() if is_tower(name)} == {"outside the language model"}
    check_head(model)
    with torch.no_grad():
        dense_logits = model(torch.arange(12).view(1, 12)).logits
        prune_(model)
        assert not torch.equal(model(torch.arange(12).view(1, 12)).logits, dense_logits)


def test_towers_and_projectors_are_known_by_their_names():
    towers = (
        *("vision_tower.vision_model.encoder.layers.0.mlp.fc1", "visual.blocks.3.attn.qkv", "audio_tower.layers.0.fc1"),
        *("model.multi_modal_projector.linear_1", "mm_projector.0", "model.connector.modality_projection.proj"),
        *(
            "vit.layers.0.attention.qkv",
            "model.vision_model.encoder.layers.1.self_attn.q_proj",
            "resampler.layers.0.fc1",
            "qformer.layer.0.x",
        ),
    )
    assert all(is_tower(name) and not is_block_linear(f"{name}.weight", (8, 8)) for name in towers)
    language = (
        *("language_model.model.layers.0.mlp.up_proj", "model.layers.3.mlp.vision_moe.up_proj"),
        *("model.text_model.layers.0.mlp.up_proj", "transformer.h.0.attn.c_proj", "model.decoder.layers.0.fc1"),
    )
    assert all(not is_tower(name) and is_block_linear(f"{name}.weight", (8, 8)) for name in language)


@pytest.mark.parametrize("family", slow_but(VISION[-1:], VISION))
def test_castlm_prune_verify_eval_and_pack(family, models, tmp_path, capsys):
    text, out, packed = tmp_path / "text.txt", tmp_path / "out", tmp_path / "packed"
    text.write_text("All happy families are alike; each unhappy family is unhappy in its own way.\n\n" * 12)
    prune_to(out, models[family], text, device="cpu")
    assert_same_tower(out, models[family])
    assert main(["verify", str(out)]) == 0
    assert main(["eval", str(out), "--text", str(text), "--seq-len", "64", "--device", "cpu"]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main(["pack", str(out), "--output-dir", str(packed)]) == 0
    assert verify(packed).ok
    assert main(["unpack", str(packed), "--output-dir", str(tmp_path / "again")]) == 0
    assert_equal_weights(out, tmp_path / "again")
    unpacked = load_model(packed).model.state_dict()
    assert all(torch.equal(tensor, unpacked[name]) for name, tensor in load_model(out).model.state_dict().items())
    if native.kernels() is not None:
        ids = torch.arange(12).view(1, 12)
        ours, theirs = (AutoModelForImageTextToText.from_pretrained(folder) for folder in (packed, out))
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_castlm_train_on_text_keeps_the_tower(models, text, tmp_path):
    run = tmp_path / "run"
    assert main(small_command("train", models["llava"], text, run, max_steps=3, device="cpu")) == 0
    assert_same_tower(run / "model", models["llava"])
    record = record_of(run / "model")
    assert record["proof"]["layers"] == 14
    assert record["left_dense"]["model.multi_modal_projector.linear_1.weight"] == "outside the language model"


def test_the_model_without_its_head_is_refused_by_name(tmp_path):
    folder = save_tiny(tmp_path, "llava")
    edit_json(folder / "config.json", architectures=["LlavaModel"])
    with pytest.raises(InputError, match="LlavaModel"):
        load_model(folder)


@pytest.mark.parametrize("family", VISION)
def test_the_basis_inside_the_blocks_changes_and_the_stream_that_images_enter_does_not(family):
    model = tiny_model(family)
    ids = torch.randint(0, 256, (4, 48), generator=torch.Generator().manual_seed(0))
    before, embeddings = model(ids).logits, model.get_input_embeddings().weight.clone()
    report = change_basis_(model, ids)
    assert [change.what for change in report.changes] == ["values rotated", "MLP neurons permuted"]
    assert report.changes[1].num_tried == 2
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-3)
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
