"""`castlm.pack`: store a model for castlm's kernels, an n:m one without its zeros."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Unpack

from castlm.api.signature import with_keywords_of
from castlm.core.nm import Pattern
from castlm.fields import build, choice, parsed, positional
from castlm.keywords import PackKeywords
from castlm.patterns import parse_pattern_or_dense

if typing.TYPE_CHECKING:  # it imports torch
    from castlm.export.packed import PackReport


def head_formats() -> tuple[str, ...]:
    """The choices of `head`."""
    from castlm.formats.table import HEADS

    return HEADS


@dataclass
class PackOptions:
    """The options of packing."""

    model: str = positional()
    """Model folder in Hugging Face format, run of `castlm train`, hub id, GGUF file, or "demo"; n:m or dense."""

    output_dir: str = field(kw_only=True)
    """Folder for the packed model."""

    pattern: Pattern | Literal["dense"] | None = parsed(None, parse_pattern_or_dense)
    """n:m, at most n non-zeros in every m along the input axis, or dense. The default is the pattern in castlm.json;
    without one, 2:4 if the first layer has it, otherwise dense.
    """

    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Cast all weights to this dtype first. By default they keep their bits, except that -0.0 may become 0.0."""

    head: str | None = choice(None, head_formats)
    """int8 rounds the output head and the embedding, tied or not, with one scale per row."""

    overwrite: bool = False
    """Replace an earlier result in output_dir."""


@with_keywords_of(PackOptions)
def pack(model: str | Path, *, output_dir: str | Path, **options: Unpack[PackKeywords]) -> PackReport:
    """Writes a model for castlm's CPU kernels to `output_dir`, and verifies it; an n:m one without its zeros.

    transformers loads the folder after `castlm.register()`. For a model in memory, see `pack_model_`; `unpack_folder`
    writes the plain folder again.

    Args:
        model: a Hugging Face folder, a run of `train`, a hub id, a GGUF file, or "demo"; n:m or dense.
        output_dir: the folder of the packed model.
        options: as of `castlm pack`: `pattern`, `dtype`, `head` and `overwrite`.

    Returns:
        The number of packed tensors, and the bytes of the weight files before and after.

    Raises:
        InputError: an option out of range, a model without the pattern, or `output_dir` taken.

    Examples:
        >>> import castlm
        >>> report = castlm.pack("run", output_dir="packed", head="int8")  # doctest: +SKIP
        >>> report.bytes_after / report.bytes_before  # doctest: +SKIP
        0.34
    """
    given = {"model": model, "output_dir": output_dir, **options}
    return run_pack(build(PackOptions, {name: v for name, v in given.items() if v is not None}))


def run_pack(options: PackOptions) -> PackReport:
    """`pack` with converted options."""
    from castlm.export.packed import groups_of, pack_folder, pattern_of
    from castlm.files.output import check_output
    from castlm.models.locate import result_folder
    from castlm.progress import shown_progress

    groups = groups_of(options.model, pattern_of(options.model, options.pattern))
    inputs = {"model": result_folder(options.model)}
    folder = check_output(options.output_dir, overwrite=options.overwrite, inputs=inputs)
    with shown_progress("pack, tensors") as progress:
        return pack_folder(
            options.model,
            folder,
            groups,
            dtype=options.dtype,
            head=options.head,
            overwrite=options.overwrite,
            progress=progress,
        )
