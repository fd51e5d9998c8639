"""The text of a run: training documents packed into batches, and the held-out tokens for perplexity."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from castlm.core.errors import InputError
from castlm.data.documents import Documents, HubDocuments, open_documents, split_documents, text_hash
from castlm.data.loader import BatchLoader
from castlm.data.packing import BlockStream
from castlm.data.tokens import check_vocabulary, token_ids
from castlm.distributed.world import World
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


def open_training_text(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int, world: World
) -> TrainingText:
    """Opens the datasets of `config` and tokenizes the held-out text.

    Raises:
        InputError: a dataset that cannot be opened, too little text, or token ids outside the vocabulary.
    """
    documents = open_documents(
        config.dataset, column=config.column, split=config.dataset_split, data_config=config.dataset_config
    )
    if config.eval_dataset is None:
        documents, held_out = split_documents(documents, config.eval_fraction, config.seed)
    else:
        held_out = open_documents(config.eval_dataset, column=config.column)
    stream = BlockStream(documents, tokenizer, seq_len=config.seq_len, seed=config.seed, repeat=config.repeat_blocks)
    loader = BatchLoader(
        stream,
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
