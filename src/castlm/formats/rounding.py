"""Rounds weights to int8, float8, int6, int4 or int3 with every zero kept, so that a mask survives quantization.

All scales are symmetric, without a zero point. int6, int4 and int3 have one for each row and 64 columns, q4_0 for 32,
and are rounded by GPTQ (Frantar et al. 2023, arXiv 2210.17323), column by column: later columns compensate for the
error of a column. A masked weight has the single grid point 0 and passes its share of the error to later columns, as in
SparseGPT (arXiv 2301.00774). GPTQ relies on columns that turn out to be masked, so a few passes of coordinate descent
follow (QuantEase, arXiv 2309.01885): each code in turn becomes the best for the layer's output with all others fixed,
and each scale the best for its codes. They never increase the error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from castlm.core.cholesky import upper_factor
from castlm.core.errors import InputError, check_finite
from castlm.core.rounding import best_scale, grid_scale, in_groups
from castlm.dtypes import STORED
from castlm_runtime.formats import FORMATS


@dataclass
class Rounded:
    """A weight (rows, columns) on a grid: `codes * scales`."""

    kind: str
    """A format of `FORMATS` that rounds."""
    codes: Tensor
    """(rows, columns): int8 holds int8, int6 (-32 to 31), int4, q4_0 (-8 to 7) and int3, float8_e4m3fn holds fp8."""
    scales: Tensor
    """fp32: (rows, 1), or for int6, int4, int3 and q4_0 (rows, groups of columns) with values exact in bf16."""

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
        codes, scales = torch.split(self.codes, rows), torch.split(self.scales, rows)
        return [Rounded(self.kind, *part) for part in zip(codes, scales)]


def round_rows(weight: Tensor, kind: str) -> Rounded:
    """Rounds each row to the nearest values of a format, scaled so that its largest magnitude is the end of the range.

    Args:
        weight: (rows, columns), any float dtype.
        kind: a format with one scale for each row, such as "int8" or "fp8".

    Raises:
        InputError: NaN or infinity in the weight.
    """
    form = FORMATS[kind]
    assert form.rounds
    assert not form.group
    check_finite(f"a weight of shape {tuple(weight.shape)}", weight)
    weight = weight.float()
    stored, largest = STORED[form.stored], form.largest
    scales = (weight.abs().amax(1, keepdim=True) / largest).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = weight / scales
    # float8 rounds in `to`, which would make infinity of what lies beyond the end by a rounding of the division
    codes = scaled.clamp(-largest, largest).to(stored) if stored.is_floating_point else scaled.round().to(stored)
    return Rounded(kind, codes, scales)


def round_in_groups(
    weight: Tensor, hessian: Tensor | None = None, damping: float = 0.01, passes: int = 4, kind: str = "int4"
) -> Rounded:
    """Rounds in groups of columns: by GPTQ and coordinate descent if `hessian` is given, otherwise to the nearest.

    The scale of a group is signed, so that its largest magnitude may take the code -8. It is the best of a few that put
    this magnitude at an end of the range or clip it. Without a Hessian, nothing says which columns matter, and int4
    weighs squared errors by |w|: SmolLM2-135M then has a perplexity of 46.6 on 20 windows of WikiText-2 (unrounded 36),
    without the weighting 53.0, and with every largest magnitude at -8, as in OpenVINO's int4, 47.3. int3 is better
    without it: 14.4 on stories260K, where the weighting has 16.7.

    Args:
        weight: (rows, columns), any float dtype; zeros stay.
        hessian: X^T X of the input up to a factor, (columns, columns), fp32, symmetric; overwritten.
        damping: fraction of the Hessian's mean diagonal to add to it.
        passes: passes of coordinate descent over all columns.
        kind: "int6", "int4", "int3" or "q4_0".

    Raises:
        InputError: NaN or infinity in the weight, or a Hessian that cannot be factorized.
    """
    check_finite(f"a weight of shape {tuple(weight.shape)}", weight)
    columns = weight.shape[1]
    target = weight.float().T.contiguous()  # (columns, rows): a column lies contiguous
    updated = target.clone()  # the columns still to be rounded compensate for those that are
    kept = target != 0  # a masked weight has the single code 0
    upper = torch.eye(columns, device=updated.device)
    if hessian is not None:  # U, upper triangular, with U^T U = H^-1 of the damped H
        diagonal = hessian.diagonal()
        dead = diagonal == 0  # columns without input are decoupled
        hessian[dead, :], hessian[:, dead] = 0, 0
        diagonal[dead] = diagonal[~dead].mean() if bool((~dead).any()) else 1
        factor, damping = upper_factor(hessian, damping)
        diagonal += damping * diagonal.mean()
        upper = torch.linalg.solve_triangular(factor, upper, upper=True)  # U = R^-1 of H = R R^T, (576, 576)
    blocks, ends = FORMATS[kind].groups(columns), _range(kind)
    codes, scales = torch.empty_like(updated), updated.new_empty(len(blocks), updated.shape[1])
    for group, block in enumerate(blocks):
        inner = upper[block, block]
        importance = inner.diagonal().square().reciprocal().unsqueeze(1)  # 1 / U_jj^2, the cost in the output
        weights = updated[block] * kept[block]
        if hessian is None and not FORMATS[kind].needs_training:
            importance = weights.abs()
        scales[group] = best_scale(weights, ends, ends[::-1], importance, dim=0)
        errors = _round_block(updated[block], kept[block], scales[group], inner, codes[block], ends)
        # The columns behind this group inherit its errors at once: (512, 64) @ (64, rows).
        updated[block.stop :].addmm_(upper[block, block.stop :].T, errors, alpha=-1)
    if hessian is not None:
        _descend(codes, scales, target, kept, hessian, passes, kind)
    return Rounded(kind, codes.T.to(torch.int8).contiguous(), scales.T.contiguous())


_TABLE_ROWS = 16_384
_TABLE_DAMPING = 0.1


def round_table(weight: Tensor, kind: str, hessian: Tensor | None = None) -> Rounded:
    """Rounds an output head or an embedding, some rows at a time, as a table has many.

    A head reads fewer directions than a layer, and takes more damping: with int4, SmolLM2-135M has 20.87 on 8,192
    tokens of Wikipedia with 0.1, 20.99 with 0.01, 21.01 with 0.3, and 23.15 to the nearest.

    Args:
        weight: (vocabulary, hidden).
        kind: a format of `HEADS`.
        hessian: of the head's input, as of `round_in_groups`; None rounds to the nearest. int8 has no use for it.
    """
    if not FORMATS[kind].group:
        return round_rows(weight, kind)
    parts = [
        round_in_groups(rows, None if hessian is None else hessian.clone(), _TABLE_DAMPING, kind=kind)
        for rows in weight.split(_TABLE_ROWS)
    ]
    return Rounded(kind, torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts]))


def on_grid(weight: Tensor, kind: str) -> Rounded:
    """The codes and scales of a weight that is rounded to `kind` already; see `castlm.core.rounding`.

    Args:
        weight: (rows, columns) in bf16, fp16 or fp32, whose values are codes times scales in this dtype.

    Raises:
        InputError: a group that is no whole multiple of a scale.
    """
    group = FORMATS[kind].group
    try:
        scales = grid_scale(weight, _range(kind), group)
    except InputError as error:
        raise InputError(f"{error} of {kind}, as castlm.json says: make the model again") from error
    codes = (in_groups(weight, group).float() / scales.unsqueeze(-1)).round_().flatten(1)[:, : weight.shape[1]]
    return Rounded(kind, codes.to(torch.int8).contiguous(), scales)


def _range(kind: str) -> tuple[int, int]:
    """The smallest and the largest code."""
    largest = int(FORMATS[kind].largest)
    return -largest - 1, largest


def _descend(
    codes: Tensor, scales: Tensor, target: Tensor, kept: Tensor, hessian: Tensor, passes: int, kind: str
) -> None:
    """Coordinate descent on tr(E^T H E), E = codes * scales - target, in place; all are (columns, rows), scales
    (groups, rows)."""
    blocks, ends = FORMATS[kind].groups(len(codes)), _range(kind)
    error = torch.cat([codes[block] * scales[group] - target[block] for group, block in enumerate(blocks)])
    for _ in range(passes):
        for group, block in enumerate(blocks):
            inner, scale = hessian[block, block], scales[group]
            slope = hessian[block] @ error  # half the gradient by the weights, (64, 576) @ (576, rows), kept up to date
            for j in range(len(slope)):
                column = codes[block.start + j]
                wanted = column - slope[j] / (inner[j, j] * scale)  # where the quadratic in this code has its minimum
                change = wanted.round_().clamp_(*ends).mul_(kept[block.start + j]).sub_(column)
                column += change
                slope.addr_(inner[:, j], change.mul_(scale))
            _refit(scale, codes[block], slope, inner)
            error[block] = codes[block] * scale - target[block]


def _refit(scale: Tensor, codes: Tensor, slope: Tensor, inner: Tensor) -> None:
    """Replaces the scale (rows,) by the best one for the codes (64, rows) of a group, where rounding that to bf16 still
    improves.
    """
    # The loss at scale + d is the loss at scale + 2 d first + d^2 second, with the codes fixed.
    first, second = (slope * codes).sum(0), (codes * (inner @ codes)).sum(0)
    change = (scale - first / second.clamp_min(1e-30)).bfloat16().float() - scale
    is_better = (2 * change * first + change.square() * second < 0) & (scale + change != 0)
    scale.add_(change * is_better)


def _round_block(
    updated: Tensor, kept: Tensor, scale: Tensor, upper: Tensor, codes: Tensor, ends: tuple[int, int]
) -> Tensor:
    """Rounds the columns of one group, (64, rows), in order; returns the error of each, in units of U_jj."""
    errors = torch.empty_like(updated)
    for j in range(len(updated)):
        codes[j] = (updated[j] / scale).round_().clamp_(*ends).mul_(kept[j])
        # GPTQ, Alg. 1: the error (w_j - q_j) / U_jj, which column k > j inherits times U_jk
        errors[j] = updated[j].addcmul_(codes[j], scale, value=-1).div_(upper[j, j])
        updated[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
    return errors
