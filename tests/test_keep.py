"""The zeros of a sparse model survive every optimizer, and what breaks them raises at the step where it happens."""

import gc
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import castlm
from castlm.core.errors import InputError
from castlm.core.keep import KeptPattern
from castlm.core.shards import local
from castlm.core.sparsify import sparse_linears
from tests.ranks import run_ranks
from tests.runs import prune_to
from tests.slow import slow
from tests.tiny import TEXT, linear_model, save_tiny, sparse_model, tiny_model, tiny_tokenizer

IDS = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(1))


def step(model, optimizer) -> None:
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def zeros(model) -> dict[str, torch.Tensor]:
    return {name: p.detach() == 0 for name, p in model.named_parameters() if "layers" in name and p.dim() == 2}


def torch_adamw(parameters, **options):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, **options)


def bnb(name):
    def make(parameters):
        return getattr(pytest.importorskip("bitsandbytes").optim, name)(parameters, lr=1e-2, weight_decay=0.1)

    return make


OPTIMIZERS = {
    "AdamW": torch_adamw,
    "fused AdamW": lambda parameters: torch_adamw(parameters, fused=True),
    "AdamW of one tensor after the other": lambda parameters: torch_adamw(parameters, foreach=False, amsgrad=True),
    "8-bit AdamW of bitsandbytes": bnb("AdamW8bit"),
    "8-bit Lion of bitsandbytes": bnb("Lion8bit"),
    "8-bit AdEMAMix of bitsandbytes": bnb("AdEMAMix8bit"),
    "AdamS with 8-bit moments": lambda parameters: castlm.AdamS(
        [{"params": list(parameters), "sparse": False}], lr=1e-2, total_steps=9, moments="8bit", weight_decay=0.1
    ),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_zero_in_weights_gradients_and_moments(name):
    model = sparse_model(hidden_size=64, intermediate_size=128, head_dim=16)  # large enough for bitsandbytes' 8 bits
    before = zeros(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    kept = castlm.keep_pattern_(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(4):
        model(input_ids=IDS, labels=IDS).loss.backward()
        for layer, mask in kept.masks().items():
            assert not model.get_submodule(layer).weight.grad[~mask].any()
        optimizer.step()
        optimizer.zero_grad()
    for n, p in model.named_parameters():
        assert not torch.equal(p, start[n]), f"{n} was not trained"
        if n in before:
            assert torch.equal(p[before[n]], torch.zeros(int(before[n].sum()))), n
            assert torch.signbit(p[before[n]]).sum() == 0, f"{n} holds -0.0"
    assert kept.num_checks == 4
    for n, p in model.named_parameters():
        for value in optimizer.state[p].values() if n in before else ():
            if isinstance(value, torch.Tensor) and value.shape == p.shape and value.dtype.is_floating_point:
                assert not value[before[n]].any(), n


def test_an_optimizer_that_mixes_weights_raises_at_its_first_step():
    model = sparse_model()
    castlm.keep_pattern_(model)
    matrices = [layer.weight for layer in castlm.sparse_linears(model)[0].values()]
    with pytest.raises(InputError, match=r"Muon.*model.layers.0.self_attn.q_proj"):
        step(model, torch.optim.Muon(matrices, lr=1e-2))


def test_moments_from_before_raise_and_the_message_counts_the_weights():
    model = tiny_model("llama")
    optimizer = torch_adamw(model.parameters())
    step(model, optimizer)
    castlm.prune_(model)
    weight = model.model.layers[0].self_attn.q_proj.weight
    num_masked = int((weight == 0).sum())
    castlm.keep_pattern_(model)
    with pytest.raises(InputError, match=rf"AdamW, {num_masked} masked weights of model.layers.0.self_attn.q_proj"):
        step(model, optimizer)


def test_a_model_that_is_not_sparse_is_refused_by_layer():
    with pytest.raises(InputError, match=r"14 of 14 .*model.layers.0.self_attn.q_proj"):
        castlm.keep_pattern_(tiny_model("llama"))
    model = sparse_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4:8] = 1.0
    with pytest.raises(InputError, match=r"1 of 14 .*model.layers.1.mlp.up_proj with 1 place"):
        castlm.keep_pattern_(model)
    with pytest.raises(InputError, match="4:8"):
        castlm.keep_pattern_(tiny_model("llama"), "4:8")


def test_a_gpt2_with_conv1d_is_refused_with_the_loader_that_helps(tmp_path):
    sparse = prune_to(tmp_path / "sparse", save_tiny(tmp_path / "dense", "gpt2"))
    plain = AutoModelForCausalLM.from_pretrained(sparse)
    for refused in (castlm.keep_pattern_, castlm.prune_, castlm.sparse_linears):
        with pytest.raises(InputError, match=r"Conv1D.*: load it with castlm\.load_model"):
            refused(plain)
    castlm.keep_pattern_(castlm.load_model(sparse).model).check("now")


def test_layers_left_dense_are_those_of_the_filter_or_of_castlm_json(tmp_path):
    model = sparse_model()
    model.model.layers[1].mlp.up_proj.weight.data.fill_(1.0)
    kept = castlm.keep_pattern_(model, filter_fn=lambda module, fqn: "layers" in fqn and "up_proj" not in fqn)
    assert len(kept.weights) == 12
    (tmp_path / "castlm.json").write_text('{"left_dense": {"model.layers.1.mlp.up_proj": "excluded"}}')
    model.config._name_or_path = str(tmp_path)
    kept = castlm.keep_pattern_(model)
    assert len(kept.weights) == 13
    assert "model.layers.1.mlp.up_proj" not in kept.weights


def test_a_weight_that_was_flattened_is_refused():
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.ones(64))
    with pytest.raises(InputError, match=r"layers.0 .*\(64,\)"):
        KeptPattern({"layers.0": layer})


def test_a_weight_that_was_replaced_raises():
    model = sparse_model()
    castlm.keep_pattern_(model)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    with pytest.raises(InputError, match=r"model.layers.0.mlp.up_proj"):
        step(model, torch_adamw(model.parameters()))


def test_the_guard_lives_and_ends_with_the_model():
    model = sparse_model()
    guard = weakref.ref(castlm.keep_pattern_(model))
    gc.collect()
    assert guard() is not None
    del model
    gc.collect()
    assert guard() is None


def test_remove_ends_the_guard():
    model = sparse_model()
    kept = castlm.keep_pattern_(model)
    kept.remove()
    step(model, torch_adamw(model.parameters()))
    with pytest.raises(InputError, match="masked weights of"):
        kept.check("training")


def test_experts_keep_their_zeros():
    model = linear_model("mixtral")
    castlm.prune_(model)
    kept = castlm.keep_pattern_(model)
    experts = model.get_submodule("model.layers.1.mlp.experts.down_proj").weight
    before = experts.detach().clone()
    optimizer = bnb("AdamW8bit")(model.parameters())
    for _ in range(2):
        step(model, optimizer)
    assert experts.dim() == 3
    assert "model.layers.1.mlp.experts.down_proj" in kept.weights
    assert torch.equal(experts == 0, before == 0)
    assert not torch.equal(experts, before)


def test_sparse_experts_that_are_no_layers_are_refused():
    model = tiny_model("mixtral")
    castlm.prune_(model)  # the other layers
    experts = model.get_parameter("model.layers.1.mlp.experts.down_proj")
    castlm.keep_pattern_(model).remove()
    experts.data *= castlm.nm_mask(experts)
    with pytest.raises(InputError, match=r"layers.1.mlp.experts.down_proj.*linearize_experts_"):
        castlm.keep_pattern_(model)


# ---- PatternCallback and the adapters, with the real transformers, TRL and PEFT


BATCH = torch.randint(256, (8, 32), generator=torch.Generator().manual_seed(1))
DATA = [{"input_ids": ids, "labels": ids} for ids in BATCH]
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""Layers of at least 4,096 weights: bitsandbytes stores the moments of smaller ones in fp32."""


def arguments(folder, kind=TrainingArguments, **over):
    fields = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return kind(str(folder), **(fields | over))


def train(model, folder, callback, **over) -> Trainer:
    trainer = Trainer(model, arguments(folder, **over), train_dataset=DATA, callbacks=[callback])
    trainer.train()
    return trainer


def sft_train(model, folder, callback, peft_config=None, **over):
    trl = pytest.importorskip("trl")
    data = Dataset.from_list([{"text": story} for story in TEXT.split("\n\n")[:8]])
    trainer = trl.SFTTrainer(
        model,
        args=arguments(folder, trl.SFTConfig, max_length=64, **over),
        train_dataset=data,
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
        callbacks=[callback],
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(("is_sft", "decay"), [(False, 0.1), (True, 0.0)])
def test_a_callback_makes_a_dense_model_sparse_in_a_trainer(is_sft, decay, tmp_path):
    """Also in TRL's, whose model, data and loss are its own."""
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    args_kind = pytest.importorskip("trl").SFTConfig if is_sft else TrainingArguments
    args = arguments(tmp_path, args_kind, max_steps=4, weight_decay=decay, **({"max_length": 64} if is_sft else {}))
    cast = castlm.CastCallback(model, args, pattern="1:4", adams={"decay_end": 0.5})
    kind, options = cast.optimizer
    assert [group.get("weight_decay") for group in options["params"]] == [None, decay, 0.0]
    assert options["decay_end"] == 0.5
    if is_sft:
        trl = pytest.importorskip("trl")
        data = Dataset.from_list([{"text": story} for story in TEXT.split("\n\n")[:8]])
        trainer = trl.SFTTrainer(
            model,
            args=args,
            train_dataset=data,
            processing_class=tiny_tokenizer(),
            callbacks=[cast],
            optimizer_cls_and_kwargs=(kind, options),
        )
    else:
        trainer = Trainer(model, args, train_dataset=DATA, callbacks=[cast], optimizer_cls_and_kwargs=(kind, options))
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert castlm.verify(tmp_path / "model", "1:4").ok
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert saved.keys() == before.keys()
    assert all(not torch.equal(value, before[name]) for name, value in saved.items() if value.dim() > 1)


def test_a_trainer_without_the_callbacks_optimizer_is_refused(tmp_path):
    model, args = tiny_model("llama"), arguments(tmp_path)
    trainer = Trainer(model, args, train_dataset=DATA, callbacks=[castlm.CastCallback(model, args)])
    with pytest.raises(InputError, match=r"AdamW.*optimizer_cls_and_kwargs=callback\.optimizer"):
        trainer.train()


@pytest.mark.parametrize(
    ("run", "optim"),
    [
        (train, "adamw_torch"),
        (train, "adamw_bnb_8bit"),
        (sft_train, "adamw_torch"),
        slow(train, "adamw_torch_fused"),
        slow(sft_train, "adamw_bnb_8bit"),
    ],
)
def test_trainer_leaves_a_sparse_model_sparse(run, optim, tmp_path):
    if "bnb" in optim:
        pytest.importorskip("bitsandbytes")
    model, before = sparse_model(**WIDE), sparse_model(**WIDE)
    callback = castlm.PatternCallback()
    trainer = run(model, tmp_path, callback, optim=optim)
    assert callback.kept.num_checks == 4  # three steps, and the end
    trainer.save_model(str(tmp_path / "model"))
    assert castlm.verify(tmp_path / "model").ok
    for name, old in before.named_parameters():
        new = model.get_parameter(name)
        assert not torch.equal(new, old), f"{name} was not trained"
        assert not new[old == 0].any()


@pytest.mark.parametrize("optim", [slow("adamw_torch"), "adamw_bnb_8bit"])
def test_a_resumed_trainer_and_its_best_model_stay_sparse(optim, tmp_path):
    if "bnb" in optim:
        pytest.importorskip("bitsandbytes")
    saving = {"optim": optim, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    for max_steps, resume in ((2, None), (4, True)):
        model, callback = sparse_model(**WIDE), castlm.PatternCallback()
        args = arguments(tmp_path, max_steps=max_steps, load_best_model_at_end=True, **saving)
        trainer = Trainer(model, args, train_dataset=DATA, eval_dataset=DATA, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
    assert callback.kept.num_checks == 3  # two steps, and the best model
    assert castlm.verify(tmp_path / "checkpoint-4").ok


class Merge(TrainerCallback):
    """Fills a zero between two steps, as a merged adapter or other loaded weights do."""

    def on_step_begin(self, args, state, control, model=None, **parts):
        if state.global_step == 1:
            model.model.layers[1].mlp.up_proj.weight.data[5, :4] = 1.0


def test_what_fills_a_zero_raises_at_its_step(tmp_path):
    model, callback = sparse_model(), castlm.PatternCallback()
    trainer = Trainer(model, arguments(tmp_path), train_dataset=DATA, callbacks=[callback, Merge()])
    with pytest.raises(InputError, match=r"step 2 of AdamW, 2 .*model.layers.1.mlp.up_proj"):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"deepspeed": "zero3.json"}, "DeepSpeed"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "FSDP1 flattens the weights"),
    ],
)
def test_engines_that_flatten_weights_are_refused(setting, reason, monkeypatch):
    args = SimpleNamespace(**{"deepspeed": None, **setting})
    with pytest.raises(InputError, match=reason):
        castlm.PatternCallback().on_train_begin(args, None, None, model=sparse_model())
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match="DeepSpeed"):
        castlm.PatternCallback().on_train_begin(SimpleNamespace(deepspeed=None), None, None, model=sparse_model())


def adapted(config_of, model=None, **options):
    """A sparse model with an adapter that is not at zero any more."""
    peft = pytest.importorskip("peft")
    model = model or sparse_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = peft.get_peft_model(model, config_of(model, r=4, **options))
    for parameter in found.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_an_adapter_trains_and_its_merge_keeps_every_zero_and_computes_the_same(dtype, tolerance):
    """PEFT holds the adapter of a bf16 model in fp32."""
    before, model = sparse_model().to(dtype), adapted(castlm.shira_config, model=sparse_model().to(dtype))
    output = model(input_ids=BATCH, labels=BATCH)
    output.loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    assert output.logits.dtype == dtype
    merged, expected = model.merge_and_unload(), output.logits.float()
    assert (merged(input_ids=BATCH).logits - expected).norm() < tolerance * expected.norm()
    for name, layer in sparse_linears(before)[0].items():
        weight = merged.get_submodule(name).weight
        assert torch.equal(weight == 0, layer.weight == 0), name
        assert not torch.equal(weight, layer.weight), name


def test_sft_trainer_trains_an_adapter_that_keeps_the_pattern(tmp_path):
    model, callback = sparse_model(), castlm.PatternCallback()
    trainer = sft_train(model, tmp_path, callback, castlm.shira_config(model, r=4))
    assert callback.kept.num_checks == 4
    trainer.save_model(str(tmp_path / "adapter"))
    assert any(
        value.any()
        for name, value in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items()
        if "shira_weight" in name
    )
    trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert castlm.verify(tmp_path / "merged").ok


def test_plain_lora_is_refused_before_the_first_step(tmp_path):
    peft = pytest.importorskip("peft")
    with pytest.raises(InputError, match=r"model.layers.0.self_attn.q_proj.*shira_config"):
        sft_train(sparse_model(), tmp_path, castlm.PatternCallback(), peft.LoraConfig(r=4))


def test_the_merge_of_plain_lora_is_found_by_verify(tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted(lambda model, r: peft.LoraConfig(r=r, target_modules=["q_proj", "v_proj"])).merge_and_unload()
    model.save_pretrained(tmp_path)
    report = castlm.verify(tmp_path)
    assert not report.ok
    assert [layer.name for layer in report.layers if not layer.ok] == [
        f"model.layers.{i}.self_attn.{name}_proj.weight" for i in range(2) for name in "qv"
    ]
    assert "merged adapter" in report.text()


def test_an_adapter_of_a_dense_model_or_too_large_is_refused():
    with pytest.raises(InputError, match="14 of 14 layers are not 2:4"):
        castlm.shira_config(tiny_model("llama"))
    with pytest.raises(InputError, match=r"r = 99 .*k_proj.*r <= 5"):
        castlm.shira_config(sparse_model(), r=99)


def train_ddp_or_fsdp2(engine: str) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    whole, model = sparse_model(), sparse_model()
    if engine == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    kept = castlm.keep_pattern_(model)
    run = DistributedDataParallel(model) if engine == "ddp" else model
    for trained in (run, whole):
        part = BATCH if trained is whole else BATCH.chunk(size)[rank]
        if trained is whole:
            castlm.keep_pattern_(whole)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            trained(input_ids=part, labels=part).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert kept.num_checks == 3
    for name, parameter in model.named_parameters():
        found = parameter.full_tensor() if engine == "fsdp2" else parameter
        torch.testing.assert_close(found, whole.get_parameter(name), rtol=1e-3, atol=1e-3)
        assert torch.equal(found == 0, whole.get_parameter(name) == 0), name
    weight = model.model.layers[1].mlp.up_proj.weight
    if rank == 1:
        local(weight).data.fill_(1.0)
    if rank == 1 or engine == "fsdp2":  # then both ranks count and raise alike
        wanted = weight.numel() // 2 // (2 if engine == "fsdp2" else 1)
        with pytest.raises(InputError, match=rf"{wanted:,} masked weights of model.layers.1.mlp.up_proj"):
            kept.check("a fill")


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.slow
def test_two_ranks_keep_the_pattern_and_train_as_one(engine, tmp_path):
    run_ranks(train_ddp_or_fsdp2, 2, engine, folder=tmp_path)
