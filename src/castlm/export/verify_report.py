"""The result of `verify`: the counts of every layer, and the tensors not counted, with reasons, as text and as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from castlm.core.nm import Pattern
from castlm.names import printable

ALLOW_DENSE = 0.1
"""The default of `allow_dense`: the largest share of the multiplied weights that may stay dense."""
_DENSE = 0.1
"""A layer that violates its pattern is reported as dense if its share of zeros is below this."""


@dataclass
class LayerReport:
    """The counts of one linear layer of a transformer block."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    axis: int
    """The input axis, along which groups run: the last axis, or the one before it for Conv1D and some 3-D experts."""
    num_groups: int = 0
    num_violations: int = 0
    num_zeros: int = 0
    max_nonzeros: int = 0
    """The largest number of non-zeros in a group."""
    num_non_finite: int = 0
    problem: str | None = None
    """Why the layer has no groups to count."""
    left_dense: str | None = None
    """Why the layer is dense on purpose; its groups are counted, but may violate the pattern."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def zero_fraction(self) -> float:
        return self.num_zeros / max(1, self.numel)

    @property
    def ok(self) -> bool:
        sparse = self.left_dense is not None or (self.problem is None and self.num_violations == 0)
        return sparse and self.num_non_finite == 0


@dataclass
class VerifyReport:
    """Whether a checkpoint has the pattern, with the counts behind the answer. Layers are in the order of the model."""

    path: str
    pattern: Pattern
    layers: list[LayerReport] = field(default_factory=list)
    allow_dense: float = ALLOW_DENSE
    num_dense_elsewhere: int = 0
    """Number of weights outside `layers` that products inside the transformer blocks sum over, such as routers."""
    uncounted: dict[str, str] = field(default_factory=dict)
    """Weights of transformer blocks whose groups could not be counted, with the reason: then the answer is no."""
    dense: dict[str, str] = field(default_factory=dict)
    """Tensors of two or more dimensions that the pattern does not apply to, with the reason."""
    non_finite_elsewhere: dict[str, int] = field(default_factory=dict)
    """Tensors outside `layers` that hold NaN or infinity, with how many."""

    @property
    def sparse_layers(self) -> list[LayerReport]:
        """The layers that must have the pattern."""
        return [layer for layer in self.layers if layer.left_dense is None]

    @property
    def ok(self) -> bool:
        """Whether every layer that must have the pattern was counted and has it, every value is finite, and the share
        of dense weights is at most `allow_dense`."""
        is_whole = all(layer.ok for layer in self.layers) and not self.uncounted and not self.non_finite_elsewhere
        return is_whole and self.share >= 1 - self.allow_dense

    @property
    def share(self) -> float:
        """The share of the pattern in the weights by which the transformer blocks of the language model multiply."""
        multiplied = self.num_dense_elsewhere + sum(layer.numel for layer in self.layers)
        return sum(layer.numel for layer in self.sparse_layers if layer.ok) / max(1, multiplied)

    @property
    def num_non_finite(self) -> int:
        return sum(layer.num_non_finite for layer in self.layers) + sum(self.non_finite_elsewhere.values())

    def totals(self) -> dict[str, int | float]:
        """Counts over the layers that must have the pattern; non-finite values over the whole checkpoint."""
        sparse = self.sparse_layers
        return {
            "layers": len(sparse),
            "bad_layers": sum(not layer.ok for layer in sparse),
            "left_dense": len(self.layers) - len(sparse),
            "uncounted": len(self.uncounted),
            "weights": sum(layer.numel for layer in sparse),
            "groups": sum(layer.num_groups for layer in sparse),
            "violations": sum(layer.num_violations for layer in sparse),
            "zero_fraction": sum(layer.num_zeros for layer in sparse) / max(1, sum(layer.numel for layer in sparse)),
            "non_finite": self.num_non_finite,
            "share": self.share,
        }

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON."""
        layers = [
            asdict(layer) | {"shape": list(layer.shape), "zero_fraction": layer.zero_fraction, "ok": layer.ok}
            for layer in self.layers
        ]
        return {
            "path": self.path,
            "pattern": str(self.pattern),
            "ok": self.ok,
            "totals": self.totals(),
            "layers": layers,
            "allow_dense": self.allow_dense,
            "uncounted": self.uncounted,
            "dense": self.dense,
            "non_finite_elsewhere": self.non_finite_elsewhere,
        }

    @property
    def hint(self) -> str:
        """A likely cause if layers that should be sparse are dense; otherwise empty."""
        violated = [layer for layer in self.sparse_layers if layer.num_violations > layer.num_groups / 2]
        dense = [layer for layer in violated if layer.zero_fraction < _DENSE]
        if not dense:
            return ""
        return (
            f"{len(dense)} of {len(self.sparse_layers)} layers are dense: the model was never pruned, or a merged "
            "adapter (plain LoRA) has filled its zeros, which castlm finetune --adapter shira does not"
        )

    @property
    def headline(self) -> str:
        """The share of the pattern, and whether it is enough."""
        lacks = "" if self.share >= 1 - self.allow_dense else f", less than {1 - self.allow_dense:.4g} (--allow-dense)"
        return f"{self.pattern} in {self.share:.2%} of the weights that the transformer blocks multiply by{lacks}"

    def summary(self) -> str:
        """The answer and its counts, in one line."""
        totals = self.totals()
        rest = f", {totals['left_dense']} left dense" if totals["left_dense"] else ""
        rest += f", {totals['uncounted']} not counted" if totals["uncounted"] else ""
        damaged = [*self.non_finite_elsewhere, *(layer.name for layer in self.layers if layer.num_non_finite)]
        rest += f", {totals['non_finite']:,} values not finite, as in {damaged[0]}" if damaged else ""
        counted = f"{totals['violations']:,} of {totals['groups']:,} groups violate it"
        zeros = f"{totals['zero_fraction']:.2%} zeros"
        return printable(
            f"{self.pattern} {'holds' if self.ok else 'DOES NOT HOLD'} in {self.path}: {counted} in "
            f"{totals['layers']} layers, {zeros}{rest}, {self.headline}"
        )

    def text(self, max_good: int = 12) -> str:
        """`headline`, then a table of all layers that fail and at most `max_good` that hold, what was not counted, and
        `summary()`.

        If no layer fails, the largest number of non-zeros in a group and the values that are not finite are left out.

        Names come from the checkpoint, which may be anyone's, so their control characters are escaped.
        """
        bad = [layer for layer in self.layers if not layer.ok]
        good = [layer for layer in self.layers if layer.ok]
        rows: list[tuple[str, ...]] = [("layer", "shape", "groups", "violating", "max", "zeros", "not finite", "")]
        rows += [_row(layer) for layer in bad + good[:max_good]]
        if not bad:  # two columns say nothing then, and the table fits in 80 columns without them
            rows = [(*row[:4], row[5], row[7]) for row in rows]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [self.headline]
        lines += [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:-1], widths[1:-1]), row[-1]]).rstrip()
            for row in rows
        ]
        if len(good) > max_good:
            lines.append(f"... and {len(good) - max_good} more layers that hold")
        lines += [f"not counted: {name} ({reason})  <-- FAILS" for name, reason in self.uncounted.items()]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.dense.items():
            by_reason.setdefault(reason, []).append(name)
        lines += [f"dense: {name} ({reason})" for name, reason in self.dense.items() if name in by_reason[reason][:3]]
        lines += [f"dense: {len(of) - 3} more ({reason})" for reason, of in by_reason.items() if len(of) > 3]
        lines += [f"not finite: {name} ({count:,} values)" for name, count in self.non_finite_elsewhere.items()]
        lines += [self.hint] if self.hint else []
        return "\n".join([*map(printable, lines), self.summary()])


def _row(layer: LayerReport) -> tuple[str, ...]:
    note = layer.problem or ""
    if layer.left_dense is not None:
        note = f"left dense: {layer.left_dense}"
    axis = " (in, out)" if layer.axis == len(layer.shape) - 2 else ""
    return (
        printable(layer.name),
        "x".join(map(str, layer.shape)) + axis,
        f"{layer.num_groups:,}",
        f"{layer.num_violations:,}",
        str(layer.max_nonzeros),
        f"{layer.zero_fraction:.2%}",
        f"{layer.num_non_finite:,}",
        note if layer.ok else f"{note}  <-- FAILS".strip(),
    )
