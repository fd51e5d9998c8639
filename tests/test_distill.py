"""The chunked loss against log_softmax, kl_div and cross_entropy on full logits, in value and in every gradient."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from castlm.core.distill import OutputHead, TopTokens, distillation_loss, top_tokens
from castlm.core.errors import InputError
from tests.refusals import refusal

TOKENS, HIDDEN, TEACHER_HIDDEN, VOCAB = 11, 8, 6, 37

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "scale": 1.7, "softcap": 2.0},
}


def plain_logits(hidden, head):
    logits = F.linear(hidden, head.weight, head.bias) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def textbook_loss(hidden, student, labels, teacher_hidden, teacher, *, eta, temperature=1.0, k=None):
    """Returns (loss, ce, kl), means over the tokens whose label is not -100.

    With `k`, the divergence is over the `k` most probable tokens of the teacher, and all others as one.
    """
    real = labels != -100
    logits, theirs = plain_logits(hidden, student)[real], plain_logits(teacher_hidden, teacher)[real].detach()
    p, q = (F.log_softmax(x / temperature, -1) for x in (logits, theirs))
    if k:
        best = q.topk(k).indices
        p, q = (
            torch.cat([x.gather(1, best), x.scatter(1, best, float("-inf")).logsumexp(-1, keepdim=True)], -1)
            for x in (p, q)
        )
    kl = (q.exp() * (q - p)).sum(-1).mean() * temperature**2
    ce = F.cross_entropy(logits, labels[real])
    return eta * kl + (1 - eta) * ce, ce, kl


def make(dtype=torch.float32, bias=False, scale=1.0, softcap=None, seed=0, ignored=(2, 3, 10)):
    """Leaves with requires_grad: student hidden and head; labels; teacher hidden and head."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    heads = [
        OutputHead(leaf(VOCAB, size), leaf(VOCAB) if bias else None, softcap, scale)
        for size in (HIDDEN, TEACHER_HIDDEN)
    ]
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    labels[list(ignored)] = -100
    return leaf(TOKENS, HIDDEN), heads[0], labels, leaf(TOKENS, TEACHER_HIDDEN), heads[1]


def student_leaves(hidden, head):
    return [t for t in (hidden, head.weight, head.bias) if t is not None]


def assert_same(actual, expected, tolerance=1e-5):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("eta", [0.0, 1 / 3, 1.0])
@pytest.mark.parametrize("head", HEADS)
def test_equals_the_textbook(head, eta):
    given = make(**HEADS[head])
    leaves = student_leaves(*given[:2])
    for temperature, chunk_tokens in itertools.product((1.0, 2.5), (1, 3, None)):
        got = distillation_loss(*given, eta=eta, temperature=temperature, chunk_tokens=chunk_tokens)
        want = textbook_loss(*given, eta=eta, temperature=temperature)
        assert_same(got[:2], want[:2])
        torch.testing.assert_close(got.kl, want[2].detach() * (eta > 0), rtol=1e-5, atol=1e-5)
        assert_same(torch.autograd.grad(got.loss, leaves), torch.autograd.grad(want[0], leaves))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_num_tokens_makes_accumulation_equal_one_batch(as_tensor):
    hidden, student, labels, teacher_hidden, teacher = given = make()
    whole = distillation_loss(*given)
    count = (labels != -100).sum() if as_tensor else int((labels != -100).sum())
    parts = [
        distillation_loss(hidden[s], student, labels[s], teacher_hidden[s], teacher, num_tokens=count)
        for s in (slice(0, 4), slice(4, None))
    ]
    for name in ("loss", "ce", "kl"):
        assert_same([sum(getattr(part, name) for part in parts)], [getattr(whole, name)])
    leaves = student_leaves(hidden, student)
    assert_same(torch.autograd.grad(sum(part.loss for part in parts), leaves), torch.autograd.grad(whole.loss, leaves))


@pytest.mark.parametrize("num_tokens", [None, 0, 7])
def test_all_ignored_is_zero_with_zero_gradients(num_tokens):
    given = make(ignored=range(TOKENS), **HEADS["all"])
    result = distillation_loss(*given, num_tokens=num_tokens)
    assert [float(x.detach()) for x in result] == [0, 0, 0]
    for gradient in torch.autograd.grad(result.loss, student_leaves(*given[:2])):
        assert not gradient.any()


def test_backward_scales_by_the_incoming_gradient_and_runs_once():
    given = make()
    leaves = student_leaves(*given[:2])
    loss = distillation_loss(*given).loss
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="backward once"):
        torch.autograd.grad(loss, leaves)
    assert_same(torch.autograd.grad(-3 * distillation_loss(*given).loss, leaves), [-3 * g for g in once])


def test_only_what_needs_a_gradient_gets_one():
    hidden, student, labels, teacher_hidden, teacher = given = make()
    want = torch.autograd.grad(distillation_loss(*given).loss, hidden)
    frozen = OutputHead(student.weight.detach())
    result = distillation_loss(hidden, frozen, labels, teacher_hidden, teacher)
    assert not result.ce.requires_grad
    assert not result.kl.requires_grad
    result.loss.backward()
    assert_same([hidden.grad], want)
    assert frozen.weight.grad is None
    assert teacher_hidden.grad is None
    assert teacher.weight.grad is None


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numel[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return out


def test_at_most_one_chunk_of_logits_is_alive():
    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(300, 4, requires_grad=True)
    labels = torch.randint(300, (64,))
    with LargestTensor() as seen:
        distillation_loss(
            hidden, OutputHead(weight), labels, hidden, OutputHead(weight), chunk_tokens=8
        ).loss.backward()
    assert max(seen.numel.values()) == 8 * 300


def test_without_grad_no_gradient_is_computed():
    hidden, weight = torch.randn(16, 40, requires_grad=True), torch.randn(50, 40, requires_grad=True)
    labels = torch.randint(50, (16,))
    with torch.no_grad(), LargestTensor() as seen:
        result = distillation_loss(hidden, OutputHead(weight), labels, eta=0, chunk_tokens=4)
    assert not result.loss.requires_grad
    want = F.cross_entropy(hidden @ weight.T, labels).detach()
    assert float(result.loss) == pytest.approx(float(want), rel=1e-6)
    seen.numel.pop(weight.untyped_storage().data_ptr(), None)
    seen.numel.pop(hidden.untyped_storage().data_ptr(), None)
    assert max(seen.numel.values()) == 4 * 50


@pytest.mark.parametrize("head", HEADS)
def test_bf16_autocast_follows_the_textbook(head):
    given = make(**HEADS[head])
    leaves = student_leaves(*given[:2])
    with torch.autocast("cpu", torch.bfloat16):
        got = distillation_loss(*given, chunk_tokens=4)
    gradients = torch.autograd.grad(got.loss, leaves)
    assert got.loss.dtype == torch.float32
    assert [g.dtype for g in gradients] == [torch.float32] * len(leaves)
    exact = textbook_loss(*given, eta=1 / 3)
    assert_same([got.loss], [exact[0]], tolerance=0.03)
    for gradient, want in zip(gradients, torch.autograd.grad(exact[0], leaves)):
        assert float((gradient - want).norm() / want.norm()) < 0.03


REFUSALS = {
    "no teacher": ({"teacher_hidden": None}, "no teacher is given"),
    "labels": ({"labels": torch.zeros(4, dtype=torch.int64)}, r"do not match labels \(4,\)"),
    "vocabulary": ({"teacher_head": OutputHead(torch.zeros(40, TEACHER_HIDDEN))}, "has 40 entries, the student's 37"),
    "teacher tokens": ({"teacher_hidden": torch.zeros(3, TEACHER_HIDDEN)}, r"\(3,\)"),
    "top tokens": ({"teacher_top": TopTokens(torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, 2))}, r"\(3,\)"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_line_with_the_value(case):
    change, message = REFUSALS[case]
    names = ("student_hidden", "student_head", "labels", "teacher_hidden", "teacher_head")
    with refusal(message):
        distillation_loss(**{**dict(zip(names, make())), **change})


def test_fp16_gradients_are_refused_and_fp16_losses_are_not():
    given = make(torch.float16)
    with pytest.raises(InputError, match="fp16"):
        distillation_loss(*given)
    with torch.no_grad():
        assert torch.isfinite(distillation_loss(*given).loss)


# ---- from a teacher's most probable tokens: the full loss at k = vocabulary, below it the KL of k + 1 events


@pytest.mark.parametrize("k", [1, 5, VOCAB - 5])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equals_the_divergence_over_the_top_and_the_rest(k, temperature):
    given = make(**HEADS["all"])
    options = {"eta": 0.4, "temperature": temperature}
    top = top_tokens(*given[3:], k, temperature)
    got = distillation_loss(*given[:3], teacher_top=top, **options)
    want = textbook_loss(*given, **options, k=k)
    assert_same(got, want, 2e-5)
    leaves = student_leaves(*given[:2])
    assert_same(torch.autograd.grad(got.loss, leaves), torch.autograd.grad(want[0], leaves), 2e-5)
    assert got.kl < distillation_loss(*given, **options).kl


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
    exact_head = OutputHead(torch.eye(VOCAB, dtype=torch.float64))
    want = textbook_loss(exact, exact_head, labels, teacher.double(), exact_head, eta=1.0, k=k)
    assert got.kl >= 0
    torch.testing.assert_close(got.kl.double(), want[2], rtol=1e-5, atol=3e-5)
    gradients = torch.autograd.grad(got.loss, student)[0], torch.autograd.grad(want[0], exact)[0]
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-4, atol=1e-7)
