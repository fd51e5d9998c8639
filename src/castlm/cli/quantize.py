"""`castlm quantize`: round a sparse model to int8, float8 or int4, zeros kept."""

from __future__ import annotations

import contextlib
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from castlm.cli.options import parse, result_folder
from castlm.core.errors import InputError
from castlm.core.pattern import NM, Pattern
from castlm.fields import positional

if TYPE_CHECKING:
    from torch import Tensor

    from castlm.core.experts import SparseLayer
    from castlm.data.documents import Documents
    from castlm.data.hub import HubDocuments
    from castlm.inference.quantize import QuantizeReport
    from castlm.inference.rounding import Rounded
    from castlm.models.io import Loaded

_NOT_PASSED_ON = (
    *("schema_version", "versions", "proof", "left_dense", "figures", "perplexity", "dtype", "files"),
    *("packed", "quantized"),
)
"""Entries of castlm.json that do not hold of the quantized model, or are written again."""


_OF_INT4 = ("calibration", "column", "num_sequences", "seq_len", "seed", "damping")


@dataclass
class QuantizeCommand:
    """Round the linear layers of a sparse model to int8, fp8 or int4, keep every zero, and verify the result."""

    model: str = positional()
    """Sparse model: Hugging Face folder or run of `castlm train`."""

    output_dir: str
    """Folder for the quantized model."""

    kind: Literal["int8", "fp8", "int4"] = "int8"
    """int8 and fp8 round each row to the nearest; int4 rounds groups of 64 columns by GPTQ with a calibration text."""

    packed: bool = False
    """Write int8 or int4 in the packed format, codes and scales without the zeros, instead of a plain model folder."""

    head: Literal["int8"] | None = None
    """With --packed: int8 rounds the output head, and an embedding tied to it, to int8 with a scale for each row."""

    calibration: str | None = None
    """Text for int4: a file, folder, glob or hub dataset, as --dataset of castlm train."""

    column: str | None = None
    """Column of .jsonl and .parquet that holds the text, or messages, which the chat template renders. By default it is
    found."""

    chat_template_path: str | None = None
    """File with a Jinja chat template to use, and to save, in place of the tokenizer's own."""

    pattern: str | None = None
    """n:m of the model; that of its castlm.json when not given."""

    num_sequences: int = field(default=64, metadata={"at_least": 1})
    """Calibration sequences."""

    seq_len: int = field(default=512, metadata={"at_least": 1})
    """Their length in tokens, at most the model's context."""

    seed: int = 0
    """Seed of the draw of calibration sequences."""

    damping: float = 0.01
    """int4: share of the mean diagonal that is added to the Hessian."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses CUDA if there is a GPU."""

    save_dtype: Literal["source", "fp32", "bf16", "fp16"] = "source"
    """What the dequantized values are written in; source: what the model is stored in."""

    overwrite: bool = False
    """Replace what output_dir holds."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    def run(self) -> int:
        from castlm.data.documents import open_documents
        from castlm.export.folder import read_manifest
        from castlm.export.unit_count import groups_of
        from castlm.export.verify import read_left_dense
        from castlm.files.output import claimed
        from castlm.hardware import choose_device, keep_freed_memory
        from castlm.oneshot.options import check_damping

        keep_freed_memory()
        check_damping(self.damping)
        if self.kind == "int4" and self.calibration is None:
            raise InputError("int4 needs a calibration text: pass --calibration FILE")
        if self.kind != "int4":
            for option in fields(self):
                value = getattr(self, option.name)
                if option.name in _OF_INT4 and value != option.default:
                    raise InputError(f"{option.name} {value} is of int4, and kind is {self.kind}: leave it out")
        if self.packed and self.kind == "fp8":
            raise InputError("the packed format holds int8 and int4: leave --packed out for fp8")
        if self.head is not None and not self.packed:
            raise InputError(f"--head {self.head} is of the packed format: pass --packed, or leave it out")
        source = result_folder(self.model)
        manifest = read_manifest(Path(source))
        left_dense = read_left_dense(Path(source) / "castlm.json")
        text = self.pattern or manifest.get("pattern")
        if not isinstance(text, str):
            why = "has no pattern in a castlm.json" if Path(source).is_dir() else "is not a folder"
            raise InputError(f"{self.model} {why}: check the path, or pass --pattern 2:4")
        pattern = groups_of(Pattern.parse(text))
        if pattern is None:
            raise InputError(f"{self.model} is {text}, which has no n:m to keep: pass --pattern of an n:m model")
        device = choose_device(self.device)
        documents = None if self.calibration is None else open_documents(self.calibration, column=self.column)
        inputs = {"model": source, "calibration": self.calibration}
        with claimed(self.output_dir, "result", overwrite=self.overwrite, inputs=inputs) as folder:
            manifest |= {"pattern": text, "left_dense": left_dense}
            return self._quantize(source, manifest, pattern, documents, folder, device)

    def _quantize(
        self,
        source: str,
        manifest: dict[str, Any],
        pattern: NM,
        documents: Documents | HubDocuments | None,
        folder: Path,
        device: str,
    ) -> int:
        import torch

        from castlm.core.sparsify import sparse_linears
        from castlm.data.chat import with_template
        from castlm.inference.quantize import quantize_
        from castlm.models.io import load_model
        from castlm.oneshot.report import few_experts_note
        from castlm.progress import note, shown_progress

        # GPTQ computes in fp32; rounding by rows takes fp32 a layer at a time, and what is written is the same.
        held = None if self.kind != "int4" and self.save_dtype == "source" else torch.float32
        loaded = load_model(source, dtype=held, trust_remote_code=self.trust_remote_code)
        with_template(loaded.tokenizer, self.chat_template_path)
        layers, left_dense = sparse_linears(loaded.model, pattern)
        left_dense |= manifest["left_dense"]
        _check_pattern(self.model, layers, pattern, left_dense)
        blocks, text = self._calibration(loaded, documents)
        loaded.model.to(device)
        with shown_progress(f"{self.kind}, {'blocks' if blocks is not None else 'layers'}") as progress:
            report = quantize_(loaded.model, self.kind, calibration=blocks, damping=self.damping, progress=progress)
        loaded.model.to("cpu")
        if report.few_experts:
            note(few_experts_note(report.few_experts))
        passed_on = {key: value for key, value in manifest.items() if key not in _NOT_PASSED_ON}
        quantized = {"source": self.model, **report.record(), **text}
        record = {"base_model": self.model, **passed_on, "quantized": quantized}
        self._write(loaded, report, pattern, left_dense, record, folder)
        print(
            f"{folder}: {self.kind} in {len(report.layers)} layers, mean relative error {report.mean_error:.2e}, "
            f"{pattern} verified; measure it with: castlm eval {shlex.quote(str(folder))} --text FILE"
        )
        return 0

    def _write(
        self,
        loaded: Loaded,
        report: QuantizeReport,
        pattern: NM,
        left_dense: Mapping[str, str],
        record: Mapping[str, Any],
        folder: Path,
    ) -> None:
        """Writes the quantized model to `folder` with castlm.json, plain or packed, and verifies it."""
        from castlm.export.cut_sizes import cut_pattern
        from castlm.export.hf import export_model
        from castlm.files.atomic_dir import atomic_dir
        from castlm.inference.quantize import stored_layers
        from castlm.models.io import save_dtype

        recorded = Pattern.parse(record["pattern"])
        with contextlib.ExitStack() as stack:
            target = folder
            if self.packed:
                temporary = stack.enter_context(atomic_dir(folder, overwrite=True))
                target = temporary / "plain" / folder.name
            export_model(
                loaded.model,
                loaded.tokenizer,
                target,
                pattern=recorded if cut_pattern(recorded) is None else pattern,  # it is cut already
                left_dense=left_dense,
                record=record,
                overwrite=True,
                dtype=save_dtype(self.save_dtype, loaded.dtype),
                keep_rejected=not self.packed,  # the plain folder is temporary then
            )
            if self.packed:
                try:
                    _pack(target, temporary, pattern, stored_layers(loaded.model, report.layers), self.head)
                except InputError as error:  # of a folder that is gone by the time a person reads it
                    said = str(error).replace(str(target), self.model)
                    raise InputError(said.replace(str(temporary), str(folder))) from error

    def _calibration(
        self, loaded: Loaded, documents: Documents | HubDocuments | None
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """The calibration sequences and their record for castlm.json; None and an empty record without a text."""
        from castlm.data.calibration import calibration_sequences
        from castlm.oneshot.calibration import calibration_length
        from castlm.progress import note

        if documents is None:
            return None, {}
        length = min(self.seq_len, calibration_length(loaded.model))
        blocks, _ = calibration_sequences(documents, loaded.tokenizer, self.num_sequences, length, self.seed, say=note)
        return blocks, {"text": self.calibration, "text_sha256": documents.text_hash(), "seed": self.seed}


def _check_pattern(name: str, layers: Mapping[str, SparseLayer], pattern: NM, left_dense: Mapping[str, str]) -> None:
    """Raises `InputError` unless every sparse layer has the pattern, before work is done that could not be written."""
    from castlm.export.verify import left_dense_reason

    for layer_name, layer in layers.items():
        if left_dense_reason(f"{layer_name}.weight", left_dense) is None and pattern.violations(layer.weight):
            raise InputError(f"{name} is not {pattern} in {layer_name}: pass its own pattern, or prune it first")


def _pack(plain: Path, folder: Path, pattern: NM, layers: Mapping[str, Rounded], head: str | None) -> None:
    """Replaces the folder `plain` in `folder` by what it is packed, with the integers themselves, and verifies that."""
    from castlm.export.integers import store_integers
    from castlm.export.packed import pack_folder
    from castlm.export.verify import left_dense_reason, read_left_dense, verify
    from castlm.files.atomic_file import atomic_write_json
    from castlm.files.owned import RESULT, read_record

    packed = folder / "packed"
    pack_folder(plain, packed, pattern.n, pattern.m, head=head)
    shutil.rmtree(plain.parent)
    left_dense = read_left_dense(packed / "castlm.json")  # their values are rounded, and stored as they are
    layers = {n: layer for n, layer in layers.items() if left_dense_reason(f"{n}.weight", left_dense) is None}
    store_integers(packed, layers)
    found = verify(packed, pattern, known_layers=())  # pack_folder found all of them
    if not found.ok:
        raise InputError(found.summary())
    for file in packed.iterdir():
        if file.name != RESULT:
            file.rename(folder / file.name)
    # Last and without its list of files, which would call the folder whole: `atomic_dir` makes a new one.
    record = read_record(packed / RESULT)
    atomic_write_json(folder / RESULT, {name: value for name, value in record.items() if name != "files"})
    (packed / RESULT).unlink()
    packed.rmdir()


def main(arguments: list[str]) -> int:
    return int(parse(QuantizeCommand, arguments, "quantize").run())
