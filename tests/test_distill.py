"""The chunked loss against log_softmax, kl_div and cross_entropy on full logits, in value and in every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from castlm.core import distill
from castlm.core.distill import OutputHead, Side, distillation_loss
from castlm.core.errors import InputError

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


def plain_distillation_loss(student_logits, teacher_logits, labels, eta, temperature):
    """The textbook formulation; (loss, ce, kl), means over the tokens whose label is not -100."""
    real = labels != -100
    ce = F.cross_entropy(student_logits[real], labels[real])
    kl = F.kl_div(
        F.log_softmax(student_logits[real] / temperature, -1),
        F.log_softmax(teacher_logits[real] / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    kl = kl * temperature**2
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


@pytest.mark.parametrize("chunk_tokens", [1, 3, None])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("eta", [0.0, 1 / 3, 1.0])
@pytest.mark.parametrize("head", HEADS)
def test_equals_the_plain_formulation(head, eta, temperature, chunk_tokens):
    hidden, student, labels, teacher_hidden, teacher = make(**HEADS[head])
    got = distillation_loss(
        hidden, student, labels, teacher_hidden, teacher, eta=eta, temperature=temperature, chunk_tokens=chunk_tokens
    )
    want = plain_distillation_loss(
        plain_logits(hidden, student), plain_logits(teacher_hidden, teacher).detach(), labels, eta, temperature
    )
    assert_same(got[:2], want[:2])
    torch.testing.assert_close(got.kl, want[2].detach() * (eta > 0), rtol=1e-5, atol=1e-5)
    leaves = student_leaves(hidden, student)
    assert_same(torch.autograd.grad(got.loss, leaves), torch.autograd.grad(want[0], leaves))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradients_against_finite_differences_in_float64(temperature):
    hidden, student, labels, teacher_hidden, teacher = make(torch.float64, **HEADS["all"])
    leaves = student_leaves(hidden, student)

    def loss():
        return distillation_loss(
            hidden, student, labels, teacher_hidden, teacher, eta=0.4, temperature=temperature, chunk_tokens=4
        ).loss

    assert loss().dtype == torch.float64
    for leaf, gradient in zip(leaves, torch.autograd.grad(loss(), leaves)):
        direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(3), dtype=leaf.dtype)
        with torch.no_grad():
            leaf += 1e-6 * direction
            above = loss()
            leaf -= 2e-6 * direction
            below = loss()
            leaf += 1e-6 * direction
        assert float((gradient * direction).sum()) == pytest.approx(float(above - below) / 2e-6, rel=1e-7, abs=1e-9)


def test_tied_head_adds_to_the_embedding_gradient():
    _, _, labels, teacher_hidden, teacher = make(ignored=())
    embedding = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(5), requires_grad=True)
    hidden = F.embedding(labels.roll(1), embedding).sin()
    got = distillation_loss(hidden, OutputHead(embedding), labels, teacher_hidden, teacher)
    want = plain_distillation_loss(
        hidden @ embedding.T, plain_logits(teacher_hidden, teacher).detach(), labels, 1 / 3, 1.0
    )
    assert_same(torch.autograd.grad(got.loss, embedding, retain_graph=True), torch.autograd.grad(want[0], embedding))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_num_tokens_makes_accumulation_equal_one_batch(as_tensor):
    hidden, student, labels, teacher_hidden, teacher = make()
    whole = distillation_loss(hidden, student, labels, teacher_hidden, teacher)
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
    hidden, student, labels, teacher_hidden, teacher = make(ignored=range(TOKENS), **HEADS["all"])
    result = distillation_loss(hidden, student, labels, teacher_hidden, teacher, num_tokens=num_tokens)
    assert [float(x.detach()) for x in result] == [0, 0, 0]
    for gradient in torch.autograd.grad(result.loss, student_leaves(hidden, student)):
        assert not gradient.any()


def test_zero_token_weights_equal_selection():
    """The path of an accelerator, where ignored rows keep their place and get the weight 0."""
    hidden, student, labels, teacher_hidden, teacher = make(**HEADS["all"])
    want = distillation_loss(hidden, student, labels, teacher_hidden, teacher, eta=0.3, temperature=2.0)
    real = labels != -100
    plan = distill._Plan(
        labels=labels.masked_fill(~real, 0),
        token_weights=real / real.sum(),
        teacher=Side.of(teacher_hidden, teacher, torch.float32),
        eta=0.3,
        temperature=2.0,
        dtype=torch.float32,
        chunk_tokens=4,
    )
    got = distill._ChunkedLoss.apply(hidden, *student, plan)
    assert_same(got, want)
    leaves = student_leaves(hidden, student)
    assert_same(torch.autograd.grad(got[0], leaves), torch.autograd.grad(want.loss, leaves))


def test_another_ignore_index():
    hidden, student, labels, teacher_hidden, teacher = make()
    want = distillation_loss(hidden, student, labels, teacher_hidden, teacher)
    got = distillation_loss(
        hidden, student, labels.masked_fill(labels == -100, 50_000), teacher_hidden, teacher, ignore_index=50_000
    )
    assert_same(got, want)


def test_backward_scales_by_the_incoming_gradient_and_runs_once():
    hidden, student, labels, teacher_hidden, teacher = make()
    leaves = student_leaves(hidden, student)
    loss = distillation_loss(hidden, student, labels, teacher_hidden, teacher).loss
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="backward once"):
        torch.autograd.grad(loss, leaves)
    loss = distillation_loss(hidden, student, labels, teacher_hidden, teacher).loss
    assert_same(torch.autograd.grad(-3 * loss, leaves), [-3 * g for g in once])


def test_only_what_needs_a_gradient_gets_one():
    hidden, student, labels, teacher_hidden, teacher = make()
    want = torch.autograd.grad(distillation_loss(hidden, student, labels, teacher_hidden, teacher).loss, hidden)
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
def test_bf16_autocast_follows_the_plain_formulation_under_autocast(head):
    hidden, student, labels, teacher_hidden, teacher = make(**HEADS[head])
    leaves = student_leaves(hidden, student)
    with torch.autocast("cpu", torch.bfloat16):
        got = distillation_loss(hidden, student, labels, teacher_hidden, teacher, chunk_tokens=4)
    gradients = torch.autograd.grad(got.loss, leaves)
    assert got.loss.dtype == torch.float32
    assert [g.dtype for g in gradients] == [torch.float32] * len(leaves)
    exact = plain_distillation_loss(
        plain_logits(hidden, student), plain_logits(teacher_hidden, teacher).detach(), labels, 1 / 3, 1.0
    )
    assert_same([got.loss], [exact[0]], tolerance=0.03)
    for gradient, want in zip(gradients, torch.autograd.grad(exact[0], leaves)):
        assert float((gradient - want).norm() / want.norm()) < 0.03


def test_bf16_weights_get_bf16_gradients_close_to_fp32():
    hidden, student, labels, teacher_hidden, teacher = make(torch.bfloat16)
    got = distillation_loss(hidden, student, labels, teacher_hidden, teacher, chunk_tokens=2)
    leaves = student_leaves(hidden, student)
    gradients = torch.autograd.grad(got.loss, leaves)
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 2
    wide = [t.detach().float().requires_grad_() for t in leaves]
    exact = distillation_loss(
        wide[0], OutputHead(wide[1]), labels, teacher_hidden.float(), OutputHead(teacher.weight.float())
    )
    for gradient, want in zip(gradients, torch.autograd.grad(exact.loss, wide)):
        assert float((gradient.float() - want).norm() / want.norm()) < 0.03


REFUSALS = {
    "no teacher": ({"teacher_hidden": None}, "no teacher is given"),
    "labels": ({"labels": torch.zeros(4, dtype=torch.int64)}, r"do not match labels \(4,\)"),
    "vocabulary": ({"teacher_head": OutputHead(torch.zeros(40, TEACHER_HIDDEN))}, "has 40 entries, the student's 37"),
    "teacher tokens": ({"teacher_hidden": torch.zeros(3, TEACHER_HIDDEN)}, r"\(3,\)"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_line_with_the_value(case):
    change, message = REFUSALS[case]
    names = ("student_hidden", "student_head", "labels", "teacher_hidden", "teacher_head")
    with pytest.raises(InputError, match=message) as raised:
        distillation_loss(**{**dict(zip(names, make())), **change})
    assert "\n" not in str(raised.value)


def test_fp16_gradients_are_refused_and_fp16_losses_are_not():
    hidden, student, labels, teacher_hidden, teacher = make(torch.float16)
    with pytest.raises(InputError, match="fp16"):
        distillation_loss(hidden, student, labels, teacher_hidden, teacher)
    with torch.no_grad():
        assert torch.isfinite(distillation_loss(hidden, student, labels, teacher_hidden, teacher).loss)
