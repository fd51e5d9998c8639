"""The dense model of a run, its teacher, and the layers that stay dense.

A model is whole in a single process; on several ranks it is without weights until each reads its rows. Methods with
`whole_copies` load the whole model on each rank.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from castlm.core.blocks import in_block, is_tower
from castlm.core.errors import InputError
from castlm.core.sparsify import FilterFn, is_sparse_linear
from castlm.distributed.loading import Checkpoint, fingerprint, open_sharded, opened_files
from castlm.distributed.world import World
from castlm.export.folder import read_left_dense, read_manifest
from castlm.models.architecture import check_head, context_length, is_vision_language, vocab_size
from castlm.models.io import Loaded, load_model, open_model
from castlm.models.locate import cached_snapshot, locate
from castlm.oneshot.residual import untie_
from castlm.training.options import ModelOptions, TeacherOptions


@dataclass
class Source:
    """The dense model of a run."""

    loaded: Loaded
    stored: Checkpoint | None
    """The place of each parameter on disk, for a model without weights; None for a model in memory."""
    options: dict[str, Any]
    """Keyword arguments of `load_model`."""
    name: str
    """The option `model`."""
    fingerprint: str
    """A hash of the weights, the same on all ranks."""

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.loaded.tokenizer

    def untie_(self) -> None:
        """Gives the output head its own weight, which is read from the place of the embeddings."""
        names = dict(self.model.named_parameters(remove_duplicate=False))
        head = self.model.get_output_embeddings().weight
        tied = [name for name, parameter in names.items() if parameter is head]
        untie_(self.model)
        if self.stored is not None:
            places = {**self.stored.places, **dict.fromkeys(tied, self.stored.places[tied[0]])}
            self.stored = dataclasses.replace(self.stored, places=places)

    def embeddings(self) -> Tensor:
        """The weight (vocab, hidden) of the input embeddings, on the CPU."""
        weight = self.model.get_input_embeddings().weight
        if self.stored is None:
            return weight.detach().cpu()
        (name,) = (name for name, parameter in self.model.named_parameters() if parameter is weight)
        with opened_files() as read:
            return self.stored.places[name].read(read, slice(None))

    def whole_model(self) -> PreTrainedModel:
        """A copy of the dense model with all its weights."""
        return copy.deepcopy(self.model) if self.stored is None else load_model(self.name, **self.options).model


def open_source(options: ModelOptions, world: World, *, whole_copies: bool = False) -> Source:
    """Opens the model of a run, or its teacher.

    Args:
        whole_copies: load the whole model on each rank, instead of its rows.

    Raises:
        InputError: as `load_model`; weights that differ between ranks; an architecture that cannot be distilled.
    """
    opened = None
    if world.mesh is not None and not whole_copies:
        opened = open_sharded(options.model, **options.loading)
    loaded, stored = (load_model(options.model, **options.loading), None) if opened is None else opened
    found = fingerprint(loaded.model) if stored is None else stored.fingerprint()
    world.check_alike({f"other weights of {options.model}": found})
    if stored is None:
        check_head(loaded.model)
    for parameter_name, parameter in loaded.model.named_parameters():
        if is_tower(parameter_name):  # text does not reach a vision tower
            parameter.requires_grad_(False)
    return Source(loaded, stored, options.loading, options.model, found)


def check_sizes(of_model: PretrainedConfig, *, seq_len: int, teacher_top_k: int) -> None:
    """Raises `InputError` if `seq_len` or `teacher_top_k` exceeds the positions or the vocabulary of the model."""
    longest = context_length(of_model)
    if longest is not None and seq_len > longest:
        raise InputError(f"seq_len {seq_len} exceeds the model's {longest} positions: lower it")
    vocab = vocab_size(of_model)
    if teacher_top_k > vocab:
        raise InputError(f"teacher_top_k {teacher_top_k} exceeds the model's {vocab} tokens: lower it")


_PROBE = "Once upon a time, 1,234 x-rays:\n\tdef naïve(x): return x**2  # 世界 🙂"
"""Words, digits, white space, code and other scripts, in whose splitting tokenizers differ."""


def options_of_teacher(teacher: TeacherOptions, model: ModelOptions) -> ModelOptions:
    """The options that open the teacher; those of the dense model if it is the teacher."""
    if teacher.teacher is None:
        return model
    return ModelOptions(teacher.teacher, trust_remote_code=model.trust_remote_code)


def check_teacher(teacher: TeacherOptions, model: ModelOptions, *, seq_len: int) -> None:
    """Checks that the dense model can be distilled from another teacher, without the weights of either.

    Raises `InputError` for a teacher with other tokens, fewer positions or a smaller vocabulary, or with hidden states
    of another shape if they are compared.
    """
    name = teacher.teacher
    if name is None or not teacher.eta:
        return
    (_, ours, tokenizer), (_, theirs, of_teacher) = (
        open_model(options.model, **options.loading) for options in (model, options_of_teacher(teacher, model))
    )
    remedy = "give a teacher with the tokenizer of the model, or use eta 0"
    known = of_teacher.get_vocab()
    differing = [token for token, number in tokenizer.get_vocab().items() if known.get(token) != number]
    if differing or tokenizer(_PROBE)["input_ids"] != of_teacher(_PROBE)["input_ids"]:
        first = f", first {differing[0]!r}" if differing else ""
        raise InputError(f"teacher {name} cuts text into other tokens than the model{first}: {remedy}")
    if vocab_size(theirs) < vocab_size(ours):
        raise InputError(f"teacher {name} has {vocab_size(theirs)} logits, the model {vocab_size(ours)}: {remedy}")
    if is_vision_language(theirs) != is_vision_language(ours):
        raise InputError(f"teacher {name} is a {theirs.model_type}, the model a {ours.model_type}: one reads no images")
    check_sizes(theirs, seq_len=seq_len, teacher_top_k=0)
    shapes = [(c.num_hidden_layers, c.hidden_size) for c in (ours.get_text_config(), theirs.get_text_config())]
    if teacher.hidden_weight and shapes[0] != shapes[1]:
        raise InputError(
            f"hidden_weight {teacher.hidden_weight:g}: teacher {name} has (blocks, hidden size) {shapes[1]}, the model "
            f"{shapes[0]}: use hidden_weight 0"
        )


def _folder_of(model: ModelOptions) -> Path | None:
    """The folder with the files of a model; None for a hub model that is not in the cache."""
    where = locate(model.model)
    return cached_snapshot(where.target, model.revision) if where.is_hub else Path(where.target)


def cut_of_source(model: ModelOptions) -> dict[str, Any]:
    """The entry "cut" of the model's castlm.json, if channels or heads were cut out of it; else empty."""
    folder = _folder_of(model)
    cut = None if folder is None else read_manifest(folder).get("cut")
    return {} if cut is None else {"cut": cut}


def layers_left_dense(model: ModelOptions) -> tuple[str, ...]:
    """`left_dense`, plus the layers that the model's castlm.json lists as left dense on purpose."""
    folder = _folder_of(model)
    if folder is None:
        return model.left_dense
    found: list[str] = [
        name.removesuffix(".weight")
        for name, reason in read_left_dense(folder).items()
        if in_block(name) and reason == "excluded by the filter"
    ]
    return tuple(dict.fromkeys([*model.left_dense, *found]))


def filter_of(left_dense: Sequence[str]) -> FilterFn:
    """The filter of a run: `is_sparse_linear`, except names that contain a part of `left_dense`."""

    def is_sparse(module: nn.Module, fqn: str) -> bool:
        return is_sparse_linear(module, fqn) and not any(part in fqn for part in left_dense)

    return is_sparse


def check_left_dense(left_dense: Sequence[str], model: nn.Module) -> None:
    """Raises `InputError` if a part of `left_dense` matches no layer that could be sparse."""
    names = [name for name, module in model.named_modules() if is_sparse_linear(module, name)]
    for part in left_dense:
        if not any(part in name for name in names):
            raise InputError(f"left_dense {part} matches no sparse layer; a name of one is {names[-1]}")
