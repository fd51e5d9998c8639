"""`castlm quantize --train-steps`: codes stay, scales come closer to the unrounded model, a kill loses little."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import castlm
from castlm.cli.main import main
from castlm.core.nm import is_nm_sparse
from castlm.core.rounding import ScaledCodes, grid_scale, in_groups
from castlm.export import quantized
from castlm.export.packed import unpack_folder
from castlm.models.io import load_model
from castlm.training import scales
from castlm.training.trainer import Trainer
from tests.refusals import assert_refused
from tests.runs import assert_equal_weights, killed_in, prune_to, record_of
from tests.slow import slow
from tests.tiny import save_tiny

READ = ("--calibration-sequences", "8", "--seq-len", "64")


def command(model, output, text, *more, kind="int3", steps=40, rate="1e-3"):
    """A short run, whose rate suits models that are random."""
    options = ["--kind", kind, "--calibration", text, *READ]
    if steps:
        options += ["--train-steps", str(steps), "--learning-rate", rate]
    return ["quantize", str(model), *options, *([] if output is None else ["--output-dir", str(output)]), *more]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("llama") / "model", "llama")


def layers_of(folder):
    return {name: w for name, w in load_file(folder / "model.safetensors").items() if "proj" in name}


def assert_same_codes(trained, rounded):
    """Each group of 64 columns is that of the rounded weight times one factor; some factors are not 1."""
    factors = []
    for name, weight in trained.items():
        first = in_groups(rounded[name].float(), 64)
        new = in_groups(weight.float(), 64)
        extreme = first.abs().argmax(-1, keepdim=True)
        factor = new.gather(-1, extreme) / first.gather(-1, extreme)
        assert (factor > 0).all()
        torch.testing.assert_close(new, first * factor, rtol=1e-5, atol=1e-7)
        factors.append(factor.flatten())
    assert (torch.cat(factors) != 1).float().mean() > 0.1


def test_scaled_codes_are_codes_times_scales_and_pass_their_gradient():
    torch.manual_seed(0)
    codes = torch.randint(-4, 4, (5, 100)).float()
    codes[:, 0], codes[:, 64] = -4, -4  # so that the scale is the only one that fits
    first = torch.tensor([[0.5, -0.25]] * 5)
    weight = codes * first.repeat_interleave(64, 1)[:, :100]
    layer = ScaledCodes(weight, 3, 64)
    assert torch.equal(layer(weight), weight)
    with torch.no_grad():
        layer.fit_(weight, keep_scales=False)
    assert torch.equal(grid_scale(weight, (-4, 3), 64), first)
    assert torch.equal(layer(weight), weight)
    with torch.no_grad():
        layer.log_scale += 0.3  # by which a rounding to the nearest would move codes
    factor = first.abs().log().add(0.3).exp().bfloat16().float() / first.abs()
    new = layer(weight)
    assert torch.equal(new, codes * (first * factor).repeat_interleave(64, 1)[:, :100])
    found, scale = layer.stored(weight)
    assert torch.equal(found, codes)
    assert torch.equal(scale, first * factor)
    grad = torch.randn_like(weight)
    (new * grad).sum().backward()
    expected = in_groups(grad * new.detach(), 64).sum(-1)
    torch.testing.assert_close(layer.log_scale.grad, expected)


@pytest.mark.parametrize(("kind", "pattern"), [("int3", None), slow("int4", "2:4"), slow("int3", "8:32")])
def test_codes_stay_and_scales_come_closer_to_the_model_before_the_rounding(
    kind, pattern, llama, text, tmp_path, capsys
):
    model = Path(prune_to(tmp_path / "sparse", model=llama, pattern=pattern)) if pattern else llama
    assert main(command(model, tmp_path / "rounded", text, kind=kind, steps=0)) == 0
    assert main(command(model, tmp_path / "trained", text, kind=kind)) == 0
    said = capsys.readouterr().err
    before, after = map(float, said.split("KL divergence ")[1].split(" on")[0].split(" -> "))
    assert after < before
    trained, rounded = layers_of(tmp_path / "trained"), layers_of(tmp_path / "rounded")
    assert_same_codes(trained, rounded)
    others = load_file(model / "model.safetensors")
    for name, weight in load_file(tmp_path / "trained" / "model.safetensors").items():
        assert name in trained or torch.equal(weight, others[name])
    record = record_of(tmp_path / "trained")
    assert record["quantized"]["train_steps"] == 40
    assert record["pattern"] == pattern
    if pattern:
        n, m = map(int, pattern.split(":"))
        assert all(is_nm_sparse(weight, n, m) for weight in trained.values())
    assert not list(tmp_path.glob("*.partial/*"))
    # packed: the same values by codes and scales
    assert main(command(model, tmp_path / "packed", text, "--packed", "--head", "int6", kind=kind)) == 0
    unpack_folder(str(tmp_path / "packed"), tmp_path / "unpacked")
    for name, weight in layers_of(tmp_path / "unpacked").items():
        torch.testing.assert_close(weight.float(), trained[name].float(), rtol=0.01, atol=0)


@pytest.mark.parametrize("family", [slow("mixtral"), slow("gpt2")])
def test_models_that_are_rounded_whole_are_trained_too(family, text, tmp_path):
    model = save_tiny(tmp_path / "model", family)
    assert main(command(model, tmp_path / "out", text, "--packed", kind="int4")) == 0
    unpack_folder(str(tmp_path / "out"), tmp_path / "plain")
    assert main(command(model, tmp_path / "trained", text, kind="int4")) == 0
    found, expected = (load_model(str(tmp_path / name)).model.state_dict() for name in ("plain", "trained"))
    for name, weight in expected.items():
        if "head" not in name and "embed" not in name and "wte" not in name:
            torch.testing.assert_close(found[name].float(), weight.float(), rtol=0.02, atol=1e-6)


def test_a_model_in_memory_is_trained_on_documents_in_memory(llama, text):
    with open(text, encoding="utf-8") as opened:
        documents = opened.read().split("\n\n")
    model = load_model(str(llama)).model
    options = {"calibration_sequences": 4, "seq_len": 32, "train_steps": 2, "learning_rate": 1e-3}
    found = castlm.quantize(model, documents, kind="int4", tokenizer=load_model(str(llama)).tokenizer, **options)
    assert found.facts.quantized.train_steps == 2
    layer = found.model.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(layer, model.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(Trainer, "train_step", 3), slow(quantized, "hessian_of", 1), slow(scales, "held_out_loss", 1)],
)
def test_a_killed_training_continues_to_the_same_bits(owner, name, call, llama, text, tmp_path, monkeypatch):
    monkeypatch.setattr(scales, "SAVE_STEPS", 2)
    packed = ("--packed", "--head", "int6")
    assert main(command(llama, tmp_path / "straight", text, *packed, steps=4, rate="3e-3")) == 0
    killed = command(llama, tmp_path / "killed", text, *packed, steps=4, rate="3e-3")
    with killed_in(owner, name, call):
        main(killed)
    assert not (tmp_path / "killed").exists()
    taken = []
    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self: taken.append(self.step) or step(self))
    assert main(killed) == 0
    assert taken == ([2, 3] if name == "train_step" else [])
    assert_equal_weights(tmp_path / "straight", tmp_path / "killed")


def test_checkpoints_of_other_options_are_refused_by_name_and_overwritten_on_request(
    llama, text, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(scales, "SAVE_STEPS", 1)
    with killed_in(Trainer, "train_step", 3):
        main(command(llama, tmp_path / "out", text, steps=4, rate="3e-3"))
    other = command(llama, tmp_path / "out", text, steps=5, rate="3e-3")
    assert main(other) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "max_steps" in last
    assert "--overwrite" in last
    assert main([*other, "--overwrite"]) == 0


def test_a_kl_that_rises_ends_with_1_and_writes_nothing(llama, text, tmp_path, capsys):
    wild = [*command(llama, tmp_path / "out", text, kind="int4"), "--learning-rate", "0.3"]  # at 3 some diverge
    assert main(wild) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "KL divergence" in last
    assert "--learning-rate" in last
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_trained_is_refused_first(llama, text, tmp_path, capsys, monkeypatch):
    out = ["--output-dir", str(tmp_path / "out")]
    cases = [
        (command(llama, tmp_path / "out", text, kind="int8"), "int8"),
        (["quantize", str(llama), "--kind", "int4", "--train-steps", "3", *out], "calibration"),
    ]
    assert_refused(cases, capsys)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_refused([(command(llama, tmp_path / "out", text), "torchrun")], capsys)


def test_a_text_too_short_to_train_on_is_refused_before_anything_is_rounded(llama, tmp_path, capsys, monkeypatch):
    short = tmp_path / "short.jsonl"
    # enough for the calibration; one is held out, and the other is shorter than a sequence
    short.write_text('{"text": "word word word word word word word word"}\n' * 2, encoding="utf-8")
    monkeypatch.setattr(quantized, "round_blocks", None)
    words = command(llama, tmp_path / "out", str(short))
    assert_refused([(words, str(short))], capsys)
