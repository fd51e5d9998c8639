"""`castlm verify`: count the groups of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from castlm.cli.command_line import check_json_path, to_stdout, write_json
from castlm.core.nm import NM, Pattern
from castlm.export.verify_report import ALLOW_DENSE
from castlm.fields import like, option, parsed, positional
from castlm.patterns import parse_pattern
from castlm.training.options import ModelOptions
from castlm_runtime.reading import user_path


@dataclass
class VerifyCommand:
    """Count every group of every sparse layer of a model folder. The exit code is 0 if all have the pattern, otherwise
    1. The first line of the answer is the share of the pattern in all weights that the transformer blocks multiply by.
    """

    path: str = positional(
        help="Folder in Hugging Face format, or run of `castlm train`.",
    )

    pattern: Pattern | None = parsed(
        None,
        parse_pattern,
        help="n:m, at most n non-zeros in every m along the input axis. The default is the pattern in the folder's "
        "castlm.json, or 2:4 without one.",
    )

    allow_dense: float = option(
        ALLOW_DENSE,
        at_least=0,
        at_most=1,
        help="The largest share of the weights by which the transformer blocks multiply that may lack the pattern.",
    )

    trust_remote_code: bool = like(ModelOptions, "trust_remote_code")

    json: str | None = option(
        None,
        help='File for the report as JSON; "-" prints it instead of the table.',
    )

    def run(self) -> int:
        from castlm.export.folder import pattern_of_files
        from castlm.export.verify import verify

        path = _counted(self.path)
        check_json_path(self.json)
        report = verify(
            path,
            self.pattern or pattern_of_files(path) or NM(2, 4),
            allow_dense=self.allow_dense,
            trust_remote_code=self.trust_remote_code,
        )
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
