"""The text of a run: training documents packed into batches, and the held-out tokens for perplexity."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from castlm.core.errors import InputError
from castlm.data.chat import with_template
from castlm.data.documents import Documents, joined_digest, open_documents, split_documents
from castlm.data.hub import HubDocuments
from castlm.data.image_sequences import AnyDocuments, ImageSequences
from castlm.data.images import ImageEncoder
from castlm.data.json_rows import ALONE, Share
from castlm.data.loader import BatchLoader
from castlm.data.mixture import MixedSequences, Mixture
from castlm.data.packing import PackedSequences
from castlm.data.scored import ScoredText, scored_text
from castlm.data.tokens import check_vocabulary
from castlm.distributed.world import World
from castlm.evaluation.perplexity import sequences_of
from castlm.models.opening import open_model, open_processor
from castlm.progress import note
from castlm.training.config import TrainConfig


@dataclass
class TrainingText:
    """What a run trains and is evaluated on."""

    documents: AnyDocuments
    """Training documents, without the held-out ones."""
    loader: BatchLoader
    """This rank's batches of them."""
    held_out: ScoredText
    """Tokens of all evaluation texts."""
    eval_parts: dict[str, ScoredText]
    """Tokens of each evaluation text by its file name, or its path where names meet; empty if there is only one."""
    has_chat: bool
    """Whether any of these texts holds conversations."""
    train_sha256: str
    eval_sha256: str
    template_sha256: str | None
    """Of the chat template that the training documents are rendered with; None if they are plain text."""
    processor: ProcessorMixin | None = None
    """Prepares the images of the texts, where any has some."""


def resolve_epochs(config: TrainConfig, world: World) -> TrainConfig:
    """`config` with the `max_steps` that its `num_train_epochs` amount to, rounded up.

    Raises:
        InputError: the dataset is streamed from the hub, so that its length is not known, or the run is too long.
    """

    def num_tokens(documents: Documents) -> int:
        _, _, tokenizer = open_model(config.model, trust_remote_code=config.trust_remote_code, revision=config.revision)
        return _packed(config, documents, with_template(tokenizer, config.chat_template_path)).tokens_per_epoch()

    def steps() -> int:
        documents, _ = _open_splits(config)
        if not isinstance(documents, Documents):
            raise InputError(f"num_train_epochs: {config.dataset} is streamed, its length is not known: give max_steps")
        tokens = len(documents) * config.seq_len if documents.has_images else num_tokens(documents)
        batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * world.size
        return max(1, math.ceil(float(config.num_train_epochs or 0) * tokens / (batch * config.seq_len)))

    return replace(config, max_steps=world.on_main(steps, beats=True), num_train_epochs=None)


def _open_splits(config: TrainConfig, share: Share = ALONE) -> tuple[AnyDocuments, list[Documents | HubDocuments]]:
    """The training documents, and the texts of the evaluation."""
    found = partial(open_documents, column=config.column, share=share)
    hub = {"split": config.dataset_split, "data_config": config.dataset_config}
    parts = [found(text, **hub) for text in config.datasets]
    hub = {"split": config.eval_split, "data_config": config.eval_config}
    held_out = [found(text, **hub) for text in config.eval_datasets]
    if not held_out:
        splits = [split_documents(part, config.eval_fraction, config.seed) for part in parts]
        parts, held_out = [part for part, _ in splits], [part for _, part in splits]
    mixed = parts[0] if len(parts) == 1 else Mixture(parts, list(config.datasets.values()))
    return mixed, held_out


def _with_images(
    config: TrainConfig, documents: AnyDocuments, processor: ProcessorMixin, say: Callable[[str], None]
) -> ImageSequences:
    return ImageSequences(
        documents,
        ImageEncoder(processor, config.assistant_only_loss),
        seq_len=config.seq_len,
        seed=config.seed,
        repeat=config.repeat_sequences,
        say=say,
    )


def _packed(
    config: TrainConfig,
    documents: Documents | HubDocuments,
    tokenizer: PreTrainedTokenizerBase,
    say: Callable[[str], None] = lambda text: None,
) -> PackedSequences:
    return PackedSequences(
        documents,
        tokenizer,
        seq_len=config.seq_len,
        seed=config.seed,
        repeat=config.repeat_sequences,
        assistant_only=config.assistant_only_loss,
        say=say,
    )


def _sequences(
    config: TrainConfig,
    documents: AnyDocuments,
    tokenizer: PreTrainedTokenizerBase,
    processor: ProcessorMixin | None,
    world: World,
) -> PackedSequences | MixedSequences | ImageSequences:
    """The sequences of the training documents; the main rank alone says what is left out of a text without images."""
    if processor is not None and documents.has_images:  # each rank sees the images of its own rows alone
        return _with_images(config, documents, processor, note)
    say = note if world.is_main else lambda text: None
    if isinstance(documents, Mixture):
        return MixedSequences([_packed(config, part, tokenizer, say) for part in documents.parts], documents.weights)
    return _packed(config, documents, tokenizer, say)


def _scored_parts(
    config: TrainConfig,
    held_out: Sequence[Documents | HubDocuments],
    tokenizer: PreTrainedTokenizerBase,
    processor: ProcessorMixin | None,
    vocab_size: int,
) -> dict[str, ScoredText]:
    """The tokens of each evaluation text by its name; raises `InputError` for one that cannot be evaluated."""
    # Of a part of the training text, a sample: the same for every seed of a run, as its hash is.
    seed = None if config.eval_datasets else 0
    options = {"assistant_only": config.assistant_only_loss, "processor": processor, "seed": seed}
    parts = {text.name: scored_text(text, tokenizer, config.eval_tokens or None, **options) for text in held_out}
    for name, part in parts.items():
        if len(part.ids) < 2:
            raise InputError(f"the evaluation text {name} has {len(part.ids)} tokens: give more")
        check_vocabulary(part.ids, vocab_size)
        if not sequences_of(part, config.seq_len, config.seq_len):
            raise InputError(
                f"no token of the evaluation text {name} that counts is within seq_len {config.seq_len}: raise seq_len"
            )
    return parts


def _by_short_name(parts: dict[str, ScoredText]) -> dict[str, ScoredText]:
    short = {name: Path(name).name for name in parts}
    count = Counter(short.values())
    return {short[name] if count[short[name]] == 1 else name: part for name, part in parts.items()}


def open_training_text(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int, world: World
) -> TrainingText:
    """Opens the datasets of `config` and tokenizes the held-out text.

    Raises:
        InputError: a dataset that cannot be opened, too little text, token ids outside the vocabulary, or images with a
            teacher cache, which knows a sequence by its tokens.
    """
    documents, held_out = _open_splits(config, Share(world.rank, world.size, world.gather))
    if config.teacher_cache is not None and documents.has_images:
        raise InputError("teacher_cache knows a sequence by its tokens, and the text has images: leave it out")
    processor = None
    if any(text.has_images for text in (documents, *held_out)):
        options = {"trust_remote_code": config.trust_remote_code, "revision": config.revision}
        processor = open_processor(config.model, tokenizer, **options)
    loader = BatchLoader(
        _sequences(config, documents, tokenizer, processor, world),
        rows_per_rank=config.per_device_train_batch_size,
        rank=world.rank,
        world_size=world.size,
        prefetch=config.prefetch,
    )
    parts = _scored_parts(config, held_out, tokenizer, processor, vocab_size)
    train_sha256 = documents.text_hash()
    eval_sha256 = joined_digest([text.text_hash() for text in held_out])
    world.check_alike({"another training text": train_sha256, "another evaluation text": eval_sha256})
    return TrainingText(
        documents,
        loader,
        ScoredText.joined(list(parts.values())),
        _by_short_name(parts) if len(parts) > 1 else {},
        any(text.is_chat for text in (documents, *held_out)),
        train_sha256,
        eval_sha256,
        hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest() if documents.is_chat else None,
        processor,
    )
