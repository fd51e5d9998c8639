"""Quantize a sparse model: every linear layer inside the transformer blocks on a grid of int8, float8 or int4.

int4 follows the walk of the one-shot solvers: a block's inputs are those that the quantized blocks before it give, so
that it also makes up for what they lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from castlm.core.errors import InputError
from castlm.core.sparsify import FilterFn, is_sparse_linear
from castlm.inference.rounding import KINDS, Rounded, round_int4, round_rows
from castlm.oneshot.calibration import check_calibration
from castlm.oneshot.inputs import check_plain_weights, see_inputs
from castlm.oneshot.solvers import SOLVERS, whole_hessian
from castlm.oneshot.walk import BlockInputs, block_stack


@dataclass
class QuantizeReport:
    """What `quantize_` did."""

    kind: str
    layers: dict[str, Rounded] = field(default_factory=dict)
    """Codes and scales by layer, for a packed file."""
    errors: dict[str, float] = field(default_factory=dict)
    """|X W^T - X W'^T|^2 / |X W^T|^2 on calibration text by layer; without text, |W - W'|^2 / |W|^2."""
    num_sequences: int = 0
    seq_len: int = 0
    seconds: float = 0.0

    @property
    def mean_error(self) -> float:
        return sum(self.errors.values()) / len(self.errors)

    def record(self) -> dict[str, Any]:
        """What castlm.json says of it."""
        return {
            "kind": self.kind,
            "layers": len(self.layers),
            "mean_relative_error": self.mean_error,
            "num_sequences": self.num_sequences,
            "seq_len": self.seq_len,
            "seconds": round(self.seconds, 2),
        }


@torch.no_grad()
def quantize_(
    model: PreTrainedModel,
    kind: str,
    *,
    calibration: Tensor | None = None,
    damping: float = 0.01,
    filter_fn: FilterFn = is_sparse_linear,
    progress: Callable[[int, int], None] | None = None,
) -> QuantizeReport:
    """Rounds the linear layers of a model in place; zeros stay exactly zero, so that an n:m model stays one.

    The weights hold the dequantized values in the model's dtype, and the report the codes and scales. Memory beyond the
    model: the codes, and for int4 the hidden states of the calibration text and one fp32 matrix (in, in).

    Args:
        kind: "int8" or "fp8", nearest by rows, or "int4", GPTQ in groups of 64 columns.
        calibration: int64 (num_sequences, seq_len), as from `calibration_blocks`; int4 needs it, the others take none.
        damping: int4: share of the mean diagonal that is added to the Hessian.
        filter_fn: which layers; dense ones among them are rounded as well.
        progress: called with (blocks or layers done, in all).

    Returns:
        What was done, with codes and scales by layer.

    Raises:
        InputError: an unknown kind, no layer, weight scaling that is not folded, calibration missing or not wanted, or
            a weight or an input that is not finite.

    Example:
        >>> report = quantize_(model, "int4", calibration=calibration_blocks(token_ids, 64, 512))
        >>> report.layers["model.layers.0.mlp.up_proj"].codes.dtype
        torch.int8
    """
    started = time.perf_counter()
    layers = _layers(model, kind, filter_fn, damping)
    report = QuantizeReport(kind)
    if kind == "int4":
        if calibration is None:
            raise InputError("int4 needs a calibration text: pass calibration, from calibration_blocks")
        check_calibration(model, calibration)
        report.num_sequences, report.seq_len = calibration.shape
        _walk(model, layers, calibration, damping, report, progress)
    else:
        if calibration is not None:
            raise InputError(f"{kind} is rounded without a calibration text: leave calibration out")
        for done, (name, layer) in enumerate(layers.items(), 1):
            rounded = _named(name, lambda weight=layer.weight: round_rows(weight, kind))
            new = _write(layer, rounded)
            report.layers[name] = rounded
            old_norm = new[0].square().sum()
            report.errors[name] = float((new[1] - new[0]).square().sum() / old_norm) if old_norm > 0 else 0.0
            if progress is not None:
                progress(done, len(layers))
    report.seconds = time.perf_counter() - started
    return report


def _layers(model: PreTrainedModel, kind: str, filter_fn: FilterFn, damping: float) -> dict[str, nn.Linear]:
    if kind not in KINDS:
        raise InputError(f"there is no format {kind!r}: choose one of {', '.join(KINDS)}")
    if not 0 <= damping <= 1:
        raise InputError(f"damping {damping} is out of range: pass 0 to 1")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and filter_fn(m, n)}
    if not layers:
        raise InputError(f"{type(model).__name__} has no linear layer to quantize: check filter_fn")
    check_plain_weights(layers, "quantizing")
    return layers


def _walk(
    model: PreTrainedModel,
    layers: dict[str, nn.Linear],
    calibration: Tensor,
    damping: float,
    report: QuantizeReport,
    progress: Callable[[int, int], None] | None,
) -> None:
    stack, blocks = block_stack(model, layers)
    inputs = BlockInputs(model, blocks, calibration)
    for index in range(len(blocks)):
        inside = {k: v for k, v in layers.items() if k.startswith(f"{stack}.{index}.")}
        if inside:
            for seen in see_inputs(inside, inputs, SOLVERS["sparsegpt"], len(calibration)):
                chosen = {name: inside[name] for name in seen.names}
                _round_together(chosen, seen.statistic, seen.sample, damping, report)
        if index + 1 < len(blocks):
            inputs.advance()
        if progress is not None:
            progress(index + 1, len(blocks))


def _round_together(
    layers: dict[str, nn.Linear], hessian: Tensor, sample: Tensor, damping: float, report: QuantizeReport
) -> None:
    """Rounds layers that read the same input, all their rows in one piece; of the Hessian the upper half is there."""
    names = ", ".join(layers)
    if not hessian.isfinite().all():
        raise InputError(f"the calibration text makes NaN or infinity at the input of {names}: load the model in fp32")
    whole_hessian(hessian)
    weight = torch.cat([layer.weight.float() for layer in layers.values()])
    rounded = _named(names, lambda: round_int4(weight, hessian, damping))
    for (name, layer), part in zip(layers.items(), rounded.split([layer.out_features for layer in layers.values()])):
        old, new = _write(layer, part)
        report.layers[name] = part
        lost, whole = (sample @ (new - old).T).square().sum(), (sample @ old.T).square().sum()
        report.errors[name] = float(lost / whole) if whole > 0 else 0.0


def _named(names: str, work: Callable[[], Rounded]) -> Rounded:
    try:
        return work()
    except InputError as error:
        raise InputError(f"{names}: {error}") from None


def _write(layer: nn.Linear, rounded: Rounded) -> tuple[Tensor, Tensor]:
    """Puts the dequantized weight into the layer; returns the old and the new one in fp32."""
    old = layer.weight.to(torch.float32, copy=True)
    layer.weight.copy_(rounded.dequantized())
    return old, layer.weight.float()
