"""Options that have no effect in a run, and why. A run reports them instead of ignoring them without a word."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

from castlm.core.combined import is_structured
from castlm.core.decay import DECAYS
from castlm.core.pattern import Pattern
from castlm.data.documents import find_files
from castlm.fields import default_of, is_required
from castlm.methods.table import METHODS
from castlm.oneshot.options import CALIBRATED, BasisOptions, Refinements
from castlm.training.config import TrainConfig


class Effect(NamedTuple):
    """When an option has an effect."""

    when: Callable[[TrainConfig], bool]
    needs: str
    """The same in words, as the end of "... has an effect only with"."""


def _decays(config: TrainConfig) -> bool:
    return "decay" in METHODS[config.method].options


def _turns_axes(config: TrainConfig) -> bool:
    return config.start in CALIBRATED and not is_structured(Pattern.parse(config.pattern))


def _any_on_hub(datasets: Iterable[str]) -> bool:
    return any(find_files(dataset) is None for dataset in datasets)


def _splits_local_text(config: TrainConfig) -> bool:
    """Whether a fraction of a text is held out. Of a stream, whose length is not known, a number of documents is."""
    return config.eval_dataset is None and any(find_files(dataset) is not None for dataset in config.datasets)


EFFECTS: dict[str, Effect] = {
    "decay_end": Effect(lambda c: c.reads_decay_end, "a decay that ends before the run"),
    "lam": Effect(lambda c: _decays(c) and DECAYS[c.decay].needs_lam, "a decay that uses lam"),
    "ignore_decay_budget": Effect(lambda c: _decays(c) and DECAYS[c.decay].reduces, "a decay"),
    "lora_r": Effect(lambda c: c.adapter != "none", "adapter shira or lora"),
    "mask_interval": Effect(
        lambda c: c.method != "cast" or c.start == "magnitude" or c.starts_at_zero,
        "init_from magnitude, or an n:m pattern whose decay is horizon",
    ),
    "calibration_sequences": Effect(lambda c: c.start in CALIBRATED, f"init_from {' or '.join(CALIBRATED)}"),
    **dict.fromkeys(
        (field.name for field in dataclasses.fields(Refinements)),
        Effect(lambda c: c.start in CALIBRATED, "init_from sparsegpt"),
    ),
    "refit_iterations": Effect(
        lambda c: c.start in CALIBRATED, "init_from sparsegpt, or a structured pattern with a score that reads text"
    ),
    **dict.fromkeys(
        (field.name for field in dataclasses.fields(BasisOptions)),
        Effect(
            _turns_axes,
            "an n:m pattern from a calibrated start: init_from sparsegpt or wanda",
        ),
    ),
    "rotation_iterations": Effect(
        lambda c: _turns_axes(c) and c.rotates_values,
        "a rotation: rotate other than off, and an n:m pattern with init_from sparsegpt or wanda",
    ),
    "temperature": Effect(lambda c: c.eta > 0, "eta above 0"),
    "teacher_top_k": Effect(lambda c: c.eta > 0, "eta above 0"),
    "min_lr_ratio": Effect(lambda c: c.lr_scheduler_type != "constant", "a learning rate that falls"),
    "hub_model_id": Effect(lambda c: c.push_to_hub, "push_to_hub"),
    "hub_private_repo": Effect(lambda c: c.push_to_hub, "push_to_hub"),
    "dataset_split": Effect(lambda c: _any_on_hub(c.datasets), "a dataset of the hub"),
    "eval_fraction": Effect(
        _splits_local_text, "a held-out part of local text: no eval_dataset, and no stream of the hub"
    ),
    "eval_split": Effect(lambda c: _any_on_hub(c.eval_datasets), "an eval_dataset of the hub"),
    "eval_config": Effect(lambda c: c.eval_dataset is not None, "an eval_dataset"),
    "left_dense": Effect(lambda c: c.method != "dense", "a method that makes weights sparse"),
    "pattern": Effect(lambda c: c.method != "dense", "a method that makes weights sparse"),
    "save_total_limit": Effect(lambda c: c.save_steps > 0, "save_steps above 0"),
    "async_save": Effect(lambda c: c.save_steps > 0, "save_steps above 0"),
}
"""The options whose effect depends on others. Those of a method are in its row of `METHODS`."""

OF_CHAT = {
    "assistant_only_loss": "conversations, and the texts are plain",
    "chat_template_path": "conversations, and the texts are plain; the template is saved with the result",
}
"""The options whose effect depends on the texts."""


def without_effect(config: TrainConfig, has_chat: bool = True) -> dict[str, str]:
    """The options that were changed from their default and have no effect in this run, each with the reason.

    Args:
        has_chat: whether any text of the run holds conversations.

    Examples:
        >>> without_effect(TrainConfig("model", "text.jsonl", "run", eta=0.0, temperature=2.0))
        {'temperature': 'temperature = 2.0 has an effect only with eta above 0'}
    """
    found = {}
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if is_required(field) or value in (None, default_of(field)):
            continue
        readers = [method for method, row in METHODS.items() if name in row.options]
        if readers and config.method not in readers:
            found[name] = f"{name} = {value} has an effect only with method {' or '.join(readers)}"
        elif name in OF_CHAT and not has_chat:
            found[name] = f"{name} = {value} has an effect only with {OF_CHAT[name]}"
        elif name in EFFECTS and not EFFECTS[name].when(config):
            found[name] = f"{name} = {value} has an effect only with {EFFECTS[name].needs}"
    return found
