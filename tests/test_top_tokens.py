"""The loss from a teacher's most probable tokens: the full loss at k = vocabulary, below it the KL of k + 1 events."""

import pytest
import torch
import torch.nn.functional as F

from castlm.core.distill import OutputHead, distillation_loss, top_tokens
from castlm.core.errors import InputError
from tests.test_distill import HEADS, VOCAB, assert_same, make, plain_logits, student_leaves


def plain_top_loss(student_logits, teacher_logits, labels, k, eta, temperature):
    """The k most probable tokens of the teacher and all others as one, by the textbook; (loss, ce, kl)."""
    real = labels != -100
    q = F.log_softmax(teacher_logits[real] / temperature, -1)
    p = F.log_softmax(student_logits[real] / temperature, -1)
    best = q.topk(k).indices
    q, p = (
        torch.cat([x.gather(1, best), x.scatter(1, best, float("-inf")).logsumexp(-1, keepdim=True)], -1)
        for x in (q, p)
    )
    kl = (q.exp() * (q - p)).sum(-1).mean() * temperature**2
    ce = F.cross_entropy(student_logits[real], labels[real])
    return eta * kl + (1 - eta) * ce, ce, kl


@pytest.mark.parametrize("chunk_tokens", [3, None])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("head", HEADS)
def test_at_the_whole_vocabulary_it_is_the_full_loss(head, temperature, chunk_tokens):
    hidden, student, labels, teacher_hidden, teacher = make(**HEADS[head])
    settings = {"eta": 0.4, "temperature": temperature, "chunk_tokens": chunk_tokens}
    top = top_tokens(teacher_hidden, teacher, VOCAB, temperature, chunk_tokens)
    want = distillation_loss(hidden, student, labels, teacher_hidden, teacher, **settings)
    got = distillation_loss(hidden, student, labels, teacher_top=top, **settings)
    assert_same(got, want)
    leaves = student_leaves(hidden, student)
    assert_same(torch.autograd.grad(got.loss, leaves), torch.autograd.grad(want.loss, leaves))


@pytest.mark.parametrize("k", [1, 5, VOCAB - 5])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equals_the_divergence_over_the_top_and_the_rest(k, temperature):
    hidden, student, labels, teacher_hidden, teacher = make(**HEADS["all"])
    top = top_tokens(teacher_hidden, teacher, k, temperature)
    got = distillation_loss(hidden, student, labels, teacher_top=top, eta=0.4, temperature=temperature)
    logits = plain_logits(hidden, student), plain_logits(teacher_hidden, teacher).detach()
    want = plain_top_loss(*logits, labels, k, 0.4, temperature)
    assert_same(got, want, 2e-5)
    leaves = student_leaves(hidden, student)
    assert_same(torch.autograd.grad(got.loss, leaves), torch.autograd.grad(want[0], leaves), 2e-5)
    full = distillation_loss(hidden, student, labels, teacher_hidden, teacher, eta=0.4, temperature=temperature)
    assert got.kl < full.kl


@pytest.mark.parametrize("k", [1, 2, 7])
@pytest.mark.parametrize("sure", [0.1, 3.0, 20.0, 80.0])
@pytest.mark.parametrize("side", ["student", "both"])
def test_values_and_gradients_are_those_of_fp64_however_sure_the_student_is(side, sure, k):
    """The logits are the hidden states, so that `sure` is how far apart they are."""
    torch.manual_seed(k)
    head = OutputHead(torch.eye(VOCAB))
    student = (sure * torch.randn(40, VOCAB)).requires_grad_()
    teacher = torch.randn(40, VOCAB) * (sure if side == "both" else 1)
    labels = torch.randint(VOCAB, (40,))
    top = top_tokens(teacher, head, k)
    got = distillation_loss(student, head, labels, teacher_top=top, eta=1.0)
    exact = student.detach().double().requires_grad_()
    want = plain_top_loss(exact, teacher.double(), labels, k, 1.0, 1.0)
    assert got.kl >= 0
    torch.testing.assert_close(got.kl.double(), want[2], rtol=1e-5, atol=3e-5)
    gradients = torch.autograd.grad(got.loss, student)[0], torch.autograd.grad(want[0], exact)[0]
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-4, atol=1e-7)


def test_a_sure_student_is_drawn_to_the_tokens_that_it_has_given_up():
    """A difference 1 - sum(p) of fp32 numbers gives a KL of -0.35 here, and a gradient of 1e-11."""
    head = OutputHead(torch.eye(4))
    student = torch.tensor([[20.0, 20.0, -20.0, -20.0]], requires_grad=True)
    top = top_tokens(torch.tensor([[0.01, 0.01, 0.0, 0.0]]), head, 2)
    loss, _, kl = distillation_loss(student, head, torch.tensor([0]), teacher_top=top, eta=1.0)
    assert 19 < kl < 20
    assert torch.autograd.grad(loss, student)[0][0, 2] < -0.24


def test_another_shape_raises():
    hidden, student, labels, teacher_hidden, teacher = make()
    top = top_tokens(teacher_hidden[:3], teacher, 2)
    with pytest.raises(InputError, match=r"\(3,\)"):
        distillation_loss(hidden, student, labels, teacher_top=top)
