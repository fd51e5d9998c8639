"""Masked units are cut out: configs, logits, families that are refused, and verify against the base."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.core.sparsify import prune_, sparse_linears
from castlm.export.hf import export_model
from castlm.export.verify import verify
from castlm.models.io import load_model
from castlm.patterns import parse_pattern
from castlm.structured.cut import TOLERANCE, check_cut
from castlm.structured.pattern import CHANNELS, HEADS
from tests.runs import edit_json
from tests.slow import slow
from tests.tiny import linear_model, save_tiny, tiny_model, tiny_tokenizer

QUICK = ("llama", "gemma2", "gpt2")
"""Families that `make test` tries."""

IDS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(1))


def exported(model, text, folder):
    """`model` pruned to a pattern and exported."""
    pattern = parse_pattern(text)
    _, left_dense = sparse_linears(model, pattern)
    prune_(model, pattern)
    return export_model(model, tiny_tokenizer(), folder, pattern=pattern, left_dense=left_dense, record={})


@torch.no_grad()
def difference(one, other):
    """The largest difference of the logits, relative to the largest logit."""
    a, b = one(IDS).logits, other(IDS).logits
    return float((a - b).abs().max() / a.abs().max())


CUTS = [("channels", family) for family in sorted(CHANNELS)] + [("heads", family) for family in sorted(HEADS)]


@pytest.mark.parametrize(("kind", "family"), [case if case[1] in QUICK else slow(*case) for case in CUTS])
def test_units_are_cut_out_and_the_folder_loads_as_it_is(kind, family, tmp_path):
    model = linear_model(family)
    facts = exported(model, f"{kind}:0.5", tmp_path / "cut")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    assert facts.num_params == loaded.num_parameters() < model.num_parameters()
    assert difference(model, loaded) <= TOLERANCE
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    if kind == "channels":
        field = CHANNELS[family]
        assert (facts.cut.before, facts.cut.after) == ({field: 64}, {field: 32})
        assert config[field] == getattr(loaded.config, field) == 32
    else:
        assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 8)
        assert loaded.model.layers[0].self_attn.q_proj.weight.shape == (16, 32)


@pytest.mark.parametrize(
    ("family", "text"),
    [
        *[(family, "heads:0.5") for family in ("gpt2", "opt", "olmo2")],
        *[("phi3", "channels:0.5"), ("mixtral", "channels:0.5"), ("mixtral", "channels:0.75+2:4")],
    ],
)
def test_families_without_a_config_for_it_are_refused_by_name(family, text):
    with pytest.raises(InputError, match=f"out of {family}"):
        check_cut(linear_model(family), parse_pattern(text))
    check_cut(linear_model(family), parse_pattern("2:4"))


def test_what_no_config_can_describe_is_refused_before_anything_is_trained():
    model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    with pytest.raises(InputError, match=r"3 of 4 KV heads.*heads:0\.25, heads:0\.5$"):
        check_cut(model, parse_pattern("heads:0.75"))  # 32 channels do not divide by 6 heads
    check_cut(model, parse_pattern("heads:0.5"))
    with pytest.raises(InputError, match="each of the 2 transformer blocks"):
        check_cut(model, parse_pattern("channels:0.5"), lambda module, fqn: "layers.0." in fqn)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense model, and what is left of it at channels:0.5 and heads:0.5."""
    root = tmp_path_factory.mktemp("cut")
    dense = save_tiny(root / "dense")
    for text in ("channels", "heads"):
        exported(load_model(str(dense)).model, f"{text}:0.5", root / text)
    return root


@pytest.mark.parametrize("kind", ["channels", "heads"])
def test_verify_takes_a_base_whose_config_leaves_a_size_to_its_default(kind, folders, tmp_path):
    shutil.copy(folders / "dense" / "config.json", tmp_path)
    edit_json(tmp_path / "config.json", head_dim=None)
    assert main(["verify", str(folders / kind), "--base", str(tmp_path)]) == 0


@pytest.mark.parametrize("kind", ["channels", "heads"])
def test_verify_counts_against_the_base(kind, folders, capsys):
    folder, dense = str(folders / kind), str(folders / "dense")
    report = verify(folder, f"{kind}:0.5", base=dense)
    assert report.ok
    layers = {"channels": 6, "heads": 8}[kind]
    units = {"channels": 64, "heads": 2}[kind]
    assert report.totals()["layers"] == layers
    assert report.totals()["groups"] == layers * units
    assert report.totals()["cut"] == report.totals()["weights"]
    assert main(["verify", folder, "--pattern", f"{kind}:0.5", "--base", dense]) == 0
    assert main(["verify", folder]) == 0  # by its castlm.json
    assert main(["verify", folder, "--pattern", f"{kind}:0.4", "--base", dense]) == (1 if kind == "channels" else 0)
    assert "50.00% of the base's weights" in capsys.readouterr().out


def test_a_model_that_is_not_cut_does_not_have_the_pattern(folders, tmp_path):
    model = load_model(str(folders / "dense")).model
    prune_(model, parse_pattern("channels:0.5"))
    model.save_pretrained(tmp_path / "zeros")
    report = verify(tmp_path / "zeros", "channels:0.5", base=str(folders / "dense"))
    assert not report.ok
    assert report.totals()["violations"] == 6 * 32


def test_verify_refuses_another_base_and_layers_that_were_not_cut_together(folders, tmp_path):
    save_tiny(tmp_path / "other", hidden_size=64)
    folder = folders / "channels"
    with pytest.raises(InputError, match="it is not its base"):
        verify(folder, "channels:0.5", base=str(tmp_path / "other"))
    save_tiny(tmp_path / "wider", intermediate_size=96)
    with pytest.raises(InputError, match=r"intermediate_size 96"):
        verify(folder, "channels:0.5", base=str(tmp_path / "wider"))
    with pytest.raises(InputError, match=r"config\.json"):
        verify(folder, "channels:0.5", base=str(tmp_path))
    with pytest.raises(InputError, match="--base is for patterns"):
        verify(folder, "2:4", base=str(folders / "dense"))
    shutil.copytree(folder, tmp_path / "cut")
    (tmp_path / "cut" / "castlm.json").unlink()
    with pytest.raises(InputError, match="give --base DENSE"):
        verify(tmp_path / "cut", "channels:0.5")
    assert verify(tmp_path / "cut", "channels:0.5", base=str(folders / "dense")).ok
    file = tmp_path / "cut" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, file)
    with pytest.raises(InputError, match=r"config\.json asks for"):
        verify(tmp_path / "cut", "channels:0.5", base=str(folders / "dense"))
