"""`castlm unpack`: a packed model, or a GGUF file, as a plain Hugging Face folder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from castlm.fields import positional


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
        print(f"{folder}: {count} tensors unpacked")
        return 0
