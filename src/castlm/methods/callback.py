"""CAST in `transformers.Trainer` and in Trainers made from it, such as TRL's SFTTrainer.

A callback parametrizes the model with weight scaling, names the optimizer, and prunes and folds at the end. For one
process and for DDP; `castlm train` adds distillation, a start, sharding, exact resume and verification.
"""

from __future__ import annotations

import os
import types
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import ParallelMode

from castlm.core.adams import AdamS
from castlm.core.errors import InputError
from castlm.core.nm import Pattern, parse_pattern
from castlm.core.scaling import add_weight_scaling, fold_weight_scaling
from castlm.core.sparsify import FilterFn, is_sparse_linear, prune_, sparse_param_groups


class CastCallback(TrainerCallback):
    """Makes a model n:m sparse in a `Trainer`: give it as a callback, and its `optimizer` as the optimizer.

    When training ends, before anything is saved, the model is pruned with the last masks and its weight scaling is
    folded: it is a plain model then. A start by `castlm.prune_oneshot_` before gives better masks than the magnitude.

    Args:
        model: in fp32, with `bf16=True` in `args` for speed; it gets weight scaling.
        args: the arguments of the Trainer: `max_steps`, `learning_rate`, `adam_beta1`, `adam_beta2`, `adam_epsilon` and
            `weight_decay` are the optimizer's.
        pattern: n:m, as "2:4".
        filter_fn: as in `castlm.sparse_linears`.
        scale_groups: scale factors of a row; 0 leaves weight scaling out.
        adams: further options of `castlm.AdamS`, as `{"decay_end": 0.3}`.

    Raises:
        InputError: DeepSpeed, FSDP, `load_best_model_at_end`, no `max_steps`, or a model without layers for the
            pattern.

    Examples::

        cast = castlm.CastCallback(model, args, pattern="2:4")
        trainer = trl.SFTTrainer(
            model, args, train_dataset=data, callbacks=[cast], optimizer_cls_and_kwargs=cast.optimizer
        )
        trainer.train()
        trainer.save_model("sparse")
        castlm.verify("sparse").ok
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        pattern: Pattern | str = "2:4",
        filter_fn: FilterFn = is_sparse_linear,
        scale_groups: int = 2,
        adams: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> None:
        _refuse_what_breaks_the_masks(args)
        self.pattern, self.filter_fn = parse_pattern(pattern), filter_fn
        self._model, self._args, self._adams = model, args, adams
        if scale_groups:
            add_weight_scaling(model, scale_groups, pattern=self.pattern, filter_fn=filter_fn)

    @property
    def optimizer(self) -> tuple[type[AdamS], dict[str, Any]]:
        """AdamS and its arguments, for `optimizer_cls_and_kwargs` of a Trainer."""
        args, groups = self._args, []
        for group in sparse_param_groups(self._model, self.pattern, self.filter_fn):
            if group["sparse"]:
                groups.append(group)
                continue
            named = list(zip(group["param_names"], group["params"]))
            for is_matrix in (True, False):  # as in transformers, norms, biases and scales are not decayed
                part = [(n, p) for n, p in named if is_matrix == (p.dim() > 1 and "parametrizations" not in n)]
                params, names = [p for _, p in part], [n for n, _ in part]
                decay = args.weight_decay if is_matrix else 0.0
                if part:
                    groups.append({"params": params, "param_names": names, "sparse": False, "weight_decay": decay})
        options = {
            "params": groups,
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "total_steps": args.max_steps,
        }
        return AdamS, {**options, **self._adams}

    def on_train_begin(self, *_: Any, **parts: Any) -> None:
        """Checks that the Trainer has taken the optimizer."""
        self._adams_of(parts["optimizer"])

    def on_train_end(self, *_: Any, **parts: Any) -> None:
        """Prunes with the last masks and folds the weight scaling."""
        masks = self._adams_of(parts["optimizer"]).masks()
        prune_(self._model, self.pattern, masks=masks, filter_fn=self.filter_fn)
        fold_weight_scaling(self._model)

    @staticmethod
    def _adams_of(optimizer: Any) -> AdamS:
        """The AdamS in an optimizer that accelerate may have wrapped."""
        found = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(found, AdamS):
            raise InputError(
                f"the Trainer trains by {type(found).__name__}: pass optimizer_cls_and_kwargs=callback.optimizer"
            )
        return found


class CastTrainer(Trainer):
    """A `transformers.Trainer` that makes its model n:m sparse; see `CastCallback` for what it takes and raises.

    Args:
        options: of `CastCallback`, such as `pattern`, and of `Trainer`, such as `train_dataset`.

    Examples::

        trainer = castlm.CastTrainer(model, args, pattern="2:4", train_dataset=data)
        trainer.train()
        trainer.save_model("sparse")
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        pattern: Pattern | str = "2:4",
        filter_fn: FilterFn = is_sparse_linear,
        scale_groups: int = 2,
        adams: Mapping[str, Any] = types.MappingProxyType({}),
        callbacks: Sequence[TrainerCallback] | None = None,
        **options: Any,
    ) -> None:
        cast = CastCallback(model, args, pattern=pattern, filter_fn=filter_fn, scale_groups=scale_groups, adams=adams)
        options["optimizer_cls_and_kwargs"] = cast.optimizer
        super().__init__(model, args, callbacks=[cast, *(callbacks or [])], **options)


def _refuse_what_breaks_the_masks(args: TrainingArguments) -> None:
    """Raises `InputError` where Trainer would silently train something other than CAST."""
    launched = {name for name in ("DEEPSPEED", "FSDP") if os.environ.get(f"ACCELERATE_USE_{name}", "false") == "true"}
    if args.deepspeed or "DEEPSPEED" in launched:
        raise InputError("DeepSpeed hands the optimizer flat slices of the weights, which cuts groups apart: use DDP")
    if args.fsdp or "FSDP" in launched:
        raise InputError(
            "FSDP1 flattens the weights, which cuts groups apart, and on a CPU Trainer silently replaces FSDP by DDP: "
            "use DDP, or torchrun -m castlm train, which shards rows"
        )
    if args.load_best_model_at_end:
        raise InputError("load_best_model_at_end would prune it with the masks of the last step: turn it off")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise InputError("Trainer would train a separate model in each process: on a CPU, torchrun needs use_cpu=True")
    if args.max_steps < 1:
        raise InputError("set max_steps: the number of steps is part of the method")
