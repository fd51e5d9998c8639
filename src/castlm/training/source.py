"""The dense model that a run starts from: whole on a single process, and without weights among several ranks until
each rank reads its own rows; whole on each of them where the method asks for it.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from castlm.core.blocks import is_tower
from castlm.core.errors import InputError
from castlm.data.chat import with_template
from castlm.distributed.fingerprint import fingerprint
from castlm.distributed.loading import Checkpoint, check_one_snapshot, open_sharded, opened_files
from castlm.distributed.world import World
from castlm.methods.table import class_of
from castlm.models.architecture import check_head, context_length, vocab_size
from castlm.models.io import Loaded, load_model
from castlm.models.locate import locate
from castlm.oneshot.options import UNIT_SCORES
from castlm.oneshot.solvers import SOLVERS
from castlm.oneshot.stream_basis import untie_
from castlm.training.config import TrainConfig


@dataclass
class Source:
    """The dense model of a run."""

    loaded: Loaded
    stored: Checkpoint | None
    """Where each parameter lies, while the model is still without weights; None for a model in memory."""
    options: dict[str, Any]
    """Keyword arguments of `load_model`."""
    name: str
    """As the config has it."""
    fingerprint: str
    """Of its weights, the same on all ranks."""

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.loaded.tokenizer

    def untie_(self) -> None:
        """Gives the output head a weight of its own, to be read from where the embeddings are stored."""
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
        """A copy of the dense model with all its weights, for one rank to work on."""
        return copy.deepcopy(self.model) if self.stored is None else load_model(self.name, **self.options).model


def open_source(config: TrainConfig, world: World) -> Source:
    """Opens the model of `config` and checks that it fits the config.

    Raises:
        InputError: as `load_model`; other weights on another rank; sequences longer than the model's context; an
            architecture that cannot be distilled.
    """
    options = {"trust_remote_code": config.trust_remote_code, "revision": config.revision}
    if config.start not in (*SOLVERS, *UNIT_SCORES):
        locate(config.start)  # in the first second, and not after the dense model was loaded
    shards = world.mesh is not None and not class_of(config.method, config.adapter).whole_copies
    opened = open_sharded(config.model, **options) if shards else None
    loaded, stored = (load_model(config.model, **options), None) if opened is None else opened
    check_one_snapshot(config.model, config.revision, world)
    found = fingerprint(loaded.model) if stored is None else stored.fingerprint()
    world.check_alike({f"other weights of {config.model}": found})
    with_template(loaded.tokenizer, config.chat_template_path)
    model = loaded.model
    check_sizes(config, model.config)
    if stored is None:
        check_head(model)
    for parameter_name, parameter in model.named_parameters():
        if is_tower(parameter_name):  # no text reaches them
            parameter.requires_grad_(False)
    return Source(loaded, stored, options, config.model, found)


def check_sizes(config: TrainConfig, of_model: PretrainedConfig) -> None:
    """Raises `InputError` where `config` asks for more positions or tokens than the model has."""
    longest = context_length(of_model)
    if longest is not None and config.seq_len > longest:
        raise InputError(f"seq_len {config.seq_len} exceeds the model's {longest} positions: lower it")
    vocab = vocab_size(of_model)
    if config.teacher_top_k > vocab:
        raise InputError(f"teacher_top_k {config.teacher_top_k} exceeds the model's {vocab} tokens: lower it")
