"""One-shot solvers of a layer, written from their papers: magnitude, Wanda and SparseGPT.

A solver is a row of `SOLVERS`: it prunes a weight, given a statistic of the input. Importing this module does not
import torch, so that a command can ask a row what its solver reads before any work.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from castlm.core.nm import NM, Pattern
from castlm.oneshot.options import Refinements

if TYPE_CHECKING:
    from torch import Tensor

    from castlm.world import World

# Columns of X^T X at a time. On a CPU, 256 take a tenth longer for 1,024 tokens of 576 or 1,536 columns (Zen 3). Tensor
# cores need more to be busy: 512 of 14,336 columns read x 28 times, and compute 3 % below the diagonal in vain.
_GRAM_COLUMNS, _GRAM_COLUMNS_NARROW = 128, 512


class Settings(NamedTuple):
    """The settings of a start that solvers and refinements read."""

    pattern: Pattern
    refinements: Refinements
    world: World
    """The ranks that solve the rows together; see `castlm.oneshot.ranks.by_rows`."""


class Pruned(NamedTuple):
    """The result of a solver: the new weight, and SparseGPT's damping."""

    weight: Tensor
    damping: float | None = None


class Solver:
    """Prunes a weight, given a statistic of its input; a row of `SOLVERS`. By default it reads no text."""

    axes: ClassVar[int] = 0
    """The number of axes of the statistic: 1 for (columns,), 2 for (columns, columns), 0 for a solver without text."""
    patterns: ClassVar[type[Pattern]] = Pattern  # type: ignore[type-abstract]  # of isinstance alone
    """The patterns that it prunes to: all, or only those of a class, such as `NM`."""
    is_refined: ClassVar[bool] = False
    """Whether the refinements of SparseGPT follow it. They need its Hessian."""

    def prune(self, weight: Tensor, statistic: Tensor, settings: Settings) -> Pruned:
        """Prunes an fp32 weight (rows, columns); may overwrite the statistic."""
        raise NotImplementedError

    def add(self, statistic: Tensor, x: Tensor, num_sequences: int) -> None:
        """Adds x (tokens, columns), fp32 or, under autocast, bf16, to the statistic."""

    def from_hessian(self, hessian: Tensor) -> Tensor | None:
        """The statistic, made of SparseGPT's Hessian (columns, columns), whole, which a change of basis has collected.

        None, the default, collects it in another pass.
        """
        return None

    @property
    def reads_text(self) -> bool:
        """Whether it reads a calibration text, which it then requires."""
        return self.axes > 0

    @property
    def refinements(self) -> tuple[str, ...]:
        """The options of `Refinements` that it reads: all if it is refined, the damping if it has a Hessian."""
        if self.is_refined:
            return tuple(option.name for option in fields(Refinements))
        return ("damping",) if self.axes == 2 else ()

    def zeros(self, x: Tensor) -> Tensor:
        """An empty statistic for inputs like `x` (..., columns), on its device."""
        import torch

        return torch.zeros((x.shape[-1],) * self.axes, device=x.device)

    def tensors(self, statistic: Tensor) -> list[Tensor]:
        """The tensors of a statistic, which are sums: itself."""
        return [statistic]


class Magnitude(Solver):
    """Keeps the largest weights."""

    def prune(self, weight: Tensor, statistic: Tensor, settings: Settings) -> Pruned:
        return Pruned(weight.masked_fill(~settings.pattern.mask(weight), 0))


class Wanda(Solver):
    """Keeps the largest |W_ij| * |X_j| (Sun et al. 2023, arXiv 2306.11695, Eq. 1); kept weights do not change.

    The statistic is the mean of |X_j|^2 over sequences, (columns,).
    """

    axes = 1

    def prune(self, weight: Tensor, statistic: Tensor, settings: Settings) -> Pruned:
        mask = settings.pattern.mask(weight * statistic.sqrt())  # (1536, 576) * (576,)
        return Pruned(weight.masked_fill(~mask, 0))

    def add(self, statistic: Tensor, x: Tensor, num_sequences: int) -> None:
        statistic.add_(x.float().square().sum(0), alpha=1 / num_sequences)  # (576,)

    def from_hessian(self, hessian: Tensor) -> Tensor:
        return hessian.diagonal() / 2  # H = 2 X^T X / num_sequences


class SparseGPT(Solver):
    """SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774); see `castlm.oneshot.sparsegpt`.

    The statistic is the Hessian, (columns, columns), of which only the upper triangle is summed.
    """

    axes = 2
    patterns = NM
    is_refined = True

    def prune(self, weight: Tensor, statistic: Tensor, settings: Settings) -> Pruned:
        from castlm.oneshot.sparsegpt import sparsegpt

        assert isinstance(settings.pattern, NM)
        pattern, damping = settings.pattern, settings.refinements.damping
        hessian = whole_hessian(statistic)
        return Pruned(*sparsegpt(weight, hessian, pattern.n, pattern.m, damping, world=settings.world))

    def add(self, statistic: Tensor, x: Tensor, num_sequences: int) -> None:
        add_hessian(statistic, x, num_sequences)

    def from_hessian(self, hessian: Tensor) -> Tensor:
        return hessian


SOLVERS: dict[str, Solver] = {"magnitude": Magnitude(), "wanda": Wanda(), "sparsegpt": SparseGPT()}


def add_hessian(hessian: Tensor, x: Tensor, num_sequences: int) -> None:
    """Adds 2/num_sequences X^T X to the upper triangle of H, by blocks of rows: half of the work of a full product.

    Args:
        hessian: (columns, columns) fp32.
        x: (tokens, columns), fp32 or bf16. The tensor cores of a GPU multiply bf16 without rounding and add in fp32; no
            GPU has run that yet.
    """
    import torch

    if x.dtype == torch.bfloat16 and x.is_cuda:
        for start in range(0, x.shape[1], _GRAM_COLUMNS_NARROW):
            rows = slice(start, start + _GRAM_COLUMNS_NARROW)
            product = torch.mm(x[:, rows].T, x[:, start:], out_dtype=torch.float32)
            hessian[rows, start:].add_(product, alpha=2 / num_sequences)
        return
    x = x.float()
    for start in range(0, x.shape[1], _GRAM_COLUMNS):
        rows = slice(start, start + _GRAM_COLUMNS)  # (128, tokens) @ (tokens, 1536 - start)
        hessian[rows, start:].addmm_(x[:, rows].T, x[:, start:], alpha=2 / num_sequences)


def whole_hessian(hessian: Tensor) -> Tensor:
    """Mirrors the upper triangle of a Hessian (columns, columns) into the lower one, in place."""
    hessian.triu_()  # below the diagonal blocks `add_hessian` has left parts of products
    hessian += hessian.triu(1).T
    return hessian


def damped(hessian: Tensor, damping: float) -> Tensor:
    """A copy that can be inverted: its diagonal gets a 1 for dead inputs, then `damping` times its mean."""
    result = hessian.clone()
    diagonal = result.diagonal()
    diagonal[diagonal == 0] = 1  # a dead input: any positive number gives the factor a row of its own
    diagonal += damping * diagonal.mean()
    return result


def row_energies(weight: Tensor, gram: Tensor) -> Tensor:
    """|X w|^2 (rows,) of each row w of `weight` (rows, columns), where `gram` is X^T X."""
    return ((weight @ gram) * weight).sum(1)  # the diagonal of W G W^T, without its (rows, rows)
