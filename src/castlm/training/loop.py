"""train(): from a dense model to a verified n:m model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from castlm.core.errors import InputError
from castlm.distributed.world import DIAGNOSIS_S, close_world, init_world
from castlm.progress import note
from castlm.training.checkpoint import after_restart
from castlm.training.config import TrainConfig
from castlm.training.finish import finish, read_result
from castlm.training.interrupt import Interrupt
from castlm.training.lam import resolve_lam
from castlm.training.run import Run


def loop(run: Run, interrupt: Interrupt) -> None:
    """Steps a run to its end, with evaluations and checkpoints in between.

    Raises:
        Interrupted: a signal arrived; the run is saved.
    """
    config = run.config
    eval_steps = config.eval_steps or max(1, config.max_steps // 10)
    saved = run.progress.step if run.progress.step else -1
    if run.progress.step == 0:
        run.evaluate()
    while run.progress.step < config.max_steps:
        run.world.meet(f"step {run.progress.step + 1}")
        run.saver.finish_if_written()
        run.train_step()
        last = run.progress.step == config.max_steps
        if run.progress.step % eval_steps == 0 or last:
            run.evaluate()
        if config.save_steps and (run.progress.step % config.save_steps == 0 or last):
            run.save()
            saved = run.progress.step
        if run.world.any(interrupt.requested):
            if saved != run.progress.step:
                run.save()
            run.saver.finish()
            raise interrupt.stopped(run.progress.step, run.output_dir)
    run.cover_teacher_cache()
    run.saver.finish()


def train(config: TrainConfig) -> dict[str, Any]:
    """Runs `config` from its dense model to the proven result in `output_dir/model`.

    Returns:
        The record of the run, which is also the result's castlm.json.

    Raises:
        InputError: on anything the user can put right; nothing is half-written.
        Interrupted: after Ctrl-C or SIGTERM, with the run saved; its message says how to resume.
    """
    world = init_world(config.device, config.sharding, config.timeout_s)
    try:
        config = world.on_main(lambda: after_restart(config))
        finished = Path(config.output_dir) / "model"
        if world.on_main(lambda: config.resume and (finished / "castlm.json").is_file()):
            if world.is_main:
                note(f"{finished} is finished already")
            return world.on_main(lambda: read_result(finished))
        if config.lam == "auto":
            config = resolve_lam(config, world)
        run = Run(config, world)
        with run.telemetry, Interrupt() as interrupt:
            loop(run, interrupt)
            return finish(run.result())
    except RuntimeError as error:  # a collective that failed says which address went away, not which rank
        missing = world.missing(min(DIAGNOSIS_S, config.timeout_s))
        if not missing:
            raise
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{missing} hangs or is gone; torchrun --max-restarts starts it again ({reason})") from error
    finally:
        close_world(world)
