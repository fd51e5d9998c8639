"""The settings of a run that the table shows: its start and its effective options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from castlm.compare.presets import ONESHOT
from castlm.methods.table import METHODS
from castlm.training.config import WITHOUT_EFFECT, TrainConfig
from castlm.training.options import StartOptions

SHOWN_ELSEWHERE = {"method", "seed", "learning_rate", "init_from", "max_steps", "eval_steps", "model", "revision"}
SHOWN_ELSEWHERE |= {"dataset", "eval_dataset", "calibration"}
START_OPTIONS = {option.name for option in fields(StartOptions)}
"""Options that distinguish starts of the same name."""


def start_of(config: Mapping[str, Any]) -> str:
    """The start of a run: "dense", a one-shot method, or the name of a model folder."""
    method = str(config["method"])
    if method in ONESHOT or METHODS[method].starts_dense:
        return "dense"
    return Path(str(config.get("init_from") or "")).name


def options_of(variants: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The options by variant: those of its method, and all in which the trained variants differ.

    Args:
        variants: all fields of one run of each variant, except the output folder.
    """
    trained = [config for config in variants.values() if config["method"] not in ONESHOT]
    names = {name for config in trained for name in config} - SHOWN_ELSEWHERE - WITHOUT_EFFECT
    of_methods = {name for method in METHODS.values() for name in method.options}
    differing = [name for name in sorted(names - of_methods) if len({str(config.get(name)) for config in trained}) > 1]
    return {variant: _options(config, differing) for variant, config in variants.items()}


def _options(config: Mapping[str, Any], differing: list[str]) -> dict[str, Any]:
    method = str(config["method"])
    if method in ONESHOT:
        return {} if method == "magnitude" else {"num_sequences": config.get("num_sequences")}
    run = TrainConfig.from_mapping({**config, "output_dir": method})  # which no effect depends on
    own = [name for name in METHODS[method].options if run.needs(name) is None]
    return {name: config[name] for name in (*own, *differing) if config.get(name) is not None}


def options_text(options: Mapping[str, Any]) -> str:
    """Options as text for a table: "decay horizon, scale_groups 2"."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in options.items()
    )
