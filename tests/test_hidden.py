"""The distance of hidden states: its formula, its sums, and a run that distills them."""

import copy

import pytest
import torch

from castlm.core.distill import hidden_distance
from castlm.oneshot.methods import change_basis_
from castlm.training.objective import Objective, as_teacher_
from tests.runs import begin_run, small, take_steps
from tests.tiny import VOCAB_SIZE, tiny_model

BLOCKS, HIDDEN = 3, 8


@pytest.fixture
def states():
    """Hidden states of student and teacher, and labels, some of which do not count."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        [torch.randn(2, 6, HIDDEN, generator=generator, dtype=torch.float64) for _ in range(BLOCKS)] for _ in range(2)
    )
    labels = torch.randint(0, 9, (2, 6), generator=generator)
    labels[0, :2] = labels[1, 5] = -100
    return [s.requires_grad_() for s in student], teacher, labels


def test_the_distance_is_relative_for_each_token_and_averaged_over_those_that_count(states):
    student, teacher, labels = states
    expected = [
        torch.log(1 + (s[row, at] - t[row, at]).square().sum() / t[row, at].square().sum())
        for s, t in zip(student, teacher)
        for row, at in (labels != -100).nonzero().tolist()
    ]
    assert torch.allclose(hidden_distance(student, teacher, labels), torch.stack(expected).mean())
    assert torch.autograd.gradcheck(lambda *student: hidden_distance(student, teacher, labels), student)
    nowhere = [torch.zeros_like(s) for s in student]
    assert hidden_distance([0 * s for s in student], nowhere, labels) == 0  # and no NaN


def test_the_same_function_in_another_basis_is_at_no_distance():
    model = tiny_model("llama")
    ids = torch.randint(0, VOCAB_SIZE, (4, 32), generator=torch.Generator().manual_seed(0))
    teacher = as_teacher_(copy.deepcopy(model), torch.float32)
    objective = Objective(model, teacher, 0.5, compares_hidden=True)
    change_basis_(model, ids)
    loss = objective(ids, ids, ids.numel(), hidden_weight=1.0)
    assert loss.hidden < 1e-10
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    damaged = objective(ids, ids, ids.numel(), hidden_weight=1.0)
    assert damaged.hidden > 1e-4
    assert torch.allclose(damaged.loss, 0.5 * damaged.ce + 0.5 * damaged.kl + damaged.hidden)


def test_gradient_checkpointing_changes_nothing(llama, text, tmp_path):
    runs = [
        begin_run(small(llama, text, tmp_path / str(saves), gradient_checkpointing=saves, init_from="magnitude"))
        for saves in (False, True)
    ]
    for run in runs:
        take_steps(run)
    for (name, one), (_, other) in zip(*(run.model.named_parameters() for run in runs)):
        assert torch.equal(one, other), name
