"""`castlm verify`: count the groups of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from castlm.cli.options import parse, result_folder, write_json
from castlm.core.pattern import Pattern
from castlm.fields import positional


@dataclass
class VerifyCommand:
    """Prove that every group of every sparse layer of a checkpoint is n:m. Exit 0: it is; 1: it is not."""

    path: str = positional()
    """Folder in Hugging Face format, or one .safetensors file."""

    pattern: str = "2:4"
    """n:m, at most n non-zeros in every m along the input axis."""

    json: str | None = None
    """Write the report there; "-" prints it instead of the table."""

    def run(self) -> int:
        from castlm.export.verify import verify

        report = verify(result_folder(self.path), Pattern.parse(self.pattern))
        write_json(self.json, report.as_dict())
        if self.json != "-":
            print(report.text())
        return 0 if report.ok else 1


def main(arguments: list[str]) -> int:
    return int(parse(VerifyCommand, arguments, "verify").run())
