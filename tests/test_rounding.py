"""Trained rounding: the rounding and its gradients, whole runs of 3-bit weights, and their packed folders."""

import json

import pytest
import torch
from torch import nn

from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.core.rounding import (
    SCALE_RATE,
    add_weight_rounding,
    best_scale,
    fit_rounding_,
    in_groups,
    round_weight,
    rounded_layers,
)
from castlm.core.scaling import add_weight_scaling, fold_weight_scaling
from castlm.core.sparsify import is_sparse_linear
from castlm.evaluation.perplexity import perplexity
from castlm.export.packed import pack_folder, unpack_folder
from castlm.export.verify import verify
from castlm.formats.rounding import on_grid
from castlm.models.io import load_model
from castlm.training.train import train
from castlm_runtime.packed import read_specs
from castlm_runtime.stored import PACKED_SINGLE as FILE
from castlm_runtime.stored import read_header
from tests.packed_weights import needs_kernels
from tests.ranks import run_ranks
from tests.ranks import small as small_on
from tests.refusals import assert_refused
from tests.runs import begin_run, metrics, small, weights
from tests.slow import slow
from tests.tiny import EXPERTS, TEXT, save_tiny

# ---- the rounding


def test_weights_round_to_codes_times_scales_with_one_code_more_on_the_side_of_the_largest():
    weight = torch.tensor([[0.9, -0.1, 5.0, -2.6, -7.0], [-0.9, 0.1, -9.0, 2.6, 7.0]])
    scale = torch.tensor([[1.0], [2.0]])
    found = round_weight(weight, scale.log(), bits=3, group=64)
    assert found.tolist() == [[1, 0, 3, -3, -4], [0, 0, -8, 2, 6]]


def test_gradients_are_those_of_learned_step_size_quantization():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 70, generator=generator, dtype=torch.float64).requires_grad_()
    scale = torch.tensor([[0.5, 0.25], [0.125, 0.5], [1.0, 0.25]], dtype=torch.float64)  # exact in bf16
    log_scale = scale.log().requires_grad_()
    grad = torch.randn(3, 70, generator=generator, dtype=torch.float64)
    round_weight(weight, log_scale, 3, 64).backward(grad)
    for row in range(3):
        for group, columns in enumerate((slice(0, 64), slice(64, 70))):
            w, s, g = weight[row, columns].detach(), scale[row, group], grad[row, columns]
            low, high = (-3, 4) if w.max() >= -w.min() else (-4, 3)
            steps = w / s
            inside = (steps >= low - 0.5) & (steps <= high + 0.5)
            of_scale = torch.where(inside, steps.round() - steps, torch.where(steps > 0, high, low))  # LSQ, Eq. 3
            assert log_scale.grad[row, group] == pytest.approx(float((g * of_scale * s).sum()))
            assert torch.equal(weight.grad[row, columns], g * inside)
    assert (weight.grad == 0).any()  # something was clipped


def test_first_scales_have_the_least_squared_error_of_those_that_put_the_largest_weight_at_an_end():
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    groups = in_groups(weight, 64)
    chosen = best_scale(groups, (-4, 3), at=(-4,)).abs()
    largest = groups.abs().amax(-1)
    for shrink in (1.0, 0.95, 0.9, 0.85, 0.8, 0.7):
        other = (largest * shrink / 4).bfloat16().float()
        errors = [(round_weight(weight, s.log(), 3, 64) - weight).square().sum() for s in (chosen, other)]
        assert errors[0] <= errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_are_found_again_in_stored_weights(dtype):
    generator = torch.Generator().manual_seed(0)
    for kind, low in (("int3", -4), ("int4", -8)):
        codes = torch.randint(low, -low, (400, 150), generator=generator)
        codes *= torch.rand(400, 150, generator=generator) < torch.rand(400, 1, generator=generator)  # up to all zero
        scales = torch.randn(400, 3, generator=generator).bfloat16().float()
        weight = (codes * scales.repeat_interleave(64, 1)[:, :150]).to(dtype)
        found = on_grid(weight, kind)
        assert torch.equal(found.dequantized().to(dtype), weight)
        assert torch.equal(found.scales.bfloat16().float(), found.scales)
        if dtype == torch.float32:
            assert torch.equal(found.dequantized(), weight)


def test_the_fold_leaves_the_rounded_weights_in_plain_layers():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(100, 30)])})
    add_weight_scaling(model)
    assert add_weight_rounding(model, 3) == ["layers.0"]
    model["layers"][0].parametrizations.weight[0].scale.data.uniform_(0.5, 1.5)
    unrounded = model["layers"][0].weight.detach().clone()
    fit_rounding_(model)
    rounded = model["layers"][0].weight.detach().clone()
    assert 0 < (rounded - unrounded).abs().max() < unrounded.abs().max() / 2
    fold_weight_scaling(model)
    assert torch.equal(model["layers"][0].weight, rounded)
    assert list(rounded_layers(model)) == []
    assert on_grid(rounded, "int3").codes.unique().tolist() == list(range(-4, 4))


# ---- runs


def bits_of(run, **over):
    """Packs the model of a run; returns the formats of its tensors."""
    pack_folder(run / "model", run / "packed", head="source", **over)
    return {spec.values for spec in read_specs(read_header(run / "packed" / FILE)).values()}


@needs_kernels
@pytest.mark.parametrize(
    "fields",
    [
        {"method": "dense"},
        {"weight_bits": 4},
        slow({}),
        slow({"method": "dense", "weight_bits": 4}),
        slow({"method": "finetune", "pattern": "3:4"}),
        slow({"method": "srste"}),
        slow({"method": "gradual_magnitude"}),
        slow({"method": "dense", "moments": "8bit", "weight_decay": 0.1}),
        slow({"method": "dense", "save_dtype": "bf16"}),
    ],
)
def test_a_run_of_few_bits_is_packed_to_what_it_evaluated(fields, llama, text, tmp_path):
    config = small(llama, text, tmp_path / "run", **{"weight_bits": 3, **fields})
    kind = f"int{config.method.weight_bits}"
    facts = train(config)
    sparse = config.method.row.is_sparse
    last = metrics(tmp_path / "run")[-1]
    measured = last.get("prune_now_ppl", last["perplexity"])
    assert facts.rounded.kind == kind
    assert facts.rounded.layers > 0
    assert facts.perplexity.dense != facts.perplexity.one_shot
    assert facts.perplexity.final == measured
    pattern = config.model.pattern if sparse else None
    assert bits_of(tmp_path / "run", pattern=pattern) == {kind}
    if sparse:
        assert kind in (tmp_path / "run" / "model" / "README.md").read_text()
        assert verify(tmp_path / "run" / "packed", config.model.pattern).ok
    unpack_folder(tmp_path / "run" / "packed", tmp_path / "unpacked")
    pack_folder(tmp_path / "unpacked", tmp_path / "repacked", pattern, head="source")
    assert (tmp_path / "repacked" / FILE).read_bytes() == (tmp_path / "run" / "packed" / FILE).read_bytes()
    held_out = begin_run(config.changed(output_dir=str(tmp_path / "again"))).text.held_out
    plain, packed = (load_model(str(folder)) for folder in (tmp_path / "unpacked", tmp_path / "run" / "packed"))
    assert perplexity(plain.model, held_out, seq_len=32).perplexity == pytest.approx(measured, rel=2e-3)
    ids = torch.tensor([packed.tokenizer(TEXT)["input_ids"][:40]])
    with torch.no_grad():
        one, other = packed.model(input_ids=ids).logits, plain.model(input_ids=ids).logits
    assert float((one - other).abs().max() / other.abs().max()) < 0.02  # activations are rounded to int8


def test_bits_a_weight_are_those_of_the_packed_file(llama, text, tmp_path):
    facts = train(small(llama, text, tmp_path / "run", weight_bits=3, method="dense", max_steps=1))
    pack_folder(tmp_path / "run" / "model", tmp_path / "packed", None, head="source")
    stored = read_header(tmp_path / "packed" / FILE)
    stems = {name.removesuffix(".values") for name in stored if name.endswith(".values")}
    bits = 8 * sum(tensor.num_bytes for name, tensor in stored.items() if name.rpartition(".")[0] in stems)
    model = load_model(llama).model
    total = sum(m.weight.numel() for name, m in model.named_modules() if is_sparse_linear(m, name))
    assert facts.rounded.bits_per_weight == pytest.approx(bits / total)
    assert facts.rounded.layers == len(stems)


def test_scales_have_one_learning_rate_whatever_that_of_the_weights_is(llama, text, tmp_path):
    for rate in (1e-3, 1e-5):
        run = begin_run(small(llama, text, tmp_path / str(rate), weight_bits=4, learning_rate=rate))
        run.train_step()
        rates = {}
        for group in run.optimizer.param_groups:
            for name in group["param_names"]:
                rates.setdefault(name.endswith("log_scale"), set()).add(group["lr"])
        at_first = run.config.optimizer.learning_rate_at(0)
        assert rates[False] == {at_first}
        assert list(rates[True]) == [pytest.approx(at_first / rate * SCALE_RATE)]


@pytest.mark.parametrize(
    ("fields", "share"),
    [({"method": "dense"}, 0.99), ({}, 0.99), slow({"precision": "bf16"}, 0.5), slow({"sharding": "replicate"}, 0.99)],
)
def test_two_ranks_train_the_weights_of_one(fields, share, gemma, text, tmp_path):
    """A sum in another order may turn the rounding of a weight that lies between two codes, and in bf16 that of the
    scale of a whole group.
    """
    for ranks in (1, 2):
        of_one = {name: value for name, value in fields.items() if name != "sharding"} if ranks == 1 else fields
        config = small_on(gemma, text, tmp_path / str(ranks), ranks, weight_bits=3, **of_one)
        run_ranks(train, ranks, config, folder=tmp_path)
    one, other = (weights(tmp_path / str(ranks) / "model") for ranks in (1, 2))
    equal = [(one[name] - other[name]).abs() <= 1e-6 for name in one]
    assert sum(int(e.sum()) for e in equal) > share * sum(e.numel() for e in equal)
    rows = [metrics(tmp_path / str(ranks))[-1] for ranks in (1, 2)]
    assert rows[0]["perplexity"] == pytest.approx(rows[1]["perplexity"], rel=2e-3)
    sparse = config.method.row.is_sparse
    assert bits_of(tmp_path / "2", **({} if sparse else {"pattern": None})) == {"int3"}


@needs_kernels
@pytest.mark.parametrize("family", [slow(family) for family in EXPERTS[:1]])
def test_experts_of_three_bits(family, text, tmp_path):
    model = save_tiny(tmp_path / "dense", family)
    train(small(str(model), text, tmp_path / "run", weight_bits=3, method="dense", max_steps=2))
    assert bits_of(tmp_path / "run", pattern=None) == {"int3"}


def test_what_three_bits_are_not_for(llama, text, tmp_path, capsys):
    command = ["train", "--model", llama, "--dataset", text, "--output-dir", str(tmp_path / "run"), "--weight-bits"]
    assert_refused(
        [
            ([*command, "5"], "--weight-bits"),
            ([*command, "3", "--pattern", "channels:0.5"], "channels:0.5"),
        ],
        capsys,
    )
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="adapter shira"):
        small(llama, text, tmp_path / "run", method="finetune", init_from=llama, adapter="shira", weight_bits=3)


def test_a_folder_that_is_not_of_three_bits_is_refused_where_it_says_so(llama, text, tmp_path, capsys):
    train(small(llama, text, tmp_path / "run", weight_bits=3, method="dense", max_steps=1))
    again = ["quantize", str(tmp_path / "run"), "--output-dir", str(tmp_path / "out")]
    assert_refused([(again, "castlm pack")], capsys)
    record = json.loads((tmp_path / "run" / "model" / "castlm.json").read_text())
    changed = save_tiny(tmp_path / "changed", "llama")
    for rounded in ({"kind": "int3"}, {"kind": "int9"}, {"kind": "fp8"}, {"kind": [3]}, {"bits": 3}, "int3"):
        (changed / "castlm.json").write_text(json.dumps({**record, "rounded": rounded}))
        named = "int3" if rounded == {"kind": "int3"} else "castlm.json: rounded"
        command = ["pack", str(changed), "--head", "source", "--output-dir", str(tmp_path / "out")]
        assert_refused([(command, named)], capsys)
    assert main(["pack", str(tmp_path / "run"), "--output-dir", str(tmp_path / "out")]) == 0
