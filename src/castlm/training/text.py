"""The text of a run: training documents packed into batches, and the held-out tokens for perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from castlm.core.errors import InputError
from castlm.data.documents import Documents, HubDocuments, open_documents, split_documents, text_hash
from castlm.data.loader import BatchLoader
from castlm.data.packing import PackedSequences
from castlm.data.tokens import check_vocabulary, token_ids
from castlm.distributed.world import World
from castlm.models import open_model
from castlm.training.config import TrainConfig


@dataclass
class TrainingText:
    """What a run trains and is evaluated on."""

    documents: Documents | HubDocuments
    """Training documents, without the held-out ones."""
    loader: BatchLoader
    """This rank's batches of them."""
    eval_ids: Tensor
    """Held-out tokens, int64, (num_tokens,)."""
    train_sha256: str
    eval_sha256: str


def resolve_epochs(config: TrainConfig, world: World) -> TrainConfig:
    """`config` with the `max_steps` that its `num_train_epochs` amount to, rounded up.

    Raises:
        InputError: the dataset is streamed from the hub, so that its length is not known, or the run is too long.
    """

    def steps() -> int:
        documents, _ = _open_splits(config)
        if isinstance(documents, HubDocuments):
            raise InputError(f"num_train_epochs: {config.dataset} is streamed, its length is not known: give max_steps")
        _, _, tokenizer = open_model(config.model, trust_remote_code=config.trust_remote_code, revision=config.revision)
        tokens = _sequences(config, documents, tokenizer).tokens_per_epoch()
        batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * world.size
        return max(1, math.ceil(float(config.num_train_epochs or 0) * tokens / (batch * config.seq_len)))

    return replace(config, max_steps=world.on_main(steps), num_train_epochs=None)


def _open_splits(config: TrainConfig) -> tuple[Documents | HubDocuments, Documents | HubDocuments]:
    """The training documents and those of the evaluation."""
    documents = open_documents(
        config.dataset, column=config.column, split=config.dataset_split, data_config=config.dataset_config
    )
    if config.eval_dataset is None:
        return split_documents(documents, config.eval_fraction, config.seed)
    return documents, open_documents(config.eval_dataset, column=config.column)


def _sequences(
    config: TrainConfig, documents: Documents | HubDocuments, tokenizer: PreTrainedTokenizerBase
) -> PackedSequences:
    return PackedSequences(documents, tokenizer, seq_len=config.seq_len, seed=config.seed, repeat=config.repeat_blocks)


def open_training_text(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int, world: World
) -> TrainingText:
    """Opens the datasets of `config` and tokenizes the held-out text.

    Raises:
        InputError: a dataset that cannot be opened, too little text, or token ids outside the vocabulary.
    """
    documents, held_out = _open_splits(config)
    sequences = _sequences(config, documents, tokenizer)
    loader = BatchLoader(
        sequences,
        rows_per_rank=config.per_device_train_batch_size,
        rank=world.rank,
        world_size=world.size,
        prefetch=config.prefetch,
    )
    eval_ids = token_ids(held_out, tokenizer, limit=config.eval_tokens or None)
    if len(eval_ids) < 2:
        raise InputError(f"the evaluation text {held_out.name} has {len(eval_ids)} tokens: give more")
    check_vocabulary(eval_ids, vocab_size)
    return TrainingText(documents, loader, eval_ids, text_hash(documents), text_hash(held_out))
