"""A packed model of transformers in the engine with a cache, for tests of single passes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from castlm.core.sparsify import prune_
from castlm.packed.in_engine import model_in_engine
from castlm.packed.layers import pack_model_
from castlm_runtime.model import BLOCK, Cache, Part
from tests.tiny import tiny_model

ERRORS = {"fp32": 1e-5, "bf16": 6e-3, "int8": 3e-2}  # of all logits together, beside their size


def packed_model(family: str, n: int = 2, m: int = 4, **over: Any) -> PreTrainedModel:
    """A tiny model with packed layers."""
    model = tiny_model(family, **over)
    prune_(model)
    pack_model_(model, n, m, dtype=torch.float32)
    return model


def ids_of(count: int, seed: int = 0) -> Tensor:
    """Random tokens (count,)."""
    return torch.randint(264, (count,), generator=torch.Generator().manual_seed(seed))


def difference(found: Tensor, exact: Tensor) -> float:
    """The size of the error of all numbers together, beside theirs."""
    return float((found - exact).norm() / exact.norm())


class Engine:
    """A model and a cache of `num_blocks` blocks."""

    def __init__(self, model: PreTrainedModel, kind: str = "fp32", num_blocks: int = 64):
        self.model = model_in_engine(model)
        self.cache = Cache(self.model, kind, num_blocks)

    def forward(
        self, parts: Sequence[tuple[Tensor, int, list[int]]], threads: int = 1, every: bool = False
    ) -> list[Tensor]:
        """The logits of each part: (tokens, position, blocks); of every token, or of the last one."""
        self.model.threads = threads
        made = []
        for tokens, position, blocks in parts:
            shape = (len(tokens), self.model.vocabulary) if every else (self.model.vocabulary,)
            used = blocks[: -(-(position + len(tokens)) // BLOCK)]
            made.append(Part(tokens.tolist(), position, used, np.full(shape, np.nan, np.float32)))
        self.model.forward(self.cache, made)
        return [torch.from_numpy(part.logits).view(-1, self.model.vocabulary) for part in made]

    def read(self, ids: Tensor, lengths: Sequence[int], blocks: list[int], threads: int = 1) -> Tensor:
        """The logits of every token of `ids`, read in parts of `lengths`, in a pass of its own each."""
        found, position = [], 0
        for length in lengths:
            found += self.forward([(ids[position : position + length], position, blocks)], threads, every=True)
            position += length
        assert position == len(ids)
        return torch.cat(found)
