"""The cache of keys and values in the forward of transformers' models, under the names that its versions give it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import Cache, PreTrainedModel


def cache_keyword(model: PreTrainedModel) -> str:
    """The name by which a model's forward takes a cache: "cache" since transformers 5.24, "past_key_values" before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def cache_of(output: Mapping[str, Any]) -> Cache:
    """The cache in the output of a model's forward, under either name."""
    return next(value for value in output.values() if isinstance(value, Cache))
