"""The examples do what they say: run them as a user does, and hold the Trainer against the plain loop it stands for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

import castlm
from castlm.core.errors import InputError
from castlm.export.verify import verify
from tests.ranks import run_ranks
from tests.runs import assert_same_but_for_sums
from tests.tiny import TEXT, save_tiny, tiny_model

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ground(tmp_path) -> SimpleNamespace:
    (tmp_path / "text.txt").write_text(TEXT)
    return SimpleNamespace(
        model=str(save_tiny(tmp_path / "dense")), text=str(tmp_path / "text.txt"), out=tmp_path / "out"
    )


def run_trainer(model: str, text: str, out: str, batch_size: int) -> None:
    example("trainer").main(model, text, out, steps=6, seq_len=32, batch_size=batch_size)


@pytest.mark.slow
def test_trainer_ends_sparse_in_one_process_and_under_ddp(ground, tmp_path):
    folders = []
    for ranks in (1, 2):
        folders.append(tmp_path / f"out-{ranks}")
        arguments = (ground.model, ground.text, str(folders[-1]), 4 // ranks)
        run_ranks(run_trainer, ranks, *arguments, folder=tmp_path)
        report = verify(folders[-1])
        assert report.ok
        assert len(report.sparse_layers) == 14
    one, two, dense = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (*folders, ground.model))
    assert_same_but_for_sums(one, two)
    for name, weight in one.items():
        assert not torch.equal(weight[weight != 0], dense[name][weight != 0]), f"{name} was not trained"


def test_trainer_is_the_plain_loop(tmp_path):
    """The same steps by hand: what Trainer adds (clipping, scheduler, accelerate) changes nothing else."""
    blocks = torch.randint(256, (8, 16), generator=torch.Generator().manual_seed(1))
    args = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=8,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trained = tiny_model("llama")
    data = [{"input_ids": block, "labels": block} for block in blocks]
    example("trainer").CastTrainer(trained, args, train_dataset=data).train()

    model = tiny_model("llama").train()
    castlm.add_weight_scaling(model)
    optimizer = castlm.AdamS(castlm.sparse_param_groups(model), lr=1e-3, total_steps=4)
    for _ in range(4):
        model(input_ids=blocks, labels=blocks).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    castlm.prune_(model, masks=optimizer.masks())
    castlm.fold_weight_scaling(model)
    assert_same_but_for_sums(model.state_dict(), trained.state_dict())


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"deepspeed": "zero3.json"}, "DeepSpeed"),
        ({"fsdp": "full_shard"}, "FSDP1 flattens the weights"),
        ({"load_best_model_at_end": True}, "masks of the last step"),
        ({"max_steps": -1}, "set max_steps"),
    ],
)
def test_trainer_refuses_what_breaks_the_masks(setting, reason, tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=4, report_to=[], use_cpu=True)
    for name, value in setting.items():
        setattr(args, name, value)
    with pytest.raises(InputError, match=reason):
        example("trainer").CastTrainer(tiny_model("llama"), args)


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [("ACCELERATE_USE_FSDP", "true", "FSDP1 flattens"), ("WORLD_SIZE", "2", "separate model in each process")],
)
def test_trainer_refuses_what_its_launcher_asks_for(variable, value, reason, tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path), max_steps=4, report_to=[], use_cpu=True)
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=reason):
        example("trainer").CastTrainer(tiny_model("llama"), args)


def test_trainer_refuses_half_precision_weights(tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=4, report_to=[], use_cpu=True, save_strategy="no")
    blocks = torch.zeros(4, 8, dtype=torch.long)
    data = [{"input_ids": block, "labels": block} for block in blocks]
    with pytest.raises(InputError, match="fp32"):
        example("trainer").CastTrainer(tiny_model("llama").bfloat16(), args, train_dataset=data).train()


def test_torch_loop(ground, capsys):
    example("torch_loop").main(ground.model, ground.text, str(ground.out), steps=4, seq_len=32)
    assert verify(ground.out).ok
