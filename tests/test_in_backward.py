"""Steps inside the backward pass: the bits of a step after it, and the gradients of one block at a time."""

import pytest
import torch

from castlm.core.adams import AdamS
from castlm.core.errors import InputError
from castlm.distributed.gradients import NormInParts, gradient_norm, torch_norm_of
from castlm.training.train import train
from castlm.training.trainer import obstacle_on_ranks
from tests.runs import begin_run, metrics, small, stop_and_resume, take_steps
from tests.slow import slow


@pytest.mark.parametrize(
    "fields",
    [
        {"max_grad_norm": 0.1},  # clips every step
        {"max_grad_norm": 0.0, "init_from": "magnitude", "moments": "8bit", "gradient_checkpointing": True},
        slow({"method": "ast", "max_grad_norm": 0.1}),
        {"method": "finetune", "weight_decay": 0.1},
        slow({"method": "dense", "weight_bits": 3}),
    ],
)
def test_a_run_that_steps_in_the_backward_pass_and_is_resumed_has_the_bits_of_a_plain_one(
    fields, llama, text, tmp_path
):
    plain = small(llama, text, tmp_path / "plain", **fields, save_steps=5)
    train(plain)
    killed = stop_and_resume(plain.changed(step_in_backward=True), 7)
    of_the_machine = ("tokens_per_s", "eta_s", "peak_memory_bytes")
    one, other = (
        [{k: v for k, v in row.items() if k not in of_the_machine} for row in metrics(folder)]
        for folder in (tmp_path / "plain", killed)
    )
    assert one == other


def test_torchs_norm_which_gpus_take_is_the_exact_one_up_to_rounding():
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((300, 40), (40,), (7,))]
    for number, parameter in enumerate(parameters[:2]):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    exact = gradient_norm(parameters)
    whole = torch.cat([p.grad.double().flatten() for p in parameters[:2]]).norm()
    torch.testing.assert_close(exact.double(), whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch_norm_of(parameters), exact, rtol=1e-6, atol=0)
    in_parts = NormInParts(parameters)
    for parameter in reversed(parameters):  # as a backward pass reaches them
        if parameter.grad is not None:
            in_parts.add(parameter)
    assert torch.equal(in_parts.norm(), exact)


def test_the_gradients_of_one_block_are_there_at_a_time(llama, text, tmp_path, monkeypatch):
    run = begin_run(small(llama, text, tmp_path / "run", init_from="magnitude", step_in_backward=True))
    updated = []
    update = AdamS.update

    def seen(self, parameters):
        updated.append(([run.names[p] for p in parameters], [run.names[p] for p in run.names if p.grad is not None]))
        update(self, parameters)

    monkeypatch.setattr(AdamS, "update", seen)
    take_steps(run)
    assert sorted(name for names, _ in updated for name in names) == sorted(run.names.values())
    for names, with_gradients in updated:  # the head is tied: its gradient waits for the embeddings' and is no part's
        assert set(with_gradients) <= set(names)
    assert max(len(names) for names, _ in updated) == len([name for name in run.names.values() if "layers.0." in name])
    assert not any(parameter.grad is not None for parameter in run.names)


def test_what_keeps_or_sums_all_gradients_is_refused_by_name(llama, text, tmp_path):
    config = small(llama, text, tmp_path / "run", step_in_backward=True)
    with pytest.raises(InputError, match="gradient_accumulation_steps 2"):
        config.changed(gradient_accumulation_steps=2)
    assert "one rank" in obstacle_on_ranks(config)
