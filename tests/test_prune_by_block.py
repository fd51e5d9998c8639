"""A prune gives the same result with one block or the whole model in memory, after a kill at any moment too."""

import weakref
from pathlib import Path

import pytest
import torch

from castlm.cli import prune as command
from castlm.core.errors import InputError
from castlm.export import pruned as prune_module
from castlm.oneshot import basis as basis_module
from castlm.oneshot.folder import HiddenStates, StartFolder
from castlm.oneshot.source import StoredModel
from castlm.oneshot.steps import solve as solve_module
from tests.runs import assert_equal_weights, edit_weights, killed_in, record_of, weights
from tests.slow import slow
from tests.tiny import save_tiny, tiny_model

PLAIN = ["--rotate", "off", "--no-permute"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=3)


def prune(model, text: str, output: Path, *options: str, memory: str = "block") -> Path:
    arguments = ["--model", str(model), "--output-dir", str(output), "--memory", memory]
    if "magnitude" not in options:
        arguments += [
            "--calibration",
            text,
            "--calibration-sequences",
            "19",
            "--seq-len",
            "64",
        ]  # passes of 10 and of 9
    assert command.main([*arguments, *options]) == 0
    return output


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *(slow(family, torch.float32) for family in ("llama", "gemma", "opt")),
        ("gpt2", torch.float32),
        slow("llama", torch.bfloat16),
        ("qwen3_moe", torch.float32),
        *(slow(family, torch.bfloat16) for family in ("mixtral", "gpt_oss", "qwen2_moe")),
    ],
)
def test_the_result_is_that_of_the_whole_model_bit_for_bit(tmp_path, text, family, dtype):
    model = save_tiny(tmp_path / "dense", family)
    tiny_model(family).to(dtype).save_pretrained(model)
    whole = prune(model, text, tmp_path / "whole", memory="model")
    assert {tensor.dtype for tensor in weights(whole).values()} == {dtype}
    assert_equal_weights(whole, prune(model, text, tmp_path / "block"))
    assert not (tmp_path / "block.partial").exists()


@pytest.mark.parametrize(
    "options",
    [
        slow(PLAIN),
        ["--solver", "wanda"],
        slow(["--solver", "magnitude"]),
        slow(["--start-effort", "published"]),
        slow(["--precision", "bf16"]),
        ["--reconstruct-epochs", "2"],
    ],
)
def test_each_method_gives_what_it_gives_with_the_whole_model(llama, tmp_path, text, options):
    whole = prune(llama, text, tmp_path / "whole", *options, memory="model")
    assert_equal_weights(whole, prune(llama, text, tmp_path / "block", *options))
    assert not (tmp_path / "block.partial").exists()


def test_only_the_statistics_that_are_solved_next_are_held(llama, tmp_path, text, monkeypatch):
    """Those of the other inputs, which chose the basis, are gone when the first layers are solved."""
    see, solve, seen = solve_module.see_inputs, solve_module.prune_layers, []

    def see_inputs(*args):
        found = see(*args)
        seen.extend(weakref.ref(entry.statistic) for entry in found)
        return found

    def prune_layers(*args):
        assert sum(reference() is not None for reference in seen) <= 1
        return solve(*args)

    for module in (basis_module, solve_module):
        monkeypatch.setattr(module, "see_inputs", see_inputs)
    monkeypatch.setattr(solve_module, "prune_layers", prune_layers)
    prune(llama, text, tmp_path / "out")
    assert len(seen) == 3 * (4 + 3)  # in each block all inputs, then again those of o, of gate and up, and of down


MOMENTS = {
    "before the record": (StartFolder, "record"),
    "behind the record": (HiddenStates, "move_on"),
    "before a block is written": (StartFolder, "write_block"),
    "behind a block's file": (HiddenStates, "flush"),
    "while the hidden states are written": (HiddenStates, "__setitem__"),
    "while the text enters": (HiddenStates, "insert"),
    "while a block is read": (StoredModel, "_stored"),
    "before the export": (prune_module, "export_blocks"),
}
QUICK = ("behind a block's file", "before the export")


@pytest.fixture(scope="module")
def straight(llama, text, tmp_path_factory) -> Path:
    return prune(llama, text, tmp_path_factory.mktemp("straight") / "out")


@pytest.mark.parametrize(
    ("moment", "call"),
    [(moment, 1) for moment in QUICK]
    + [slow(moment, 1) for moment in MOMENTS if moment not in QUICK]
    + [slow(moment, 2) for moment in MOMENTS if moment not in ("before the export", "while the text enters")],
)
def test_a_prune_killed_at_any_moment_goes_on_to_the_same_result(llama, straight, tmp_path, text, moment, call):
    with killed_in(*MOMENTS[moment], call):
        prune(llama, text, tmp_path / "killed")
    assert_equal_weights(straight, prune(llama, text, tmp_path / "killed"))
    assert record_of(straight)["basis"]["changes"] == record_of(tmp_path / "killed")["basis"]["changes"]


def unfinished(llama, tmp_path, text, *options: str) -> Path:
    with killed_in(HiddenStates, "move_on"):
        prune(llama, text, tmp_path / "out", *options)
    return tmp_path / "out.partial"


@pytest.mark.parametrize("damage", [False, slow(True)])
def test_overwrite_starts_again_with_other_options_or_a_damaged_record(damage, llama, straight, tmp_path, text):
    """Nothing is read of the earlier start, which followed the dense model over more text, in passes of 11 and 10."""
    options = ("--reconstruct-epochs", "1", "--calibration-sequences", "21", "--overwrite")
    partial = unfinished(llama, tmp_path, text, *options)
    (partial / "notes.txt").write_text("mine")
    if damage:
        (partial / "progress.json").write_text("{")
    assert_equal_weights(straight, prune(llama, text, tmp_path / "out", "--overwrite"))
    assert [path.name for path in partial.iterdir()] == ["notes.txt"]


def test_a_damaged_file_of_an_unfinished_prune_is_named(llama, straight, tmp_path, text):
    partial = unfinished(llama, tmp_path, text)
    for name in ("progress.json", "block-00000.safetensors", "hidden-00001-0.bin"):
        content = (partial / name).read_bytes()
        changed = content.replace(b'"results"', b'"other"') if name == "progress.json" else content[:-1] + b"\xff"
        for damaged in (content[:-9], changed):
            (partial / name).write_bytes(damaged)
            with pytest.raises(InputError, match=rf"{name} is (missing or damaged|damaged|not readable)"):
                prune(llama, text, tmp_path / "out")
        (partial / name).write_bytes(content)
    (partial / "hidden-00001-0.bin").unlink()
    with pytest.raises(InputError, match="missing or damaged"):
        prune(llama, text, tmp_path / "out")
    assert_equal_weights(straight, prune(llama, text, tmp_path / "out", "--overwrite"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--damping", "2"], "damping = 2.0 is out of range"),
        (["--seq-len", "300"], "300"),
        (["--solver", "flap"], "flap"),
        (
            ["--solver", "magnitude", "--calibration", "text.txt"],
            "--calibration = text.txt has an effect only with a solver that reads a text",
        ),
    ],
)
def test_a_prune_that_is_refused_leaves_nothing_beside_its_output(llama, tmp_path, text, options, message):
    with pytest.raises(InputError, match=message):
        prune(llama, text, tmp_path / "out", *options)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite_is_named(tmp_path, text, name):
    model = save_tiny(tmp_path / "dense", "llama")
    edit_weights(model, lambda w: w[name].view(-1)[0].fill_(float("nan")))
    with pytest.raises(InputError, match=rf"{name} of .* holds NaN"):
        prune(model, text, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()  # it is found before all work


@pytest.mark.parametrize("memory", ["block", "model"])
def test_a_bad_index_is_named_in_one_line(tmp_path, text, memory):
    model = save_tiny(tmp_path / "dense", "llama")
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    gone = '"weight_map": {"a": "gone.safetensors"}'
    indexes = {
        "[]": "object",
        '{"weight_map": 3}': "weight_map",
        f"{{{gone}}}": "lacks 'metadata'",
        f'{{"metadata": {{}}, {gone}}}': "missing files",
    }
    for index, message in indexes.items():
        (model / "model.safetensors.index.json").write_text(index)
        with pytest.raises(InputError, match=rf"model\.safetensors\.index\.json.*{message}"):
            prune(model, text, tmp_path / "out", memory=memory)


def test_a_folder_of_the_user_named_as_an_unfinished_prune_changes_nothing(llama, tmp_path, text):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("mine")
    with pytest.raises(InputError, match=r"out\.partial"):
        prune(llama, text, tmp_path / "out", memory="auto")
    assert (tmp_path / "out.partial" / "mine").read_text() == "mine"


def test_a_block_is_held_where_the_model_does_not_fit(llama, tmp_path, text, monkeypatch, capsys):
    monkeypatch.setattr("castlm.export.pruned.available_memory", lambda device: 1000.0)
    prune(llama, text, tmp_path / "out", memory="auto")
    assert "one transformer block at a time is in memory" in capsys.readouterr().err
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 4


def test_a_block_is_held_where_the_model_does_not_fit_on_the_gpu(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 2000))
    for device, memory in (("cpu", "model"), ("cuda", "block")):
        assert prune_module.choose_memory(str(llama), None, tmp_path / "out", device) == memory
