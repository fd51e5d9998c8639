"""`castlm verify`: count the groups of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from castlm.cli.options import check_json_path, to_stdout, write_json
from castlm.core.nm import NM, Pattern
from castlm.fields import parsed, positional
from castlm.files.reading import user_path
from castlm.patterns import parse_pattern


@dataclass
class VerifyCommand:
    """Count every group of every sparse layer of a model folder. The exit code is 0 if all have the pattern, otherwise
    1.
    """

    path: str = positional()
    """Folder in Hugging Face format, run of `castlm train`, or one .safetensors file."""

    pattern: Pattern | None = parsed(None, parse_pattern)
    """n:m, at most n non-zeros in every m along the input axis. The default is the pattern in the folder's castlm.json,
    or 2:4 without one."""

    json: str | None = None
    """File for the report as JSON; "-" prints it instead of the table."""

    def run(self) -> int:
        from castlm.export.folder import pattern_of_files
        from castlm.export.verify import verify

        path = _counted(self.path)
        check_json_path(self.json)
        report = verify(path, self.pattern or pattern_of_files(path) or NM(2, 4))
        write_json(self.json, report.as_dict())
        if self.json != "-":
            to_stdout(report.text(), keep="\n")
        return 0 if report.ok else 1


def _counted(name: str) -> str:
    """The folder or safetensors file that `name` refers to: a run's model, a hub model in the cache."""
    from castlm.models.locate import local_folder, model_in

    place = user_path(name)
    if place.is_dir():
        return str(model_in(place))
    return name if place.exists() and place.suffix != ".gguf" else str(local_folder(name))
