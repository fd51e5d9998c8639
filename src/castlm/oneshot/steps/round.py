"""The step that rounds the linear layers of each transformer block to int8, float8, int4 or int3, and `quantize_`.

int4 and int3 can read a calibration text: a block's inputs come from the quantized blocks before it, so that it also
compensates for their errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from castlm.core.errors import InputError, naming
from castlm.core.experts import ExpertLinear
from castlm.core.sparsify import FilterFn, SparseLayer, filter_for, is_sparse_linear, matrices
from castlm.data.calibration import CalibrationText
from castlm.facts import Quantized
from castlm.formats.rounding import Rounded, round_in_groups, round_rows
from castlm.models.stored_layout import StoredLayout
from castlm.oneshot.inputs import check_finite_input, see_inputs
from castlm.oneshot.report import LayerResult, OneshotReport, relative_error
from castlm.oneshot.routed import calibrated_on_all_note
from castlm.oneshot.run import run_start
from castlm.oneshot.solvers import SOLVERS, whole_hessian
from castlm.oneshot.source import MemoryModel, Source
from castlm.oneshot.steps.base import Step
from castlm.oneshot.walk import Visit
from castlm.say import Progress, Say, silent
from castlm_runtime.formats import FORMATS

Codes = Literal["memory", "blocks", "none"]
"""Where codes and scales of rounded layers are kept: in memory, in the files of the blocks, or nowhere."""


class Round(Step):
    """Rounds the layers of each block, and keeps every zero. With codes in memory it cannot be resumed.

    Args:
        kind: see `quantize_`.
        damping: of GPTQ.
        codes: where codes and scales are kept.

    Attributes:
        layers: codes and scales in memory by layer, on the CPU; for experts, by the layer's name and the expert's
            number.
        few_experts: by layer, the number of experts that saw all tokens because too few were routed to them.
    """

    def __init__(self, kind: str, damping: float = 0.01, codes: Codes = "memory") -> None:
        self.kind, self.damping, self.codes = kind, damping, codes
        self.reads_text, self.needs_text = FORMATS[kind].reads_text, False
        self.layers: dict[str, Rounded] = {}
        self.few_experts: dict[str, int] = {}

    def __str__(self) -> str:
        return self.kind

    def options(self) -> dict[str, Any]:
        return {"kind": self.kind, "damping": self.damping, "codes": self.codes}

    def __call__(self, visit: Visit, report: OneshotReport) -> None:
        if not visit.inside:
            return
        if visit.inputs is None or not FORMATS[self.kind].reads_text:
            to_nearest = round_in_groups if FORMATS[self.kind].group else round_rows
            for name, weight in matrices(visit.inside).items():
                with naming(name):
                    rounded = to_nearest(weight, kind=self.kind)
                old, new = self._write(visit, name, weight, rounded)
                report.layers.append(_result(name, new, relative_error(new - old, old)))
            return
        for seen in see_inputs(visit.inside, visit.inputs, SOLVERS["sparsegpt"], visit.inputs.num_sequences):
            weights = matrices({name: visit.inside[name] for name in seen.names})
            for entry in seen.entries():  # layers with the same input are rounded together, all rows at once
                names = ", ".join(entry.names)
                check_finite_input(names, entry.statistic)
                whole_hessian(entry.statistic)  # only its upper half was filled
                together = torch.cat([weights[name].float() for name in entry.names])  # q, k, v: (960, 576)
                with naming(names):
                    rounded = round_in_groups(together, entry.statistic, self.damping, kind=self.kind)
                for name, part in zip(entry.names, rounded.split([len(weights[name]) for name in entry.names])):
                    old, new = self._write(visit, name, weights[name], part)
                    error = relative_error(entry.sample @ (new - old).T, entry.sample @ old.T)
                    report.layers.append(_result(name, new, error))
            if seen.num_few:
                self.few_experts |= dict.fromkeys(seen.names, seen.num_few)

    def _write(self, visit: Visit, name: str, weight: Tensor, rounded: Rounded) -> tuple[Tensor, Tensor]:
        """Writes the dequantized values into a weight; returns the old and the new values in fp32."""
        old = weight.to(torch.float32, copy=True)
        weight.copy_(rounded.dequantized())
        if self.codes == "memory":
            self.layers[name] = rounded.cpu()
        elif self.codes == "blocks":
            of_layer = rounded.cpu()
            visit.beside |= {f"{CODES}{name}": of_layer.codes, f"{SCALES}{name}": of_layer.scales}
        return old, weight.float()


CODES, SCALES = "codes:", "scales:"
"""Before the name of a layer whose codes or scales are in the file of a block."""


def _result(name: str, weight: Tensor, error: float) -> LayerResult:
    return LayerResult(name, tuple(weight.shape), num_zeros=int((weight == 0).sum()), error=error)


@dataclass
class QuantizeReport:
    """The result of `quantize_`."""

    kind: str
    layers: dict[str, Rounded] = field(default_factory=dict)
    """Codes and scales by layer, on the CPU; for experts, by the layer's name and the expert's number. Empty where
    `castlm quantize` keeps them on disk, or does not need them."""
    errors: dict[str, float] = field(default_factory=dict)
    """|X W^T - X W'^T|^2 / |X W^T|^2 on calibration text by layer; without text, |W - W'|^2 / |W|^2."""
    num_sequences: int = 0
    seq_len: int = 0
    seconds: float = 0.0
    few_experts: dict[str, int] = field(default_factory=dict)
    """By layer, the number of experts that saw all tokens of the text because too few were routed to them."""

    @property
    def mean_error(self) -> float:
        return sum(self.errors.values()) / len(self.errors)

    @property
    def notes(self) -> list[str]:
        """Lines for the user."""
        return [calibrated_on_all_note(self.few_experts)] if self.few_experts else []

    def facts(self) -> Quantized:
        """The entry of castlm.json, without the model and the calibration text."""
        return Quantized(
            kind=self.kind,
            layers=len(self.errors),
            mean_relative_error=self.mean_error,
            num_sequences=self.num_sequences,
            seq_len=self.seq_len,
            seconds=round(self.seconds, 2),
            experts_calibrated_on_all_tokens=self.few_experts or None,
        )


def quantize_(
    model: PreTrainedModel,
    kind: str,
    *,
    calibration: Tensor | None = None,
    damping: float = 0.01,
    filter_fn: FilterFn = is_sparse_linear,
    progress: Progress = silent,
) -> QuantizeReport:
    """Rounds the linear layers of a model in place; zeros stay exactly zero, so that an n:m model stays one.

    The weights hold the dequantized values in the model's dtype, and the report the codes and scales. Memory beyond the
    model: the codes, and with a calibration text its hidden states and one fp32 matrix (in, in).

    Args:
        kind: "int8" or "fp8", to the nearest with a scale per row; or "int4" or "int3", with a scale per 64 columns, by
            GPTQ (arXiv 2210.17323), or to the nearest without a calibration text.
        calibration: int64 (num_sequences, seq_len), as from `draw_calibration`, for int4 and int3 alone.
        damping: int4, int3: fraction of the mean diagonal to add to the Hessian.
        filter_fn: selects the layers; dense ones among them are rounded too.
        progress: called with (finished blocks, all blocks).

    Returns:
        The codes and scales by layer, and the errors.

    Raises:
        InputError: no layer, weight scaling that is not folded, or a weight or an input that is not finite.

    Examples:
        >>> tokens = draw_calibration(token_ids, 64, 512)  # doctest: +SKIP
        >>> report = quantize_(model, "int4", calibration=tokens)  # doctest: +SKIP
        >>> report.layers["model.layers.0.mlp.up_proj"].codes.dtype  # doctest: +SKIP
        torch.int8
    """
    source = MemoryModel(model, layers_to_round(model, filter_fn))
    text = None if calibration is None else CalibrationText(calibration)
    return round_blocks(source, Round(kind, damping), text, progress=progress)


def layers_to_round(model: PreTrainedModel, filter_fn: FilterFn = is_sparse_linear) -> dict[str, SparseLayer]:
    """The linear layers of a model that `filter_fn` selects, by name. Raises `InputError` if there are none."""
    chooses = filter_for(model, filter_fn)
    layers: dict[str, SparseLayer] = {
        n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, ExpertLinear)) and chooses(m, n)
    }
    if not layers:
        raise InputError(f"{type(model).__name__} has no linear layer to quantize: check filter_fn")
    return layers


def round_blocks(
    source: Source,
    step: Round,
    text: CalibrationText | None,
    folder: Path | None = None,
    *,
    then: Sequence[Step] = (),
    facts: Mapping[str, Any] | None = None,
    restart: bool = False,
    progress: Progress = silent,
    say: Say = silent,
) -> QuantizeReport:
    """Rounds the layers of `source` block by block: a `MemoryModel` in place, a `StoredModel` into `folder`.

    See `run_start` for the other arguments.

    Args:
        then: further steps after `step`.
    """
    assert text is None or any(each.reads_text for each in (step, *then))
    done = run_start(source, [step, *then], text, folder, facts=facts, restart=restart, progress=progress, say=say)
    num_sequences, seq_len = (0, 0) if text is None else text.sequences.shape
    return QuantizeReport(
        step.kind,
        step.layers,
        {layer.name: layer.error or 0.0 for layer in done.layers},
        num_sequences,
        seq_len,
        done.seconds,
        step.few_experts,
    )


def stored_layers(model: PreTrainedModel, layers: Mapping[str, Rounded]) -> dict[str, Rounded]:
    """Converts `layers` to the layout of the files: names on disk, and experts split or stacked as there."""
    stored: dict[str, Rounded] = {}
    layout = StoredLayout(model)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name in layers:
            (part,) = layout.parts(name)
            stored[part.stem] = layers[name]
        if isinstance(layer, ExpertLinear) and f"{name}.0" in layers:
            experts = [layers[f"{name}.{expert}"] for expert in range(layer.num_experts)]
            for part in layout.parts(name):
                if part.expert is None:  # all experts in one tensor: their rows follow each other
                    # 8 experts, (1408, 2048) codes each -> (11264, 2048)
                    codes, scales = (torch.cat([getattr(each, of) for each in experts]) for of in ("codes", "scales"))
                    stored[part.stem] = Rounded(experts[0].kind, codes, scales)
                else:
                    one = experts[part.expert]
                    stored[part.stem] = Rounded(one.kind, one.codes[part.rows], one.scales[part.rows])
    return stored


HEAD_HESSIAN = "hessian:head"
"""The name of the Hessian in the file of the last block."""


class SeeHead(Step):
    """Sums the Hessian of the output head's input after the last block, and leaves it beside this block.

    Attributes:
        hessian: fp32 (hidden, hidden), on the CPU; None before the last block, and in a start that continues behind it.
    """

    def __init__(self) -> None:
        self.hessian: Tensor | None = None

    def __str__(self) -> str:
        return "the output head"

    def options(self) -> dict[str, Any]:
        return {"sees_head": True}

    def __call__(self, visit: Visit, report: OneshotReport) -> None:
        if visit.inputs is None or visit.index < len(visit.source.blocks) - 1:
            return
        hessian: Tensor | None = None
        for hidden in visit.inputs.leaving(visit.source):
            rows = hidden.flatten(0, 1)  # (2, 512, 576) -> (1024, 576)
            if hessian is None:
                hessian = SOLVERS["sparsegpt"].zeros(rows)
            SOLVERS["sparsegpt"].add(hessian, rows, visit.inputs.num_sequences)
        assert hessian is not None
        check_finite_input("the output head", hessian)
        self.hessian = visit.beside[HEAD_HESSIAN] = whole_hessian(hessian).cpu()
