"""`castlm.train` and `castlm.finetune`: a dense model becomes an n:m one, and an n:m one is fine-tuned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack, overload

from castlm.api.signature import with_keywords_of
from castlm.core.errors import InputError
from castlm.facts import Facts
from castlm.fields import choice
from castlm.keywords import FinetuneKeywords, TrainKeywords
from castlm.training.config import RECIPES, FinetuneConfig, TrainConfig


@dataclass
class RecipeOptions:
    """The values that the options of `castlm train` override."""

    recipe: str = choice("castlm", RECIPES)
    """Base values of all options. castlm: our defaults. paper: decay, learning rates, eta, batch and length as
    published for LLaMA2-7B, with Adam's usual betas.
    """


FOREIGN = {"train": ("adapter",), "finetune": ("method", "start")}
"""The sections of a config whose options a command does not read."""


def _own(config: type[TrainConfig], command: str) -> list[type[Any]]:
    return [kind for title, kind in config.sections().items() if title not in FOREIGN[command]]


TRAIN_OPTIONS: list[type[Any]] = [RecipeOptions, *_own(TrainConfig, "train")]
FINETUNE_OPTIONS = _own(FinetuneConfig, "finetune")
"""The dataclasses of the options of `train` and `finetune`."""


@overload
def train(model: TrainConfig) -> Facts: ...
@overload
def train(
    model: str | Path,
    dataset: str | Path | Sequence[str],
    output_dir: str | Path,
    **options: Unpack[TrainKeywords],
) -> Facts: ...
@with_keywords_of(*TRAIN_OPTIONS)
def train(
    model: str | Path | TrainConfig,
    dataset: str | Path | Sequence[str] | None = None,
    output_dir: str | Path | None = None,
    **options: Unpack[TrainKeywords],
) -> Facts:
    """Trains a dense model to an n:m sparse one, which is verified from the disk, in `output_dir/model`.

    Args:
        model: a Hugging Face folder, hub id, GGUF file, or "demo"; or a `TrainConfig` or `FinetuneConfig`, alone.
        dataset: the training text: a file, folder, glob or hub dataset; `castlm train --help` names the types of files.
            Several are mixed by weights, as in `["a.txt:0.7", "b.jsonl:0.3"]`.
        output_dir: a new folder for the run.
        options: as of `castlm train`: `pattern`, `max_steps`, `learning_rate`, `seq_len`, `resume` and about 90 others;
            `castlm train --help-all` describes them.

    Returns:
        The facts of the run, which are also the castlm.json of the result: `facts.perplexity.pruned` is its
        perplexity, and `facts.verdict.ok` is False if the run diverged or fell short.

    Raises:
        InputError: any error that the user can correct; no result is half-written.
        Interrupted: after Ctrl-C or SIGTERM during the steps; its message names the saved step and how to resume.

    Examples:
        >>> import castlm
        >>> facts = castlm.train("demo", "text.txt", "run", max_steps=60, seq_len=128)  # doctest: +SKIP
        >>> facts.perplexity.pruned  # doctest: +SKIP
        20.31
    """
    from castlm.training import train as loop  # imports torch

    if isinstance(model, TrainConfig):
        if dataset is not None or output_dir is not None or options:
            raise InputError("train takes a config alone, or a model, a dataset and an output_dir: give one of both")
        return loop.train(model)
    if dataset is None or output_dir is None:
        lacking = "dataset" if dataset is None else "output_dir"
        raise InputError(f"{lacking} is missing: train takes a model, a dataset and an output_dir")
    return loop.train(TrainConfig.of(model, dataset, output_dir, **options))


@with_keywords_of(*FINETUNE_OPTIONS)
def finetune(
    model: str | Path,
    dataset: str | Path | Sequence[str],
    output_dir: str | Path,
    **options: Unpack[FinetuneKeywords],
) -> Facts:
    """Fine-tunes an n:m sparse model. Every zero stays zero, and the result is verified, in `output_dir/model`.

    Args:
        model: an n:m sparse model: a folder, plain or packed, a run of `train`, or a hub id. The pattern is the one in
            its castlm.json, unless `pattern` names another.
        dataset: the training text, as for `train`; conversations count the assistant's tokens.
        output_dir: a new folder for the run.
        options: as of `castlm finetune`: `adapter`, `max_steps`, `learning_rate` and others.

    Returns:
        The facts of the run, as `train` returns them; `facts.perplexity.start` is that of the model before.

    Raises:
        InputError: as `train`, or a model that is dense.

    Examples:
        >>> import castlm
        >>> facts = castlm.finetune("run", "chats.jsonl", "tuned", adapter="shira")  # doctest: +SKIP
    """
    from castlm.training import train as loop  # imports torch

    return loop.train(of_recorded_pattern(FinetuneConfig.of(model, dataset, output_dir, **options)))


def of_recorded_pattern(config: TrainConfig) -> TrainConfig:
    """The config with the model's folder in place of its run, and the pattern in its castlm.json unless one is given.

    Raises:
        InputError: the demo model, or a castlm.json whose pattern left no zeros in the model.
    """
    from castlm.export.folder import pattern_of_files
    from castlm.models.locate import DEMO, result_folder

    model = result_folder(config.model.model)
    if model == DEMO:  # known before its 135M weights are read
        raise InputError(f"{DEMO} is a dense model: fine-tune the folder that castlm prune or castlm train makes of it")
    pattern = config.model.pattern
    if "pattern" not in config.given and (recorded := pattern_of_files(model)) is not None:
        pattern = recorded
    return config.changed(model=model, init_from=model, pattern=pattern)
