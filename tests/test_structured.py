"""Channels, heads and their combinations with n:m: grammar, masks, AdamS, scores, runs, and several ranks."""

import itertools

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from castlm.cli.main import main
from castlm.core.adams import AdamS
from castlm.core.decay import DECAYS
from castlm.core.errors import InputError
from castlm.core.nm import NM
from castlm.core.sparsify import prune_, sparse_linears, sparse_param_groups
from castlm.data.calibration import CalibrationText
from castlm.distributed.world import close_world, init_world
from castlm.export.verify import verify
from castlm.models.io import load_model
from castlm.oneshot.options import Refinements
from castlm.patterns import parse_pattern
from castlm.starts import prune_oneshot_
from castlm.structured.pattern import Channels
from castlm.structured.prune_units import loss_gradients, solve_columns
from castlm.structured.scores import SCORES
from castlm.training.config import TrainConfig
from castlm.training.train import train
from tests.fused import needs_kernels
from tests.ranks import assert_pruned_alike, masks_after_steps, run_ranks
from tests.ranks import small as small_on_ranks
from tests.runs import assert_same_runs_but_for_sums, record_of, small, train_until
from tests.slow import slow
from tests.tiny import VOCAB_SIZE, save_tiny, tiny_model

TEXTS = ("channels:0.5", "heads:0.5", "channels:0.75+2:4", "heads:0.5+2:4")


def stepped(model, text, steps=10, seed=0, **options):
    """A model after some steps of AdamS with random gradients, and the optimizer."""
    torch.manual_seed(seed)
    groups = sparse_param_groups(model, parse_pattern(text))
    optimizer = AdamS(groups, lr=0.05, total_steps=steps, mask_interval=3, **{"decay_end": 0.5, **options})
    for _ in range(steps):
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
    return optimizer


def test_the_text_of_a_pattern_parses_back():
    for text in TEXTS:
        assert str(parse_pattern(text)) == text
        assert parse_pattern(str(parse_pattern(text))) == parse_pattern(text)
    assert parse_pattern("channels:.25") == Channels(0.25)
    assert parse_pattern("channels:0.75+2:4") == Channels(0.75, NM(2, 4))


NO_PATTERNS = (
    *("channels", "channels:", "channels:1", "channels:1.5", "channels:-0.5", "channels:0.0", "channels:0.5:1"),
    *("heads:half", "heads:0.5 ", "blocks:32x32:0.5"),
    *("channels:0.5+", "channels:0.5+heads:0.5", "2:4+channels:0.5", "channels:0.5+4:2", "channels:0.5+2:4+2:4"),
    *("channels:0.50000", "channels:\u0660.5", "channels:5e-1", "channels:nan"),
)


@pytest.mark.parametrize("text", NO_PATTERNS)
def test_other_texts_are_refused_in_one_line(text):
    with pytest.raises(InputError) as raised:
        parse_pattern(text)
    assert "\n" not in str(raised.value)


def test_a_kv_head_is_masked_with_its_query_heads():
    model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=4)
    pattern = parse_pattern("heads:0.25").for_model(model)
    attention = model.model.layers[0].self_attn
    q, k, v, o = (attention.get_submodule(f"{name}_proj").weight for name in "qkvo")  # 8 heads of 8, 4 KV heads
    with torch.no_grad():
        v[16:24] *= 100  # KV head 2, which query heads 4 and 5 read
    masks = pattern.joint_masks([q, k, v, o])
    kept_q = torch.zeros(64, dtype=torch.bool)
    kept_q[32:48] = True
    kept_kv = torch.zeros(32, dtype=torch.bool)
    kept_kv[16:24] = True
    assert torch.equal(masks[0], kept_q[:, None].expand_as(q))
    assert torch.equal(masks[1], kept_kv[:, None].expand_as(k))
    assert torch.equal(masks[2], kept_kv[:, None].expand_as(v))
    assert torch.equal(masks[3], kept_q.expand_as(o))


@pytest.mark.parametrize("text", TEXTS)
def test_pruned_weights_have_no_violation_and_the_dense_ones_have(text):
    model = tiny_model("llama")
    pattern = parse_pattern(text).for_model(model)
    layers, dense = sparse_linears(model, parse_pattern(text))

    def violations():
        return [
            pattern.joint_violations([layers[name].weight for name in unit]) for unit in pattern.joint_layers(layers)
        ]

    assert min(violations()) > 0
    assert sorted(prune_(model, parse_pattern(text))) == sorted(layers)
    assert max(violations()) == 0
    assert any(name.startswith("model.layers") for name in dense) == (text in ("channels:0.5", "heads:0.5"))


@pytest.mark.parametrize("text", TEXTS)
def test_adams_leaves_nothing_of_a_masked_unit(text):
    model = tiny_model("llama")
    optimizer = stepped(model, text)
    pattern = optimizer.param_groups[0]["pattern"]
    layers, _ = sparse_linears(model, parse_pattern(text))
    assert optimizer.flips() >= 0
    for unit in pattern.joint_layers(layers):
        weights = [layers[name].weight for name in unit]
        assert pattern.joint_violations(weights) == 0
        assert pattern.joint_violations([optimizer.mask(weight) for weight in weights]) == 0
    optimizer.load_state_dict(optimizer.state_dict())


@needs_kernels
@pytest.mark.parametrize(("text", "decay"), [*itertools.product(("channels:0.5", "heads:0.5+2:4"), DECAYS)])
def test_every_decay_runs_fused_with_the_result_of_the_operators(text, decay):
    models = [tiny_model("llama"), tiny_model("llama")]
    options = {"decay": decay, "lam": 0.0 if decay in ("horizon", "none") else 1e-2}
    one, other = (stepped(model, text, fused=fused, **options) for model, fused in zip(models, (None, False)))
    for a, b in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(one.sparse_params(), other.sparse_params()):
        assert torch.equal(one.mask(a), other.mask(b))


def test_masks_that_part_a_unit_are_refused_in_a_saved_state_and_by_prune_which_changes_nothing():
    model = tiny_model("llama")
    optimizer = AdamS(sparse_param_groups(model, parse_pattern("channels:0.5")), total_steps=10)
    masks = optimizer.masks()
    first = next(iter(masks))
    masks[first] = torch.ones_like(masks[first])
    before = first.detach().clone()
    with pytest.raises(InputError, match=r"channels:0\.5"):
        prune_(model, parse_pattern("channels:0.5"), masks=masks)
    assert torch.equal(before, first)
    saved = optimizer.state_dict()
    saved["state"][0]["mask"].fill_(255)
    with pytest.raises(InputError, match=r"channels:0\.5"):
        optimizer.load_state_dict(saved)


def test_layers_that_are_no_unit_or_have_lost_a_part_of_theirs_stay_dense():
    model = tiny_model("llama")

    def not_down_0(module, fqn):
        return isinstance(module, nn.Linear) and "layers" in fqn and "layers.0.mlp.down" not in fqn

    layers, dense = sparse_linears(model, parse_pattern("channels:0.5"), not_down_0)
    assert sorted(layers) == [f"model.layers.1.mlp.{part}_proj" for part in ("down", "gate", "up")]
    assert dense["model.layers.0.mlp.gate_proj"] == Channels.outside
    assert dense["model.layers.0.self_attn.q_proj"] == Channels.outside


def test_heads_without_q_k_and_v_of_their_own_are_refused():
    with pytest.raises(InputError, match="GPT2LMHeadModel"):
        sparse_linears(tiny_model("gpt2"), parse_pattern("heads:0.5"))
    with pytest.raises(AssertionError, match="call for_model"):
        parse_pattern("heads:0.5").joint_masks([torch.ones(8, 8)] * 4)


def test_shares_that_keep_all_or_nothing_and_nan_are_refused():
    with pytest.raises(InputError, match="keeps none of 2 units"):
        stepped(tiny_model("llama"), "heads:0.2", steps=1)
    with pytest.raises(InputError, match="keeps all of 4 units"):
        Channels(0.9).num_kept(4)
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="contains NaN"):
        prune_(model, parse_pattern("channels:0.5"))
    with pytest.raises(InputError, match="holds NaN or infinity"):
        prune_oneshot_(model, "magnitude", pattern=parse_pattern("channels:0.5"))
    with pytest.raises(InputError, match="flap needs a calibration text"):
        prune_oneshot_(model, "flap", pattern=parse_pattern("channels:0.5"))


# ---- scores of units, and least squares on the rest


TOKENS = torch.randint(0, VOCAB_SIZE, (8, 32), generator=torch.Generator().manual_seed(0))
NO_REFIT = Refinements(refit_iterations=0)


def mlp_inputs(model):
    """The input of down_proj in block 0, (tokens, channels)."""
    seen = []
    hook = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(TOKENS)
    hook.remove()
    return seen[0].flatten(0, 1)


def expected(score, model):
    """The score of each channel of block 0."""
    mlp = model.model.layers[0].mlp
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    if score == "magnitude":
        return gate.square().sum(1) + up.square().sum(1) + down.square().sum(0)
    if score == "taylor":
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        parts = [(w * w.grad).abs() for w in (gate, up, down)]
        return parts[0].sum(1) + parts[1].sum(1) + parts[2].sum(0)
    x = mlp_inputs(model)
    return x.var(0, correction=0) * down.square().sum(0)


def kept_channels(model, block=0):
    return model.model.layers[block].mlp.down_proj.weight.ne(0).any(0)


@pytest.mark.parametrize("score", SCORES)
def test_the_channels_with_the_highest_score_stay(score):
    model = tiny_model("llama")
    best = expected(score, tiny_model("llama")).argsort(descending=True)[:32]
    prune_oneshot_(model, score, pattern=parse_pattern("channels:0.5"), calibration=TOKENS, refinements=NO_REFIT)
    assert kept_channels(model).nonzero().flatten().tolist() == sorted(best.tolist())


def test_kept_columns_are_the_least_squares_solution():
    torch.manual_seed(0)
    x, weight = torch.randn(100, 12), torch.randn(5, 12)
    kept = torch.arange(12) % 3 > 0
    new = solve_columns(weight, kept, x.T @ x, damping=0.0)
    solution = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    torch.testing.assert_close(new, solution, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("text", [slow("channels:0.5"), "heads:0.5", "channels:0.75+2:4", slow("heads:0.5+2:4")])
@pytest.mark.parametrize("score", ["flap", "taylor"])
def test_every_pattern_is_pruned_and_least_squares_lower_the_error(text, score):
    errors = []
    for refinements in (NO_REFIT, Refinements()):
        model = tiny_model("llama")
        pattern = parse_pattern(text).for_model(model)
        report = prune_oneshot_(model, score, pattern=parse_pattern(text), calibration=TOKENS, refinements=refinements)
        layers, _ = sparse_linears(model, parse_pattern(text))
        for unit in pattern.joint_layers(layers):
            assert pattern.joint_violations([layers[name].weight for name in unit]) == 0
        errors.append(sum(layer.error for layer in report.layers if ".layers.0." in layer.name))
        assert {layer.name for layer in report.layers} == set(layers)
    assert 0 < errors[1] < errors[0]


def test_gradients_are_those_of_a_plain_backward_pass_that_runs_each_block_again():
    model, plain = tiny_model("llama"), tiny_model("llama")
    layers, _ = sparse_linears(model, parse_pattern("channels:0.5"))
    calls = []
    hook = next(iter(layers.values())).register_forward_pre_hook(lambda *_: calls.append(1))
    found = loss_gradients(model, layers, CalibrationText(TOKENS))
    hook.remove()
    assert len(calls) == 2
    plain(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(torch.equal(found[name], plain.get_submodule(name).weight.grad) for name in layers)
    assert all("forward" not in vars(block) for block in model.model.layers)


@pytest.fixture
def prune(llama, text):
    """`castlm prune` of a tiny LLaMA; gives the exit code."""
    command = ["prune", "--model", llama, "--calibration", text, "--num-sequences", "4", "--seq-len", "32"]
    return lambda out, *arguments: main([*command, "--output-dir", str(out), *arguments])


def test_castlm_prune_cuts_and_records_the_score_and_leaves_nothing_to_quantize(prune, llama, tmp_path, capsys):
    assert prune(tmp_path / "out", "--pattern", "channels:0.5") == 0
    record = record_of(tmp_path / "out")
    assert (record["method"], record["pattern"]) == ("flap", "channels:0.5")
    assert record["cut"]["after"] == {"intermediate_size": 32}
    assert main(["verify", str(tmp_path / "out"), "--base", llama]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`intermediate_size` from 64 to 32" in card
    assert "it needs no kernels of its own" in card
    capsys.readouterr()
    assert main(["quantize", str(tmp_path / "out"), "--output-dir", str(tmp_path / "no")]) == 2
    assert "which has no n:m to keep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--pattern", "channels:0.5", "--method", "sparsegpt"], "sparsegpt"),
        (["--pattern", "2:4", "--method", "flap"], "'flap'"),
        (["--reconstruct-epochs", "1", "--num-sequences", "1"], "reconstruct_epochs"),
        (["--pattern", "heads:0.9"], "all of 2 units"),
        (["--pattern", "channels:0.5", "--mask-iterations", "4"], "--mask-iterations = 4"),
    ],
)
def test_castlm_prune_refuses_what_does_not_fit_a_pattern_before_any_work(arguments, named, prune, tmp_path, capsys):
    assert prune(tmp_path / "no", *arguments) == 2
    said = capsys.readouterr().err
    assert named in said
    assert "rotated" not in said  # no work was done before
    assert not (tmp_path / "no").exists()


def test_plans_know_the_patterns_or_refuse_them(llama, capsys):
    memory = ["plan", "memory", "--model", llama, "--seq-len", "32", "--pattern"]
    assert main([*memory, "channels:0.5"]) == 0
    assert main([*memory, "channels:0.999"]) == 2
    assert "keeps all of 64 units" in capsys.readouterr().err


# ---- runs of castlm train


@pytest.mark.parametrize(
    "fields",
    [
        slow({"pattern": "channels:0.5"}),
        slow({"pattern": "heads:0.5", "init_from": "magnitude"}),
        {"pattern": "channels:0.75+2:4", "init_from": "flap"},
        slow({"pattern": "channels:0.5", "method": "finetune"}),
        {"pattern": "heads:0.5+2:4", "method": "ste"},
        *(
            slow({"pattern": "channels:0.5", "decay": decay, "lam": 1.0, "ignore_decay_budget": True})
            for decay in DECAYS
        ),
    ],
)
def test_a_run_ends_in_a_verified_model(fields, llama, text, tmp_path):
    facts = train(small(llama, text, tmp_path / "run", max_steps=4, eval_steps=4, **fields))
    folder = tmp_path / "run" / "model"
    assert verify(folder, fields["pattern"]).ok
    assert facts.pattern == fields["pattern"]
    # measured before the cut, and after it from the disk
    assert facts.perplexity.pruned == pytest.approx(facts.proof.perplexity_from_disk, rel=1e-5)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert facts.cut.logits_moved <= 1e-4
    assert facts.num_params == model.num_parameters() < load_model(llama).model.num_parameters()
    if "method" not in fields:
        assert (facts.mask.largest_masked == 0) == (fields.get("decay", "horizon") == "horizon")


def test_a_run_may_start_from_a_model_whose_units_are_zero(llama, text, tmp_path):
    pattern = parse_pattern("channels:0.5")
    model = load_model(llama).model
    prune_(model, pattern)
    model.save_pretrained(tmp_path / "zeros")
    load_model(llama).tokenizer.save_pretrained(tmp_path / "zeros")
    config = small(
        llama, text, tmp_path / "run", max_steps=2, pattern="channels:0.5", init_from=str(tmp_path / "zeros")
    )
    train(config.changed(learning_rate=1e-9))
    small_model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    kept = model.model.layers[0].mlp.down_proj.weight.ne(0).any(0)
    expected = model.model.layers[0].mlp.down_proj.weight[:, kept]
    torch.testing.assert_close(small_model.model.layers[0].mlp.down_proj.weight, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match=r"is not heads:0\.5 in"):
        train(config.changed(pattern="heads:0.5", output_dir=str(tmp_path / "other")))


def test_runs_that_could_not_be_exported_are_refused_before_they_train(llama, text, tmp_path):
    opt = str(save_tiny(tmp_path / "opt", "opt"))
    for model, fields, reason in (
        (opt, {"pattern": "heads:0.5"}, "cannot cut heads out of opt"),
        (llama, {"pattern": "channels:0.5", "left_dense": ("layers.1.mlp.up",)}, "each of the 2 transformer blocks"),
        (llama, {"pattern": "channels:0.5", "init_from": "sparsegpt"}, "neither one of magnitude, flap"),
        (llama, {"pattern": "channels:0.5", "rotate": "values", "init_from": "flap"}, "use rotate auto"),
        (llama, {"pattern": "heads:0.9"}, "keeps all of 2 units"),
    ):
        with pytest.raises(InputError, match=reason):
            train(small(model, text, tmp_path / "run", **fields))
        assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_the_default_start_of_structured_patterns_is_calibrated():
    config = TrainConfig.of("model", "text", "run", pattern="channels:0.5", calibration_sequences=8)
    assert config.start.init_from == "flap"
    starts = {"heads:0.5": "taylor", "2:4": "sparsegpt"}
    assert {text: config.changed(pattern=text).start.init_from for text in starts} == starts
    assert config.without_effect() == {}
    methods = {"finetune": "flap", "srste": "magnitude"}
    assert {name: config.changed(method=name).start.init_from for name in methods} == methods


# ---- several ranks


def train_on_dtensors(text: str) -> None:
    """AdamS and prune_ on row shards, bit for bit as on the whole weights."""
    world = init_world("cpu", "full")
    plain, sharded = tiny_model("llama"), tiny_model("llama")
    for layer in [module for module in sharded.modules() if isinstance(module, nn.Linear | nn.Embedding)]:
        fully_shard(layer, mesh=world.mesh)
    fully_shard(sharded, mesh=world.mesh)
    optimizers = [
        AdamS(sparse_param_groups(model, parse_pattern(text)), lr=1e-2, total_steps=8, mask_interval=2, decay_end=1.0)
        for model in (plain, sharded)
    ]
    one, other = masks_after_steps(plain, sharded, optimizers, world.mesh, 5)
    flips = world.sum(torch.tensor(float(optimizers[1].flips())))
    assert int(flips) == optimizers[0].flips()
    optimizers[1].load_state_dict(optimizers[1].state_dict())
    assert_pruned_alike(plain, sharded, (one, other), text)
    close_world(world)


@pytest.mark.parametrize("text", ["channels:0.5", slow("heads:0.5+2:4")])
def test_adams_on_shards_is_adams_on_whole_weights(text, tmp_path):
    run_ranks(train_on_dtensors, 3, text, folder=tmp_path)


@pytest.mark.parametrize(
    ("fields", "ranks"),
    [
        slow({"pattern": "channels:0.5", "init_from": "magnitude"}, 3),
        slow({"pattern": "heads:0.5", "init_from": "flap", "method": "finetune"}, 1),
        ({"pattern": "channels:0.5", "init_from": "taylor"}, 1),
    ],
)
def test_ranks_are_one_rank_and_a_run_is_resumed_on_another_number(fields, ranks, gemma, text, tmp_path):
    train(small_on_ranks(gemma, text, tmp_path / "one", 1, **fields))
    two = small_on_ranks(gemma, text, tmp_path / "two", 2, save_steps=4, **fields)
    run_ranks(train_until, 2, two, 4, folder=tmp_path)
    others = small_on_ranks(gemma, text, tmp_path / "two", ranks, save_steps=4, resume=True, **fields)
    if ranks == 1:
        train(others)
    else:
        run_ranks(train, ranks, others, folder=tmp_path)
    assert verify(tmp_path / "two" / "model", fields["pattern"]).ok
    assert_same_runs_but_for_sums(tmp_path / "one" / "model", tmp_path / "two" / "model")
