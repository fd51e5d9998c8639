"""The config of `castlm finetune`: that of a training run whose model is n:m sparse already and stays so."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from castlm.core.blocks import in_block
from castlm.core.errors import InputError
from castlm.export.folder import read_manifest
from castlm.export.verify import read_left_dense
from castlm.fields import essential, positional
from castlm.models.locate import cached_snapshot, locate
from castlm.training.config import TrainConfig, section_fields
from castlm.training.sections import MethodOptions, StartOptions

FULL_LEARNING_RATE, ADAPTER_LEARNING_RATE = 5e-5, 5e-4


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """Fine-tune an n:m sparse model on your text. Every zero of it stays zero, and the result is verified.

    The options are those of `TrainConfig`; the defaults are those of fine-tuning: no teacher, Adam's usual betas, a
    lower learning rate. `castlm.train` runs it.

    Raises:
        InputError: whatever `TrainConfig` refuses, and options that make it another kind of run.

    Examples:
        >>> config = FinetuneConfig("my-2of4-model", "text.jsonl", "run", adapter="shira", learning_rate=5e-4)
        >>> config.method, config.init_from, config.eta
        ('finetune', 'my-2of4-model', 0.0)
    """

    UNUSED: ClassVar[dict[str, str]] = {
        name: "train"
        for section in (MethodOptions, StartOptions)
        for name in section_fields(section)
        if name not in TrainConfig.UNUSED
    }
    """Options that have no effect here, which the command line leaves out, each with the command that reads it."""

    model: str = positional(essential=True)
    """n:m sparse causal LM: a folder, plain or packed, or a hub id. Its zeros are the mask."""

    pattern: str = field(default="2:4", kw_only=True)
    """Pattern that the model has, and keeps. On the command line the default is that of the model's castlm.json."""

    method: str = field(default="finetune", kw_only=True)
    """How the model is trained: with a fixed mask."""

    init_from: str | None = field(default=None, kw_only=True)
    """Start of the run: always the model itself."""

    eta: float = field(default=0.0, kw_only=True)
    """Weight of the KL divergence to the model before fine-tuning in the loss, 0 to 1. Above 0 the model stays closer
    to what it was."""

    adapter: Literal["none", "shira", "lora"] = essential("none")
    """What is trained. none: all weights that are not zero. shira, lora: a PEFT adapter that keeps every zero when it
    is merged; it is written to `output_dir/adapter` too."""

    learning_rate: float = essential(None)  # type: ignore[assignment]
    """Peak learning rate. The default is 5e-5, and 5e-4 for adapters."""

    adam_betas: tuple[float, float] = field(default=(0.9, 0.999), kw_only=True)
    """Decay rates of Adam's moments."""

    def __post_init__(self) -> None:
        if self.init_from is None:
            object.__setattr__(self, "init_from", self.model)
        if self.learning_rate is None:
            rate = FULL_LEARNING_RATE if self.adapter == "none" else ADAPTER_LEARNING_RATE
            object.__setattr__(self, "learning_rate", rate)
        super().__post_init__()
        if self.method != "finetune":
            raise InputError(f"method {self.method} does not fine-tune a sparse model: use castlm train, or finetune")
        if self.init_from != self.model:
            raise InputError(
                f"init_from {self.init_from}: fine-tuning starts from its model {self.model}; leave it out, or use "
                "castlm train"
            )


def _folder_of(config: TrainConfig) -> Path | None:
    """Where the files of the run's model are; None of a hub model that is not in the cache."""
    where = locate(config.model)
    return cached_snapshot(where.target, config.revision) if where.is_hub else Path(where.target)


def cut_of_source(config: TrainConfig) -> dict[str, Any]:
    """The entry "cut" of castlm.json, where units were cut out of the model that is fine-tuned; else nothing."""
    folder = _folder_of(config)
    cut = None if folder is None else read_manifest(folder).get("cut")
    return {} if cut is None else {"cut": cut}


def with_left_dense(config: TrainConfig) -> TrainConfig:
    """`config` with the layers in `left_dense` that its model's castlm.json says were left dense on purpose."""
    folder = _folder_of(config)
    if folder is None:
        return config
    found: list[str] = [
        name.removesuffix(".weight")
        for name, reason in read_left_dense(folder / "castlm.json").items()
        if in_block(name) and reason == "excluded by the filter"
    ]
    new: Any = tuple(dict.fromkeys([*config.left_dense, *found]))
    return dataclasses.replace(config, left_dense=new)
