"""A model has one name in every command: a folder, a run, a packed folder, a GGUF file or a hub id."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from castlm.cli.command_line import read_arguments
from castlm.cli.main import main
from castlm.cli.pack import PackCommand
from castlm.cli.prune import PruneCommand
from castlm.core.errors import InputError
from castlm.core.sparsify import prune_
from castlm.export import pruned
from castlm.export.packed import pack_folder
from castlm.lab.planning.memory import read_config
from castlm.models.io import load_model
from castlm.models.locate import locate
from tests.test_models import write_gguf
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict[str, str]:
    """The same sparse model under each kind of name."""
    top = tmp_path_factory.mktemp("names")
    model = tiny_model("llama")
    prune_(model)
    model.save_pretrained(top / "folder")
    tiny_tokenizer().save_pretrained(top / "folder")
    shutil.copytree(top / "folder", top / "run" / "model")
    (top / "run" / "config.yaml").write_text("model: folder\n")
    pack_folder(top / "folder", top / "packed")
    write_gguf(top / "tiny.gguf", model)
    return {
        **{kind: str(top / kind) for kind in ("folder", "run", "packed")},
        "safetensors": str(top / "folder/model.safetensors"),
        "gguf": str(top / "tiny.gguf"),
    }


@pytest.mark.parametrize("kind", ["folder", "run", "packed", "gguf"])
def test_every_kind_of_name_is_loaded(names, kind):
    loaded = load_model(names[kind])
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) > 0
    assert loaded.source == (names[kind] + "/model" if kind == "run" else names[kind])
    assert read_config(names[kind]).hidden_size == 32


@pytest.mark.parametrize("kind", ["folder", "run", "packed", "safetensors"])
@pytest.mark.parametrize("form", [[], ["--model"]])
def test_verify_counts_every_kind_with_and_without_an_option(names, kind, form, capsys):
    assert main(["verify", *form, names[kind]]) == 0
    assert "2:4 holds" in capsys.readouterr().out


def test_a_model_is_given_with_an_option_or_without():
    options = [("options", PackCommand)]
    for arguments in (
        ["x", "--output-dir", "o"],
        ["--output-dir", "o", "--model", "x"],
        ["--model=x", "--output-dir=o"],
    ):
        assert read_arguments(options, arguments, "pack", PackCommand) == {"model": "x", "output_dir": "o"}
    for arguments in (["x", "--output-dir", "o"], ["--model", "x", "--output-dir", "o"]):
        assert read_arguments([("options", PruneCommand)], arguments, "prune", PruneCommand)["model"] == "x"
    with pytest.raises(InputError, match="unrecognized arguments: y"):
        read_arguments(options, ["y", "--model", "x"], "pack", PackCommand)


PRUNE_BY_BLOCK = ["prune", "--model", "MODEL", "--solver", "magnitude", "--memory", "block", "--output-dir", "OUT"]


def test_what_needs_a_folder_says_without_a_model_in_memory_how_to_make_one(names, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pruned, "load_model", None)
    for command, name, remedy in (
        (["verify", "MODEL"], names["gguf"], f"castlm unpack {names['gguf']}"),
        (["verify", "MODEL"], "some/model", "hf download some/model"),
        (PRUNE_BY_BLOCK, "some/model", "hf download some/model"),
    ):
        values = {"MODEL": name, "OUT": str(tmp_path / "out")}
        assert main([values.get(word, word) for word in command]) == 2
        assert remedy in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_gguf_file_is_pruned_one_block_at_a_time(names, tmp_path, monkeypatch):
    monkeypatch.setattr(pruned, "load_model", None)
    values = {"MODEL": names["gguf"], "OUT": str(tmp_path / "out")}
    assert main([values.get(word, word) for word in PRUNE_BY_BLOCK]) == 0
    found = load_model(tmp_path / "out").model.state_dict()
    for name, dense in load_model(names["gguf"]).model.state_dict().items():
        kept = found[name] != 0
        assert torch.equal(found[name][kept], dense.bfloat16().float()[kept]), name


def test_unpack_writes_a_gguf_file_as_a_folder(names, tmp_path, capsys):
    assert main(["unpack", names["gguf"], "--output-dir", str(tmp_path / "plain")]) == 0
    found = load_model(tmp_path / "plain").model.state_dict()
    expected = load_model(names["gguf"]).model.state_dict()
    assert all(torch.equal(found[name], tensor.bfloat16().float()) for name, tensor in expected.items())
    assert load_file(tmp_path / "plain/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_a_run_without_a_model_says_how_to_finish_it(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(InputError, match="--resume"):
        locate(tmp_path)
