"""What a training run consists of before its first step: folder, model, text, teacher, method, shards, optimizer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedModel

from castlm.baselines.retrain import METHODS, Retraining
from castlm.core.budget import decay_budget
from castlm.core.errors import InputError
from castlm.core.masks import pack_mask
from castlm.core.pattern import parse_pattern
from castlm.core.shards import like_rows, local
from castlm.core.sparsify import is_sparse_linear
from castlm.files import prepare_output_dir
from castlm.models import Loaded, check_head, load_model
from castlm.training.checkpoint import checkpoint_steps, read_manifest
from castlm.training.config import TrainConfig
from castlm.training.data import (
    BatchLoader,
    BlockStream,
    check_vocabulary,
    open_documents,
    split_documents,
    text_hash,
    token_ids,
)
from castlm.training.distributed import World, shard_
from castlm.training.evaluation import held_out_perplexity
from castlm.training.hardware import autocast, choose_fused, choose_precision, describe
from castlm.training.initial import start_, starting_weights
from castlm.training.objective import Objective, make_teacher
from castlm.training.schedule import schedule
from castlm.training.selfcheck import SelfCheck, masked_samples
from castlm.training.sharded import Checkpoint, check_one_snapshot, load_rows_, materialize_, open_sharded
from castlm.training.teacher_cache import TeacherCache


class Setup:
    """The parts of a run, made in the order in which they can go wrong."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config, self.world = config, world
        self.pattern = parse_pattern(config.pattern)
        self.output_dir = Path(config.output_dir)
        self.resume_from = self._claim_output_dir()
        self.loaded, self.stored = self._load()
        self.model: PreTrainedModel = self.loaded.model
        self._check_model()
        self._open_text()
        self.precision = choose_precision(config.precision, world.device, self.model.config)
        self._build(config, fresh=self.resume_from is None)
        self.facts = {
            "world_batch": self.world_batch,
            "dataset_sha256": self.train_hash,
            "eval_sha256": self.eval_hash,
            "precision_used": self.precision,
        }

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

    def _load(self) -> tuple[Loaded, Checkpoint | None]:
        """The model; among several ranks empty where that can be, to be filled with each rank's rows in `_build`."""
        config = self.config
        opened = open_sharded(config.model, **self._model_options) if self.world.mesh is not None else None
        found = (load_model(config.model, **self._model_options), None) if opened is None else opened
        check_one_snapshot(config.model, config.revision, self.world)
        return found

    def _check_model(self) -> None:
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest is not None and self.config.seq_len > longest:
            raise InputError(f"seq_len {self.config.seq_len} exceeds the model's {longest} positions: lower it")
        vocab = self.model.config.vocab_size
        if self.config.teacher_top_k > vocab:
            raise InputError(f"teacher_top_k {self.config.teacher_top_k} exceeds the model's {vocab} tokens: lower it")
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
        stream = BlockStream(
            documents, tokenizer, seq_len=config.seq_len, seed=config.seed, repeat=config.repeat_blocks
        )
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
        starts = fresh and config.initial_mask != "magnitude"
        start = starting_weights(self) if starts else {}
        teacher_dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        cache = self._open_teacher_cache()
        has_teacher = config.eta > 0 and not (cache and cache.complete)
        teacher = make_teacher(self.model, teacher_dtype) if has_teacher else None
        self.method: Retraining = method(self.model, config, self.pattern, self.is_sparse)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.objective = Objective(self.model, teacher, config.eta, config.temperature, config.teacher_top_k, cache)
        if self.stored is None:
            self.objective.to(self.world.device)
            shard_(self.objective, self.world, self.precision)
        else:
            self._fill(self.stored)
        if cache is not None:  # the model still has the weights of its teacher
            cache.claim(
                self.model, dtype=str(teacher_dtype), top_k=config.teacher_top_k, temperature=config.temperature
            )
        num_params = sum(p.numel() for p in self.model.parameters())
        fused, self.optimizer_text = choose_fused(config.fused_optimizer, self.world.device, num_params)
        self.optimizer = self.method.build_optimizer(self.model, fused)
        # of weights that are about to be replaced
        self.dense_perplexity = self.perplexity() if starts and self.method.mask_every is None else None
        if starts:
            start_(self.method, start, self.world)
        self.names = {param: name for name, param in self.model.named_parameters()}
        self.initial_masks = {self.names[p]: like_rows(pack_mask(local(m)), p) for p, m in self.method.masks().items()}
        self._check_decay_budget()
        watched = self.method.layers if self.method.decays else {}
        self.self_check = SelfCheck(self.optimizer, watched, self.pattern, config.log_steps, self.world)

    def _open_teacher_cache(self) -> TeacherCache | None:
        config = self.config
        if config.teacher_cache is None:
            return None
        cache = TeacherCache(
            config.teacher_cache, [self.train_hash, config.seed, config.seq_len, config.repeat_blocks], self.world
        )
        cache.complete = cache.covered() >= config.max_steps * self.world_batch
        return cache

    @property
    def world_batch(self) -> int:
        """Blocks of one step, on all ranks."""
        config = self.config
        return config.per_device_train_batch_size * config.gradient_accumulation_steps * self.world.size

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

    def whole_model(self) -> PreTrainedModel:
        """A copy of the model as it came, with all its weights, for one rank to work on."""
        if self.stored is None:
            return copy.deepcopy(self.model)
        return load_model(self.config.model, **self._model_options).model

    @property
    def _model_options(self) -> dict[str, Any]:
        return {"trust_remote_code": self.config.trust_remote_code, "revision": self.config.revision}

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

    def is_sparse(self, module: torch.nn.Module, fqn: str) -> bool:
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

    def introduction(self) -> Iterator[str]:
        """The lines that a run begins with."""
        config = self.config
        yield f"{self.loaded.source}: {describe(self.world, self.precision, self.optimizer_text)}"
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.method.left_dense.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            yield f"left dense: {shown} ({reason})"
        sparse = sum(layer.out_features * layer.in_features for layer in self.method.layers.values())
        total = sum(p.numel() for p in self.model.parameters())
        masks = f"{config.pattern} from {config.initial_mask}" if self.method.layers else "no masks"
        yield f"{config.method}: {sparse:,} of {total:,} weights in {len(self.method.layers)} layers, {masks}"
        if config.teacher_cache:
            here = "all of this run is there: no teacher is loaded" if self.objective.teacher is None else "kept there"
            yield f"teacher: its {config.teacher_top_k} most probable tokens, from {config.teacher_cache} ({here})"
        if self.budget is not None:
            yield self.budget.explain()
        if self.resume_from is not None:
            yield f"resuming {self.resume_from}"
