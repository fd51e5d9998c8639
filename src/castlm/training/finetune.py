"""The config of `castlm finetune`: trains a model that is already n:m sparse, and keeps its zeros."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from castlm.core.blocks import in_block
from castlm.core.errors import InputError
from castlm.core.nm import NM, Pattern
from castlm.export.folder import read_left_dense, read_manifest
from castlm.fields import essential, parsed, positional
from castlm.methods.options import MethodOptions, OptimizerOptions
from castlm.models.locate import cached_snapshot, locate
from castlm.patterns import parse_pattern
from castlm.training.config import TrainConfig
from castlm.training.options import ModelOptions, TeacherOptions

FULL_LEARNING_RATE, ADAPTER_LEARNING_RATE = 5e-5, 5e-4


@dataclass(frozen=True)
class SparseModelOptions(ModelOptions):
    """The sparse model that is fine-tuned."""

    model: str = positional(essential=True)
    """n:m sparse causal LM: a folder, plain or packed, or a hub id. Its zeros become the mask."""

    pattern: Pattern = parsed(NM(2, 4), parse_pattern)
    """Pattern of the model, which stays. On the command line, the default is the pattern in the model's castlm.json."""


@dataclass(frozen=True, kw_only=True)
class FixedMaskOptions(MethodOptions):
    """The method of fine-tuning: a fixed mask."""

    method: str = "finetune"


@dataclass(frozen=True, kw_only=True)
class FinetuneTeacherOptions(TeacherOptions):
    """Distillation from the model before fine-tuning, or from another one."""

    eta: float = 0.0
    """Weight in the loss of the KL divergence to the teacher, by default the model before fine-tuning, 0 to 1. Above 0,
    the model stays closer to it."""


@dataclass(frozen=True, kw_only=True)
class FinetuneOptimizerOptions(OptimizerOptions):
    """Optimizer, schedule and batch of fine-tuning."""

    learning_rate: float | None = essential(None)  # type: ignore[assignment]
    """Peak learning rate. The default is 5e-5, and 5e-4 for adapters."""

    adam_betas: tuple[float, float] = field(default=(0.9, 0.999), kw_only=True)
    """Decay rates of Adam's moments."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Fine-tune an n:m sparse model on your text. Every zero stays zero, and the result is verified.

    It has the options of `TrainConfig` with some other defaults: no teacher, Adam's usual betas, a lower learning rate.
    `castlm.train` runs it.

    Raises:
        InputError: as `TrainConfig`, and for options that make it another kind of run.

    Examples:
        >>> config = FinetuneConfig.of("my-2of4-model", "text.jsonl", "run", adapter="shira")
        >>> config.method.method, config.start.init_from, config.teacher.eta, config.optimizer.learning_rate
        ('finetune', 'my-2of4-model', 0.0, 0.0005)
    """

    model: SparseModelOptions
    method: FixedMaskOptions
    teacher: FinetuneTeacherOptions
    optimizer: FinetuneOptimizerOptions

    def _fill_in(self) -> None:
        if self.start.init_from is None:
            object.__setattr__(self, "start", dataclasses.replace(self.start, init_from=self.model.model))
        if self.optimizer.learning_rate is None:
            rate = FULL_LEARNING_RATE if self.adapter.adapter == "none" else ADAPTER_LEARNING_RATE
            object.__setattr__(self, "optimizer", dataclasses.replace(self.optimizer, learning_rate=rate))
        super()._fill_in()

    def _check(self) -> None:
        if not self.method.row.keeps_mask:
            raise InputError(f"method {self.method.method} does not fine-tune a sparse model: use castlm train")
        if not self.is_finetuning:
            raise InputError(
                f"init_from {self.start.init_from}: fine-tuning starts from its model {self.model.model}; omit "
                "init_from, or use castlm train"
            )
        super()._check()


def _folder_of(model: ModelOptions) -> Path | None:
    """The folder with the files of a model; None for a hub model that is not in the cache."""
    where = locate(model.model)
    return cached_snapshot(where.target, model.revision) if where.is_hub else Path(where.target)


def cut_of_source(model: ModelOptions) -> dict[str, Any]:
    """The entry "cut" of the model's castlm.json, if channels or heads were cut out of it; else empty."""
    folder = _folder_of(model)
    cut = None if folder is None else read_manifest(folder).get("cut")
    return {} if cut is None else {"cut": cut}


def layers_left_dense(model: ModelOptions) -> tuple[str, ...]:
    """`left_dense`, plus the layers that the model's castlm.json lists as left dense on purpose."""
    folder = _folder_of(model)
    if folder is None:
        return model.left_dense
    found: list[str] = [
        name.removesuffix(".weight")
        for name, reason in read_left_dense(folder).items()
        if in_block(name) and reason == "excluded by the filter"
    ]
    return tuple(dict.fromkeys([*model.left_dense, *found]))
