"""Writes the model card: the content of a model folder, its measured perplexity, and how to load and verify it.

A perplexity means nothing without its text, sequence length and tokenizer, so the table has a column for each. Names
come from users and other people's files, so they are escaped, and only the last part of a local path is shown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from castlm.core.blocks import in_block
from castlm.core.nm import NM, Pattern
from castlm.names import markdown, markdown_code
from castlm.patterns import parse_pattern

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

_MEANING = (
    "Perplexity is exp of the mean cross-entropy in nats per token of the text, cut into sequences of that length; "
    "lower is better. Only rows with the same text, sequence length and tokenizer can be compared."
)

_CARD = """---
{front_matter}---

# {title}

{warning}This is {base}, {how}: {meaning}
{counts}

{dense}{left_dense}

{figures}## Use

```python
{imports}
model = AutoModelForCausalLM.from_pretrained("path or hub id of this folder")
tokenizer = AutoTokenizer.from_pretrained("path or hub id of this folder")
```

{storage}

`castlm verify PATH --pattern {pattern}` counts all of it again. `castlm.json` holds the configuration, the versions
of the libraries, the hashes of the texts, and the counts from when this folder was written.

{pays}## License

{license}
"""


_IMPORTS = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
_PACKED_IMPORTS = f"import castlm\n{_IMPORTS}"
_STORED_PACKED = (
    "The weights are stored without their zeros, in castlm's packed format, which `import castlm` registers with\n"
    "transformers (`pip install castlm`); without it transformers finds no weights here.\n"
    "`castlm unpack PATH --output-dir OUT` writes a plain model folder, which loads anywhere."
)
_STORED_ZEROS = (
    "The zeros are stored, so the files are as large as those of the dense model and load wherever it does. Faster or\n"
    "smaller inference needs kernels for the pattern, such as `torch.sparse.to_sparse_semi_structured` for 2:4 on an "
    "NVIDIA\nGPU."
)


_WHEN_IT_PAYS = """## When it pays

{pattern} pays where products are the limit: prompts, batches, and GPUs with hardware for it. One sequence at a time is
limited by bytes, and there dense int4 can have the lower perplexity at the same size. `castlm advise PATH` times every
format of this model on your processor and says what to use for what.

"""


def model_card(folder_name: str, manifest: Mapping[str, Any]) -> str:
    """The README.md of an exported folder, from its name and the content of its castlm.json (see `export_model`)."""
    pattern = parse_pattern(manifest["pattern"])
    source, license_id = str(manifest.get("base_model") or ""), manifest.get("license")
    hub_id, _ = _hub_model(source)
    base_name, base = (hub_id or _public(source)).split("/")[-1], _reference(source)
    front_matter = {
        **({"base_model": hub_id} if hub_id else {}),
        **({"license": license_id} if license_id else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["castlm", "sparsity", *_tags(pattern)],
    }
    proof = manifest["proof"]
    cut = manifest.get("cut")
    is_dense = bool(cut) and pattern.nm is None
    counts = (
        f"That is {proof['zero_fraction']:.2%} zeros in {proof['layers']} layers of {proof['weights']:,} weights, "
        f"and {proof['violations']} violations in {proof['groups']:,} {pattern.counted}."
    )
    if "cut" in proof:
        total = proof["cut"] + proof["weights"]
        removed = f"{proof['cut']:,} of the {total:,} weights of {proof['layers']} layers are gone."
        counts = removed if is_dense else f"{removed} {counts}"
    config = manifest.get("config") or {}
    made = f"made {'smaller' if is_dense else f'{pattern} sparse'} with castlm (the CAST method, arXiv 2509.25996)"
    if config.get("teacher"):
        made += f", distilled from {_reference(config['teacher'])}"
    kept = f"which is {pattern} sparse, fine-tuned with castlm so that its zeros are kept"
    return _CARD.format(
        how=kept if config.get("init_from") and config.get("init_from") == config.get("model") else made,
        front_matter=yaml.safe_dump(front_matter, sort_keys=False),
        title=markdown(f"{base_name}, {_short(pattern)}" if base_name else folder_name),
        base=base or "a model",
        pattern=pattern,
        warning=_warning(manifest.get("verdict") or {}),
        meaning="".join(_sentences([*_cut_text(cut), *_meaning(pattern)])),
        counts=counts,
        imports=_PACKED_IMPORTS if manifest.get("packed") else _IMPORTS,
        storage=_STORED_PACKED if manifest.get("packed") else _storage(pattern),
        dense="All that is left is dense." if is_dense else "Embeddings and the output head are dense.",
        left_dense="" if is_dense else _left_dense(manifest["left_dense"]),
        figures=_figures([*(manifest.get("figures") or []), *_as_written(manifest)]),
        pays=_WHEN_IT_PAYS.format(pattern=pattern) if isinstance(pattern, NM) else "",
        license=_license(hub_id or base_name, license_id),
    )


def _short(pattern: Pattern) -> str:
    return f"{pattern.n} of {pattern.m}" if isinstance(pattern, NM) else str(pattern)


def _tags(pattern: Pattern) -> list[str]:
    if isinstance(pattern, NM):
        return [f"{pattern.n}of{pattern.m}-sparse"]
    return ["structured-pruning"] if pattern.cut_out else []


def _sentences(parts: list[str]) -> list[str]:
    """Joins sentences: the first follows a colon, each other one starts a line."""
    return [
        parts[0],
        *(f"\n{part[0].upper()}{part[1:]}".replace("\nconsecutive", " consecutive") for part in parts[1:]),
    ]


def _cut_text(cut: Mapping[str, Any] | None) -> list[str]:
    """Describes a cut by the change of the config."""
    if not cut:
        return []
    fields = [f"`{name}` from {old:,} to {cut['after'][name]:,}" for name, old in cut["before"].items()]
    changed = [text for text, (name, old) in zip(fields, cut["before"].items()) if cut["after"][name] != old]
    return [f"the same model with {' and '.join(changed)}."]


def _meaning(pattern: Pattern) -> list[str]:
    """The sentences that the pattern adds about the stored weights."""
    groups = pattern.nm
    if groups is None:
        return [] if pattern.cut_out else [f"its linear layers inside the transformer blocks are {pattern}."]
    return [
        f"of every {groups.m}\nconsecutive weights along the input axis of each linear layer inside the "
        f"transformer blocks, at most {groups.n} are non-zero."
    ]


def _storage(pattern: Pattern) -> str:
    if pattern.cut_out and pattern.nm is None:
        return "The model is dense and smaller than its base: it needs no kernels of its own."
    return _STORED_ZEROS


def _hub_model(source: str) -> tuple[str, str]:
    """The hub id in `source` and the text after it; both empty if the model is not known to be on the hub."""
    if cached := re.search(r"(?:^|/)models--([\w.-]+?)--([\w.-]+?)/snapshots/(\w+)", source):
        return f"{cached[1]}/{cached[2]}", f"@{cached[3]}"
    on_hub = None if Path(source).exists() else _HUB_SOURCE.fullmatch(source)
    return (on_hub["id"], on_hub["rest"] or "") if on_hub else ("", "")


def _reference(source: str) -> str:
    """A model in Markdown: a link to the hub, or the last part of its path."""
    hub_id, rest = _hub_model(source)
    if hub_id:
        return f"[{hub_id}](https://huggingface.co/{hub_id}){markdown(rest)}"
    return markdown(_public(source).split("/")[-1])


def _public(name: str) -> str:
    """`name`, or the last part of it if it is a local path."""
    is_path = name.startswith(("/", "~", ".")) or "\\" in name or ("/" in name and Path(name).exists())
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] if is_path else name


def _warning(verdict: Mapping[str, Any]) -> str:
    """The first line of the card of a run that diverged or fell short."""
    if verdict.get("ok", True):
        return ""
    problem = str(verdict.get("problem", "diverged")).lower()
    return f"**This run {problem}: {markdown(str(verdict['reason']))}. Do not use this model.**\n\n"


def _left_dense(left_dense: Mapping[str, str]) -> str:
    inside = {name: reason for name, reason in left_dense.items() if in_block(name)}
    if not inside:
        return ""
    return " So are, inside the transformer blocks:\n\n" + "\n".join(
        f"- {markdown_code(name)}: {markdown(reason)}" for name, reason in inside.items()
    )


def _as_written(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The row of the written files, whose weights may be rounded to a shorter dtype than in training."""
    found = manifest["proof"].get("perplexity_from_disk")
    if found is None or not manifest.get("figures"):
        return []
    written = f"as written, in {manifest['dtype']}" if manifest.get("dtype") else "as written"
    return [{**manifest["figures"][-1], "name": written, "perplexity": found}]


def _figures(figures: list[Mapping[str, Any]]) -> str:
    columns = [key for key in _COLUMNS if any(row.get(key) is not None for row in figures)]
    if not columns:
        return ""
    lines = ["| " + " | ".join(_COLUMNS[key] for key in columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in figures]
    return "\n".join(["## Perplexity", "", *lines, "", _MEANING, "", ""])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if value >= 1000 else f"{value:.3f}"
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else markdown(_public(str(value)))


def _license(base: str, license_id: str | None) -> str:
    stated = f"{markdown(license_id)}, as for the base model. " if license_id else ""
    of = markdown(base) or "its base model"
    return f"{stated}This model is a derivative of {of}, whose license applies: read it before you share the model."
