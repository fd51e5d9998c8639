"""`castlm quantize --gguf`: another GGUF file with the rounded layers, and everything else as it was."""

from dataclasses import replace
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch

import castlm
from castlm.api.quantize import QuantizeOptions, run_quantize
from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.core.nm import NM
from castlm.core.sparsify import prune_
from castlm.export.gguf import _blocks, check_layers
from castlm.formats.rounding import Rounded
from castlm.models.io import load_model
from tests.tiny import TEXT, tiny_model, write_gguf

WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
CALIBRATED = {"calibration": "text.txt", "calibration_sequences": 4, "seq_len": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "source.gguf"
    model = tiny_model("llama", **WIDTHS)
    prune_(model, "2:4")
    write_gguf(file, model)
    return file


@pytest.mark.parametrize(
    ("kind", "rounded_to", "type_of_layers", "text"),
    [
        ("int4", "q4_0", "Q4_0", {}),
        ("int4", "q4_0", "Q4_0", CALIBRATED),
        ("int4", "q4_0", "Q4_0", {**CALIBRATED, "train_steps": 40, "learning_rate": 1e-3}),
        ("int8", "int8", "Q8_0", {}),
    ],
)
def test_the_file_has_the_values_of_the_plain_folder_and_all_else_of_its_source(
    source, tmp_path, monkeypatch, kind, rounded_to, type_of_layers, text
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "out.gguf"
    options = QuantizeOptions(str(source), kind=kind, pattern=NM(2, 4), gguf=str(out), **text)
    run_quantize(options)
    plain = {"kind": rounded_to, "gguf": None, "output_dir": str(tmp_path / "plain"), "save_dtype": "fp32"}
    run_quantize(replace(options, **plain))
    assert not (tmp_path / "out.gguf.partial").exists()

    found = load_model(out, dtype=torch.float32).model.state_dict()
    for name, expected in load_model(tmp_path / "plain").model.state_dict().items():
        assert torch.equal(found[name], expected), name
        if name.endswith("proj.weight"):
            assert NM(2, 4).violations(found[name]) == 0

    before, after = gguf.GGUFReader(source), gguf.GGUFReader(out)
    assert after.fields["general.file_type"].contents() == getattr(gguf.LlamaFileType, f"MOSTLY_{type_of_layers}")
    unlike = {"GGUF.kv_count", "general.file_type"}
    for name in before.fields.keys() - unlike:
        assert after.fields[name].contents() == before.fields[name].contents(), name
    assert after.fields.keys() - before.fields.keys() <= unlike
    assert [tensor.name for tensor in after.tensors] == [tensor.name for tensor in before.tensors]
    for old, new in zip(before.tensors, after.tensors):
        if old.name.startswith("blk.") and len(old.shape) == 2:
            assert new.tensor_type.name == type_of_layers
        else:
            assert new.tensor_type == old.tensor_type
            assert np.array_equal(new.data, old.data), old.name


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--kind", "int3", "--gguf", "x.gguf"], "int3"),
        (["--kind", "int4", "--gguf", "x.bin"], "x.bin"),
        (["--kind", "int4", "--gguf", "taken.gguf"], "taken.gguf"),
        (["--kind", "int4", "--gguf", "x.gguf", "--packed"], "--packed"),
        (["--kind", "int4", "--gguf", "x.gguf", "--output-dir", "x"], "--output-dir"),
        (["--kind", "int4"], "--output-dir"),
    ],
)
def test_what_no_file_can_be_written_for_is_refused(source, tmp_path, monkeypatch, capsys, options, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.gguf").touch()
    assert main(["quantize", str(source), *options]) == 2
    assert named in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["taken.gguf"]


def test_a_folder_the_source_itself_and_layers_without_whole_blocks_are_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "folder")
    with pytest.raises(InputError, match="folder"):
        castlm.quantize(tmp_path / "folder", kind="int4", gguf=str(tmp_path / "x.gguf"))
    write_gguf(tmp_path / "own.gguf", tiny_model("llama", **WIDTHS))
    with pytest.raises(InputError, match=r"own\.gguf"):
        castlm.quantize(tmp_path / "own.gguf", kind="int4", gguf=str(tmp_path / "own.gguf"), overwrite=True)
    for shape, named in (((64, 112), "112"), (None, "odd.gguf")):
        weights = SimpleNamespace(file="odd.gguf", shape=lambda name, shape=shape: shape)
        with pytest.raises(InputError, match=named):
            check_layers(weights, tiny_model("llama"))


def test_scales_that_fp16_rounds_are_counted_and_infinite_ones_refused():
    codes = torch.ones(2, 64, dtype=torch.int8)
    codes[1, 32:] = 0  # a scale without a code has no effect
    tiny = torch.tensor([[2.0**-14 + 2.0**-21], [2.0**-26]]).expand(2, 2)  # below 2^-14 fp16 has steps of 2^-24
    _, errors = _blocks(Rounded("q4_0", codes, tiny))
    assert (errors > 0).tolist() == [[False, False], [True, False]]
    with pytest.raises(InputError, match="7e"):
        _blocks(Rounded("q4_0", codes, torch.tensor([[1.0, 1.0], [7e4, 1.0]])))
