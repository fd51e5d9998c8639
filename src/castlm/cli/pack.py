"""`castlm pack` and `castlm unpack`: store a model for castlm's kernels, and write it as a plain folder again."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from castlm.api.pack import PackOptions, run_pack, run_unpack
from castlm.cli.command_line import to_stdout
from castlm.fields import option, positional


@dataclass(frozen=True)
class PackCommand(PackOptions):
    """Write a model for castlm's CPU kernels. A 2:4 layer in bf16 shrinks to 0.55 of its bytes; a dense one keeps its
    size.
    """

    def run(self) -> int:
        report = run_pack(self)
        ratio = report.bytes_after / report.bytes_before
        kind = f"and verified {report.pattern}" if report.pattern else "dense"
        to_stdout(
            f"{self.output_dir}: {report.num_packed} tensors packed {kind}, {report.bytes_after / 1e6:,.1f} MB, "
            f"{ratio:.3f} of what {self.model} takes; "
            f"try it with: castlm generate {shlex.quote(self.output_dir)} --prompt TEXT"
        )
        return 0


@dataclass
class UnpackCommand:
    """Write a packed model or a GGUF file as a plain Hugging Face folder, which loads without castlm."""

    path: str = positional(
        help='Folder that `castlm pack` wrote, GGUF file, or "demo".',
    )

    output_dir: str = option(
        help="Folder for the plain model.",
    )

    overwrite: bool = option(
        False,
        help="Replace an earlier result in output_dir.",
    )

    tie: bool = option(
        False,
        help="Keep one table for embedding and output head, the finer one, where a GGUF file holds two roundings "
        "of it.",
    )

    def run(self) -> int:
        count = run_unpack(self.path, self.output_dir, self.overwrite, self.tie)
        to_stdout(f"{self.output_dir}: {count} tensors unpacked")
        return 0
