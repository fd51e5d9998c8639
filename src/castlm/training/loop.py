"""train(): from a dense checkpoint to a proven n:m model. One optimizer step is one function, read top to bottom."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedModel

from castlm.baselines.retrain import METHODS, Retraining
from castlm.core.adams import decay_alpha
from castlm.core.budget import decay_budget
from castlm.core.errors import InputError
from castlm.core.masks import pack_mask
from castlm.core.pattern import parse_pattern
from castlm.core.shards import like_rows, local
from castlm.core.sparsify import is_sparse_linear
from castlm.files import prepare_output_dir
from castlm.models import Loaded, check_head, load_model
from castlm.training.checkpoint import (
    Saver,
    after_restart,
    check_same_run,
    checkpoint_steps,
    load_checkpoint,
    read_manifest,
)
from castlm.training.config import TrainConfig, learning_rate
from castlm.training.data import (
    BatchLoader,
    BlockStream,
    check_vocabulary,
    open_documents,
    split_documents,
    text_hash,
    token_ids,
)
from castlm.training.distributed import DIAGNOSIS_S, World, close_world, init_world, shard_
from castlm.training.evaluation import held_out_perplexity, mask_figures
from castlm.training.finish import finish, read_result
from castlm.training.hardware import autocast, can_compile, choose_precision, describe
from castlm.training.initial import oneshot_weights, start_from_
from castlm.training.interrupt import Interrupt
from castlm.training.objective import Objective, make_teacher, pruned
from castlm.training.selfcheck import SelfCheck, masked_samples
from castlm.training.sharded import Checkpoint, check_one_snapshot, load_rows_, materialize_, open_sharded
from castlm.training.telemetry import Telemetry, warn


def schedule(config: TrainConfig) -> tuple[list[float], list[float]]:
    """The learning rate and the ramp of the decay at each step of a run."""
    steps = range(config.max_steps)
    alphas = [decay_alpha(t, config.max_steps, config.decay, config.decay_end) for t in steps]
    return [learning_rate(t, config) for t in steps], alphas


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
                warn(f"{finished} is finished already")
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


class Run:
    """Everything a training run consists of, made in the order in which it can go wrong."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config, self.world = config, world
        self.pattern = parse_pattern(config.pattern)
        self.output_dir = Path(config.output_dir)
        resume_from = self._claim_output_dir()
        self.loaded, self.stored = self._load()
        self.model: PreTrainedModel = self.loaded.model
        self._check_model()
        self._open_text()
        fresh = resume_from is None
        self.precision = choose_precision(config.precision, world.device, self.model.config)
        self._build(config, fresh)
        self.facts = {
            "world_batch": config.per_device_train_batch_size * config.gradient_accumulation_steps * world.size,
            "dataset_sha256": self.train_hash,
            "eval_sha256": self.eval_hash,
            "precision_used": self.precision,
        }
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.figures: dict[str, dict[str, float]] = {}  # evaluations by step
        if resume_from is not None:
            self._restore(resume_from)
        else:
            world.on_main(self._start_fresh)
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
        self._announce(resume_from)

    def _load(self) -> tuple[Loaded, Checkpoint | None]:
        """The model; among several ranks empty where that can be, to be filled with each rank's rows in `_build`."""
        config = self.config
        options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "revision": config.revision}
        opened = open_sharded(config.model, **options) if self.world.mesh is not None else None
        found = (load_model(config.model, **options), None) if opened is None else opened
        check_one_snapshot(config.model, config.revision, self.world)
        return found

    def _claim_output_dir(self) -> Path | None:
        """The checkpoint to resume from; else makes sure that the output folder may be written."""
        if self.config.resume:
            return self.world.on_main(self._newest_checkpoint)
        self.world.on_main(lambda: prepare_output_dir(self.output_dir, self.config.overwrite))
        return None

    def _newest_checkpoint(self) -> Path:
        whole = checkpoint_steps(self.output_dir / "checkpoints")
        if not whole:
            raise InputError(f"{self.output_dir} holds no whole checkpoint: start it without resume")
        path = whole[max(whole)]
        model = read_manifest(path)["config"]["model"]
        if model != self.config.model:
            raise InputError(f"{path} is of the model {model}, not {self.config.model}: use that one")
        return path

    def _start_fresh(self) -> None:
        for entry in self.output_dir.iterdir():  # only what `overwrite` allows is still here
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        (self.output_dir / "config.yaml").write_text(self.config.as_yaml(), encoding="utf-8")

    def _check_model(self) -> None:
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest is not None and self.config.seq_len > longest:
            raise InputError(f"seq_len {self.config.seq_len} exceeds the model's {longest} positions: lower it")
        if self.stored is None:
            check_head(self.model)

    def _open_text(self) -> None:
        config = self.config
        documents = open_documents(
            config.dataset, column=config.column, split=config.dataset_split, data_config=config.dataset_config
        )
        if config.eval_dataset is None:
            documents, held_out = split_documents(documents, config.eval_fraction, config.seed)
        else:
            held_out = open_documents(config.eval_dataset, column=config.column)
        self.documents = documents
        self.train_hash, self.eval_hash = text_hash(documents), text_hash(held_out)
        tokenizer = self.loaded.tokenizer
        stream = BlockStream(documents, tokenizer, seq_len=config.seq_len, seed=config.seed)
        self.loader = BatchLoader(
            stream,
            rows_per_rank=config.per_device_train_batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
            prefetch=config.prefetch,
        )
        self.eval_ids = token_ids(held_out, tokenizer, limit=config.eval_tokens or None)
        if len(self.eval_ids) < 2:
            raise InputError(f"the evaluation text {held_out.name} has {len(self.eval_ids)} tokens: give more")
        check_vocabulary(self.eval_ids, self.model.config.vocab_size)

    def _build(self, config: TrainConfig, fresh: bool) -> None:
        """Teacher, method, sharding, optimizer, in this order: parametrize first, then shard, then the state."""
        method = METHODS[config.method]
        if self.world.size > 1 and method.mask_every is not None:
            raise InputError(f"method {config.method} masks whole weights in the forward pass: run it in one process")
        start = self._oneshot_start() if fresh and config.initial_mask != "magnitude" else {}
        teacher_dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        teacher = make_teacher(self.model, teacher_dtype) if config.eta > 0 else None
        self.method: Retraining = method(self.model, config, self.pattern, self._is_sparse)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.objective = Objective(self.model, teacher, config.eta, config.temperature)
        if self.stored is None:
            self.objective.to(self.world.device)
            shard_(self.objective, self.world, self.precision)
        else:
            self._fill(self.stored)
        num_params = sum(p.numel() for p in self.model.parameters())
        wanted = config.compile_optimizer == "on" or (config.compile_optimizer == "auto" and num_params >= 10_000_000)
        self.compiled = wanted and can_compile(self.world.device, required=config.compile_optimizer == "on")
        self.optimizer = self.method.build_optimizer(self.model, self.compiled)
        start_from_(self.method.layers, self.optimizer, start)
        self.names = {param: name for name, param in self.model.named_parameters()}
        self.initial_masks = {self.names[p]: like_rows(pack_mask(local(m)), p) for p, m in self.method.masks().items()}
        self._check_decay_budget()
        watched = self.method.layers if self.method.decays else {}
        self.self_check = SelfCheck(self.optimizer, watched, self.pattern, config.log_steps, self.world)

    def _oneshot_start(self) -> dict[str, Tensor]:
        config = self.config
        if self.world.size > 1:
            raise InputError(f"initial_mask {config.initial_mask} prunes a whole model first: run it in one process")
        self.model.to(self.world.device)
        return oneshot_weights(self.model, config, self.pattern, self._is_sparse, self.documents, self.loaded.tokenizer)

    def _fill(self, stored: Checkpoint) -> None:
        shard_(self.objective, self.world, self.precision)
        materialize_(self.objective, self.world.device)
        load_rows_(self.model, stored, self.world)
        if self.objective.teacher is not None:
            load_rows_(self.objective.teacher, stored, self.world)
        register_fsdp_forward_method(self.objective, "prove_head")
        with autocast(self.world.device, self.precision):  # what is gathered in bf16 multiplies nothing else
            self.objective.prove_head()
        self.objective.reshard()  # else the root goes on with these weights after a checkpoint is loaded

    def _is_sparse(self, module: torch.nn.Module, fqn: str) -> bool:
        return is_sparse_linear(module, fqn) and not any(part in fqn for part in self.config.left_dense)

    def _check_decay_budget(self) -> None:
        config = self.config
        if not self.method.decays or config.decay == "none":
            self.budget = None
            return
        weights = masked_samples(self.local_masks(), self.world)
        self.budget = decay_budget(weights, *schedule(config), config.decay)
        if not self.budget.reaches_zero and not config.ignore_decay_budget:
            raise InputError(f"{self.budget.explain()} (ignore_decay_budget runs it all the same)")

    def local_masks(self) -> dict[Tensor, Tensor]:
        """This rank's part of every sparse weight, with its mask."""
        return {local(p.data): local(mask) for p, mask in self.method.masks().items()}

    def _announce(self, resume_from: Path | None) -> None:
        say, config = self.telemetry.say, self.config
        say(f"{self.loaded.source}: {describe(self.world, self.precision, self.compiled)}")
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.method.left_dense.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            say(f"left dense: {shown} ({reason})")
        sparse = sum(layer.out_features * layer.in_features for layer in self.method.layers.values())
        total = sum(p.numel() for p in self.model.parameters())
        say(f"{config.method}: {sparse:,} of {total:,} weights in {len(self.method.layers)} layers, {config.pattern}")
        if self.budget is not None:
            say(self.budget.explain())
        if resume_from is not None:
            say(f"resuming {resume_from}")

    # ------------------------------------------------------------------ the loop

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
        self.figures[str(self.step)] = values
        self.telemetry.evaluated(self.step, values)

    def perplexity(self) -> float:
        config = self.config
        return held_out_perplexity(
            self.objective,
            self.eval_ids,
            seq_len=config.seq_len,
            batch=config.per_device_train_batch_size,
            precision=self.precision,
            world=self.world,
        )

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

    def _restore(self, path: Path) -> None:
        check_same_run(read_manifest(path), self.config.as_dict(), self.facts)
        manifest = load_checkpoint(path, self.tensors(), self.world)
        self.loader.load_state_dict(manifest["data"])
        self.step, self.tokens, self.seconds = manifest["step"], manifest["tokens"], manifest["seconds"]
        self.figures = manifest["figures"]
        first_shard = self.world.shard_index == 0  # one rank of each replica says what all of them changed
        self.method.restore_flips(manifest["flips"] if first_shard else 0)
