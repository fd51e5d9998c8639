"""The models of a run, dense model and teacher: opened, checked against each other, and which layers stay dense.

A model is whole in a single process; on several ranks it is without weights until each reads its rows. Methods with
`whole_copies` load the whole model on each rank.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from castlm.core.blocks import in_block, is_tower
from castlm.core.errors import InputError
from castlm.core.sparsify import FilterFn, filter_for
from castlm.data.documents import joined_digest
from castlm.export.folder import read_left_dense
from castlm.methods.options import default_learning_rate
from castlm.models.architecture import check_head, context_length, is_vision_language, vocab_size
from castlm.models.io import Loaded, config_hash, load_model, open_config, open_model, tokenizer_hash
from castlm.models.loading import StoredWeights, empty_model, fingerprint, open_sharded
from castlm.models.locate import cached_snapshot, locate
from castlm.progress import note
from castlm.training.options import ModelOptions, TeacherOptions
from castlm.world import World


@dataclass(frozen=True)
class OpenedModel:
    """The dense model of a run, or its teacher, as it was opened."""

    loaded: Loaded
    """The model with its tokenizer."""
    stored: StoredWeights | None
    """The place of each parameter on disk, for a model without weights; None for a model in memory."""
    options: ModelOptions
    fingerprint: str
    """A hash of the weights, the config and the tokenizer, the same on all ranks."""

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.loaded.tokenizer

    def read(self, name: str) -> Tensor:
        """A whole parameter, by its name: as it is stored, or the one in memory."""
        return self.model.get_parameter(name).detach() if self.stored is None else self.stored.read(name)

    def whole_model(self) -> PreTrainedModel:
        """A copy of the model with all its weights."""
        if self.stored is None:
            return copy.deepcopy(self.model)
        return load_model(self.options.model, **self.options.loading).model


def open_weights(options: ModelOptions, world: World, *, whole_copies: bool = False) -> OpenedModel:
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
    if stored is None:
        digest = fingerprint(loaded.model)
        world.check_alike({f"other weights of {options.model}": digest})
        check_head(loaded.model)
    else:
        digest = stored.fingerprint(world)
    for parameter_name, parameter in loaded.model.named_parameters():
        if is_tower(parameter_name):  # text does not reach a vision tower
            parameter.requires_grad_(False)
    whole = joined_digest([digest, config_hash(loaded.model.config), tokenizer_hash(loaded.tokenizer)])
    return OpenedModel(loaded, stored, options, whole)


def open_dense(
    options: ModelOptions, world: World, *, seq_len: int, teacher_top_k: int, whole_copies: bool = False
) -> OpenedModel:
    """`open_weights` of the dense model. It must have enough positions and tokens, and the layers of `left_dense`."""
    opened = open_weights(options, world, whole_copies=whole_copies)
    check_sizes(opened.model.config, seq_len=seq_len, teacher_top_k=teacher_top_k)
    check_left_dense(options.left_dense, opened.model)
    return opened


def learning_rate_for(model: ModelOptions) -> float:
    """The default learning rate of a model, after a note with the number of its weights."""
    num_weights = num_weights_of(model)
    rate = default_learning_rate(num_weights)
    note(f"learning_rate {rate:g}, by the size of the model ({num_weights / 1e6:,.1f}M weights)")
    return rate


def num_weights_of(options: ModelOptions) -> int:
    """The number of weights of a model, from its config alone; without a vision tower."""
    config = open_config(options.model, **options.loading)
    model = empty_model(config, trust_remote_code=options.trust_remote_code)
    return sum(parameter.numel() for name, parameter in model.named_parameters() if not is_tower(name))


def check_sizes(config: PretrainedConfig, *, seq_len: int, teacher_top_k: int) -> None:
    """Raises `InputError` if `seq_len` or `teacher_top_k` exceeds the positions or the vocabulary of the model."""
    longest = context_length(config)
    if longest is not None and seq_len > longest:
        raise InputError(f"seq_len {seq_len} exceeds the model's {longest} positions: lower it")
    vocab = vocab_size(config)
    if teacher_top_k > vocab:
        raise InputError(f"teacher_top_k {teacher_top_k} exceeds the model's {vocab} tokens: lower it")


_PROBE = "Once upon a time, 1,234 x-rays:\n\tdef naïve(x): return x**2  # 世界 🙂"
"""Words, digits, white space, code and other scripts, in whose splitting tokenizers differ."""


def teacher_options(teacher: TeacherOptions, model: ModelOptions) -> ModelOptions:
    """The options that open the teacher, which is the dense model unless another one is named."""
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
    _, ours, our_tokenizer = open_model(model.model, **model.loading)
    options = teacher_options(teacher, model)
    _, theirs, their_tokenizer = open_model(options.model, **options.loading)
    remedy = "give a teacher with the tokenizer of the model, or use eta 0"
    known = their_tokenizer.get_vocab()
    # The KL compares logit i with logit i: every token must have the same id, and text must be cut alike.
    differing = [token for token, number in our_tokenizer.get_vocab().items() if known.get(token) != number]
    if differing or our_tokenizer(_PROBE)["input_ids"] != their_tokenizer(_PROBE)["input_ids"]:
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


def layers_left_dense(model: ModelOptions) -> tuple[str, ...]:
    """`left_dense`, plus the layers that the model's castlm.json lists as left dense on purpose."""
    folder = _folder_of(model)
    if folder is None:
        return model.left_dense
    recorded = [
        name.removesuffix(".weight")
        for name, reason in read_left_dense(folder).items()
        if in_block(name) and reason == "excluded by the filter"
    ]
    return tuple(dict.fromkeys([*model.left_dense, *recorded]))


def filter_of(left_dense: Sequence[str], model: nn.Module) -> FilterFn:
    """The filter of a run: `filter_for` the model, except names that contain a part of `left_dense`."""
    chooses = filter_for(model)
    return lambda module, fqn: chooses(module, fqn) and not any(part in fqn for part in left_dense)


def check_left_dense(left_dense: Sequence[str], model: nn.Module) -> None:
    """Raises `InputError` if a part of `left_dense` matches no layer that could be sparse."""
    chooses = filter_for(model)
    names = [name for name, module in model.named_modules() if chooses(module, name)]
    for part in left_dense:
        if not any(part in name for name in names):
            raise InputError(f"left_dense {part} matches no sparse layer; a name of one is {names[-1]}")
