"""3-D experts are sparse weights like any other: the same masks, steps, scales, counts and files as single matrices."""

import copy
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from castlm.cli.main import main
from castlm.core.adams import AdamS
from castlm.core.blocks import is_block_linear, is_router, owners_of_experts
from castlm.core.decay import DECAYS
from castlm.core.errors import InputError
from castlm.core.experts import linearize_experts_
from castlm.core.nm import is_nm_sparse, nm_mask
from castlm.core.scaling import add_weight_scaling, fold_weight_scaling
from castlm.core.sparsify import is_sparse_linear, prune_, sparse_linears, sparse_param_groups, weight_parameter
from castlm.export.folder import StoredUse
from castlm.export.hf import export_model
from castlm.export.packed import pack_folder, unpack_folder
from castlm.export.verify import verify
from castlm.models.io import load_model, save_model
from castlm.oneshot.steps.round import layers_to_round
from castlm.training.config import TrainConfig
from castlm.training.model import filter_of
from castlm.training.train import train
from castlm_runtime.packed import read_specs, to_metadata
from castlm_runtime.stored import PACKED_SINGLE as FILE
from castlm_runtime.stored import read_header
from tests.packed_weights import needs_kernels
from tests.ranks import run_ranks
from tests.runs import (
    assert_equal_weights,
    assert_same_runs_but_for_sums,
    prune_to,
    small,
    stop_and_resume,
)
from tests.slow import slow, slow_but
from tests.tiny import EXPERTS, linear_model, save_tiny, tiny_model, tiny_tokenizer


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(seed))


def export_sparse(family: str, folder: Path, **over) -> nn.Module:
    """Exports a tiny model at 2:4 with its experts as layers, and returns it."""
    model = linear_model(family, **over)
    prune_(model)
    _, dense = sparse_linears(model)
    export_model(model, tiny_tokenizer(), folder, pattern="2:4", left_dense=dense, record={})
    return model


@pytest.mark.parametrize("family", EXPERTS)
def test_a_model_with_its_experts_as_layers_computes_and_saves_the_same(family, tmp_path):
    model = tiny_model(family)
    plain = copy.deepcopy(model)
    made = linearize_experts_(model)
    assert made == [f"model.layers.{i}.mlp.experts.{p}_proj" for i in (0, 1) for p in ("gate_up", "down")]
    assert linearize_experts_(model) == []
    for ours in (model, copy.deepcopy(model)):
        torch.testing.assert_close(ours(ids()).logits, plain(ids()).logits, rtol=0, atol=2e-6)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == plain.state_dict().keys()
    other = linear_model(family, seed=1)
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other(ids()).logits, model(ids()).logits)
    for folder, written in (("ours", model), ("theirs", plain)):
        written.save_pretrained(tmp_path / folder)
    assert_equal_weights(tmp_path / "ours", tmp_path / "theirs")


def test_a_router_is_known_by_its_name_and_a_gate_of_attention_is_none():
    routers = ["mlp.gate", "mlp.router", "block_sparse_moe.gate", "mlp.shared_expert_gate", "ffn.router.layer"]
    routers += ["self_attention.experts.router.layer"]
    for name in (f"model.layers.3.{router}" for router in routers):
        assert is_router(name)
        assert not is_block_linear(f"{name}.weight", (4, 32))
    layers = ("mlp.gate_proj", "mlp.experts.7.w1", "mlp.experts.7.gate_proj", "self_attn.gate", "attention.gate.proj")
    for name in (f"model.layers.3.{layer}" for layer in layers):
        assert not is_router(name)
        assert is_block_linear(f"{name}.weight", (4, 32))
    stored = ("b.0.mlp.experts.7.w1", "b.1.block_sparse_moe.input_linear.weight", "b.2.mlp.shared_expert.up_proj")
    assert owners_of_experts(stored) == {"b.0.mlp", "b.1.block_sparse_moe", "b.2.mlp"}
    assert not owners_of_experts(["b.0.mlp.input_linear.weight", "b.0.mlp.up_proj.weight"])


def test_a_linear_router_stays_dense_and_experts_of_unknown_orientation_name_the_remedy():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj = nn.Parameter(torch.randn(2, 8, 8))

    block = nn.ModuleDict({"gate": nn.Linear(8, 4), "experts": Experts(), "up_proj": nn.Linear(8, 8)})
    model = nn.ModuleDict({"layers": nn.ModuleList([block])})
    assert linearize_experts_(model) == []
    sparse, dense = sparse_linears(model)
    assert list(sparse) == ["layers.0.up_proj"]
    assert dense["layers.0.gate.weight"] == "a router of experts"
    assert "linearize_experts_" in dense["layers.0.experts.up_proj"]


WAYS = {"torch": {"fused": False}, "fused": {}, "8-bit": {"moments": "8bit"}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("decay", DECAYS)
def test_a_3d_weight_steps_like_its_matrices(decay, way):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 16, 96, generator=generator) if way != "8-bit" else torch.randn(3, 64, 96)
    together = nn.Parameter(weights.clone())
    apart = [nn.Parameter(matrix.clone()) for matrix in weights]
    options = {"lr": 1e-2, "total_steps": 20, "decay": decay, "decay_end": 0.5, "lam": 1e-2, "mask_interval": 3}
    one, many = (AdamS([{"params": params, "sparse": True}], **options, **WAYS[way]) for params in ([together], apart))
    for _ in range(12):
        together.grad = torch.randn(weights.shape, generator=generator)
        for matrix, grad in zip(apart, together.grad):
            matrix.grad = grad.clone()
        one.step()
        many.step()
        assert one.flips() == many.flips()
    for i, matrix in enumerate(apart):
        assert torch.equal(together[i], matrix)
        assert torch.equal(one.mask(together)[i], many.mask(matrix))
    resumed = AdamS([{"params": [together], "sparse": True}], **options, **WAYS[way])
    resumed.load_state_dict(one.state_dict())
    assert torch.equal(resumed.mask(together), one.mask(together))
    broken = one.mask(together)
    broken[1, 2, :4] = True
    with pytest.raises(InputError, match="too much in 1 places"):
        one.set_mask(together, broken)


@pytest.mark.parametrize("family", EXPERTS)
def test_training_in_a_loop_of_ones_own_ends_sparse(family, tmp_path):
    model = linear_model(family)
    add_weight_scaling(model, 2)
    optimizer = AdamS(sparse_param_groups(model), lr=1e-3, total_steps=6, decay_end=0.5)
    for _ in range(6):
        model(ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    scales = [p for name, p in model.named_parameters() if "experts" in name and name.endswith("scale")]
    assert len(scales) == 4
    assert all((scale != 1).all() for scale in scales)
    prune_(model, masks=optimizer.masks())
    before = model(ids()).logits
    fold_weight_scaling(model)
    torch.testing.assert_close(model(ids()).logits, before, rtol=1e-4, atol=1e-5)
    sparse, _ = sparse_linears(model)
    assert all(is_nm_sparse(weight_parameter(layer)) for layer in sparse.values())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids()).logits, model(ids()).logits, rtol=0, atol=2e-6)
    assert verify(tmp_path).ok


def test_an_expert_left_dense_is_recorded_by_its_names_in_the_files(tmp_path):
    def not_down(module: nn.Module, fqn: str) -> bool:
        return not fqn.endswith("experts.down_proj") and "gate.weight" not in fqn and ".layers." in f".{fqn}"

    model = linear_model("mixtral")
    prune_(model, filter_fn=not_down)
    _, dense = sparse_linears(model, filter_fn=not_down)
    facts = export_model(model, tiny_tokenizer(), tmp_path / "m", pattern="2:4", left_dense=dense, record={})
    name = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    assert facts.left_dense[name] == "excluded by the filter"
    report = verify(tmp_path / "m", allow_dense=1.0)
    assert report.ok
    assert report.totals()["left_dense"] == 8
    with pytest.raises(InputError, match="DOES NOT HOLD"):
        export_model(model, tiny_tokenizer(), tmp_path / "n", pattern="2:4", left_dense={}, record={})


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("other", ["gate", "3.router", "shared_expert_gate"])
def test_an_expert_that_is_named_like_a_router_is_counted(family, other, tmp_path):
    """transformers stacks whatever lies between `experts.` and `.w1.weight`, or the family's name for it."""
    model = linear_model(family)
    prune_(model)
    save_model(model, tiny_tokenizer(), tmp_path)
    assert verify(tmp_path).ok
    tensors = load_file(tmp_path / "model.safetensors")
    dense = [name for name in tensors if ".experts.3." in name]
    assert len(dense) == 6
    hidden = {name.replace(".experts.3.", f".experts.{other}."): tensors.pop(name) + 1 for name in dense} | tensors
    save_file(hidden, tmp_path / "model.safetensors")
    bad = [layer.name for layer in verify(tmp_path).layers if not layer.ok]
    assert len(bad) == 6
    assert all(f".experts.{other}." in name for name in bad)


def test_experts_that_do_not_state_their_order_are_counted_as_they_are_multiplied(tmp_path):
    tiny_model(
        "llama4_text", num_key_value_heads=2, head_dim=8, num_local_experts=4, intermediate_size_mlp=48
    ).save_pretrained(tmp_path)
    axes = {layer.name: layer.axis for layer in verify(tmp_path).layers if "experts." in layer.name}
    assert set(axes.values()) == {1}
    assert len(axes) == 4


def test_a_family_inside_another_is_counted_along_its_own_axis(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 264}
    bert = BertConfig(**sizes, intermediate_size=64)
    gpt2 = GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=264, add_cross_attention=True)
    text = tiny_model("gpt_oss").config.to_dict()
    models = {
        "gpt2": EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(bert, gpt2)),
        "gpt_oss": LlavaForConditionalGeneration(
            LlavaConfig(vision_config=tiny_model("llava").config.vision_config, text_config=text)
        ),
    }
    for family, model in models.items():
        for is_right in (True, False):
            folder = tmp_path / f"{family} {is_right}"
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.normal_()
                    is_turned = is_right and ("c_" in name or "q_attn" in name or "experts" in name)
                    if name.count(".") > 2 and parameter.dim() > 1:
                        weight = parameter.mT if is_turned else parameter
                        weight.mul_(nm_mask(weight.reshape(-1, weight.shape[-1]), 2, 4).view_as(weight))
            model.save_pretrained(folder)
            assert verify(folder).ok is is_right, family


def test_a_config_with_more_experts_than_it_can_hold_is_refused(tmp_path):
    save_tiny(tmp_path, "qwen2_moe")
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.shared_expert_intermediate_size == 48
    config.num_experts = 100_000
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="num_experts = 100000"):
        verify(tmp_path)


def test_a_gate_without_experts_beside_it_is_a_layer_in_memory_and_in_files(tmp_path):
    gate, layer = "model.layers.0.mlp.gate", "model.layers.0.self_attn.q_proj"
    experts = [f"model.layers.0.mlp.experts.{number}.up_proj" for number in range(2)]
    for names, is_layer in (([gate, layer], True), ([gate, layer, *experts], False)):
        model = nn.Module()
        for name in names:
            at = model
            *owners, leaf = name.split(".")
            for owner in owners:
                at = at._modules.setdefault(owner, nn.Module())
            at.add_module(leaf, nn.Linear(8, 8))
        assert (gate in sparse_linears(model)[0]) is is_layer
        assert (gate in sparse_linears(model, filter_fn=filter_of((), model))[0]) is is_layer
        assert (gate in layers_to_round(model)) is is_layer
        tensors = {f"{name}.weight": torch.ones(8, 8) for name in names}
        save_file(tensors, tmp_path / "one.safetensors")
        uses = {name: StoredUse(name, 1, 8, "a sum over axis -1", True, True) for name in tensors}
        report = verify(tmp_path / "one.safetensors", uses=uses)
        assert (f"{gate}.weight" in {bad.name for bad in report.layers}) is is_layer
        assert is_layer or report.dense == {f"{gate}.weight": "a router of experts"}


@pytest.mark.parametrize("family", ["aria_text", slow("granitemoe"), "granitemoeshared"])
def test_experts_under_the_older_names_are_counted(family, tmp_path):
    report = verify(prune_to(tmp_path / "sparse", save_tiny(tmp_path / "dense", family)))
    assert report.ok
    assert sum(len(layer.shape) == 3 for layer in report.sparse_layers) == 2 * 2


# ---- packed folders


@pytest.fixture(scope="module", params=[*EXPERTS, slow("aria_text"), slow("granitemoehybrid")])
def folders(request, tmp_path_factory) -> tuple[Path, Path]:
    """A 2:4 model and the same packed."""
    folder = tmp_path_factory.mktemp(request.param)
    export_sparse(request.param, folder / "plain")
    pack_folder(folder / "plain", folder / "packed")
    return folder / "plain", folder / "packed"


def test_every_expert_is_counted_and_one_that_is_not_sparse_is_found_and_not_packed(folders, tmp_path):
    plain, _ = folders
    report = verify(plain)
    sparse, _ = sparse_linears(load_model(plain).model)
    assert report.totals()["weights"] == sum(weight_parameter(layer).numel() for layer in sparse.values())
    assert report.ok
    assert not report.uncounted

    spoiled = Path(shutil.copytree(plain, tmp_path / "spoiled"))
    tensors = load_file(spoiled / "model.safetensors")
    down = ("experts.3.w2.weight", "down_proj", "3.down_proj.weight", "experts.fc2.weight", "output_linear.weight")
    name = next(name for name in tensors if name.endswith(down))
    tensors[name].view(-1, tensors[name].shape[-1])[:4, :4] = 1  # along rows and along columns
    save_file(tensors, spoiled / "model.safetensors", metadata={"format": "pt"})
    (bad,) = [layer for layer in verify(spoiled).layers if not layer.ok]
    assert bad.name == name
    assert bad.num_violations >= 1
    assert len(bad.shape) == tensors[name].dim()
    with pytest.raises(InputError, match=rf"{re.escape(name)}.* is not 2:4"):
        pack_folder(spoiled, tmp_path / "packed")


def test_packing_and_unpacking_give_the_same_files_and_the_same_model(folders, tmp_path):
    plain, packed = folders
    report = verify(packed)
    assert report.ok
    assert report.totals()["weights"] == verify(plain).totals()["weights"]
    assert unpack_folder(packed, tmp_path / "again") == len(report.sparse_layers)
    assert_equal_weights(plain, tmp_path / "again")
    expected, loaded = (load_model(folder).model.state_dict() for folder in folders)
    assert expected.keys() == loaded.keys()
    assert all(torch.equal(weight, loaded[name]) for name, weight in expected.items())


def test_experts_in_some_blocks_only_are_packed(tmp_path):
    export_sparse("qwen3_moe", tmp_path / "plain", mlp_only_layers=[0])
    pack_folder(tmp_path / "plain", tmp_path / "packed")
    unpack_folder(tmp_path / "packed", tmp_path / "again")
    assert_equal_weights(tmp_path / "plain", tmp_path / "again")
    report = verify(tmp_path / "packed")
    assert report.ok

    file, lacking = tmp_path / "packed" / FILE, "model.layers.1.mlp.experts.2.up_proj"
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(f"{lacking}.")}
    specs = {name: spec for name, spec in read_specs(read_header(file)).items() if name != lacking}
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


@needs_kernels
@pytest.mark.parametrize("kind", [slow("int8"), "int4"])
@pytest.mark.parametrize("folders", slow_but(("gpt_oss",), [*EXPERTS, "aria_text", "granitemoehybrid"]), indirect=True)
def test_experts_are_quantized_into_the_packed_folder(kind, folders, text, tmp_path):
    plain, _ = folders
    arguments = [str(plain), "--kind", kind, "--output-dir"]
    calibration = ["--calibration", text, "--calibration-sequences", "4", "--seq-len", "32"] if kind == "int4" else []
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


# ---- runs of castlm train


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {family: str(save_tiny(folder / family, family)) for family in EXPERTS}


def config(model: str, text: str, folder: Path, **over) -> TrainConfig:
    over = {"max_steps": 4, "decay_end": 0.5, "cross_document_attention": "gpt_oss" in model, "device": "cpu", **over}
    return small(model, text, folder, **over)


def assert_sparse(folder: Path) -> None:
    model = load_model(folder).model
    layers = [m for name, m in model.named_modules() if is_sparse_linear(m, name)]
    assert len(layers) == 12
    assert sum(layer.weight.dim() == 3 for layer in layers) == 4
    assert all(is_nm_sparse(layer.weight) for layer in layers)
    report = verify(folder)
    assert report.ok
    assert not report.uncounted
    assert report.totals()["left_dense"] == 0


@pytest.mark.parametrize(("family", "ranks"), [("gpt_oss", 2), slow("qwen3_moe", 2), slow("gpt_oss", 3)])
def test_ranks_are_one_rank_each_with_its_experts(family, ranks, models, text, tmp_path):
    """4 experts over 2 ranks, and over 3, where the last one holds none; files as one rank writes them."""
    start = {"qwen3_moe": "sparsegpt", "gpt_oss": "magnitude"}[family]
    over = {"init_from": start, "scale_groups": 2, "per_device_train_batch_size": 12 // ranks}
    run_ranks(train, ranks, config(models[family], text, tmp_path / "many", **over), folder=tmp_path)
    train(config(models[family], text, tmp_path / "one", **over | {"per_device_train_batch_size": 12}))
    assert_same_runs_but_for_sums(tmp_path / "one" / "model", tmp_path / "many" / "model")
    assert_sparse(tmp_path / "many" / "model")


def test_a_resumed_run_is_a_straight_one_bit_for_bit(models, text, tmp_path):
    """With 8-bit moments, whose state has scales beside all that the state of fp32 ones has."""
    straight = config(models["gpt_oss"], text, tmp_path / "straight", save_steps=2, moments="8bit")
    train(straight)
    assert_sparse(stop_and_resume(straight, 3) / "model")
