"""The loss of CAST, eta*KL(teacher || student) + (1-eta)*CE, without the logits of all tokens in memory.

The forward pass goes over chunks of tokens, from hidden states and output heads, and computes the gradient as well; the
backward pass only scales it. One chunk of logits is in memory instead of about seven (tokens, vocab) tensors.

`hidden_distance` distills hidden states: the logits tell a student what to compute in the end, the hidden states tell
each of its blocks. For a sparse student, whose blocks were each damaged, that is the nearer target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from castlm.core.errors import InputError


class OutputHead(NamedTuple):
    """The map from hidden states to logits: `z = (h @ weight.T + bias) * scale`, then `softcap * tanh(z / softcap)`."""

    weight: Tensor
    """(vocab, hidden)."""
    bias: Tensor | None = None
    """(vocab,)."""
    softcap: float | None = None
    """Gemma 2's bound on |logit|; None for no cap."""
    scale: float = 1.0
    """Granite's 1 / logits_scaling or Cohere's logit_scale."""


class Side(NamedTuple):
    """The student or the teacher, ready for the matmul: cast once, with scale and 1/softcap folded into `hidden`."""

    hidden: Tensor  # (tokens, hidden)
    weight_t: Tensor  # (hidden, vocab), a view
    bias: Tensor | None
    softcap: float | None

    @staticmethod
    def of(hidden: Tensor, head: OutputHead, dtype: torch.dtype) -> Side:
        # z / softcap is wanted, for c tanh(z / c): both factors go into the (tokens, hidden) side, 85 times smaller
        # than the logits.
        factor = head.scale / (head.softcap or 1.0)
        hidden = hidden.detach().reshape(-1, hidden.shape[-1]).to(dtype)
        bias = None if head.bias is None else head.bias.detach().to(dtype) * factor
        weight_t = head.weight.detach().to(dtype).t()
        return Side(hidden if factor == 1 else hidden * factor, weight_t, bias, head.softcap)


def logits_(side: Side, rows: slice, out: Tensor, narrow: Tensor, tanh: Tensor | None) -> Tensor:
    """Writes the logits (chunk, vocab) of `rows` into `out`.

    Args:
        narrow: a buffer for the product if the matmul runs in a narrower dtype than `out`; empty otherwise.
        tanh: a buffer for the tanh of the softcap, which the gradient needs; None if it is not needed.
    """
    product = narrow if narrow.numel() else out
    if side.bias is None:
        torch.mm(side.hidden[rows], side.weight_t, out=product)
    else:
        torch.addmm(side.bias, side.hidden[rows], side.weight_t, out=product)
    if product is narrow:
        out.copy_(narrow)
    if side.softcap is not None:
        out.tanh_()
        if tanh is not None:
            tanh.copy_(out)
        out.mul_(side.softcap)
    return out


def log_softmax_(logits: Tensor) -> Tensor:
    """`log_softmax` over the last axis, in place."""
    return torch.log_softmax(logits, -1, out=logits)


def log_probs_(side: Side, rows: slice, out: Tensor, narrow: Tensor, temperature: float) -> Tensor:
    """Writes the log-probabilities (chunk, vocab) at `temperature` into `out`. Other arguments as in `logits_`."""
    logits = logits_(side, rows, out, narrow, None)
    if temperature != 1:
        logits.div_(temperature)
    return log_softmax_(logits)


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of autocast if it is enabled, else the dtype of `hidden`."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def default_chunk_tokens(device: torch.device) -> int:
    """The number of tokens whose logits are in memory at once.

    The gradient of the head moves 8*vocab*hidden bytes per chunk for 2*chunk*vocab*hidden FLOP. On a CPU the time falls
    little beyond 128 tokens (measured). An accelerator performs some 200 FLOP per byte, according to data sheets.
    """
    return 192 if device.type == "cpu" else 1024


_LEAST = 1e-7  # the smallest probability of the teacher's bucket: in fp32, 1 - sum cannot be told from 0 below it


class TopTokens(NamedTuple):
    """The k most probable next tokens at each position, in no particular order."""

    tokens: Tensor
    """int32, (..., k)."""
    log_probs: Tensor
    """float32, (..., k): from the softmax over the whole vocabulary at the temperature of the loss."""

    def rows(self, chosen: Tensor | slice) -> TopTokens:
        """The positions that a bool mask (...) or a slice selects."""
        return TopTokens(self.tokens[chosen], self.log_probs[chosen])


@torch.no_grad()
def top_tokens(
    hidden: Tensor, head: OutputHead, k: int, temperature: float = 1.0, chunk_tokens: int | None = None
) -> TopTokens:
    """The `k` most probable next tokens of a teacher, for `distillation_loss(teacher_top=...)`.

    Args:
        hidden: (..., hidden), after the final norm.
        k: number of tokens, at most the size of the vocabulary.
        temperature: the same as in the loss, above 0.
        chunk_tokens: as in `distillation_loss`. Matmuls have the same dtype as there.

    Examples:
        >>> head = OutputHead(torch.eye(4))
        >>> top = top_tokens(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), head, k=2)
        >>> sorted(top.tokens[0].tolist())
        [1, 3]
    """
    vocab = head.weight.shape[0]
    dtype = matmul_dtype(hidden)
    wide = torch.promote_types(dtype, torch.float32)
    side = Side.of(hidden, head, dtype)
    num_tokens = len(side.hidden)
    # Logits of a chunk: (192, 49152) fp32 are 36 MiB; of a whole batch (4096, 49152) 768 MiB.
    chunk = max(1, min(chunk_tokens or default_chunk_tokens(hidden.device), num_tokens))
    logits = torch.empty(chunk, vocab, dtype=wide, device=hidden.device)
    # Matmuls in bf16 write bf16 logits, widened before the softmax: with 8 bits, logits of 20 are 0.125 apart.
    narrow = torch.empty(chunk if dtype != wide else 0, vocab, dtype=dtype, device=hidden.device)
    tokens = torch.empty(num_tokens, k, dtype=torch.int32, device=hidden.device)
    log_probs = torch.empty(num_tokens, k, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, num_tokens, chunk):
            rows = slice(start, min(start + chunk, num_tokens))
            count = rows.stop - start
            best = log_probs_(side, rows, logits[:count], narrow[:count], temperature).topk(k, dim=-1, sorted=False)
            tokens[rows], log_probs[rows] = best.indices.to(torch.int32), best.values.float()
    shape = (*hidden.shape[:-1], k)
    return TopTokens(tokens.view(shape), log_probs.view(shape))


def spread_(teacher_top: TopTokens, student: Tensor, out: Tensor) -> Tensor:
    """Writes into `out` the log-probabilities (tokens, vocab) of a teacher that is known by its top-k tokens.

    The probability outside `teacher_top` (tokens, k) is distributed as in the student's log-probabilities `student`
    (tokens, vocab), so that only its sum contributes to the KL.
    """
    tokens = teacher_top.tokens.to(torch.int64)
    # The clamp keeps the bucket of the rest above the rounding of 1 - sum, which may come out negative.
    rest = (1 - teacher_top.log_probs.exp().sum(-1, keepdim=True)).clamp_(min=_LEAST).log_()  # (tokens, 1)
    # The student's probability of all other tokens is a sum over them and not 1 minus the sum over `tokens`: where a
    # student is sure, that difference is rounding noise, which would make the KL negative and its gradient zero. It is
    # computed in `out`, so that nothing of this size is allocated, and is -inf if there are no others.
    others = out.copy_(student).scatter_(1, tokens, float("-inf"))
    largest = others.amax(-1, keepdim=True).clamp_(min=torch.finfo(others.dtype).min)  # -inf - -inf would be NaN
    rest_of_student = others.sub_(largest).exp_().sum(-1, keepdim=True).log_().add_(largest)
    torch.add(student, rest - rest_of_student, out=out)
    return out.scatter_(1, tokens, teacher_top.log_probs.to(out.dtype))


class DistillationLoss(NamedTuple):
    """Three 0-dimensional tensors in nats per token. Only `loss` carries a gradient."""

    loss: Tensor
    ce: Tensor
    kl: Tensor


def distillation_loss(
    student_hidden: Tensor,
    student_head: OutputHead,
    labels: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_head: OutputHead | None = None,
    *,
    teacher_top: TopTokens | None = None,
    eta: float = 1 / 3,
    temperature: float = 1.0,
    num_tokens: int | Tensor | None = None,
    chunk_tokens: int | None = None,
    ignore_index: int = -100,
) -> DistillationLoss:
    """`eta * T^2 * KL(teacher || student) + (1-eta) * CE` in nats, averaged over tokens whose label is not ignored.

    Equal to log_softmax, kl_div and cross_entropy on full logits. Matmuls run in the dtype of autocast, or else of
    `student_hidden`; softmax and logarithms in at least fp32. The gradient of the student's head is accumulated in at
    least fp32. The backward pass hands its gradient over and can run once. The teacher gets no gradient.

    Args:
        student_hidden: (tokens, hidden) or (batch, seq, hidden), after the final norm, as (8, 512, 576).
        student_head: its weight may be tied to the embedding. It gets a gradient only if it requires one.
        labels: int64, `student_hidden.shape[:-1]`, already shifted: `labels[i]` is the token that follows hidden i.
        teacher_hidden: `labels.shape + (teacher_hidden_size,)`. Not read at `eta=0`, where the KL is reported as 0.
        teacher_head: over the same vocabulary as the student's.
        teacher_top: what `top_tokens` returns for the teacher at the same temperature, `labels.shape + (k,)`, in place
            of `teacher_hidden` and `teacher_head`. The KL is then over the top-k tokens and one bucket for all others:
            a lower bound, equal to the KL if k is the whole vocabulary.
        eta: share of the KL term, in [0, 1]; the paper's is 1/3. CE is also reported at `eta=1`.
        temperature: T, which divides both logits in the KL term only.
        num_tokens: the divisor of the summed loss, in place of this call's number of tokens that count. With gradient
            accumulation, pass the number in the whole global batch.
        chunk_tokens: number of tokens whose logits are in memory at once. By default 192 on a CPU and 1,024 elsewhere.
        ignore_index: the label of tokens that do not count.

    Raises:
        InputError: tokens or vocabularies that do not match, a missing teacher, or fp16 matmuls with gradients
            (1/num_tokens underflows before a loss scaler can act).

    Reference: CAST, arXiv 2509.25996, Eq. 13.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> hidden, head = torch.randn(3, 4), OutputHead(torch.randn(5, 4))
        >>> labels = torch.tensor([1, 4, -100])
        >>> loss, ce, kl = distillation_loss(hidden, head, labels, teacher_hidden=hidden, teacher_head=head)
        >>> abs(kl.item()) < 1e-6 and torch.allclose(loss, 2 / 3 * ce)  # the teacher is the student
        True
    """
    teacher: tuple[Tensor, OutputHead] | TopTokens | None = None
    if eta:
        teacher = teacher_top
        if teacher is None and teacher_hidden is not None and teacher_head is not None:
            teacher = teacher_hidden, teacher_head
        if teacher is None:
            raise InputError(f"eta is {eta} but no teacher is given: pass teacher_hidden and teacher_head, or eta=0")
    # torch would read a part of tensors that do not match, or broadcast them.
    theirs = () if teacher is None else teacher[:1]  # the hidden states, or the tokens of `TopTokens`
    shapes = [tuple(states.shape[:-1]) for states in (student_hidden, *theirs)]
    if any(shape != labels.shape for shape in shapes):
        raise InputError(f"hidden states or top tokens of {shapes} tokens do not match labels {tuple(labels.shape)}")
    if eta and teacher_head is not None and len(teacher_head.weight) != len(student_head.weight):
        raise InputError(
            f"the teacher's vocabulary has {len(teacher_head.weight)} entries, the student's "
            f"{len(student_head.weight)}: distillation needs the same vocabulary, or eta=0"
        )

    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (student_hidden, student_head.weight, student_head.bias)
    )
    device = student_hidden.device.type
    dtype = matmul_dtype(student_hidden)
    if needs_grad and dtype == torch.float16:
        raise InputError("the distillation loss has no fp16 gradient (1/num_tokens underflows): use bf16 or fp32")

    real = labels != ignore_index
    # a tensor: reading it would wait for the device
    count = real.sum() if num_tokens is None else torch.as_tensor(num_tokens)
    # Selecting rows would synchronize on an accelerator: there, ignored rows get the weight 0 instead.
    if device == "cpu" and not bool(real.all()):
        student_hidden, labels = student_hidden[real], labels[real]
        if isinstance(teacher, TopTokens):
            teacher = teacher.rows(real)
        elif teacher is not None:
            teacher = teacher[0][real], teacher[1]
        real = real[real]  # all True, and as long as the rows that are left
    side: Side | TopTokens | None = None
    if isinstance(teacher, TopTokens):
        side = TopTokens(teacher.tokens.flatten(0, -2), teacher.log_probs.flatten(0, -2))
    elif teacher is not None:
        side = Side.of(*teacher, dtype)

    plan = _Plan(
        labels=labels.masked_fill(~real, 0).reshape(-1),
        # At least fp32: in bf16, 1/num_tokens would be off by up to 0.4 %, alike for all tokens of a run.
        token_weights=real.to(torch.promote_types(dtype, torch.float32)).reshape(-1) / count.clamp(min=1),
        teacher=side,
        eta=eta,
        temperature=temperature,
        dtype=dtype,
        chunk_tokens=chunk_tokens or default_chunk_tokens(student_hidden.device),
    )
    hidden = student_hidden.reshape(-1, student_hidden.shape[-1])
    if needs_grad:
        return DistillationLoss(*_ChunkedLoss.apply(hidden, *student_head, plan))
    return _chunked_loss(hidden, student_head, plan, (False, False, False))[0]


class _Plan(NamedTuple):
    """The inputs of one call that carry no gradient."""

    labels: Tensor  # (tokens,), 0 where ignored
    token_weights: Tensor  # (tokens,), 1/num_tokens, or 0 where ignored
    teacher: Side | TopTokens | None
    eta: float
    temperature: float
    dtype: torch.dtype  # of the matmuls
    chunk_tokens: int


class _Buffers(NamedTuple):
    """The (chunk, vocab) tensors, allocated once: on a CPU new pages cost more than the arithmetic on them."""

    student: Tensor
    teacher: Tensor
    scratch: Tensor
    tempered: Tensor
    tanh: Tensor
    narrow: Tensor  # in the dtype of the matmuls, if that is narrower than fp32

    @staticmethod
    def of(plan: _Plan, student: Side, chunk: int, needs_grad: bool) -> _Buffers:
        def empty(wanted: bool, dtype: torch.dtype = plan.token_weights.dtype) -> Tensor:
            size = (chunk, student.weight_t.shape[1]) if wanted else (0,)
            return torch.empty(size, dtype=dtype, device=plan.labels.device)

        distills = plan.teacher is not None
        return _Buffers(
            student=empty(True),
            teacher=empty(distills),
            scratch=empty(distills),
            tempered=empty(distills and plan.temperature != 1),
            tanh=empty(needs_grad and student.softcap is not None),
            narrow=empty(plan.dtype != plan.token_weights.dtype, plan.dtype),
        )

    def first(self, count: int) -> _Buffers:
        return _Buffers(*(buffer[:count] for buffer in self))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float, plan: _Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = OutputHead(weight, bias, softcap, scale)
        losses, ctx.grads = _chunked_loss(hidden, head, plan, ctx.needs_input_grad[:3])
        # Both are reported alone; a gradient through them would be silently zero.
        ctx.mark_non_differentiable(losses.ce, losses.kl)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None  # with no other reference, AccumulateGrad does not copy them
        if grads is None:
            raise RuntimeError("distillation_loss can run backward once: call it again for another backward pass")
        # On an accelerator the comparison would synchronize, and the multiplication is cheap.
        if grad_loss.device.type != "cpu" or grad_loss != 1:
            for grad in grads:
                if grad is not None:
                    grad.mul_(grad_loss)
        return (*grads, None, None, None)


def _chunked_loss(
    hidden: Tensor, head: OutputHead, plan: _Plan, needs: tuple[bool, bool, bool]
) -> tuple[DistillationLoss, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The losses, and the gradients of hidden, weight and bias that `needs` asks for."""
    chunk = max(1, min(plan.chunk_tokens, len(hidden)))
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        student = Side.of(hidden, head, plan.dtype)
        # All chunks write into the same buffers; the last one, which may be shorter, into their first rows.
        all_buffers = _Buffers.of(plan, student, chunk, any(needs))
        ce = plan.token_weights.new_zeros(())
        kl = torch.zeros_like(ce)
        grads = _Gradients(hidden, head, needs, ce.dtype)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, min(start + chunk, len(hidden)))
            buffers = all_buffers.first(rows.stop - start)
            chunk_ce, chunk_kl = _chunk_(student, plan, rows, buffers, any(needs))
            ce += chunk_ce @ plan.token_weights[rows]  # a weighted sum over tokens: (192,) @ (192,)
            kl += chunk_kl @ plan.token_weights[rows]
            if any(needs):
                grads.add_(student, plan.token_weights[rows], rows, buffers)
        return DistillationLoss(plan.eta * kl + (1 - plan.eta) * ce, ce, kl), grads.finish()


def _chunk_(student: Side, plan: _Plan, rows: slice, buffers: _Buffers, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """The CE and the KL of each token, (chunk,). Leaves d loss / d logits (chunk, vocab) in `buffers.student`.

    That gradient is `(1-eta) (p - onehot) + eta T (p_T - q_T)`, with p the student's and q the teacher's probabilities.
    """
    eta, T = plan.eta, plan.temperature
    labels = plan.labels[rows, None]  # (192, 1)
    p = p_T = logits_(student, rows, buffers.student, buffers.narrow, buffers.tanh if needs_grad else None)
    if plan.teacher is not None and T != 1:
        # Before the next line overwrites the logits, which both softmaxes read.
        p_T = log_softmax_(torch.div(p, T, out=buffers.tempered))
    log_softmax_(p)  # (192, 49152), in place of the logits, as all that follows: nothing of this size is allocated
    ce = -p.gather(1, labels)[:, 0]
    kl = torch.zeros_like(ce)
    if plan.teacher is not None:
        if isinstance(plan.teacher, TopTokens):
            q_T = spread_(plan.teacher.rows(rows), p_T, buffers.teacher)
        else:
            q_T = log_probs_(plan.teacher, rows, buffers.teacher, buffers.narrow, T)
        torch.sub(q_T, p_T, out=buffers.scratch)  # log q - log p, (192, 49152)
        q_T.exp_()
        kl = buffers.scratch.mul_(q_T).sum(-1) * T**2  # Eq. 13: sum of q (log q - log p)
    if needs_grad:
        p.exp_()
        if plan.teacher is not None and T == 1:
            p.sub_(q_T, alpha=eta)  # (1-eta) p + eta (p - q) = p - eta q
        elif plan.teacher is not None:
            # d KL_T / d logits = (p_T - q_T) / T, and the loss multiplies the KL by T^2 (Hinton et al. 2015)
            p.mul_(1 - eta).add_(p_T.exp_().sub_(q_T), alpha=eta * T)
        p.scatter_(1, labels, p.gather(1, labels) - (1 - eta))  # - (1-eta) onehot
    return ce, kl


class _Gradients:
    """The gradients of hidden, weight and bias, accumulated chunk by chunk; None if not needed."""

    def __init__(self, hidden: Tensor, head: OutputHead, needs: tuple[bool, bool, bool], wide: torch.dtype) -> None:
        self.head = head
        # The rows of a chunk are written once; weight and bias get a share of every chunk, and begin at zero.
        self.hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.weight = torch.zeros_like(head.weight, dtype=wide) if needs[1] else None
        self.bias = torch.zeros_like(head.bias, dtype=wide) if head.bias is not None and needs[2] else None

    def add_(self, student: Side, token_weights: Tensor, rows: slice, buffers: _Buffers) -> None:
        grad = buffers.student
        if student.softcap is not None:  # d (c tanh(z / c)) / dz = 1 - tanh(z / c)^2
            torch.ops.aten.tanh_backward.grad_input(grad, buffers.tanh, grad_input=grad)
        scaled = token_weights * self.head.scale  # dz / d(h @ weight.T + bias), and the mean over tokens: (192,)
        if self.bias is not None:
            self.bias += scaled @ grad
        if buffers.narrow.numel():
            grad = buffers.narrow.copy_(grad)
        if self.hidden is not None:
            self.hidden[rows] = torch.mm(grad, student.weight_t.t()) * scaled[:, None]  # (192, 49152) @ (49152, 576)
        if self.weight is not None:
            # student.hidden already includes scale / softcap, so that only softcap is multiplied back
            capped = token_weights * (student.softcap or 1.0)
            hidden = (student.hidden[rows] * capped[:, None]).to(grad.dtype)
            if grad.dtype == self.weight.dtype:
                self.weight.addmm_(grad.t(), hidden)  # (49152, 192) @ (192, 576), summed over the chunks
            else:
                self.weight += torch.mm(grad.t(), hidden)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        weight = None if self.weight is None else self.weight.to(self.head.weight.dtype)
        bias = None if self.bias is None or self.head.bias is None else self.bias.to(self.head.bias.dtype)
        return self.hidden, weight, bias


def hidden_distance(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    labels: Tensor,
    *,
    num_tokens: int | Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    r"""Mean over blocks and tokens of the relative distance of two residual streams, in at least fp32.

    With `s` and `t` (hidden,) the stream of student and teacher at one token behind one block:

    .. code-block:: text

        distance = log(1 + |s - t|^2 / |t|^2)

    It is 0 where the student agrees and log 2 where its stream is zero, whatever the width and depth of the model. It
    adds up over micro-batches and ranks, and a rotation of both streams leaves it as it is. The logarithm bounds what
    one token counts: most models give the first token a stream that is hundreds of times the usual size (22,700
    against 150 in SmolLM2-135M), and a student that gives it to another token is at a squared distance of thousands.

    Args:
        student: the stream behind each block, each `labels.shape + (hidden,)`.
        teacher: the same of the teacher, which gets no gradient.
        labels: int64; tokens whose label is `ignore_index` do not count.
        num_tokens: the divisor, in place of this call's number of tokens that count; as for `distillation_loss`.

    Reference: SquareHead, Kurtic et al. 2023 (arXiv 2310.06927), which normalizes a whole batch at once and has no
    logarithm.

    Examples:
        >>> states, labels = torch.ones(1, 3, 4), torch.tensor([[1, 2, -100]])
        >>> hidden_distance([1.5 * states], [states], labels)  # log 1.25
        tensor(0.2231)
    """
    real = labels != ignore_index
    count = real.sum() if num_tokens is None else torch.as_tensor(num_tokens, device=labels.device)
    weights = real / count.clamp(min=1) / len(student)  # (8, 512): the mean over tokens, then over blocks
    pairs = zip(student, teacher, strict=True)
    distances = [_Distance.apply(ours, theirs.detach(), weights) for ours, theirs in pairs]
    return torch.stack(distances).sum()


class _Distance(torch.autograd.Function):
    """The weighted sum of the distances of all tokens behind one block.

    The backward pass computes the difference again, so that nothing is kept but the states themselves: the student's
    are there anyway, and the teacher's may be narrower than a difference.
    """

    @staticmethod
    def forward(ctx: Any, ours: Tensor, theirs: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(ours, theirs, weights)
        _, ratio, _ = _compare(ours, theirs)
        return (ratio.log1p() * weights).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ours, theirs, weights = ctx.saved_tensors
        difference, ratio, power = _compare(ours, theirs)
        # d log(1 + |s - t|^2 / |t|^2) / ds = 2 (s - t) / (|t|^2 (1 + ratio))
        per_token = 2 * grad * weights / (power * (1 + ratio))  # (8, 512)
        return difference.mul_(per_token[..., None]).to(ours.dtype), None, None


def _compare(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The difference (..., hidden), and by token `|s - t|^2 / |t|^2` and `|t|^2` (...), in at least fp32."""
    wide = torch.promote_types(ours.dtype, torch.promote_types(theirs.dtype, torch.float32))
    target = theirs.to(wide)
    power = target.square().sum(-1).clamp(min=torch.finfo(wide).tiny)  # a stream of zeros divides by 1e-38, not by 0
    difference = ours.to(wide) - target
    return difference, difference.square().sum(-1) / power, power
