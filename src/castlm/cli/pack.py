"""`castlm pack` and `castlm unpack`: store a model for castlm's kernels, and write it as a plain folder again."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from typing import Literal

from castlm.cli.options import head_formats, result_folder, to_stdout
from castlm.core.nm import Pattern
from castlm.fields import choice, parsed, positional
from castlm.patterns import parse_pattern_or_dense


@dataclass
class PackCommand:
    """Write a model for castlm's CPU kernels. A 2:4 layer in bf16 shrinks to 0.55 of its bytes; a dense one keeps its
    size.
    """

    path: str = positional()
    """Model folder in Hugging Face format, run of `castlm train`, hub id, GGUF file, or "demo"; n:m or dense."""

    output_dir: str = dataclasses.field(kw_only=True)
    """Folder for the packed model."""

    pattern: Pattern | Literal["dense"] | None = parsed(None, parse_pattern_or_dense)
    """n:m, at most n non-zeros in every m along the input axis, or dense. The default is the pattern in castlm.json;
    without one, 2:4 if the first layer has it, otherwise dense.
    """

    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Cast all weights to this dtype first. By default they keep their bits, except that -0.0 may become 0.0."""

    head: str | None = choice(None, head_formats)
    """int8 rounds the output head, and an embedding tied to it, with one scale per row."""

    overwrite: bool = False
    """Replace an earlier result in output_dir."""

    def run(self) -> int:
        from castlm.export.packed import groups_of, pack_folder, pattern_of
        from castlm.files.output import check_output
        from castlm.progress import shown_progress

        groups = groups_of(self.path, pattern_of(self.path, self.pattern))
        folder = check_output(self.output_dir, overwrite=self.overwrite, inputs={"path": result_folder(self.path)})
        options = {"dtype": self.dtype, "head": self.head, "overwrite": True}
        with shown_progress("pack, tensors") as progress:
            report = pack_folder(self.path, folder, groups, progress=progress, **options)
        ratio = report.bytes_after / report.bytes_before
        to_stdout(
            f"{folder}: {report.num_packed} tensors packed {f'and verified {groups}' if groups else 'dense'}, "
            f"{report.bytes_after / 1e6:,.1f} MB, {ratio:.3f} of what {self.path} takes; "
            f"try it with: castlm generate {shlex.quote(str(folder))} --prompt TEXT"
        )
        return 0


@dataclass
class UnpackCommand:
    """Write a packed model or a GGUF file as a plain Hugging Face folder, which loads without castlm."""

    path: str = positional()
    """Folder that `castlm pack` wrote, GGUF file, or "demo"."""

    output_dir: str = dataclasses.field(kw_only=True)
    """Folder for the plain model."""

    overwrite: bool = False
    """Replace an earlier result in output_dir."""

    def run(self) -> int:
        from castlm.export.packed import unpack_folder
        from castlm.files.output import check_output
        from castlm.progress import shown_progress

        folder = check_output(self.output_dir, overwrite=self.overwrite, inputs={"path": self.path})
        with shown_progress("unpack, tensors") as progress:
            count = unpack_folder(self.path, folder, overwrite=True, progress=progress)
        to_stdout(f"{folder}: {count} tensors unpacked")
        return 0
