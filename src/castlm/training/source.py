"""The inputs of a run: the dense model, its teacher and the layers that stay dense; the training and evaluation texts.

A model is whole in a single process; on several ranks it is without weights until each reads its rows. Methods with
`whole_copies` load the whole model on each rank.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from castlm.core.blocks import in_block, is_tower
from castlm.core.errors import InputError
from castlm.core.sparsify import FilterFn, is_sparse_linear
from castlm.data.columns import Kind
from castlm.data.documents import (
    AnyDocuments,
    Documents,
    HubDocuments,
    Mixture,
    joined_digest,
    open_documents,
    split_documents,
)
from castlm.data.line_index import LineIndexes
from castlm.data.packing import BatchLoader, MixedSequences, Sequences, open_sequences
from castlm.data.scored import ScoredText, scored_text
from castlm.data.tokens import Encoder, check_vocabulary, open_encoder
from castlm.distributed.loading import Checkpoint, fingerprint, open_sharded, opened_files
from castlm.distributed.world import World, is_main_rank
from castlm.export.folder import read_left_dense
from castlm.facts import Cut, Facts
from castlm.models.architecture import check_head, context_length, embedding_weight, is_vision_language, vocab_size
from castlm.models.io import Loaded, load_model, open_model
from castlm.models.locate import cached_snapshot, locate
from castlm.progress import note, shown_progress
from castlm.say import Say, silent
from castlm.training.options import DataOptions, EvaluationOptions, ModelOptions, TeacherOptions


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

    def embeddings(self) -> Tensor:
        """The weight (vocab, hidden) of the input embeddings, on the CPU."""
        weight = embedding_weight(self.model)
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
    if stored is None:
        found = fingerprint(loaded.model)
        world.check_alike({f"other weights of {options.model}": found})
    else:
        found = stored.fingerprint(world)
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


def model_options_of_teacher(teacher: TeacherOptions, model: ModelOptions) -> ModelOptions:
    """The options that open the teacher, which is the dense model unless another one is named."""
    if teacher.teacher is None:
        return model
    return ModelOptions(teacher.teacher, trust_remote_code=model.trust_remote_code)


class TeacherSource:
    """The teacher of a run: the dense model itself, or another one, which is opened when it is first needed."""

    def __init__(
        self, options: TeacherOptions, model: ModelOptions, dense: Source, world: World, *, whole_copies: bool
    ) -> None:
        self._options, self._model, self._dense = options, model, dense
        self._world, self._whole_copies = world, whole_copies

    @property
    def is_other(self) -> bool:
        """Whether another model than the dense one is read."""
        return self._options.teacher is not None and self._options.eta > 0

    @functools.cached_property
    def source(self) -> Source:
        if not self.is_other:
            return self._dense
        options = model_options_of_teacher(self._options, self._model)
        return open_source(options, self._world, whole_copies=self._whole_copies)

    def take_model(self) -> PreTrainedModel:
        """The teacher's model, to be frozen: another model itself, or a copy of the dense one as it is now."""
        return self.source.model if self.is_other else copy.deepcopy(self._dense.model)


def check_teacher(teacher: TeacherOptions, model: ModelOptions, *, seq_len: int) -> None:
    """Checks that the dense model can be distilled from another teacher, without the weights of either.

    Raises `InputError` for a teacher with other tokens, fewer positions or a smaller vocabulary, or with hidden states
    of another shape if they are compared.
    """
    name = teacher.teacher
    if name is None or not teacher.eta:
        return
    _, ours, our_tokenizer = open_model(model.model, **model.loading)
    options = model_options_of_teacher(teacher, model)
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


def cut_of_source(model: ModelOptions) -> Cut | None:
    """The sizes before and after channels or heads were cut out of the model, by its castlm.json; else None."""
    folder = _folder_of(model)
    return None if folder is None else Facts.read(folder).cut


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


@dataclass
class TrainingText:
    """The training text and the evaluation text of a run."""

    documents: AnyDocuments
    """Training documents, without the held-out ones."""
    loader: BatchLoader
    """This rank's batches of the training documents."""
    held_out: ScoredText
    """Tokens of all evaluation texts."""
    eval_parts: dict[str, ScoredText]
    """Tokens of each evaluation text by its file name, or its path if names are equal; empty if there is only one."""
    indexes: LineIndexes
    """The places of the documents in its .jsonl files."""
    is_plain: bool
    """Whether all texts are plain, evaluation texts included."""
    encoder: Encoder
    """Turns documents into tokens. The loader has its own copy."""
    train_sha256: str
    eval_sha256: str
    template_sha256: str | None
    """Hash of the chat template of the training documents; None for plain text."""

    @property
    def is_masked(self) -> bool:
        """Whether some tokens of the training documents may not count in the loss."""
        return self.documents.kind is not Kind.TEXT

    def explain(self) -> str:
        """One line on which tokens of conversations count."""
        what = "conversations with images" if self.documents.kind is Kind.WITH_EXTRA else "conversations"
        return f"{what}: {self.encoder.counted} tokens count in the loss, and {self.held_out.tokens} in the perplexity"


def steps_of_epochs(
    model: ModelOptions,
    data: DataOptions,
    evaluation: EvaluationOptions,
    num_epochs: float,
    global_batch: int,
    indexes: LineIndexes | None = None,
) -> int:
    """The number of optimizer steps of `global_batch` sequences in `num_epochs` of the training documents.

    For `indexes` see `open_training_text`.

    Raises `InputError` for a stream of the hub, whose length is not known, or a mixture, which has no end.
    """
    documents, _ = _open_splits(data, evaluation, indexes)
    if not isinstance(documents, Documents):
        raise InputError(f"num_train_epochs: {data.dataset} is streamed or a mixture, without epochs: give max_steps")
    _, _, tokenizer = open_model(model.model, **model.loading)
    encoder = open_encoder([documents], tokenizer, model.model, data, **model.loading)
    sequences = _sequences(data, documents, encoder, silent)
    assert not isinstance(sequences, MixedSequences)  # a mixture has no end
    tokens = sequences.tokens_per_epoch()
    return max(1, math.ceil(num_epochs * tokens / (global_batch * data.seq_len)))


def _open_splits(
    data: DataOptions, evaluation: EvaluationOptions, indexes: LineIndexes | None = None
) -> tuple[AnyDocuments, list[Documents | HubDocuments]]:
    """The training documents, and the texts of the evaluation."""
    shown = functools.partial(shown_progress, is_main=is_main_rank())
    opened = functools.partial(open_documents, options=data, indexes=indexes, shown=shown)
    parts = [opened(text, split=data.dataset_split, data_config=data.dataset_config) for text in data.datasets]
    held_out = [
        opened(text, split=evaluation.eval_split, data_config=evaluation.eval_config)
        for text in evaluation.eval_datasets
    ]
    if not held_out:
        splits = [split_documents(part, evaluation.eval_fraction, data.seed) for part in parts]
        parts, held_out = [part for part, _ in splits], [part for _, part in splits]
    mixed = parts[0] if len(parts) == 1 else Mixture(parts, list(data.datasets.values()))
    return mixed, held_out


def _sequences(data: DataOptions, documents: AnyDocuments, encoder: Encoder, say: Say) -> Sequences:
    return open_sequences(
        documents, encoder, seq_len=data.seq_len, seed=data.seed, repeat=data.repeat_sequences, say=say
    )


def open_training_text(
    model: ModelOptions,
    data: DataOptions,
    evaluation: EvaluationOptions,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    world: World,
    *,
    rows_per_rank: int,
    indexes: LineIndexes | None = None,
) -> TrainingText:
    """Opens the texts of a run and tokenizes the held-out text.

    Args:
        tokenizer: receives the chat template of `data`, if there is one.
        rows_per_rank: sequences of a batch on one rank.
        indexes: the places of the documents in .jsonl files, of which those that are opened here are kept.

    Raises:
        InputError: a text that cannot be opened, too little text, or token ids outside the vocabulary.
    """
    indexes = indexes or LineIndexes()
    documents, held_out = _open_splits(data, evaluation, indexes)
    encoder = open_encoder([documents, *held_out], tokenizer, model.model, data, **model.loading)
    check_vocabulary(torch.tensor([encoder.eos, *encoder.bos]), vocab_size)  # they are not in every held-out text
    # All ranks read the same text, but each prepares only the images of its own rows.
    says = world.is_main or documents.kind is Kind.WITH_EXTRA
    loader = BatchLoader(
        _sequences(data, documents, encoder, note if says else silent),
        rows_per_rank=rows_per_rank,
        rank=world.rank,
        world_size=world.size,
        prefetch=True,
    )
    # A held-out part of the training text is sampled with a fixed seed: its hash does not depend on the run's seed.
    seed = None if evaluation.eval_datasets else 0
    parts = {each.name: scored_text(each, encoder, evaluation.eval_tokens or None, seed=seed) for each in held_out}
    for name, part in parts.items():
        check_vocabulary(part.ids, vocab_size)
        if len(part.ids) < 2 or not part.sequences(data.seq_len, data.seq_len):
            raise InputError(
                f"the evaluation text {name} of {len(part.ids)} tokens has none that counts within seq_len "
                f"{data.seq_len}: give more text, or raise seq_len"
            )
    num_named = Counter(Path(name).name for name in parts)
    short = {name: Path(name).name if num_named[Path(name).name] == 1 else name for name in parts}
    train_sha256 = documents.text_hash()
    eval_sha256 = joined_digest([text.text_hash() for text in held_out])
    # Nodes read their own copies: ranks that train on different texts would go unnoticed.
    world.check_alike({"another training text": train_sha256, "another evaluation text": eval_sha256})
    return TrainingText(
        documents=documents,
        loader=loader,
        held_out=ScoredText.joined(list(parts.values())),
        eval_parts={short[name]: part for name, part in parts.items()} if len(parts) > 1 else {},
        indexes=indexes,
        is_plain=all(text.kind is Kind.TEXT for text in (documents, *held_out)),
        encoder=encoder,
        train_sha256=train_sha256,
        eval_sha256=eval_sha256,
        template_sha256=None if documents.kind is Kind.TEXT else encoder.template_sha256,
    )


def open_inputs(
    model: ModelOptions,
    data: DataOptions,
    evaluation: EvaluationOptions,
    world: World,
    *,
    rows_per_rank: int,
    teacher_top_k: int,
    whole_copies: bool = False,
    indexes: LineIndexes | None = None,
) -> tuple[Source, TrainingText]:
    """Opens the dense model and the texts of a run, and checks that they fit; see `open_source`.

    For `indexes` see `open_training_text`.
    """
    source = open_source(model, world, whole_copies=whole_copies)
    check_sizes(source.model.config, seq_len=data.seq_len, teacher_top_k=teacher_top_k)
    check_left_dense(model.left_dense, source.model)
    vocab = vocab_size(source.model.config)
    text = open_training_text(
        model, data, evaluation, source.tokenizer, vocab, world, rows_per_rank=rows_per_rank, indexes=indexes
    )
    return source, text
