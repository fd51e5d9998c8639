"""The rotation of the residual stream, with the norms' gains folded away (`rotate residual`, off by default).

A norm's gain acts on single channels. Folding moves each gain into the layers that read the norm, and divides the bias
of a LayerNorm by the gain. Then every rotation passes through RMSNorm, and through LayerNorm every rotation that keeps
the vector of ones, along which the mean lies (SliceGPT, Ashkboos et al. 2024).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from castlm.core.errors import InputError
from castlm.core.nm import NM
from castlm.data.calibration import CalibrationText
from castlm.oneshot.axes import Term, learn_rotations, sampled_energies, solved_errors
from castlm.oneshot.basis import (
    Statistic,
    Statistics,
    distance,
    inverse_diagonal,
    inverse_of,
    statistics_of,
    tolerance_of,
)
from castlm.oneshot.families import Block, Matrix, Norm, Wiring
from castlm.oneshot.inputs import see_inputs
from castlm.oneshot.report import BasisReport, Change
from castlm.oneshot.solvers import SOLVERS
from castlm.oneshot.source import MemoryModel
from castlm.oneshot.walk import walk

_SMALLEST_GAIN = 1e-6
_CHECK_TOKENS = 256
_IDENTITY = 0.9  # a rotation whose diagonal is above this everywhere is treated as the identity
_FARTHEST = 0.5  # largest relative distance by which training may have moved the embeddings


@torch.no_grad()
def rotate_residual_(
    source: MemoryModel, wiring: Wiring, text: CalibrationText, pattern: NM, iterations: int, report: BasisReport
) -> None:
    """Rotates the residual stream of a dense model in place, if that lowers the mean error of the layers that read it.

    Reads the whole text once more. Memory beyond the model: two fp32 matrices (hidden, hidden) for each norm of the
    stream. The layers of `source` will be pruned, and `report` receives the result. Raises `InputError` for a family or
    a model whose stream cannot be rotated.
    """
    model = source.model
    stream = Stream(model, wiring, pattern)
    if obstacle := stream.obstacle():
        raise InputError(f"the residual stream of {wiring.family} cannot be rotated: {obstacle}; use rotate values")
    sample = text.sequences[:1, :_CHECK_TOKENS].to(model.device)
    before = model(input_ids=sample, use_cache=False).logits
    stream.fold_()
    for visit in walk(source, text):
        statistics: Statistics = {}
        if visit.inside:
            assert visit.inputs is not None
            statistics = statistics_of(see_inputs(visit.inside, visit.inputs, SOLVERS["sparsegpt"], len(text)))
        stream.add_statistics(wiring.blocks[visit.index], statistics)
    why_not = "no pruned layer reads it"
    change = report.change("residual stream rotated")
    if any(statistic is not None for statistic in stream.read):
        why_not = "the error of its layers would not fall"
        stream.learn_rotation_(change, iterations)
    if stream.rotation is None:
        stream.unfold_()
        report.notes.append(f"residual stream: not rotated, because {why_not}")
        return
    moved = distance(before, model(input_ids=sample, use_cache=False).logits)
    if moved <= tolerance_of(model.dtype):
        report.stream_basis, report.untied, report.moved = stream.rotation, stream.was_tied, moved
        return
    stream.rotate_(stream.rotation.T)
    stream.unfold_()
    report.notes.append(f"residual stream: not rotated, because the logits would move by {moved:.1g}")


class Stream:
    """The residual stream of a model, with the statistics of its readers."""

    def __init__(self, model: PreTrainedModel, wiring: Wiring, pattern: NM) -> None:
        self.model, self.wiring, self.pattern = model, wiring, pattern
        self.gains: list[Tensor] = []
        self.was_tied = False
        self.read: list[Statistic | None] = []
        """The statistic of each entry of `wiring.reads`; None if all of its readers stay dense."""
        self.pruned: set[str] = set()
        self.written: list[Term] = []
        self.rotation: Tensor | None = None
        """(hidden, hidden); None until the stream is rotated."""

    @property
    def norms(self) -> list[tuple[Norm, list[Matrix]]]:
        """Every norm of the stream with its readers, the output head included."""
        head = self.model.get_output_embeddings()
        inside = [(norm, readers) for norm, readers in self.wiring.reads if norm is not None]
        return [*inside, (self.wiring.final, [Matrix("head", head.weight.data)])]

    def obstacle(self) -> str | None:
        """Why this model's stream cannot be rotated; None if it can."""
        if self.wiring.rotation_obstacle:
            return self.wiring.rotation_obstacle
        smallest = min(float(norm.gain.abs().min()) for norm, _ in self.norms)
        return f"a norm has a gain of {smallest:.1g}, which cannot be folded" if smallest < _SMALLEST_GAIN else None

    def fold_(self) -> None:
        """Gives the head a weight of its own, and moves the gain of every norm into the layers that read it."""
        self.was_tied = is_tied(self.model)
        if self.was_tied:
            untie_(self.model)
        self.gains = [norm.gain for norm, _ in self.norms]
        for (norm, readers), gain in zip(self.norms, self.gains):
            norm.weight.fill_(norm.unit)
            if norm.bias is not None:
                norm.bias.div_(gain)  # g x + b = g (x + b / g), and the readers multiply all of it by g
            for matrix in readers:  # W (g * x) = (W * g) x: the gain (576,) scales the columns of (1536, 576)
                matrix.weight.mul_(gain)

    def unfold_(self) -> None:
        """Undoes `fold_`, up to the rounding of a product and a quotient."""
        for (norm, readers), gain in zip(self.norms, self.gains):
            norm.weight.copy_(gain - (1 - norm.unit))  # Gemma stores the gain less 1: its `unit` is 0
            if norm.bias is not None:
                norm.bias.mul_(gain)
            for matrix in readers:
                matrix.weight.div_(gain)
        if self.was_tied:
            self.model.get_output_embeddings().weight = self.model.get_input_embeddings().weight
            self.model.config.tie_word_embeddings = True

    def add_statistics(self, block: Block, statistics: Statistics) -> None:
        """Adds the statistics of the stream's readers in a block, and the inverse diagonals for its writers' inputs."""
        for matrix in (block.attention.output, *(mlp.down for mlp in block.mlps)):
            if matrix.layer in statistics:
                statistic, weight = statistics[matrix.layer], matrix.weight.float()
                diagonal = inverse_diagonal(statistic.factor())
                self.written.append(Term(weight, diagonal, statistic.energy(weight), "out", (0,)))
        for _, readers in block.reads:
            found = (statistics[matrix.layer] for matrix in readers if matrix.layer in statistics)
            seen = list({id(statistic): statistic for statistic in found}.values())
            # Each expert reads some of the tokens; their sum counts a token as often as it is routed.
            total = functools.reduce(torch.add, (statistic.hessian for statistic in seen)) if seen else None
            self.read.append(None if total is None else Statistic(total, seen[0].sample))
        self.pruned |= statistics.keys()

    def learn_rotation_(self, change: Change, iterations: int) -> None:
        """Learns a rotation of the folded stream, and applies it if the mean error of the stream's readers falls."""
        readers, hidden = self._readers(), self.wiring.hidden
        terms: list[Term] = []
        for statistic, weights in readers:
            inverse = inverse_of(statistic.factor())
            terms += [Term(weight, inverse, statistic.energy(weight), "in", (0,)) for weight in weights]
        terms += self.written
        keep_mean = any(norm.is_layer_norm for norm, _ in self.norms)
        (rotation,) = learn_rotations(terms, 1, hidden, self.pattern, iterations=iterations, keep_mean=keep_mean)
        before: list[float] = []
        after: list[float] = []
        for statistic, weights in readers:
            rotated = statistic.rotated(rotation[None], (0,))
            turned = [weight @ rotation for weight in weights]
            energies = sampled_energies(weights, statistic.hessian)
            before += solved_errors(weights, statistic.hessian, statistic.factor(), self.pattern, energies)
            after += solved_errors(turned, rotated.hessian, rotated.factor(), self.pattern, energies)
        if change.decide(sum(before) / len(before), sum(after) / len(after)):
            self.rotate_(rotation)
            self.rotation = rotation

    def _readers(self) -> list[tuple[Statistic, list[Tensor]]]:
        """The pruned weights that read the stream, grouped by their input, with its statistic."""
        return [
            (statistic, [matrix.weight.float() for matrix in readers if matrix.layer in self.pruned])
            for statistic, (_, readers) in zip(self.read, self.wiring.reads)
            if statistic is not None
        ]

    def rotate_(self, rotation: Tensor) -> None:
        """Rotates the folded stream: the columns of its embeddings and readers, the rows of its writers, the biases.

        Args:
            rotation: (hidden, hidden) fp32; its transpose undoes it, up to rounding.
        """
        embeddings = list(self.wiring.embeddings)
        if not is_tied(self.model):
            embeddings.append(self.model.get_output_embeddings().weight.data)
        columns = embeddings + [matrix.weight for _, readers in self.wiring.reads for matrix in readers]
        for weight in columns:  # W x = (W R) (R^T x), (1536, 576) @ (576, 576)
            weight.copy_(weight.float() @ rotation)
        biases = [norm.bias for norm, _ in self.norms]
        for matrix in self.wiring.writes:  # y = W x becomes R^T y, (576, 1536)
            matrix.weight.copy_((matrix.weight.T.float() @ rotation).T)
            biases.append(matrix.bias)
        for bias in biases:
            if bias is not None:
                bias.copy_(bias.float() @ rotation)


def basis_between(dense: Tensor, given: Tensor) -> Tensor | None:
    """The basis of a model's residual stream, found from its input embeddings (vocab, hidden) and the dense model's.

    It is the rotation Q (hidden, hidden) fp32 that brings `dense @ Q` nearest to `given` (orthogonal Procrustes), so it
    is also found for embeddings that have been trained. None is the identity. Raises `InputError` if no rotation brings
    the embeddings near each other.
    """
    if torch.equal(dense, given):  # spares the decomposition of (8192, 8192) in fp64, which takes minutes
        return None
    step = max(1, len(dense) // (4 * dense.shape[1]))  # 49,152 tokens of 576: every 21st, four times as many as needed
    dense, given = dense[::step].double(), given[::step].double()
    left, _, right = torch.linalg.svd(dense.T @ given)
    rotation = left @ right  # with dense^T given = U S V^T, the nearest rotation is U V^T
    is_identity = bool((rotation.diagonal() > _IDENTITY).all())
    turned = dense if is_identity else dense @ rotation
    if not (turned - given).norm() <= _FARTHEST * given.norm():
        raise InputError("its embeddings are not the dense model's in another basis")
    return None if is_identity else rotation.float()


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output head shares the weight of the input embeddings."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def untie_(model: PreTrainedModel) -> None:
    """Gives the output head a weight of its own, a copy of the embeddings; on the meta device too."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False
