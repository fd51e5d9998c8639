"""The storage layout of weights in transformers and castlm, by names and shapes alone.

Neither torch nor transformers is imported: their import takes longer than most readers of these names do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

PACKED_NOTICE = (
    "castlm's packed format: install castlm and call castlm.register() before from_pretrained, or castlm unpack it"
)
"""`transformers_weights` of a packed folder. It names no file: transformers without castlm quotes it in its error."""


def names_no_weights(transformers_weights: object) -> bool:
    """Whether the entry `transformers_weights` of a config.json is absent, or the notice of any version of castlm."""
    return transformers_weights is None or str(transformers_weights).startswith(PACKED_NOTICE.partition(":")[0])


OLD_BUFFERS = re.compile(r"\.(inv_freq|masked_bias|attn\.bias|attention\.bias)$")
"""Causal masks and rotary tables that old checkpoints store and today's models compute."""


def parts_of_config(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The content of a config.json and of all configs in it, such as `text_config`, at any depth."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from parts_of_config(value)
