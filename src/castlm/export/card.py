"""The model card: what a folder holds, what it costs in perplexity and how that was measured, how to load and check it.

A figure without its context length, text and tokenizer says nothing (2048 against 4096 tokens moves WikiText by 6 %),
so the table has a column for each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from castlm.core.blocks import in_block

_HUB_SOURCE = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(?P<rest>@\S+| \(.+\))?")  # as `Loaded.source` names it
_COLUMNS = {
    "name": "model",
    "perplexity": "perplexity",
    "seq_len": "context",
    "stride": "stride",
    "text": "text",
    "num_tokens": "tokens",
    "tokenizer": "tokenizer",
}

_CARD = """---
{front_matter}---

# {title}

{base} made {n}:{m} sparse with castlm (the CAST method, arXiv 2509.25996): at most {n} of every {m} consecutive
weights along the input axis of each linear layer inside the transformer blocks are non-zero. {counts}

Embeddings and the output head are dense.{left_dense}

{figures}## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path or hub id of this folder")
tokenizer = AutoTokenizer.from_pretrained("path or hub id of this folder")
```

The zeros are stored, so the files are as large as the dense model's, and load wherever it does. A gain in speed or
memory takes kernels for the pattern, such as `torch.sparse.to_sparse_semi_structured` for 2:4 on an NVIDIA GPU.

`castlm verify PATH --pattern {n}:{m}` counts every group again. `castlm.json` holds the configuration, the versions of
the libraries, the hashes of the texts, and the proof made when this folder was written.

## Licence

{license}
"""


def model_card(folder_name: str, manifest: Mapping[str, Any]) -> str:
    """The README.md of an exported folder, from its name and the content of its castlm.json (see `export_model`)."""
    n, m = manifest["pattern"].split(":")
    source, license_id = str(manifest.get("base_model") or ""), manifest.get("license")
    on_hub = None if Path(source).exists() else _HUB_SOURCE.fullmatch(source)
    hub_id = on_hub["id"] if on_hub else ""
    base_name = (hub_id or source).rstrip("/").split("/")[-1]
    base = f"[{hub_id}](https://huggingface.co/{hub_id}){on_hub['rest'] or ''}" if on_hub else base_name
    front_matter = {
        **({"base_model": hub_id} if hub_id else {}),
        **({"license": license_id} if license_id else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["castlm", "sparsity", f"{n}of{m}-sparse"],
    }
    proof = manifest["proof"]
    counts = (
        f"That is {proof['zero_fraction']:.2%} zeros in {proof['layers']} layers of {proof['weights']:,} weights, "
        f"and {proof['violations']} violations in {proof['groups']:,} groups."
    )
    return _CARD.format(
        front_matter=yaml.safe_dump(front_matter, sort_keys=False),
        title=f"{base_name}, {n} of {m}" if base_name else folder_name,
        base=base or "A model",
        n=n,
        m=m,
        counts=counts,
        left_dense=_left_dense(manifest["left_dense"]),
        figures=_figures(manifest.get("figures") or []),
        license=_license(hub_id or base_name, license_id),
    )


def _left_dense(left_dense: Mapping[str, str]) -> str:
    inside = {name: reason for name, reason in left_dense.items() if in_block(name)}
    if not inside:
        return ""
    return " So are, inside the blocks:\n\n" + "\n".join(f"- `{name}`: {reason}" for name, reason in inside.items())


def _figures(figures: list[Mapping[str, Any]]) -> str:
    columns = [key for key in _COLUMNS if any(row.get(key) is not None for row in figures)]
    if not columns:
        return ""
    lines = ["| " + " | ".join(_COLUMNS[key] for key in columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in figures]
    return "## Figures\n\n" + "\n".join(lines) + "\n\n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if value >= 1000 else f"{value:.3f}"
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def _license(base: str, license_id: str | None) -> str:
    stated = f"{license_id}, that of the base model. " if license_id else ""
    return (
        f"{stated}This is a derivative of {base or 'its base model'}, whose licence applies: read it before you share."
    )
