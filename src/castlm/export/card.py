"""Writes the model card: the content of a model folder, its measured perplexity, and how to load and verify it.

The texts are `card.md.jinja`, `packed.md.jinja` and `adapter.md.jinja`. A perplexity means nothing without its text,
sequence length and tokenizer, so the table has a column for each. Names come from users and other people's files, so
they are escaped, and only the last part of a local path is shown.

A packed model of others keeps its own card, below a head that names the programs that read the folder; `castlm unpack`
removes the head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from castlm.core.blocks import in_block
from castlm.core.nm import NM
from castlm.export.folder import recorded_pattern
from castlm.export.origin import described, made_by
from castlm.facts import HELD_OUT_OF, Facts, Figure, PastStep
from castlm.names import markdown, markdown_code
from castlm.packages import install_line

_HUB_SOURCE = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(?P<rest>@\S+| \(.+\))?")  # the name in `Loaded.source`
_COLUMNS = {
    "name": "model",
    "perplexity": "perplexity",
    "seq_len": "sequence length",
    "stride": "stride",
    "text": "text",
    "num_tokens": "tokens",
    "tokens": "scored tokens",
    "tokenizer": "tokenizer",
}


def model_card(folder_name: str, facts: Facts) -> str:
    """The README.md of an exported folder, from its name and its castlm.json (see `export_model`)."""
    pattern, proof = recorded_pattern(facts), facts.proof
    assert pattern is not None  # a dense model has no card
    assert proof is not None  # nor has one that was not verified
    source, license_id = facts.base_model or "", facts.license
    hub_id, _ = _hub_model(source)
    base_name = (hub_id or _public(source)).split("/")[-1]
    front_matter = {
        "base_model": hub_id,
        "license": license_id,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["castlm", "sparsity"],
    }
    groups, short = None, str(pattern)
    if isinstance(pattern, NM):
        groups, short = pattern, f"{pattern.n} of {pattern.m}"
        front_matter["tags"] = ["castlm", "sparsity", f"{pattern.n}of{pattern.m}-sparse"]
    figures = list(facts.figures or [])
    if proof.perplexity_from_disk is not None and figures:  # files may be rounded to a shorter dtype than in training
        name = f"as written, in {facts.dtype}" if facts.dtype else "as written"
        if facts.packed is not None and facts.packed.head is not None:
            name += f", before embedding and head in {facts.packed.head}"
        figures.append(replace(figures[-1], name=name, perplexity=proof.perplexity_from_disk))
    figures = _of_base(figures, hub_id or base_name)
    return _render(
        "card.md.jinja",
        front_matter=_fenced(front_matter),
        title=markdown(f"{base_name}, {short}" if base_name else folder_name),
        base=_reference(source),
        steps=[_step(step) for step in made_by(facts)],
        format=markdown(_format(facts)),
        install=install_line(),
        verdict=None if facts.verdict is None or facts.verdict.ok else facts.verdict,
        pattern=pattern,
        groups=groups,
        packed=facts.packed is not None,
        head=facts.packed and facts.packed.head,
        proof=proof,
        left_dense={name: reason for name, reason in facts.left_dense.items() if in_block(name)},
        table=_table([*figures, *_of_base(facts.general_figures or [], hub_id or base_name)]),
        measured=proof.perplexity_from_disk is not None or facts.quantized is None,
        has_options=facts.config is not None,
        has_texts=any(text is not None for text in (facts.dataset, facts.calibration, facts.measured)),
        license=license_id,
        derived_from=hub_id or base_name or "its base model",
    )


def _render(template: str, **content: Any) -> str:
    templates = Environment(
        loader=PackageLoader("castlm", "export"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters.update(md=markdown, code=markdown_code)
    return templates.get_template(template).render(**content)


def _fenced(fields: Mapping[str, Any]) -> str:
    """The head of a card for the hub, without the fields that are not known; empty if none is."""
    known = {name: value for name, value in fields.items() if value}
    return f"---\n{yaml.safe_dump(known, sort_keys=False)}---\n\n" if known else ""


def _hub_model(source: str) -> tuple[str, str]:
    """The hub id in `source` and the text after it; both empty if the model is not known to be on the hub."""
    on_hub = None if Path(source).exists() else _HUB_SOURCE.fullmatch(source)
    return (on_hub["id"], on_hub["rest"] or "") if on_hub else ("", "")


def _reference(source: str) -> str:
    """A model in Markdown: a link to the hub, or the last part of its path."""
    hub_id, rest = _hub_model(source)
    if hub_id:
        return f"[{hub_id}](https://huggingface.co/{hub_id}){markdown(rest)}"
    return markdown(_public(source).split("/")[-1])


def _public(name: str) -> str:
    """`name`, or the last part of it if it is a local path; the same for each of several texts."""
    prefix = HELD_OUT_OF if name.startswith(HELD_OUT_OF) else ""
    return prefix + ", ".join(map(_last_part, name.removeprefix(prefix).split(", ")))


def _last_part(name: str) -> str:
    """The last part of a path; of a run's `run/model` the name of the run."""
    is_path = name.startswith(("/", "~", ".")) or "\\" in name or ("/" in name and Path(name).exists())
    if not is_path:
        return name
    *owners, last = re.split(r"[/\\]", name.rstrip("/\\"))
    return owners[-1] if last == "model" and owners and owners[-1] not in ("", ".", "..", "~") else last


def _step(step: PastStep) -> str:
    """A step by which the model was made, with the last part of each local path."""
    return markdown(described(step, _public))


def _format(facts: Facts) -> str:
    """The format of the weights in the files, in words."""
    if facts.packed is None:
        rounded = f", of values that {facts.quantized.kind} has" if facts.quantized else ""
        zeros = "" if facts.pattern is None else ", with the zeros"
        return f"safetensors in {facts.dtype or 'the dtype of the base model'}{rounded}{zeros}"
    integers = facts.quantized or facts.rounded
    kind = integers.kind if integers else facts.dtype
    return f"castlm's packed format: {kind or 'the kept values'} without the zeros in the sparse layers"


def _of_base(figures: list[Figure], base: str) -> list[Figure]:
    """`figures` with the base model in place of a local folder as the tokenizer: castlm keeps the base's."""

    def is_local(name: str | None) -> bool:
        return name is not None and (_public(name) != name or Path(name).exists())

    return [replace(row, tokenizer=base) if base and is_local(row.tokenizer) else row for row in figures]


def _table(figures: list[Figure]) -> list[str]:
    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}" if value >= 1000 else f"{value:.3f}"
        if isinstance(value, int):
            return f"{value:,}"
        return "" if value is None else markdown(_public(str(value)))

    columns = [key for key in _COLUMNS if any(getattr(row, key) is not None for row in figures)]
    cells = [[_COLUMNS[key] for key in columns], *([cell(getattr(row, key)) for key in columns] for row in figures)]
    head, *rows = [f"| {' | '.join(row)} |" for row in cells]
    return [head, "|" + "---|" * len(columns), *rows] if columns else []


def adapter_card(facts: Facts, kind: str, trained: int) -> str:
    """The README.md of an adapter, in place of PEFT's template.

    Args:
        facts: of the run that trained it.
        trained: the number of trained weights.
    """
    source = facts.base_model or ""
    hub_id, _ = _hub_model(source)
    tags = ["castlm", "sparsity", kind]
    return _render(
        "adapter.md.jinja",
        front_matter=_fenced({"base_model": hub_id, "license": facts.license, "library_name": "peft", "tags": tags}),
        title=(hub_id or _public(source)).split("/")[-1],
        base=_reference(source),
        trained=trained,
        steps=[_step(step) for step in made_by(facts)],
        table=_table(_of_base(list(facts.figures or []), hub_id or _public(source).split("/")[-1])),
        license=facts.license,
    )


# ---- packed folders


_BELOW = "\n<!-- castlm pack: below is the card of the model before it was packed. -->\n\n"


def packed_card(source: Path, facts: Facts, pattern: str) -> str:
    """The README.md of the folder that the model in `source` is packed to.

    Args:
        facts: the castlm.json of the packed folder.
        pattern: n:m.
    """
    if card := _result_card(source, facts):
        return card
    before = _read_card(source)
    hub_id, _ = _hub_model(facts.base_model or "")
    front_matter = _front_matter(before) or _fenced({"base_model": hub_id, "license": facts.license})
    head = _render(
        "packed.md.jinja",
        front_matter=front_matter,
        name=source.resolve().name,
        pattern=pattern,
        install=install_line(),
        steps=[_step(step) for step in made_by(facts)],
        base=_reference(facts.base_model or ""),
        license=facts.license,
    )
    body = before.removeprefix(front_matter)
    return f"{head}{_BELOW}{body}" if body.strip() else head


def unpacked_card(source: Path, facts: Facts) -> str:
    """The README.md of the folder with castlm.json `facts` that the packed `source` is unpacked to; may be empty."""
    packed = _read_card(source)
    return _result_card(source, facts) or _front_matter(packed) + packed.partition(_BELOW)[2]


def _result_card(source: Path, facts: Facts) -> str:
    """The card of a result of castlm; empty if `facts` are not of a verified one."""
    is_verified = facts.proof is not None and facts.pattern is not None
    return model_card(source.resolve().name, facts) if is_verified else ""


def _read_card(folder: Path) -> str:
    file = folder / "README.md"
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _front_matter(card: str) -> str:
    """The YAML at the head of a card, with its fences, for the hub; empty if there is none."""
    end = card.find("\n---\n", len("---\n") - 1)
    return card[: end + len("\n---\n")] if card.startswith("---\n") and end > 0 else ""
