"""A model of transformers in memory, plain or packed, in the engine of castlm-runtime, which shares packed weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from castlm.core.experts import ExpertLinear, projections_of
from castlm.dtypes import FLOAT_NAMES
from castlm.models.architecture import generating
from castlm.models.stored_layout import StoredLayout
from castlm.packed import native
from castlm.packed.experts import PackedExperts
from castlm.packed.layers import PackedModule
from castlm_runtime.defaults import Defaults
from castlm_runtime.families import describe, why_not
from castlm_runtime.generate import Session
from castlm_runtime.model import Cache, Model, Part, Prepared, Rows, blocks_for
from castlm_runtime.packed import PackedArray, PackedSpec
from castlm_runtime.tokenizer import Tokenizer


class MemoryWeights:
    """The weights of a model for `castlm_runtime.model.Model`, by their names in its files."""

    def __init__(self, model: PreTrainedModel):
        self.layout = StoredLayout(model)
        self.modules = dict(model.named_modules())
        self._experts = {name: weight for fqn in self.modules for name, weight in self._experts_of(fqn)}

    def _experts_of(self, fqn: str) -> Iterator[tuple[str, Tensor]]:
        """The matrices of a module of experts that is not packed, by their names in the files."""
        module: Any = self.modules[fqn]
        for name, weight in projections_of(module).items():
            with torch.device("meta"):
                like = ExpertLinear(torch.empty(weight.shape), module.is_transposed)
            for part in self.layout.parts(f"{fqn}.{name}", like):
                yield part.stem, weight if part.expert is None else weight[part.expert][part.rows]

    def _module(self, name: str) -> nn.Module | None:
        if name not in self.modules:
            name = str(self.layout.loaded_name(f"{name}.weight")).removesuffix(".weight")
        return self.modules.get(name)

    def _weight(self, name: str) -> Tensor | None:
        found = self._experts.get(name)
        return getattr(self._module(name), "weight", None) if found is None else found

    def _packed_stack(self, name: str) -> list[list[PackedModule]]:
        """The packed layers of each expert in the stack `name`."""
        path, _, projection = name.rpartition(".")
        experts = self.modules.get(path)
        return experts.layers_of(projection) if isinstance(experts, PackedExperts) else []

    def spec(self, name: str) -> PackedSpec | None:
        if stack := self._packed_stack(name):
            one = stack[0][0].spec
            return replace(one, rows=one.rows * len(stack[0]) * len(stack), experts=len(stack))
        module = self._module(name)
        if isinstance(module, PackedModule):
            return module.spec
        weight = self._weight(name)
        if not isinstance(weight, Tensor) or weight.dim() not in (2, 3) or weight.dtype not in FLOAT_NAMES:
            return None
        return _dense_spec(weight)

    def matrix(self, name: str, rows: Rows) -> PackedArray | Prepared:
        module = self._module(name)
        if stack := self._packed_stack(name):
            assert isinstance(rows, slice)
            layers = list(itertools.chain(*stack))
            module = layers[rows.start // layers[0].spec.rows]
        if isinstance(module, PackedModule):
            packed: Any = module.packed
            return Prepared(packed.data_ptr(), packed.numel(), module.spec.rows, module.spec.columns, packed)
        weight = self._weight(name)
        assert weight is not None
        weight = weight.detach().reshape(-1, weight.shape[-1])
        weight = (weight if rows is None else weight[rows]).cpu().contiguous()
        return PackedArray(_dense_spec(weight), _array(weight))

    def vector(self, name: str) -> np.ndarray | None:
        path, _, which = name.rpartition(".")
        found = getattr(self._module(path), which, None)
        return None if found is None else found.detach().float().cpu().numpy()


def _dense_spec(weight: Tensor) -> PackedSpec:
    return PackedSpec.of_stored(tuple(weight.shape), weight.dim() - 1, 0, 0, FLOAT_NAMES[weight.dtype])


def _array(tensor: Tensor) -> np.ndarray:
    """The values of a tensor; bf16 as uint16 bits."""
    found: np.ndarray = (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return found


def is_packed(model: nn.Module) -> bool:
    """Whether some layers of a model are packed."""
    return any(isinstance(module, PackedModule) for module in model.modules())


def why_not_in_engine(model: PreTrainedModel) -> str | None:
    """Why the engine does not run a model in memory; None where it does."""
    if native.kernels() is None:
        return native.NOT_BUILT
    reason = why_not(model.config.to_dict())
    if reason is not None:
        return reason
    if model.device.type != "cpu":
        return f"it is on {model.device}"
    if model.generation_config.get_generation_mode().value not in ("greedy_search", "sample"):
        return "its generation config asks for another search than greedy or sampled"
    if describe(model.config.to_dict()).family.is_fused and is_packed(model):
        return "its packed layers hold several matrices each, which the engine takes from a packed folder alone"
    return None


def model_in_engine(model: PreTrainedModel, threads: int = 0) -> Model:
    """The model in the engine, if `why_not_in_engine` has no reason; packed weights are shared, others are copied."""
    return Model(describe(model.config.to_dict()), MemoryWeights(model), threads or torch.get_num_threads())


def tokenizer_in_engine(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A fast tokenizer of transformers for the engine."""
    templates = tokenizer.chat_template or {}
    config = dict(tokenizer.special_tokens_map)
    config["clean_up_tokenization_spaces"] = tokenizer.clean_up_tokenization_spaces
    named = templates if isinstance(templates, dict) else {"default": templates}
    return Tokenizer(tokenizer.backend_tokenizer, config, named, str(tokenizer.name_or_path))


class Greedy:
    """Continues prompts by the most probable tokens, with no token that ends a text: for timing.

    Args:
        model: packed or plain; a packed one runs in the engine if it can, any other in transformers' loop.
        kind: what the engine's cache keeps.
    """

    def __init__(self, model: PreTrainedModel, kind: str = "fp32"):
        self.model, self.kind = model, kind
        in_engine = is_packed(model) and why_not_in_engine(model) is None
        self.engine = model_in_engine(model) if in_engine else None
        self._cache: Cache | None = None

    def __call__(self, ids: Tensor, num_tokens: int) -> Tensor:
        """`ids` (1, num_prompt), continued by exactly `num_tokens`."""
        if self.engine is None:
            generated = generating(self.model).generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                eos_token_id=None,  # `min_new_tokens` would search the vocabulary twice for each token
                do_sample=False,
                stop_strings=None,
                pad_token_id=0,
                num_beams=1,
                num_return_sequences=1,
                return_dict_in_generate=False,
            )
            assert isinstance(generated, Tensor)
            return generated
        tokens = ids[0].tolist()
        logits, num_read = np.empty(self.engine.vocabulary, np.float32), 0
        cache = self._cache_for(len(tokens) + num_tokens)
        for _ in range(num_tokens):
            blocks = range(blocks_for(len(tokens)))
            self.engine.forward(cache, [Part(tokens[num_read:], num_read, blocks, logits)])
            num_read = len(tokens)
            tokens.append(int(logits.argmax()))
        return torch.tensor([tokens])

    def _cache_for(self, num_tokens: int) -> Cache:
        assert self.engine is not None
        if self._cache is None or self._cache.num_blocks < blocks_for(num_tokens):
            self._cache = Cache(self.engine, self.kind, blocks_for(num_tokens))
        return self._cache


def session_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: str = "bf16") -> Session:
    """The model and its tokenizer in the engine."""
    defaults = Defaults.of(model.generation_config.to_diff_dict())
    return Session(model_in_engine(model), tokenizer_in_engine(tokenizer), defaults, kind=kind)
