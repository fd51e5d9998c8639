"""train(): from a dense model to a verified n:m model.

`train` and `set_up` are the recipe, from top to bottom; each line of them hands a section of the config to the
component that reads it. `calibrate` measures the first steps of a run, and `fill_teacher_cache` runs its teacher alone.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel

from castlm.core.decay import DECAYS, DecayBudget, decay_budget
from castlm.core.errors import DivergedError, InputError
from castlm.core.nm import Pattern, pack_mask
from castlm.core.rounding import fit_rounding_
from castlm.core.shards import like_rows, local
from castlm.core.sparsify import FilterFn, sparse_linears
from castlm.data.line_index import LineIndexes
from castlm.data.packing import MixedSequences, document_offsets
from castlm.data.tokens import check_vocabulary
from castlm.distributed.sharding import compile_blocks_
from castlm.distributed.world import World, closing, init_world, naming_missing_ranks
from castlm.export.hf import check_export, check_login
from castlm.facts import Facts, Start, from_json
from castlm.files.reading import user_path
from castlm.hardware import autocast, check_compile, choose_fused, choose_precision, collect_garbage
from castlm.methods.base import Retraining, class_of
from castlm.methods.options import MethodOptions, OptimizerOptions, schedule
from castlm.models.architecture import move_, vocab_size
from castlm.oneshot.calibration import Draw
from castlm.oneshot.folder import drop_work
from castlm.oneshot.options import EFFORTS
from castlm.progress import note
from castlm.runtime.native import longest_free_group
from castlm.say import Progress, silent
from castlm.signals import Interrupt
from castlm.training.apart import Way, inputs_of, way_to_keep_apart
from castlm.training.attention import use_attention_
from castlm.training.checkpoint import newest, read_manifest
from castlm.training.config import TrainConfig
from castlm.training.finish import finish, upload
from castlm.training.lam import PLACEHOLDER_LAM, STEPS, FirstSteps, measure
from castlm.training.metrics import Evaluator, trained_rounding
from castlm.training.objective import Objective, checkpoint_activations_, shard_objective_
from castlm.training.options import CheckpointOptions
from castlm.training.recorder import Recorder
from castlm.training.run import Run, local_masks
from castlm.training.run_folder import RunFolder, claimed, is_restart
from castlm.training.source import (
    TeacherSource,
    check_teacher,
    filter_of,
    layers_left_dense,
    open_inputs,
    steps_of_epochs,
)
from castlm.training.start import (
    StartWeights,
    TrainingStart,
    check_start,
    start_,
)
from castlm.training.stepper import Stepper
from castlm.training.teacher import Teacher, as_teacher_
from castlm.training.teacher_cache import open_teacher_cache, teacher_dtype
from castlm.training.telemetry import chosen_trackers


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
            if output.push_to_hub:
                world.on_main(lambda: check_login(output.hub_repo))
            indexes = LineIndexes(folder.text_index if output.resume else None)  # so that each text is parsed once
            config = resolve(config, world, indexes)
            if world.on_main(lambda: output.resume and folder.is_finished()):
                options, batch = config.as_dict(), config.optimizer.sequences_per_step(world.size)
                facts = world.on_main(lambda: folder.finish_again(options, config.as_yaml(), batch), patient=True)
            else:
                run = set_up(config, world, indexes=indexes)
                collect_garbage(world.device.type)  # whatever was loaded on the way
                interrupt.start_training()
                with Recorder(run) as recorder:
                    take_steps(run, recorder, interrupt)
                    interrupt.start_export()
                    facts = finish(run, recorder.say)
                    world.on_main(lambda: drop_work(folder.path))
            if output.push_to_hub:  # also for a finished run, which may have been stopped before the upload
                upload(folder.model, output.hub_repo, facts, world, private=output.hub_private_repo)
            return facts


def take_steps(run: Run, recorder: Recorder, interrupt: Interrupt) -> None:
    """Takes the steps of a run that are left, with its evaluations and checkpoints.

    Raises:
        Interrupted: after a signal to any rank, once the state after the current step is saved.
    """
    stepper, last, progress = Stepper(run), run.total_steps, run.progress
    eval_steps, save_steps = run.config.evaluation.steps_between(last), run.config.checkpoint.save_steps
    with recorder.saver:
        if progress.step == 0:
            recorder.evaluate()
        while progress.step < last:
            run.world.meet(f"step {progress.step + 1}")
            recorder.saver.finish_if_written()
            try:
                figures = stepper.step()
            except DivergedError as error:
                raise recorder.diverged(error) from error
            recorder.log(figures)
            is_last = progress.step == last
            if progress.step % eval_steps == 0 or is_last:
                recorder.evaluate()
            # A signal may reach one rank alone: all agree to stop, or the others would wait in their next collective.
            is_stopped = run.world.any(interrupt.requested)
            if is_stopped or (save_steps and (progress.step % save_steps == 0 or is_last)):
                recorder.save()
            if is_stopped:
                recorder.saver.finish()
                raise interrupt.stopped(progress.step, run.folder.path)
    recorder.cover_teacher_cache()


def set_up(
    config: TrainConfig,
    world: World,
    start_of: CheckpointOptions | None = None,
    indexes: LineIndexes | None = None,
) -> Run:
    """Builds the parts of a run, and loads its checkpoint if it is resumed. Checks that can fail come first.

    Nothing in the output folder changes. The order of the last part is fixed: the teacher copies the dense weights, the
    method parametrizes before the model is sharded, the optimizer takes sharded parameters, the start sets its masks.

    Args:
        config: a config whose `lam` is a number.
        start_of: the options of the output folder beside which the start leaves its finished blocks; by default those
            of `config`.
        indexes: the places of the documents in .jsonl files that have been opened; by default, no file has.
    """
    start_of = start_of or config.checkpoint
    data, method_options, optimizer_options, runtime = config.data, config.method, config.optimizer, config.runtime
    rows, eta, top_k = optimizer_options.per_device_train_batch_size, config.teacher.eta, config.teacher.teacher_top_k
    folder, pattern = RunFolder(config.checkpoint.output_dir), config.model.pattern
    method_class = class_of(method_options.method, config.adapter.adapter)

    # what can be refused in the first second
    method_class.check(method_options, optimizer_options)
    check_compile(runtime.torch_compile, world.device)
    if optimizer_options.moments_on_host and world.device.type == "cpu":
        raise InputError("moments_on_host: this run is on a CPU, where all memory is the host's: omit it")
    if world.size > 1:
        world.check_all(_obstacle_on_ranks(config))
    trackers = world.on_main(lambda: chosen_trackers(config.checkpoint.report_to))
    checkpoint, start = None, StartWeights()
    if config.checkpoint.resume:
        checkpoint = world.on_main(lambda: folder.newest_checkpoint(config.as_dict()))
    if checkpoint is not None:
        # The facts of the start are made once, at step 0; a resumed run takes them from the checkpoint.
        start.facts = world.on_main(lambda: from_json(Start, read_manifest(checkpoint)["start"], str(checkpoint)))
    makes_start = checkpoint is None and config.start.name != "magnitude"
    if makes_start:
        check_start(config.start.name, user_path(start_of.output_dir), world)
    check_teacher(config.teacher, config.model, seq_len=data.seq_len)

    # model, text and teacher
    whole_copies = method_class.whole_copies
    source, text = open_inputs(
        config.model,
        data,
        config.evaluation,
        world,
        rows_per_rank=rows,
        teacher_top_k=top_k,
        whole_copies=whole_copies,
        indexes=indexes,
    )
    model = source.model
    precision = choose_precision(runtime.precision, world.device, model.config)
    filter_fn = filter_of(config.model.left_dense)
    if method_options.row.is_sparse:
        check_export(model, pattern, filter_fn)
    # in the whole run, on all ranks
    num_sequences = optimizer_options.max_steps * optimizer_options.sequences_per_step(world.size)
    teacher = TeacherSource(config.teacher, config.model, source, world, whole_copies=whole_copies)
    cache = None
    if config.teacher.teacher_cache is not None:  # one that cannot serve is refused before the start
        cache = open_teacher_cache(config.teacher, data, text, teacher.source, precision, world)
        cache.complete = cache.covers(num_sequences)

    # start; without a cache, no teacher takes memory yet
    is_for_cpu = world.device.type == "cpu"
    if (
        method_options.row.is_sparse
        and checkpoint is None
        and is_for_cpu
        and world.is_main
        and not config.is_finetuning
    ):
        _note_longer_groups(model, pattern, filter_fn)
    if makes_start:
        passes = 3 + (eta > 0)  # forward, twice as much backward, and the teacher's forward
        training_start = TrainingStart(
            options=config.start,
            source=source,
            text=text,
            world=world,
            pattern=pattern,
            filter_fn=filter_fn,
            draw=Draw(
                documents=text.documents,
                num_sequences=config.start.calibration_sequences,
                seq_len=data.seq_len,
                seed=data.seed,
                precision=runtime.precision,
                effort=EFFORTS[config.start.start_effort],
            ),
            keeps_dense_values=method_options.step0(config.start.name, pattern) == "dense",
            is_finetuning=config.is_finetuning,
            compares_hidden=bool(config.teacher.hidden_weight),
            training_tokens=passes * num_sequences * data.seq_len / world.size,
        )
        start = training_start.make(start_of.output_dir, start_of.overwrite)

    # student and teacher
    teacher_model = None
    if eta > 0 and not (cache and cache.complete):
        # Before the method parametrizes the student: the teacher of a run without another is a copy of the dense model.
        teacher_model = as_teacher_(teacher.take_model(), teacher_dtype(precision))
    method = method_class(
        model,
        pattern,
        filter_fn,
        method=method_options,
        optimizer=optimizer_options,
        adapter=config.adapter,
        start=config.start.name,
        seed=data.seed,
    )
    if runtime.gradient_checkpointing:
        checkpoint_activations_(model)
    hidden_weight, temperature = float(config.teacher.hidden_weight or 0.0), config.teacher.temperature
    objective = Objective(
        model,
        Teacher(teacher_model, temperature, top_k, cache, keeps_stream=hidden_weight > 0) if eta > 0 else None,
        eta,
        apart=not data.cross_document_attention,
        hidden_weight=hidden_weight,
        own_attention=not runtime.torch_compile,
    )
    if runtime.torch_compile:
        compile_blocks_(objective)
    shard_objective_(objective, source.stored, teacher.source.stored, precision, world, method.whole_copies)
    names = objective.trained_parameters()

    # optimizer and step 0
    fused, optimizer_text = choose_fused(world.device, sum(p.numel() for p in names))
    method.build_optimizer(model, fused)
    evaluator = Evaluator(objective, text.held_out, data.seq_len, rows, precision, world)
    dense_perplexity = None
    if checkpoint is None:
        changes_weights = makes_start or method.step0 != "dense" or method_options.weight_bits
        if changes_weights and not config.is_finetuning:
            with method.unmasked():  # the dense model, before the start replaces its weights
                dense_perplexity = evaluator.perplexity()
        if makes_start:
            start_(model, method, start, world)
        else:
            method.start_from_magnitude_()
    # After the start, whose weights the scales must fit; on resume they are read with the checkpoint below.
    fit_rounding_(model, keep_scales=checkpoint is not None)
    run = Run(
        config=config,
        world=world,
        folder=folder,
        source=source,
        teacher_fingerprint=teacher.source.fingerprint if teacher.is_other else None,
        text=text,
        objective=objective,
        method=method,
        optimizer_text=optimizer_text,
        evaluator=evaluator,
        names=names,
        initial_masks={names[p]: like_rows(pack_mask(local(mask)), p) for p, mask in method.masks().items()},
        dense_perplexity=dense_perplexity,
        start=start.facts,
        rounding=trained_rounding(model, method.layers, pattern),
        # A resumed run was judged at its step 0, and has the weights of the dense model until they are restored.
        budget=None if checkpoint else _decay_budget(method_options, optimizer_options, method, world),
        trackers=trackers,
        resumed_from=checkpoint,
    )
    if checkpoint is not None:
        run.restore(checkpoint)
    return run


def _note_longer_groups(model: PreTrainedModel, pattern: Pattern, filter_fn: FilterFn) -> None:
    """Notes a pattern that this CPU runs as fast as `pattern` and that loses less, if there is one."""
    groups = pattern.nm
    if groups is None or pattern.cuts:
        return
    layers, _ = sparse_linears(model, pattern, filter_fn)
    longest = longest_free_group(groups.n, groups.m)
    other = groups.with_longest_groups({layer.in_features for layer in layers.values()}, longest)
    if other != pattern:
        note(
            f"this CPU runs {other} nearly as fast as {pattern}, and its freer masks lose less quality: "
            f"--pattern {other} (GPUs have hardware for 2:4 alone)"
        )


def _obstacle_on_ranks(config: TrainConfig) -> str | None:
    """The reason why several ranks cannot take this run, or not with this sharding; None if they can."""
    method, adapter, sharding = config.method.method, config.adapter.adapter, config.runtime.sharding
    method_class = class_of(method, adapter)
    if method_class.masks_forward:
        return f"method {method} masks whole weights in the forward pass: run it in one process"
    if method_class.whole_copies and sharding != "replicate":
        return (
            f"sharding {sharding}: adapter {adapter} needs the whole model on each rank: set sharding replicate, or "
            "adapter none"
        )
    if config.optimizer.step_in_backward:
        return "step_in_backward is for one rank: several ranks add up their gradients first; omit it"
    return None


def resolve(config: TrainConfig, world: World, indexes: LineIndexes | None = None) -> TrainConfig:
    """`config` with the values that depend on files: `left_dense`, `max_steps` of the epochs, `lam`.

    For `indexes` see `set_up`.
    """
    if config.is_finetuning:
        config = config.changed(left_dense=world.on_main(lambda: layers_left_dense(config.model)))
    epochs = config.optimizer.num_train_epochs
    if epochs is not None:
        batch = config.optimizer.sequences_per_step(world.size)
        steps = world.on_main(
            lambda: steps_of_epochs(config.model, config.data, config.evaluation, epochs, batch, indexes), patient=True
        )
        config = config.changed(max_steps=steps, num_train_epochs=None)
    if config.method.lam != "auto":
        return config

    def saved_lam() -> float | None:
        """The `lam` of the checkpoint from which the run is resumed; None if there is none."""
        options = config.checkpoint
        found = newest(RunFolder(options.output_dir).checkpoints) if options.resume else None
        if found is None:
            return None
        lam = read_manifest(found)["config"].get("lam")
        return float(lam) if isinstance(lam, (int, float)) else 0.0  # 0.0 of a run that read none

    lam = world.on_main(saved_lam)
    if lam is None and config.method.reads_lam:
        lam = calibrate(config, world).lam
    return config.changed(lam=0.0 if lam is None else lam)  # 0 if nothing reads it


def calibrate(config: TrainConfig, world: World, steps: int = STEPS) -> FirstSteps:
    """Runs the first `steps` steps of `config` in a temporary folder and measures them.

    What remains are the sequences that it adds to the `teacher_cache` of `config`, and the finished blocks of a start
    beside its output folder, from which the run itself takes its start.
    """
    with tempfile.TemporaryDirectory(prefix="castlm-calibrate-") as scratch:
        scratch_config = config.changed(
            output_dir=Path(scratch) / "run",
            lam=PLACEHOLDER_LAM if config.method.lam == "auto" else config.method.lam,
            ignore_decay_budget=True,
            report_to=("none",),
            push_to_hub=False,
            resume=False,
            overwrite=False,
        )
        # The start is made beside the real output folder, where the run itself finds its finished blocks.
        run = set_up(scratch_config, world, config.checkpoint)
        with Recorder(run, announce=False) as recorder:
            found = measure(run, recorder, steps)
        del run, recorder
        collect_garbage(world.device.type)
    return found


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
    rows, top_k = config.optimizer.per_device_train_batch_size, options.teacher_top_k
    source, text = open_inputs(config.model, data, config.evaluation, world, rows_per_rank=rows, teacher_top_k=top_k)
    precision = choose_precision(runtime.precision, world.device, source.model.config)
    cache = open_teacher_cache(options, data, text, source, precision, world)
    model = as_teacher_(source.model, teacher_dtype(precision))
    move_(model, world.device)
    use_attention_(model)
    teacher = Teacher(model, options.temperature, top_k, cache)
    way: Way = "together"
    if not data.cross_document_attention:
        with autocast(world.device, precision):
            way = way_to_keep_apart(model)
    sequences, vocab = text.loader.sequences, vocab_size(model.config)
    assert not isinstance(sequences, MixedSequences)  # a mixture has no end
    total = math.ceil(sequences.tokens_per_epoch() / data.seq_len)
    done, is_whole = 0, False
    while not is_whole:
        batch = next(text.loader)
        check_vocabulary(batch["input_ids"], vocab)
        with autocast(world.device, precision):
            ids, positions = (batch[name].to(world.device) for name in ("input_ids", "position_ids"))
            documents = document_offsets(batch["position_ids"]) if way == "offsets" else None
            teacher.top_tokens(inputs_of(ids, positions, way, documents), vocab, stream=False)
        # The loader's position is that of the next sequence: in the second epoch, the first one is covered.
        done, is_whole = done + len(ids), text.loader.state_dict()["epoch"] > 0
        cache.cover(0, done, every_epoch=is_whole and data.repeat_sequences)
        progress(min(done, total), total)
    return done


def _decay_budget(
    options: MethodOptions,
    optimizer: OptimizerOptions,
    method: Retraining,
    world: World,
) -> DecayBudget | None:
    """The decay budget of a run; None if no weights decay."""
    if not method.decays or not DECAYS[options.decay].reduces:
        return None
    masks = local_masks(method.masks())
    budget = decay_budget(masks.items(), *schedule(optimizer, options), options.decay, world.sum)
    if not budget.reaches_zero and not options.ignore_decay_budget:
        raise InputError(f"{budget.explain()} (ignore_decay_budget trains anyway)")
    return budget
