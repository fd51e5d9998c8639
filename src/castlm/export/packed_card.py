"""The model card of a packed folder, and of a folder that is unpacked again.

A result of castlm gets its own card, with its figures and license. The card of any other model stays, below a new head
that names the programs that read the folder; `castlm unpack` removes the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from castlm.core.errors import InputError
from castlm.export.card import model_card

_HEAD = """{front_matter}# {name}, packed {pattern}

The weights of this model are stored in castlm's packed format{zeros}. Without castlm (`pip install castlm`),
transformers finds no weights here. Python:

```python
import castlm  # registers the format with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path of this folder")
```

`castlm unpack PATH --output-dir OUT` writes the plain model folder again, which loads anywhere.
"""
_BELOW = "\n<!-- castlm pack: below is the card of the model before it was packed. -->\n\n"


def packed_card(source: Path, manifest: Mapping[str, Any], pattern: str) -> str:
    """The README.md of the folder that the model in `source` is packed to.

    Args:
        manifest: the castlm.json of the packed folder.
        pattern: n:m.

    Raises:
        InputError: `manifest` is the damaged record of a result of castlm.
    """
    if card := _result_card(source, manifest):
        return card
    before = _read_card(source)
    front_matter = _front_matter(before)
    head = _HEAD.format(
        front_matter=front_matter,
        name=source.resolve().name,
        pattern=pattern,
        zeros="" if pattern == "dense" else ", without their zeros",
    )
    body = before.removeprefix(front_matter)
    return f"{head}{_BELOW}{body}" if body.strip() else head


def unpacked_card(source: Path, manifest: Mapping[str, Any]) -> str:
    """The README.md of the folder that the packed `source` is unpacked to; empty where the model had none.

    Args:
        manifest: the castlm.json of the unpacked folder.

    Raises:
        InputError: as `packed_card`.
    """
    packed = _read_card(source)
    return _result_card(source, manifest) or _front_matter(packed) + packed.partition(_BELOW)[2]


def _result_card(source: Path, manifest: Mapping[str, Any]) -> str:
    """The card of a result of castlm; empty if `manifest` is not the record of one."""
    if "proof" not in manifest:
        return ""
    try:
        return model_card(source.resolve().name, manifest)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{source / 'castlm.json'} is damaged: remove it to continue without it") from None


def _read_card(folder: Path) -> str:
    file = folder / "README.md"
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _front_matter(card: str) -> str:
    """The YAML at the head of a card, with its fences, for the hub; empty if there is none."""
    end = card.find("\n---\n", len("---\n") - 1)
    return card[: end + len("\n---\n")] if card.startswith("---\n") and end > 0 else ""
