"""The changes of basis of the residual stream: a permutation, or a rotation with the norms' gains folded away.

A norm's gain acts on single channels, so that only a permutation of the stream passes it. Folding moves each gain into
the layers that read the norm, and for LayerNorm divides its bias by the gain: then RMSNorm lets every rotation pass,
and LayerNorm every rotation that leaves the vector of ones in place, for its mean is along that vector.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from castlm.core.errors import InputError
from castlm.core.pattern import NM
from castlm.oneshot.block_basis import Change, Statistic, Statistics
from castlm.oneshot.families import Block, Matrix, Norm, Wiring
from castlm.oneshot.permutation import find_permutation
from castlm.oneshot.rotation import Term, learn_rotations, solved_errors

_RATE = 0.03  # of Adam, for the skew matrix of the rotation
_SCORE_ROWS = 4096  # of all layers together that a permutation is chosen by
_SMALLEST_GAIN = 1e-6
_PERMUTES, _FARTHEST = 0.9, 0.5  # each column's largest entry; the distance of embeddings that training has changed


class Stream:
    """The residual stream of a model, with the statistics of all that reads it.

    Args:
        wiring: of `model`.
        rotates: whether it is going to be rotated.
    """

    def __init__(self, model: PreTrainedModel, wiring: Wiring, pattern: NM, rotates: bool) -> None:
        self.model, self.wiring, self.pattern, self.rotates = model, wiring, pattern, rotates
        self.gains: list[Tensor] = []
        self.was_tied = False
        self.read: list[Statistic | None] = []
        """By the entries of `wiring.reads`; None where all that reads the norm stays dense."""
        self.pruned: set[str] = set()
        self.written: list[Term] = []
        self.undo: Callable[[], None] | None = None
        """Undoes the change of the stream's basis, up to rounding; None while there is none."""
        self.basis: Tensor | None = None
        """The change itself, as `castlm.core.hidden.in_stream_basis` takes it; None while there is none."""

    @property
    def norms(self) -> list[tuple[Norm, list[Matrix]]]:
        """Every norm of the stream with what reads it, the output head among them."""
        head = self.model.get_output_embeddings()
        inside = [(norm, readers) for norm, readers in self.wiring.reads if norm is not None]
        return [*inside, (self.wiring.final, [Matrix("head", head.weight.data)])]

    @property
    def is_read(self) -> bool:
        """Whether any layer that is pruned reads it."""
        return any(statistic is not None for statistic in self.read)

    def obstacle(self) -> str | None:
        """Why this model's stream cannot be rotated; None where it can."""
        if self.wiring.rotation_obstacle:
            return self.wiring.rotation_obstacle
        smallest = min(float(_gain(norm).abs().min()) for norm, _ in self.norms)
        return f"a norm has a gain of {smallest:.1g}, which cannot be folded" if smallest < _SMALLEST_GAIN else None

    def fold_(self) -> None:
        """Gives the head a weight of its own, and moves the gain of every norm into the layers that read it."""
        self.was_tied = is_tied(self.model)
        if self.was_tied:
            untie_(self.model)
        self.gains = [_gain(norm) for norm, _ in self.norms]
        for (norm, readers), gain in zip(self.norms, self.gains):
            norm.weight.fill_(norm.unit)
            if norm.bias is not None:
                norm.bias.div_(gain)
            for matrix in readers:
                matrix.weight.mul_(gain)

    def unfold_(self) -> None:
        """Undoes `fold_`, up to the rounding of a product and a quotient."""
        for (norm, readers), gain in zip(self.norms, self.gains):
            norm.weight.copy_(gain - (1 - norm.unit))
            if norm.bias is not None:
                norm.bias.mul_(gain)
            for matrix in readers:
                matrix.weight.div_(gain)
        self.read = [s if s is None else s.scaled(gain) for s, gain in zip(self.read, self.gains)]
        if self.was_tied:
            tie_(self.model)

    def see(self, block: Block, statistics: Statistics) -> None:
        """Keeps all of the statistics of what a block reads; for a rotation, the diagonals of what it writes too."""
        for matrix in (block.attention.output, *(mlp.down for mlp in block.mlps)) if self.rotates else ():
            if matrix.layer in statistics:
                statistic, weight = statistics[matrix.layer], matrix.weight.float()
                self.written.append(Term(weight, statistic.inverse_diagonal, statistic.energy(weight), "out", (0,)))
        for _, readers in block.reads:
            found = (statistics[matrix.layer].hessian for matrix in readers if matrix.layer in statistics)
            seen = list({id(hessian): hessian for hessian in found}.values())
            # experts read a part of the tokens each: their sum counts a token as often as it is routed
            self.read.append(Statistic(functools.reduce(torch.add, seen)) if seen else None)
        self.pruned |= statistics.keys()

    def permute_(self, change: Change) -> None:
        """Permutes the stream, if that lowers the mean error of the layers that read it."""
        readers = self._readers()
        rows = max(1, _SCORE_ROWS // sum(len(weights) for _, weights in readers))
        generator = torch.Generator().manual_seed(0)
        scores = []
        for statistic, weights in readers:
            for weight in weights:
                chosen = torch.randperm(len(weight), generator=generator)[:rows].to(weight.device)
                scores.append(statistic.importance(weight)[chosen] * (len(weight) / len(chosen)))
        order = find_permutation(torch.cat(scores), self.pattern).to(scores[0].device)
        before = self._error(readers)
        after = self._error([(s.permuted(order), [weight[:, order] for weight in weights]) for s, weights in readers])
        if change.decide(before, after):
            self._turn_(lambda matrix: matrix[..., order], lambda gain: gain[order])
            self.basis, back = order, order.argsort()
            self.undo = lambda: self._turn_(lambda matrix: matrix[..., back], lambda gain: gain[back])

    def rotate_(self, change: Change, iterations: int, alive: Callable[[], None]) -> None:
        """Rotates the folded stream, if that lowers the mean error of the layers that read it."""
        readers, hidden = self._readers(), self.wiring.hidden
        terms = [Term(weight, s.inverse, s.energy(weight), "in", (0,)) for s, weights in readers for weight in weights]
        terms += self.written
        keep_mean = any(norm.is_layer_norm for norm, _ in self.norms)
        (rotation,) = learn_rotations(
            terms,
            1,
            hidden,
            self.pattern,
            iterations=iterations,
            learning_rate=_RATE,
            keep_mean=keep_mean,
            alive=alive,
        )
        before = self._error(readers)
        after = self._error(
            [(s.rotated(rotation[None], (0,)), [weight @ rotation for weight in weights]) for s, weights in readers]
        )
        if not change.decide(before, after):
            return
        self._turn_(lambda matrix: matrix.float() @ rotation, lambda gain: gain)

        def undo() -> None:
            self._turn_(lambda matrix: matrix.float() @ rotation.T, lambda gain: gain)
            self.unfold_()

        self.basis, self.undo = rotation, undo

    def _readers(self) -> list[tuple[Statistic, list[Tensor]]]:
        """The weights that are pruned among those that read the stream, by their input and with its statistic."""
        return [
            (statistic, [matrix.weight.float() for matrix in readers if matrix.layer in self.pruned])
            for statistic, (_, readers) in zip(self.read, self.wiring.reads)
            if statistic is not None
        ]

    def _error(self, readers: list[tuple[Statistic, list[Tensor]]]) -> float:
        """The mean over the weights."""
        errors = [error for s, weights in readers for error in solved_errors(weights, s.hessian, self.pattern)]
        return sum(errors) / len(errors)

    def _turn_(self, turn: Callable[[Tensor], Tensor], turn_gain: Callable[[Tensor], Tensor]) -> None:
        """Applies a change of basis `turn` of the last axis to all that touches the stream, in place."""
        embeddings = list(self.wiring.embeddings)
        if not is_tied(self.model):
            embeddings.append(self.model.get_output_embeddings().weight.data)
        columns = embeddings + [matrix.weight for _, readers in self.wiring.reads for matrix in readers]
        for weight in columns:
            weight.copy_(turn(weight))
        for matrix in self.wiring.writes:
            matrix.weight.copy_(turn(matrix.weight.T).T)
            if matrix.bias is not None:
                matrix.bias.copy_(turn(matrix.bias))
        for norm in [norm for norm, _ in self.norms] + self.wiring.fixed_norms:
            norm.weight.copy_(turn_gain(norm.weight))
            if norm.bias is not None:
                norm.bias.copy_(turn(norm.bias))


def _gain(norm: Norm) -> Tensor:
    return norm.weight.detach() + (1 - norm.unit)


def basis_between(dense: Tensor, given: Tensor) -> Tensor | None:
    """The basis of a model's residual stream, by its input embeddings (vocab, hidden) and those of the dense model.

    It is the rotation Q that brings `dense @ Q` nearest to `given` (orthogonal Procrustes), so that trained embeddings
    have one too.

    Returns:
        What `castlm.core.hidden.in_stream_basis` takes: a permutation (hidden,) int64 where Q is one, else Q (hidden,
        hidden) fp32; None for the identity.

    Raises:
        InputError: no rotation brings the embeddings near each other.
    """
    step = max(1, len(dense) // (4 * dense.shape[1]))
    dense, given = dense[::step].double(), given[::step].double()
    left, _, right = torch.linalg.svd(dense.T @ given)
    rotation = left @ right
    largest, permutation = rotation.max(dim=0)
    is_permutation = bool((largest > _PERMUTES).all())
    turned = dense[:, permutation] if is_permutation else dense @ rotation
    if not (turned - given).norm() <= _FARTHEST * given.norm():
        raise InputError("its embeddings are not those of the dense model in another basis")
    if not is_permutation:
        return rotation.float()
    return None if torch.equal(permutation, torch.arange(len(permutation))) else permutation


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output head has the weight of the input embeddings."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def untie_(model: PreTrainedModel) -> None:
    """Gives the output head a weight of its own, a copy of the embeddings; on the meta device too."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False


def tie_(model: PreTrainedModel) -> None:
    """Undoes `untie_`."""
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.config.tie_word_embeddings = True
