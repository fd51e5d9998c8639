"""train(): from a dense checkpoint to a proven n:m model. One optimizer step is one function, read top to bottom."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from castlm.core.errors import InputError
from castlm.core.shards import local
from castlm.core.update import decay_alpha
from castlm.progress import note
from castlm.training.checkpoint import (
    Saver,
    after_restart,
    check_same_run,
    checkpoint_steps,
    load_checkpoint,
    read_manifest,
)
from castlm.training.config import TrainConfig
from castlm.training.data import check_vocabulary
from castlm.training.distributed import DIAGNOSIS_S, World, close_world, init_world
from castlm.training.evaluation import mask_figures
from castlm.training.finish import finish, read_result
from castlm.training.hardware import autocast
from castlm.training.interrupt import Interrupt
from castlm.training.objective import pruned
from castlm.training.schedule import learning_rate
from castlm.training.setup import Setup
from castlm.training.telemetry import Telemetry


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
            from castlm.training.calibrate import resolve_lam  # which runs a Run of its own

            config = resolve_lam(config, world)
        run = Run(config, world)
        with run.telemetry, Interrupt() as interrupt:
            run.loop(interrupt)
            return finish(run)
    except RuntimeError as error:  # a collective that failed says which address went away, not which rank
        missing = world.missing(min(DIAGNOSIS_S, config.timeout_s))
        if not missing:
            raise
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{missing} hangs or is gone; torchrun --max-restarts starts it again ({reason})") from error
    finally:
        close_world(world)


class Run(Setup):
    """A run at work: how far it is, one step, evaluation, checkpoints."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        super().__init__(config, world)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.figures: dict[str, dict[str, float]] = {}  # evaluations by step
        if self.resume_from is not None:
            self._restore(self.resume_from)
        else:
            world.on_main(self._start_fresh)
        self.first_step = self.step
        self.telemetry = Telemetry(
            self.output_dir,
            config.max_steps,
            is_main=world.is_main,
            start_step=self.step,
            tensorboard=config.tensorboard,
        )
        self.saver = Saver(
            self.output_dir / "checkpoints",
            config.save_total_limit,
            world,
            background=config.async_save,
            say=self.telemetry.say,
        )
        for line in self.introduction():
            self.telemetry.say(line)

    def _start_fresh(self) -> None:
        for entry in self.output_dir.iterdir():  # only what `overwrite` allows is still here
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        (self.output_dir / "config.yaml").write_text(self.config.as_yaml(), encoding="utf-8")

    def loop(self, interrupt: Interrupt) -> None:
        config = self.config
        eval_steps = config.eval_steps or max(1, config.max_steps // 10)
        saved = self.step if self.step else -1
        if self.step == 0:
            self.evaluate()
        while self.step < config.max_steps:
            self.world.meet(f"step {self.step + 1}")
            self.saver.finish_if_written()
            self.train_step()
            last = self.step == config.max_steps
            if self.step % eval_steps == 0 or last:
                self.evaluate()
            if config.save_steps and (self.step % config.save_steps == 0 or last):
                self.save()
                saved = self.step
            if self.world.any(interrupt.requested):
                if saved != self.step:
                    self.save()
                self.saver.finish()
                raise interrupt.stopped(self.step, self.output_dir)
        self._note_teaching()
        self.saver.finish()

    def train_step(self) -> None:
        config, optimizer, started = self.config, self.optimizer, time.perf_counter()
        seed = np.random.SeedSequence([config.seed, self.step, self.world.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))  # of the step, so that no generator's state has to be saved
        lr = learning_rate(self.step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr

        micro_batches = [next(self.loader) for _ in range(config.gradient_accumulation_steps)]
        check_vocabulary(torch.stack([b["input_ids"] for b in micro_batches]), self.model.config.vocab_size)
        real_tokens = torch.tensor(sum(int((b["labels"] != -100).sum()) for b in micro_batches))
        num_tokens = self.world.sum(real_tokens.to(self.world.device))

        self.method.before_forward(self.step)
        self.objective.train()
        if self.objective.teacher is not None:
            self.objective.teacher.eval()
        sums = torch.zeros(3, device=self.world.device)
        for batch in micro_batches:
            with autocast(self.world.device, self.precision):
                loss = self.objective(
                    batch["input_ids"].to(self.world.device), batch["labels"].to(self.world.device), num_tokens
                )
            (loss.loss * self.world.size).backward()  # FSDP averages over ranks; the loss is normalised already
            sums += torch.stack(loss).detach().float()
        total, ce, kl = self.world.sum(sums).tolist()
        grad_norm = self._clip()
        if not np.isfinite([total, grad_norm]).all():
            self.saver.finish()
            raise InputError(self._diverged(total, grad_norm))
        self.method.before_update(self.step)
        with self.self_check.around_step(self.step, self.method.mask_interval):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        alpha = decay_alpha(self.step, config.max_steps, config.decay, config.decay_end) if self.method.decays else None
        self.step += 1
        self.tokens += int(num_tokens)
        took = time.perf_counter() - started
        self.seconds += took
        values = {"loss": total, "ce": ce, "kl": kl, "lr": lr, "grad_norm": grad_norm, "tokens": self.tokens}
        values |= {} if alpha is None else {"alpha": alpha}
        values |= {"tokens_per_s": int(num_tokens) / took}
        values |= {"eta_s": self.seconds / self.step * (config.max_steps - self.step)}
        self.telemetry.log(self.step, values, write=self.step % config.log_steps == 0)

    def _clip(self) -> float:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.max_grad_norm, norm)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _diverged(self, loss: float, grad_norm: float) -> str:
        whole = checkpoint_steps(self.output_dir / "checkpoints")
        last = f"the last good checkpoint is {whole[max(whole)]}" if whole else "there is no checkpoint yet"
        return (
            f"step {self.step + 1}: the loss is {loss} and the gradient norm {grad_norm}; {last}; "
            "lower learning_rate or look at the data"
        )

    # ------------------------------------------------------------------ evaluation and checkpoints

    def evaluate(self) -> None:
        """Perplexity of the forward pass as it is, and of the model as the prune would leave it now."""
        values = {"tokens": self.tokens, "perplexity": self.perplexity()}
        masks = self.local_masks()
        if masks:
            with pruned(masks):
                values["prune_now_ppl"] = self.perplexity()
            initial = [local(mask) for mask in self.initial_masks.values()]  # in the order of `masks`
            values |= mask_figures(masks, initial, self.method.flips(), self.world)
        if self.step == 0 and self.dense_perplexity is not None:
            values["dense_ppl"] = self.dense_perplexity
        self.figures[str(self.step)] = values
        self.telemetry.evaluated(self.step, values)

    def tensors(self) -> dict[str, Any]:
        """All tensors of a checkpoint, by name, as views: loading fills them in place."""
        state = {name: self.optimizer.state[param] for param, name in self.names.items()}
        weights = {name: param.detach() for param, name in self.names.items()}
        return {
            "model": weights,
            "optimizer": state,
            "method": self.method.tensors(),
            "initial_masks": self.initial_masks,
        }

    def save(self) -> None:
        flips = torch.tensor(float(self.method.flips()), device=self.world.device, dtype=torch.float64)
        manifest = {
            "config": self.config.as_dict(),
            "facts": self.facts,
            "data": self.loader.state_dict(),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "figures": self.figures,
            "flips": int(self.world.sum(flips)) // self.world.num_replicas,
        }
        self.saver.save(self.step, self.tensors(), manifest)
        self._note_teaching()

    def _note_teaching(self) -> None:
        if self.objective.cache is not None:
            self.objective.cache.cover(self.first_step * self.world_batch, self.step * self.world_batch)

    def _restore(self, path: Path) -> None:
        check_same_run(read_manifest(path), self.config.as_dict(), self.facts)
        manifest = load_checkpoint(path, self.tensors(), self.world)
        self.loader.load_state_dict(manifest["data"])
        self.step, self.tokens, self.seconds = manifest["step"], manifest["tokens"], manifest["seconds"]
        self.figures = manifest["figures"]
        first_shard = self.world.shard_index == 0  # one rank of each replica says what all of them changed
        self.method.restore_flips(manifest["flips"] if first_shard else 0)
