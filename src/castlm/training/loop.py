"""train(): from a dense model to a verified n:m model."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

from castlm.core.errors import InputError, is_out_of_memory
from castlm.distributed.world import DIAGNOSIS_S, World, closing, init_world, is_of_a_collective
from castlm.export.hub import check_login, push
from castlm.files.output import claimed
from castlm.progress import note
from castlm.training.config import TrainConfig
from castlm.training.finetune import with_left_dense
from castlm.training.finish import finish
from castlm.training.interrupt import Interrupt
from castlm.training.lam import resolve_lam
from castlm.training.run import Run
from castlm.training.run_folder import RunFolder, after_restart, check_shared
from castlm.training.setup import global_batch
from castlm.training.text import resolve_epochs
from castlm.training.verdict import problem


def loop(run: Run, interrupt: Interrupt) -> None:
    """Steps a run to its end, with evaluations and checkpoints in between.

    An error leaves the checkpoint that is being written whole, unless a single one of several ranks has it.

    Raises:
        Interrupted: a signal arrived, and the run is saved.
    """
    try:
        _take_steps(run, interrupt)
    except Exception:
        run.saver.finish_despite_error()
        raise
    run.saver.finish()
    run.cover_teacher_cache()


def _take_steps(run: Run, interrupt: Interrupt) -> None:
    config = run.config
    saved = run.progress.step if run.progress.step else -1
    if run.progress.step == 0:
        run.evaluate()
    while run.progress.step < config.max_steps:
        run.world.meet(f"step {run.progress.step + 1}")
        run.saver.finish_if_written()
        run.train_step()
        last = run.progress.step == config.max_steps
        if run.progress.step % config.eval_steps_used == 0 or last:
            run.evaluate()
        if config.save_steps and (run.progress.step % config.save_steps == 0 or last):
            run.save()
            saved = run.progress.step
        if run.world.any(interrupt.requested):
            if saved != run.progress.step:
                run.save()
            run.saver.finish()
            raise interrupt.stopped(run.progress.step, run.folder.path)


def train(config: TrainConfig) -> dict[str, Any]:
    """Runs `config` from its dense model to the verified result in `output_dir/model`.

    Returns:
        The record of the run, which is also the result's castlm.json.

    Raises:
        InputError: anything that the user can put right; nothing is half-written.
        Interrupted: after Ctrl-C or SIGTERM; its message says what is saved and how to resume.
    """
    with Interrupt() as interrupt, closing(init_world(config.device, config.sharding, config.timeout_s)) as world:
        try:
            config = world.on_main(lambda: after_restart(config))
            with contextlib.ExitStack() as stack:
                world.on_main(lambda: stack.enter_context(_claimed(config)) and None, beats=True)
                check_shared(RunFolder(config.output_dir).path, world)
                return _train(config, world, interrupt)
        except RuntimeError as error:  # a collective that failed says which address went away, not which rank
            if is_out_of_memory(error) or not is_of_a_collective(error):  # of this rank
                raise
            missing = world.missing(min(DIAGNOSIS_S, config.timeout_s))
            if not missing:
                raise
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"{missing} hangs or has ended; torchrun --max-restarts starts it again ({reason})"
            ) from error


def _claimed(config: TrainConfig) -> contextlib.AbstractContextManager[Path]:
    """The output folder, locked by the main rank for all."""
    inputs = {name: getattr(config, name) for name in ("model", "teacher_cache")}
    inputs |= {f"dataset {text}": text for text in config.datasets}
    inputs |= {f"eval_dataset {text}": text for text in config.eval_datasets}
    inputs["init_from"] = config.init_from
    return claimed(config.output_dir, "train", overwrite=config.overwrite, resume=config.resume, inputs=inputs)


def _train(config: TrainConfig, world: World, interrupt: Interrupt) -> dict[str, Any]:
    folder = RunFolder(config.output_dir)
    if config.push_to_hub:
        world.on_main(lambda: check_login(config.hub_repo))
    if config.is_finetuning:
        config = world.on_main(lambda: with_left_dense(config))
    if config.num_train_epochs is not None:
        config = resolve_epochs(config, world)
    if config.lam == "auto":
        config = resolve_lam(config, world)
    if world.on_main(lambda: config.resume and folder.is_finished()):
        record = world.on_main(lambda: folder.finished_record(config, global_batch(config, world)), beats=True)
        if world.is_main:
            note(f"{folder.model} is finished already")
    else:
        run = Run(config, world, before_writing=interrupt.start_training)
        with run.telemetry:
            loop(run, interrupt)
            interrupt.start_export()
            record = finish(run.result())
            world.on_main(folder.drop_replaced, beats=True)
    if config.push_to_hub:  # of a finished run too, which may have been stopped here
        _upload(config, folder.model, record, world)
    return record


def _upload(config: TrainConfig, model: Path, record: dict[str, Any], world: World) -> None:
    """Uploads the result, unless its verdict is that it is no use: a good one may be in the repository."""
    if wrong := problem(record.get("verdict", {})):
        if world.is_main:
            send = f"hf upload {config.hub_repo} {model}"
            note(f"not uploaded, because the run {wrong}; {send} sends the result nevertheless")
        return
    upload = functools.partial(push, model, config.hub_repo, private=config.hub_private_repo)
    url = world.on_main(upload, beats=True)
    if world.is_main:
        note(f"uploaded: {url}")
