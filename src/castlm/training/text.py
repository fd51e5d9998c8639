"""The training text and the evaluation texts of a run."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from castlm.core.errors import InputError
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
from castlm.data.packing import BatchLoader, MixedSequences, open_sequences
from castlm.data.scored import ScoredText, scored_text
from castlm.data.tokens import Encoder, check_vocabulary, open_encoder
from castlm.models.io import open_model
from castlm.progress import note, shown_progress
from castlm.say import silent
from castlm.training.options import DataOptions, EvaluationOptions, ModelOptions
from castlm.world import World, is_main_rank


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
    general: ScoredText | None
    """Tokens of the general text; None without one."""
    is_plain: bool
    """Whether all texts are plain, evaluation texts included."""
    encoder: Encoder
    """Turns documents into tokens. The loader has its own copy."""
    train_sha256: str
    eval_sha256: str
    general_sha256: str | None
    template_sha256: str | None
    """Hash of the chat template of the training documents; None for plain text."""
    repeats: bool
    """Whether every epoch has the sequences of the first."""

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
) -> int:
    """The number of optimizer steps of `global_batch` sequences in `num_epochs` of the training documents.

    Raises `InputError` for a stream of the hub, whose length is not known, or a mixture, which has no end.
    """
    documents, _ = open_splits(data, evaluation)
    if not isinstance(documents, Documents):
        raise InputError(f"num_train_epochs: {data.dataset} is streamed or a mixture, without epochs: give max_steps")
    _, _, tokenizer = open_model(model.model, **model.loading)
    encoder = open_encoder([documents], tokenizer, model.model, data, **model.loading)
    sequences = open_sequences(documents, encoder, seq_len=data.seq_len, seed=data.seed)
    assert not isinstance(sequences, MixedSequences)  # a mixture has no end
    tokens = sequences.tokens_per_epoch()
    return max(1, math.ceil(num_epochs * tokens / (global_batch * data.seq_len)))


def open_splits(
    data: DataOptions, evaluation: EvaluationOptions
) -> tuple[AnyDocuments, list[Documents | HubDocuments]]:
    """The training documents, and the texts of the evaluation."""
    shown = functools.partial(shown_progress, is_main=is_main_rank())
    opened = functools.partial(open_documents, options=data, shown=shown)
    parts = [opened(text, split=data.dataset_split) for text in data.datasets]
    held_out = [opened(text, split=evaluation.eval_split) for text in evaluation.eval_datasets]
    if not held_out:
        splits = [split_documents(part, evaluation.eval_fraction, data.seed) for part in parts]
        parts, held_out = [part for part, _ in splits], [part for _, part in splits]
    mixed = parts[0] if len(parts) == 1 else Mixture(parts, list(data.datasets.values()))
    return mixed, held_out


def scored_parts(
    texts: Sequence[Documents | HubDocuments], encoder: Encoder, evaluation: EvaluationOptions
) -> list[ScoredText]:
    """The tokens of each evaluation text of a run."""
    # A held-out part of the training text is sampled with a fixed seed: its hash does not depend on the run's seed.
    seed = None if evaluation.eval_datasets else 0
    return [scored_text(each, encoder, evaluation.eval_tokens or None, seed=seed) for each in texts]


def open_training_text(
    model: ModelOptions,
    data: DataOptions,
    evaluation: EvaluationOptions,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    world: World,
    *,
    rows_per_rank: int,
    repeats: bool = False,
) -> TrainingText:
    """Opens the texts of a run and tokenizes the held-out text.

    Args:
        tokenizer: receives the chat template of `data`, if there is one.
        rows_per_rank: sequences of a batch on one rank.
        repeats: every epoch of a single dataset has the sequences of the first. The texts of a mixture have epochs of
            their own and are cut anew in each.

    Raises:
        InputError: a text that cannot be opened, too little text, or token ids outside the vocabulary.
    """
    documents, held_out = open_splits(data, evaluation)
    general = None
    if evaluation.general_dataset is not None:
        general = open_documents(evaluation.general_dataset, data, split=evaluation.eval_split)
    scored = [*held_out, *([] if general is None else [general])]
    encoder = open_encoder([documents, *scored], tokenizer, model.model, data, **model.loading)
    check_vocabulary(torch.tensor([encoder.eos, *encoder.bos]), vocab_size)  # they are not in every held-out text
    # All ranks read the same text, but each prepares only the images of its own rows.
    say = note if world.is_main or documents.kind is Kind.WITH_EXTRA else silent
    repeats = repeats and not isinstance(documents, Mixture)
    loader = BatchLoader(
        open_sequences(documents, encoder, seq_len=data.seq_len, seed=data.seed, repeat=repeats, say=say),
        rows_per_rank=rows_per_rank,
        rank=world.rank,
        world_size=world.size,
        prefetch=True,
    )
    tokens = scored_parts(scored, encoder, evaluation)
    for name, part in zip((each.name for each in scored), tokens):
        check_vocabulary(part.ids, vocab_size)
        if len(part.ids) < 2 or not part.sequences(data.seq_len, data.seq_len):
            raise InputError(
                f"the evaluation text {name} of {len(part.ids)} tokens has none that counts within seq_len "
                f"{data.seq_len}: give more text, or raise seq_len"
            )
    parts = {each.name: part for each, part in zip(held_out, tokens)}
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
        general=None if general is None else tokens[-1],
        is_plain=all(text.kind is Kind.TEXT for text in (documents, *scored)),
        encoder=encoder,
        train_sha256=train_sha256,
        eval_sha256=eval_sha256,
        general_sha256=None if general is None else general.text_hash(),
        template_sha256=None if documents.kind is Kind.TEXT else encoder.template_sha256,
        repeats=repeats,
    )
