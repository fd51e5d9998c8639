"""The facts of a model: castlm.json, which train, finetune, prune, quantize and pack write and many commands read.

`Facts` has an attribute for each entry of the file, and a class for each entry that is an object. Every reader of the
file calls `Facts.read`, which refuses an entry that no class has, a missing entry, and an entry of another type, in one
line that names the file and the entry. So a renamed entry fails where the file is read, not later in a card or a table.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Self

from castlm.core.errors import InputError
from castlm.files.record import RESULT, check_result
from castlm_runtime.reading import read_json_object

SCHEMA_VERSION = 1
"""The version of the entries of castlm.json."""
HELD_OUT_OF = "held out of "
"""Before the names of the training texts, the name of an evaluation text that was taken from them."""


@dataclass(frozen=True)
class Perplexities:
    """The perplexities of a run, on its evaluation text; None where it has none. Infinite if one is not finite."""

    dense: float | None = None
    """The dense model."""
    one_shot: float | None = None
    """The start of the run."""
    start: float | None = None
    """The model before fine-tuning."""
    before_prune: float | None = None
    """The trained model, with its masked weights."""
    pruned: float | None = None
    """The result."""
    trained: float | None = None
    """The dense control, which is not pruned."""

    @property
    def final(self) -> float | None:
        """The perplexity of the result: pruned, or the dense control's."""
        return self.trained if self.pruned is None else self.pruned

    def known(self) -> dict[str, float]:
        """The perplexities by name, without those that the run has not."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Conditions:
    """The conditions on which a perplexity depends."""

    seq_len: int
    stride: int
    text: str
    text_sha256: str
    num_tokens: int
    tokenizer: str
    precision: str
    tokens: str | None = None
    """The scored tokens of conversations, such as "assistant"."""


@dataclass(frozen=True, kw_only=True)
class Figure(Conditions):
    """A perplexity with its conditions: a row of the table in a model card."""

    name: str
    perplexity: float


@dataclass(frozen=True)
class Verdict:
    """Whether training improved the model, and why; see `castlm.training.verdict.verdict`."""

    ok: bool
    reason: str
    problem: str | None = None
    """"DIVERGED" or "FELL SHORT"."""
    remedy: str | None = None

    @property
    def outcome(self) -> str | None:
        """The problem of the run, "diverged" or "fell short"; None if it has none."""
        return None if self.ok else (self.problem or "diverged").lower()


@dataclass(frozen=True)
class MaskFigures:
    """The last figures of the masks of a run: see `castlm.training.metrics`."""

    sparse_weight_ratio: float | None = None
    flip_rate: float | None = None
    initial_flip_rate: float | None = None
    largest_masked: float | None = None


@dataclass(frozen=True)
class Histogram:
    """Counts of masked weights by magnitude: exact `zeros`, and `counts[i]` in `[edges[i], edges[i + 1])`.

    The first and the last bin also hold smaller and larger ones.
    """

    edges: list[float]
    zeros: int
    counts: list[int]


@dataclass(frozen=True)
class Dataset:
    """The training text."""

    name: str
    sha256: str


@dataclass(frozen=True)
class DrawnText:
    """The calibration text of a prune, and the sequences drawn from it."""

    text: str | None
    text_sha256: str
    seed: int
    num_sequences: int
    seq_len: int
    tokens_sha256: str
    precision: str
    extras_sha256: str | None = None
    """A hash of the images of the sequences; None for plain text."""


@dataclass
class BasisChange:
    """One kind of change over the whole model, with the mean relative error of its layers solved by SparseGPT."""

    what: str
    before: float
    after: float
    num_kept: int
    num_tried: int

    def __str__(self) -> str:
        where = f"{self.num_kept} of {self.num_tried} kept, " if self.num_kept < self.num_tried else ""
        return f"{self.what}: {where}layer error {self.before:.4f} -> {self.after:.4f}"


@dataclass
class Basis:
    """The changes of basis of a start."""

    changes: list[BasisChange] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """A line for each change that was omitted or undone, with the reason."""
    moved: float = 0.0
    """Largest difference of a block's output, relative to the largest."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Reconstructed:
    """Reconstruction of one block: squared output error on held-out sequences, relative to |output - input|^2."""

    before: float
    after: float
    epochs: int
    """The number of epochs that were run; it stops when the held-out error rises."""


@dataclass(frozen=True)
class Solved:
    """The entries of a one-shot method: in castlm.json of a pruned model, and in the entry `start` of a run."""

    basis: Basis | None = None
    prune_seconds: float | None = None
    """Time without the changes of basis."""
    damping: float | None = None
    """The given damping; None for a method without damping."""
    raised_damping: dict[str, float] | None = None
    """By layer, where SparseGPT needed more than the given damping."""
    experts_calibrated_on_all_tokens: dict[str, int] | None = None
    """By layer, the number of experts to which too few tokens were routed."""
    masked_by_magnitude: dict[str, int] | None = None
    """By layer, the number of matrices whose input is always 0 on the calibration text."""

    @property
    def seconds(self) -> float | None:
        """The seconds of the change of basis and of the solver; None if neither was timed."""
        parts = (self.basis.seconds if self.basis else None, self.prune_seconds)
        known = [part for part in parts if part is not None]
        return sum(known) if known else None


@dataclass(frozen=True)
class Start(Solved):
    """The report of the start of a run; without any entry if it is magnitude."""

    calibration_tokens: int | None = None
    layer_errors: dict[str, float | None] | None = None
    """The relative error of the outputs of each layer."""
    reconstructions: list[Reconstructed] | None = None


@dataclass(frozen=True)
class TrainedRounding:
    """Trained rounding: the format of the layers, their number, and the bits of a weight with mask and scales."""

    kind: str
    layers: int | None = None
    bits_per_weight: float | None = None


@dataclass(frozen=True)
class Quantized:
    """A rounding after training, by `castlm quantize`; among the earlier steps, only `kind` and `text`."""

    kind: str
    source: str | None = None
    layers: int | None = None
    mean_relative_error: float | None = None
    num_sequences: int | None = None
    seq_len: int | None = None
    seconds: float | None = None
    experts_calibrated_on_all_tokens: dict[str, int] | None = None
    text: str | None = None
    text_sha256: str | None = None
    seed: int | None = None
    train_steps: int | None = None
    """Steps in which the scales were trained; None without."""


@dataclass(frozen=True)
class Packing:
    """The packing of a model: the castlm that wrote it. The weight files name the features of the format."""

    castlm: str
    head: str | None = None
    """The format of output head and embedding; None if they have the dtype of the files."""
    format: int | None = None
    """2 in folders whose files have a version in place of features."""


@dataclass(frozen=True)
class Cut:
    """A cut of channels or heads: the share that stays, and fields of config.json before and after it."""

    units: str
    before: dict[str, int]
    after: dict[str, int]
    logits_moved: float | None = None
    """Largest difference of a logit to the masked model, relative to the largest logit."""


@dataclass(frozen=True)
class Proof:
    """The counts of `verify` from when the folder was written (`VerifyReport.totals`), and further comparisons."""

    layers: int
    bad_layers: int
    left_dense: int
    uncounted: int
    weights: int
    groups: int
    violations: int
    zero_fraction: float
    non_finite: int
    share: float | None = None
    """The share of the pattern in the weights by which the transformer blocks multiply; None in older files."""
    tensors_equal_in_bits: int | None = None
    perplexity_from_disk: float | None = None


@dataclass(frozen=True)
class PastStep:
    """A step by which castlm made a model: a prune, a training or a rounding, for the card of a later result."""

    method: str | None = None
    pattern: str | None = None
    calibration: DrawnText | None = None
    refinements: dict[str, Any] | None = None
    changes_of_basis: list[str] | None = None
    """The kinds of change before the solver, such as "values rotated"."""
    cut: Cut | None = None
    rounded: TrainedRounding | None = None
    train_steps: int | None = None
    train_tokens: int | None = None
    world_batch: int | None = None
    dataset: Dataset | None = None
    config: dict[str, Any] | None = None
    """The options of the run that describe the step."""
    quantized: Quantized | None = None


@dataclass(frozen=True)
class Origin:
    """The entries that a result takes over from the model that it was made of."""

    base_model: str | None = None
    """Hub id or path of the dense model."""
    license: str | None = None
    earlier: list[PastStep] | None = None
    """The steps before the last one, oldest first."""


@dataclass(frozen=True, kw_only=True)
class Facts(Origin, Solved):
    """The content of castlm.json. An entry is None if the command that made the model does not write it."""

    pattern: str | None
    """The pattern of the sparse layers; None for a dense model."""
    left_dense: dict[str, str]
    """The reason for each module or parameter that is dense on purpose, by name."""
    schema_version: int | None = None
    dtype: str | None = None
    """The dtype of the files."""
    versions: dict[str, str] | None = None
    proof: Proof | None = None
    cut: Cut | None = None
    packed: Packing | None = None

    method: str | None = None
    refinements: dict[str, Any] | None = None
    calibration: DrawnText | None = None
    rounded: TrainedRounding | None = None
    quantized: Quantized | None = None

    run_id: str | None = None
    config: dict[str, Any] | None = None
    """The options of the run; `TrainConfig.from_mapping` reads them."""
    world_batch: int | None = None
    """Sequences per optimizer step, over all ranks."""
    perplexity: Perplexities = Perplexities()
    figures: list[Figure] | None = None
    measured: Conditions | None = None
    general_figures: list[Figure] | None = None
    """Perplexities on a text of another kind than the training text."""
    mask: MaskFigures = MaskFigures()
    dataset: Dataset | None = None
    num_params: int | None = None
    train_tokens: int | None = None
    train_steps: int | None = None
    train_seconds: float | None = None
    start: Start = Start()
    world_size: int | None = None
    peak_memory_bytes: int | None = None
    machine: str | None = None
    masked_histogram: Histogram | None = None
    verdict: Verdict | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str) -> Self:
        """The facts in the JSON object `content`; an `InputError` names the entry, and the file `where`."""
        found: Self = _object(cls, {"pattern": None, "left_dense": {}, **content}, where, "")
        if any(name in content for name in _MARKS_OF_A_RUN):
            rounded_later = ("perplexity", "figures") if "quantized" in content else ()  # no longer true, so dropped
            for name in _OF_A_RUN:
                if name not in content and name not in rounded_later:
                    raise _refusal(where, name, "is missing")
        return found

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The facts in the castlm.json of a model folder; without any entry if there is no such file."""
        file = folder / RESULT
        return cls.from_json(read_json_object(file) if file.is_file() else {}, str(file))

    @classmethod
    def read_result(cls, folder: Path) -> Self:
        """The facts of a finished model folder, after comparing all its files with their checksums."""
        check_result(folder)
        return cls.read(folder)

    def to_json(self) -> dict[str, Any]:
        """The content of castlm.json, which `from_json` reads."""
        return to_json(self)


_MARKS_OF_A_RUN = ("run_id", "train_steps", "world_size")
_OF_A_RUN = (
    *("method", "config", "world_batch", "perplexity", "figures", "measured", "dataset", "num_params"),
    *("train_tokens", "train_steps", "train_seconds", "world_size", "machine", "verdict"),
)
"""The entries that every run writes."""


def to_json(facts: Any) -> dict[str, Any]:
    """The JSON object of one of the dataclasses above, without optional entries that are None or have no entries."""
    content = {}
    for entry in dataclasses.fields(facts):
        value = _plain(getattr(facts, entry.name))
        is_required = entry.default is MISSING and entry.default_factory is MISSING
        if is_required or (value is not None and not (value == {} and dataclasses.is_dataclass(entry.default))):
            content[entry.name] = value
    return content


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_json(value)
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value


def from_json(kind: type[Any], content: Any, where: str) -> Any:
    """An instance of one of the dataclasses above from what `to_json` returned; `where` is for the error."""
    return _object(kind, content, where, "")


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """The types of the entries of a dataclass, by name."""
    return typing.get_type_hints(kind)


def _object(kind: Any, content: Any, where: str, path: str) -> Any:
    """An instance of the dataclass `kind` from a JSON object, at the place `path` in the file `where`."""
    if not isinstance(content, Mapping):
        raise _refusal(where, path, f"is {content!r:.100}, not an object")
    inside = f"{path}." if path else ""
    hints, values = _hints(kind), {}
    for name, value in content.items():
        if name not in hints:
            raise _refusal(where, f"{inside}{name}", "is no entry that this castlm knows")
        # An absent entry is None; null stands for a number that is not finite, which JSON cannot hold.
        is_infinite = value is None and float in typing.get_args(hints[name])
        values[name] = math.inf if is_infinite else _value(hints[name], value, where, f"{inside}{name}")
    for entry in dataclasses.fields(kind):
        if entry.default is MISSING and entry.default_factory is MISSING and entry.name not in values:
            raise _refusal(where, f"{inside}{entry.name}", "is missing")
    return kind(**values)


_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _value(kind: Any, value: Any, where: str, path: str) -> Any:
    """The value of the entry `path`, of the type `kind`."""
    if kind is Any:
        return value
    arguments = typing.get_args(kind)
    if isinstance(kind, types.UnionType):  # X | None
        is_none = value is None or (value == {} and dataclasses.is_dataclass(arguments[0]))
        return None if is_none else _value(arguments[0], value, where, path)
    if dataclasses.is_dataclass(kind):
        return _object(kind, value, where, path)
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise _refusal(where, path, f"is {value!r:.100}, not an object")
        return {name: _value(arguments[1], each, where, f"{path}.{name}") for name, each in value.items()}
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise _refusal(where, path, f"is {value!r:.100}, not a list")
        return [_value(arguments[0], each, where, f"{path}[{number}]") for number, each in enumerate(value)]
    if kind is float and value is None:
        return math.inf
    if kind is float and type(value) is int:
        return float(value) if abs(value) < 2**63 else math.inf
    if type(value) is not kind:
        raise _refusal(where, path, f"is {value!r:.100}, not {_WORDS[kind]}")
    return value


def _refusal(where: str, path: str, reason: str) -> InputError:
    return InputError(
        f"{where}: {path or 'the file'} {reason}: fetch the model again, or read it with the version of castlm that "
        "wrote it"
    )
