"""The teacher's cache of a run, and a pass of the teacher alone that fills it before the run.

The pass reads the sequences of the first epoch in the order and the batches of the run, with the run's own text,
objective and precision. So it writes the same bits as the first epoch of `castlm train` would, and a run whose
sequences are all in the cache loads no teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from castlm.core.errors import InputError
from castlm.data.columns import Kind
from castlm.data.documents import open_documents
from castlm.data.tokens import check_vocabulary
from castlm.distributed.world import World, init_world
from castlm.files.reading import user_path
from castlm.hardware import autocast, choose_precision
from castlm.models.architecture import vocab_size
from castlm.models.opening import open_config
from castlm.training.config import TrainConfig
from castlm.training.objective import Objective, as_teacher_
from castlm.training.options import DataOptions, EvaluationOptions, ModelOptions, TeacherOptions
from castlm.training.source import Source, check_sizes, open_source
from castlm.training.teacher_cache import TeacherCache, make_cache_folder
from castlm.training.text import TrainingText, open_training_text


def open_teacher_cache(
    options: TeacherOptions, data: DataOptions, text: TrainingText, source: Source, precision: str, world: World
) -> TeacherCache | None:
    """The cache of a run; None without the option `teacher_cache`.

    Args:
        source: the teacher.

    Raises:
        InputError: as `TeacherCache`; a text with images, which the key of a sequence does not contain.
    """
    if options.teacher_cache is None:
        return None
    if text.documents.kind is Kind.WITH_EXTRA:
        raise InputError("teacher_cache identifies a sequence by its tokens, not by images: omit teacher_cache")
    stream = [text.train_sha256, data.seed, data.seq_len, data.repeat_sequences, data.column, text.template_sha256]
    teacher = {
        "weights": source.fingerprint,
        "dtype": str(teacher_dtype(precision)),
        "top_k": options.teacher_top_k,
        "temperature": options.temperature,
        "cross_document_attention": data.cross_document_attention,
    }
    return TeacherCache(options.teacher_cache, stream, teacher, world)


def teacher_dtype(precision: str) -> torch.dtype:
    """The dtype of the teacher's weights."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def check_teacher_pass(
    model: ModelOptions, data: DataOptions, evaluation: EvaluationOptions, teacher: TeacherOptions
) -> None:
    """Checks the requirements of `fill_teacher_cache`, except for the training text, which is sampled afterwards.

    Raises:
        InputError: an evaluation text that cannot be opened, a folder that cannot be made or holds other files, or more
            positions or tokens than the model has.
    """
    of_model = open_config(model.model, trust_remote_code=model.trust_remote_code, revision=model.revision)
    check_sizes(of_model, seq_len=data.seq_len, teacher_top_k=teacher.teacher_top_k)
    for text in evaluation.eval_datasets:
        open_documents(text, data)
    assert teacher.teacher_cache is not None
    make_cache_folder(user_path(teacher.teacher_cache))


@torch.no_grad()
def fill_teacher_cache(config: TrainConfig, progress: Callable[[int, int], None] = lambda done, total: None) -> int:
    """Runs the teacher in this process on the sequences of the first epoch of `config` that its cache lacks.

    Each finished batch is recorded, so that a pass that was stopped can continue.

    Args:
        config: a config with a `teacher_cache`.
        progress: called with (finished sequences, sequences of the epoch) after each batch.

    Returns:
        The number of sequences that the cache covers. The last batch may hold some of the second epoch, as in a run.

    Raises:
        InputError: as for a run: a model or text that cannot be read, a cache of another teacher, a full disk.
    """
    runtime, data, options = config.runtime, config.data, config.teacher
    world = init_world(runtime.device, runtime.sharding)
    source = open_source(config.model, world)
    vocab = vocab_size(source.model.config)
    check_sizes(source.model.config, seq_len=data.seq_len, teacher_top_k=options.teacher_top_k)
    rows = config.optimizer.per_device_train_batch_size
    text = open_training_text(config.model, data, config.evaluation, source.tokenizer, vocab, world, rows_per_rank=rows)
    precision = choose_precision(runtime.precision, world.device, source.model.config)
    cache = open_teacher_cache(options, data, text, source, precision, world)
    assert cache is not None
    teacher, apart = as_teacher_(source.model, teacher_dtype(precision)), not data.cross_document_attention
    objective = Objective(teacher, teacher, options.eta, options.temperature, options.teacher_top_k, cache, apart)
    objective.to(world.device).eval()
    with autocast(world.device, precision):
        objective.check_documents_apart()
    total = math.ceil(text.loader.sequences.tokens_per_epoch() / data.seq_len)
    done, is_whole = 0, False
    while not is_whole:
        batch = next(text.loader)
        check_vocabulary(batch["input_ids"], vocab)
        with autocast(world.device, precision):
            ids, positions = (batch[name].to(world.device) for name in ("input_ids", "position_ids"))
            objective.fill_cache(ids, positions)
        done, is_whole = done + len(ids), text.loader.state_dict()["epoch"] > 0
        cache.cover(0, done, every_epoch=is_whole and data.repeat_sequences)
        progress(min(done, total), total)
    return done
