"""train(): from a dense model to a verified n:m model.

This module completes the config and locks the output folder; `castlm.training.trainer` takes the steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from castlm.data.documents import open_documents
from castlm.data.packing import MixedSequences
from castlm.data.tokens import check_vocabulary
from castlm.export.hf import check_login
from castlm.facts import Facts
from castlm.hardware import autocast, choose_precision, collect_garbage
from castlm.models.architecture import move_, vocab_size
from castlm.models.io import open_config
from castlm.oneshot.folder import drop_work
from castlm.say import Progress, silent
from castlm.signals import Interrupt
from castlm.training.attention import inputs_of
from castlm.training.checkpoint import RunFolder, claimed, is_restart, newest, read_manifest
from castlm.training.config import TrainConfig
from castlm.training.finish import finish, upload
from castlm.training.first_steps import measure_first_steps
from castlm.training.model import check_sizes, layers_left_dense, learning_rate_for, open_dense
from castlm.training.objective import Objective, as_teacher_
from castlm.training.teacher_cache import make_cache_folder, teacher_dtype
from castlm.training.text import open_training_text, steps_of_epochs
from castlm.training.trainer import Trainer, open_teacher_cache
from castlm.world import World, closing, init_world, naming_missing_ranks
from castlm_runtime.reading import user_path


def train(config: TrainConfig) -> Facts:
    """Runs `config` from its dense model to the verified result in `output_dir/model`.

    Returns:
        The facts of the run, which are also the result's castlm.json.

    Raises:
        InputError: any error that the user can correct; no result is half-written.
        Interrupted: after Ctrl-C or SIGTERM during the steps; its message names the saved step and how to resume.
    """
    runtime = config.runtime
    with (
        Interrupt() as interrupt,
        closing(init_world(runtime.device, runtime.sharding, runtime.timeout_s)) as world,
        naming_missing_ranks(world),
    ):
        # `torchrun --max-restarts` repeats the command as it was: `overwrite` would delete what the run has saved.
        if world.on_main(lambda: is_restart(config.checkpoint)):
            config = config.changed(resume=True, overwrite=False)
        output = config.checkpoint
        with claimed(output, config.inputs, world) as folder:
            config = resolve(config, world)
            facts = world.on_main(lambda: _finished_before(config, folder, world.size), patient=True)
            if facts is None:
                trainer = Trainer(config, world)
                collect_garbage(world.device.type)  # whatever was loaded on the way
                interrupt.start_training()
                with trainer.recording():
                    trainer.train(interrupt)
                    interrupt.start_export()
                    facts = finish(trainer)
                    world.on_main(lambda: drop_work(folder.path))
            if output.push_to_hub:  # also for a finished run, which may have been stopped before the upload
                upload(folder.model, output.hub_repo, facts, world)
            return facts


def _finished_before(config: TrainConfig, folder: RunFolder, num_ranks: int) -> Facts | None:
    """The facts of a run that is resumed and has nothing left to do; None of another."""
    if not (config.checkpoint.resume and folder.is_finished()):
        return None
    batch = config.optimizer.sequences_per_step(num_ranks)
    return folder.finish_again(config.as_dict(), config.as_yaml(), batch)


def resolve(config: TrainConfig, world: World) -> TrainConfig:
    """`config` with the values that depend on files: `learning_rate`, `left_dense`, `max_steps` of epochs, `lam`."""
    config = config.changed(**world.on_main(lambda: _options_of_files(config, world.size), patient=True))
    if config.method.lam == "auto":
        config = config.changed(lam=measure_first_steps(config, world).lam)
    return config


def _options_of_files(config: TrainConfig, num_ranks: int) -> dict[str, Any]:
    """The options that the files of model, texts and checkpoint decide, read by the main rank; it must be logged in if
    the result is to be uploaded.
    """
    options: dict[str, Any] = {}
    if config.checkpoint.push_to_hub:
        check_login(config.checkpoint.hub_repo)
    if config.optimizer.learning_rate is None:
        options["learning_rate"] = learning_rate_for(config.model)
    if config.is_finetuning:
        options["left_dense"] = layers_left_dense(config.model)
    epochs = config.optimizer.num_train_epochs
    if epochs is not None:
        batch = config.optimizer.sequences_per_step(num_ranks)
        options["max_steps"] = steps_of_epochs(config.model, config.data, config.evaluation, epochs, batch)
        options["num_train_epochs"] = None
    if config.method.lam == "auto":
        output = config.checkpoint
        checkpoint = newest(RunFolder(output.output_dir).checkpoints) if output.resume else None
        if checkpoint is not None:
            lam = read_manifest(checkpoint)["config"].get("lam")
            options["lam"] = float(lam) if isinstance(lam, (int, float)) else 0.0  # 0 if that run did not use lam
        elif not config.method.reads_lam:
            options["lam"] = 0.0
    return options


def check_teacher_pass(config: TrainConfig) -> None:
    """Checks the requirements of `fill_teacher_cache`, except for the training text, which is sampled afterwards.

    Raises `InputError` for a text, a folder or sizes that the pass over the text would refuse.
    """
    model = open_config(config.model.model, **config.model.loading)
    check_sizes(model, seq_len=config.data.seq_len, teacher_top_k=config.teacher.teacher_top_k)
    for text in config.evaluation.eval_datasets:
        open_documents(text, config.data)
    assert config.teacher.teacher_cache is not None
    make_cache_folder(user_path(config.teacher.teacher_cache))


@torch.no_grad()
def fill_teacher_cache(config: TrainConfig, progress: Progress = silent) -> int:
    """Runs the teacher in this process on the sequences of the first epoch of `config` that its cache lacks.

    It reads them in the order, the batches and the precision of the run, so it writes the same bits as the first epoch
    of the run would, which then loads no teacher. Each finished batch is recorded, so that a pass that was stopped can
    continue.

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
    dense = open_dense(config.model, world, seq_len=data.seq_len, teacher_top_k=options.teacher_top_k)
    vocab = vocab_size(dense.model.config)
    rows = config.optimizer.per_device_train_batch_size
    text = open_training_text(
        config.model, data, config.evaluation, dense.tokenizer, vocab, world, rows_per_rank=rows, repeats=True
    )
    precision = choose_precision(runtime.precision, world.device, dense.model.config)
    cache = open_teacher_cache(options, data, text, dense, precision, world)
    model = as_teacher_(dense.model, teacher_dtype(precision))
    move_(model, world.device)
    objective = Objective(
        model,
        model,
        temperature=options.temperature,
        top_k=options.teacher_top_k,
        cache=cache,
        apart=not data.cross_document_attention,
    )
    with autocast(world.device, precision):
        objective.check_documents_apart()
    sequences = text.loader.sequences
    assert not isinstance(sequences, MixedSequences)  # a mixture has no end
    total = math.ceil(sequences.tokens_per_epoch() / data.seq_len)
    done, is_whole = 0, False
    while not is_whole:
        batch = next(text.loader)
        check_vocabulary(batch["input_ids"], vocab)
        with autocast(world.device, precision):
            moved = objective.on_device(batch, world.device)
            inputs = inputs_of(moved["input_ids"], moved["position_ids"], objective.way, moved.get("documents"))
            objective.teacher_tokens(inputs)
        # The loader's position is that of the next sequence: in the second epoch, the first one is covered.
        done, is_whole = done + len(batch["input_ids"]), text.loader.state_dict()["epoch"] > 0
        cache.cover(0, done, every_epoch=is_whole)
        progress(min(done, total), total)
    return done
