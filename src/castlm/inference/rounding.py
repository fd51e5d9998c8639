"""Rounds weights to int8, float8 or int4 with every zero kept exactly, so that a mask survives quantization.

All scales are symmetric, without a zero point. int4 has one for each row and 64 columns, and is rounded by GPTQ
(Frantar et al. 2023, arXiv 2210.17323), column by column: later columns compensate for the rounding error of a column.
A masked weight has the single grid point 0 and passes its share of the error to later columns, as in SparseGPT (arXiv
2301.00774). GPTQ relies on columns that turn out to be masked, so a few passes of coordinate descent follow (QuantEase,
arXiv 2309.01885): each code in turn becomes the best for the layer's output with all others fixed, and each scale the
best for its codes. They never increase the error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from castlm.core.errors import InputError
from castlm.inference.formats import FORMATS
from castlm.oneshot.sparsegpt import upper_factor

INT4_RANGE = (-8, 7)
"""The smallest and the largest code of int4."""
INT4_GROUP = FORMATS["int4"].group
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)


@dataclass
class Rounded:
    """A weight (rows, columns) on a grid: `codes * scales`."""

    kind: str
    """"int8", "fp8" or "int4"."""
    codes: Tensor
    """(rows, columns): int8 holds int8 and int4 (-8 to 7), float8_e4m3fn holds fp8."""
    scales: Tensor
    """fp32: (rows, 1), or for int4 (rows, ceil(columns / 64)) with values that are exact in bf16."""

    def dequantized(self) -> Tensor:
        """(rows, columns), fp32. Every zero is 0.0, because the packed format cannot always store -0.0."""
        scales = self.scales
        if group := FORMATS[self.kind].group:
            scales = scales.repeat_interleave(group, dim=1)[:, : self.codes.shape[1]]
        return (self.codes.float() * scales).add_(0.0)

    def cpu(self) -> Rounded:
        return Rounded(self.kind, self.codes.cpu(), self.scales.cpu())

    def split(self, rows: list[int]) -> list[Rounded]:
        """Splits layers that were rounded together, given their numbers of rows."""
        return [
            Rounded(self.kind, codes, scales) for codes, scales in zip(self.codes.split(rows), self.scales.split(rows))
        ]


def round_rows(weight: Tensor, kind: str) -> Rounded:
    """Rounds each row to the nearest int8 or float8 (e4m3), scaled so that its largest magnitude is the end of the
    range.

    Args:
        weight: (rows, columns), any float dtype.

    Raises:
        InputError: NaN or infinity in the weight.
    """
    assert kind in ("int8", "fp8"), kind
    weight = _finite(weight).float()
    largest = FORMATS[kind].largest
    scales = (weight.abs().amax(1, keepdim=True) / largest).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = weight / scales
    codes = scaled.round().to(torch.int8) if kind == "int8" else scaled.clamp(-largest, largest).to(torch.float8_e4m3fn)
    return Rounded(kind, codes, scales)


def round_in_groups(weight: Tensor, hessian: Tensor | None = None, damping: float = 0.01, passes: int = 4) -> Rounded:
    """Rounds to int4 in groups of 64 columns: by GPTQ and coordinate descent if `hessian` is given, otherwise to the
    nearest.

    Args:
        weight: (rows, columns), any float dtype; zeros stay.
        hessian: X^T X of the input up to a factor, (columns, columns), fp32, symmetric; overwritten.
        damping: fraction of the Hessian's mean diagonal to add to it.
        passes: passes of coordinate descent over all columns.

    Raises:
        InputError: NaN or infinity in the weight, or a Hessian that cannot be factorized.
    """
    columns = weight.shape[1]
    target = _finite(weight).float().T.contiguous()  # (columns, rows): a column lies contiguous
    left, kept = target.clone(), target != 0
    upper = torch.eye(columns, device=left.device) if hessian is None else _inverse_factor(hessian, damping)
    codes, scales = torch.empty_like(left), left.new_empty(-(-columns // INT4_GROUP), left.shape[1])
    for group, block in enumerate(_groups(columns)):
        inner = upper[block, block]
        scales[group] = _best_scale(left[block], kept[block], inner.diagonal())
        errors = _round_block(left[block], kept[block], scales[group], inner, codes[block])
        left[block.stop :].addmm_(upper[block, block.stop :].T, errors, alpha=-1)
    if hessian is not None:
        _descend(codes, scales, target, kept, hessian, passes)
    return Rounded("int4", codes.T.to(torch.int8).contiguous(), scales.T.contiguous())


def _finite(weight: Tensor) -> Tensor:
    if not weight.isfinite().all():
        raise InputError("the weight has NaN or infinity: the model is damaged")
    return weight


def _groups(columns: int) -> list[slice]:
    return [slice(start, min(start + INT4_GROUP, columns)) for start in range(0, columns, INT4_GROUP)]


def _descend(codes: Tensor, scales: Tensor, target: Tensor, kept: Tensor, hessian: Tensor, passes: int) -> None:
    """Coordinate descent on tr(E^T H E), E = codes * scales - target, in place; all are (columns, rows), scales
    (groups, rows)."""
    blocks = _groups(len(codes))
    error = torch.cat([codes[block] * scales[group] - target[block] for group, block in enumerate(blocks)])
    for _ in range(passes):
        for group, block in enumerate(blocks):
            inner, scale = hessian[block, block], scales[group]
            slope = hessian[block] @ error  # (64, rows), updated within the block
            for j in range(len(slope)):
                column = codes[block.start + j]
                wanted = column - slope[j] / (inner[j, j] * scale)
                change = wanted.round_().clamp_(*INT4_RANGE).mul_(kept[block.start + j]).sub_(column)
                column += change
                slope.addr_(inner[:, j], change.mul_(scale))
            _refit(scale, codes[block], slope, inner)
            error[block] = codes[block] * scale - target[block]


def _refit(scale: Tensor, codes: Tensor, slope: Tensor, inner: Tensor) -> None:
    """Replaces the scale (rows,) by the best one for the codes (64, rows) of a group, where rounding that to bf16 still
    improves.
    """
    first, second = (slope * codes).sum(0), (codes * (inner @ codes)).sum(0)
    change = (scale - first / second.clamp_min(1e-30)).bfloat16().float() - scale
    is_better = (2 * change * first + change.square() * second < 0) & (scale + change != 0)
    scale.add_(change * is_better)


def _round_block(left: Tensor, kept: Tensor, scale: Tensor, upper: Tensor, codes: Tensor) -> Tensor:
    """Rounds the columns of one group, (64, rows), in order; returns the error of each, in units of U_jj."""
    errors = torch.empty_like(left)
    for j in range(len(left)):
        codes[j] = (left[j] / scale).round_().clamp_(*INT4_RANGE).mul_(kept[j])
        errors[j] = left[j].addcmul_(codes[j], scale, value=-1).div_(upper[j, j])
        left[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
    return errors


def _best_scale(group: Tensor, kept: Tensor, diagonal: Tensor) -> Tensor:
    """The scale (rows,), exact in bf16, that rounds the kept weights of a group (64, rows) best.

    The candidates put the largest magnitude at 7 or at -8 (the scale may be negative), or clip it. Errors are weighted
    by 1 / U_jj^2, their cost in the layer's output.
    """
    group = group * kept
    index = group.abs().argmax(0, keepdim=True)
    extreme = group.gather(0, index).squeeze(0)
    importance = diagonal.square().reciprocal().unsqueeze(1)
    best, least = torch.ones_like(extreme), torch.full_like(extreme, float("inf"))
    for end in reversed(INT4_RANGE):
        for shrink in _SHRINK:
            scale = (extreme * (shrink / end)).bfloat16().float()
            scale = torch.where(scale == 0, 1.0, scale)
            lost = (
                (group / scale).round_().clamp_(*INT4_RANGE).mul_(scale).sub_(group).square_().mul_(importance).sum(0)
            )
            better = lost < least
            best, least = torch.where(better, scale, best), torch.where(better, lost, least)
    return best


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with U^T U = H^-1 of the damped H; columns without input are decoupled.

    The damping is added to `hessian`.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    hessian[dead, :], hessian[:, dead] = 0, 0
    diagonal[dead] = diagonal[~dead].mean() if bool((~dead).any()) else 1
    factor, damping = upper_factor(hessian, damping)
    diagonal += damping * diagonal.mean()
    return torch.linalg.solve_triangular(factor, torch.eye(len(hessian), device=hessian.device), upper=True)
