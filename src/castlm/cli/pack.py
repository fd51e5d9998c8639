"""`castlm pack`: store an n:m model without its zeros."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from typing import Literal

from castlm.cli.options import parse
from castlm.cli.verify import recorded_pattern
from castlm.core.errors import InputError
from castlm.core.pattern import Pattern
from castlm.fields import positional


@dataclass
class PackCommand:
    """Write an n:m model without its zeros: 9/16 of the bytes of each 2:4 layer in bf16, and faster on a CPU."""

    path: str = positional()
    """Model folder in Hugging Face format, or run of `castlm train`."""

    output_dir: str = dataclasses.field(kw_only=True)
    """Folder for the packed model."""

    pattern: str | None = None
    """n:m, at most n non-zeros in every m along the input axis. The default is that of castlm.json, or 2:4."""

    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Cast all weights to this dtype first; by default they stay as they are stored, bit for bit, except that -0.0 may
    become 0.0."""

    head: Literal["int8"] | None = None
    """int8: round the output head, and an embedding tied to it, to int8 with a scale for each row."""

    overwrite: bool = False
    """Replace what output_dir holds."""

    def run(self) -> int:
        from castlm.export.packed import pack_folder
        from castlm.export.unit_count import groups_of
        from castlm.files.output import claimed
        from castlm.models.locate import local_folder
        from castlm.progress import shown_progress

        source = str(local_folder(self.path))
        named = self.pattern or recorded_pattern(source) or "2:4"
        pattern = groups_of(Pattern.parse(named))
        if pattern is None:
            raise InputError(f"{self.path} is {named}, which has no n:m to pack: pass --pattern of an n:m model")
        with (
            claimed(self.output_dir, "result", overwrite=self.overwrite, inputs={"path": source}) as folder,
            shown_progress("pack, tensors") as progress,
        ):
            report = pack_folder(
                source,
                folder,
                pattern.n,
                pattern.m,
                dtype=self.dtype,
                head=self.head,
                overwrite=True,
                progress=progress,
            )
        ratio = report.bytes_after / report.bytes_before
        print(
            f"{folder}: {report.num_packed} tensors packed and verified {pattern}, "
            f"{report.bytes_after / 1e6:,.1f} MB, {ratio:.3f} of what {self.path} takes; "
            f"try it with: castlm generate {shlex.quote(str(folder))} --prompt TEXT"
        )
        return 0


def main(arguments: list[str]) -> int:
    return int(parse(PackCommand, arguments, "pack").run())
