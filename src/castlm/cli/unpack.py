"""`castlm unpack`: a packed model as a plain Hugging Face folder again."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from castlm.cli.options import parse
from castlm.fields import positional


@dataclass
class UnpackCommand:
    """Write a packed model as a plain Hugging Face folder, zeros stored, which loads without castlm."""

    path: str = positional()
    """Folder that `castlm pack` wrote."""

    output_dir: str = dataclasses.field(kw_only=True)
    """Folder for the plain model."""

    overwrite: bool = False
    """Replace what output_dir holds."""

    def run(self) -> int:
        from castlm.export.packed import unpack_folder
        from castlm.files.output import claimed
        from castlm.progress import shown_progress

        with (
            claimed(self.output_dir, "result", overwrite=self.overwrite, inputs={"path": self.path}) as folder,
            shown_progress("unpack, tensors") as progress,
        ):
            count = unpack_folder(self.path, folder, overwrite=True, progress=progress)
        print(f"{folder}: {count} tensors unpacked")
        return 0


def main(arguments: list[str]) -> int:
    return int(parse(UnpackCommand, arguments, "unpack").run())
