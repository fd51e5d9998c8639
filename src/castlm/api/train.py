"""`castlm.train` and `castlm.finetune`: a dense model becomes an n:m one, and an n:m one is fine-tuned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castlm.api.objects import Objects, Result
from castlm.api.signature import with_keywords_of
from castlm.core.errors import InputError
from castlm.fields import choice
from castlm.training.config import RECIPES, FinetuneConfig, TrainConfig

if TYPE_CHECKING:  # they import torch
    from transformers import PreTrainedTokenizerBase

    from castlm.api.objects import Model, Text


@dataclass
class RecipeOptions:
    """The values that the options of `castlm train` override."""

    recipe: str = choice(
        "castlm",
        RECIPES,
        help="Base values of all options. castlm: our defaults. paper: decay, learning rates, eta, batch and "
        "length as published for LLaMA2-7B, with Adam's usual betas.",
    )


FOREIGN = {"train": ("adapter",), "finetune": ("method", "start")}
"""The sections of a config whose options a command does not read."""


def _own(config: type[TrainConfig], command: str) -> list[type[Any]]:
    return [kind for title, kind in config.sections().items() if title not in FOREIGN[command]]


TRAIN_OPTIONS: list[type[Any]] = [RecipeOptions, *_own(TrainConfig, "train")]
FINETUNE_OPTIONS = _own(FinetuneConfig, "finetune")
"""The dataclasses of the options of `train` and `finetune`."""


@with_keywords_of(*TRAIN_OPTIONS)
def train(
    model: Model | TrainConfig,
    text: Text | None = None,
    *,
    output_dir: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> Result:
    """Trains a dense model to an n:m sparse one, which is verified from the disk, in `output_dir/model`.

    Args:
        model: a Hugging Face folder, hub id, GGUF file, or "demo"; a `PreTrainedModel`, which stays as it is; or a
            `TrainConfig` or `FinetuneConfig`, alone.
        text: the training text: a file, folder, glob or hub dataset (`castlm train --help` names the types of files), a
            list of texts, a `datasets.Dataset`, or any other iterable of documents, strings or rows with text or
            messages. Several are mixed by weights, as in `{"a.txt": 0.7, "b.jsonl": 0.3}`.
        output_dir: a new folder for the run; without one, the result is a model in memory.
        tokenizer: of a model in memory; by default the one where it was loaded from.
        options: as of `castlm train`: `pattern`, `max_steps`, `learning_rate`, `seq_len`, `eval_dataset` (which takes
            the same as `text`), `teacher` (the same as `model`), `resume` and others; `castlm train --help-all`
            describes them.

    Returns:
        The result: `result.model`, and `result.facts`, which are also the castlm.json of its folder.
        `result.perplexity.pruned` is its perplexity, and `result.verdict.ok` is False if the run diverged or fell
        short.

    Raises:
        InputError: any error that the user can correct; no result is half-written.
        Interrupted: after Ctrl-C or SIGTERM during the steps; its message names the saved step and how to resume.

    Examples:
        >>> import castlm
        >>> run = castlm.train("demo", "text.txt", output_dir="run", max_steps=60, seq_len=128)  # doctest: +SKIP
        >>> run.perplexity.pruned  # doctest: +SKIP
        20.31
        >>> sparse = castlm.train(model, dataset, tokenizer=tokenizer, max_steps=60).model  # doctest: +SKIP
    """
    if isinstance(model, TrainConfig):
        if text is not None or output_dir is not None or options:
            raise InputError("train takes a config alone, or a model, a text and options: give one of both")
        from castlm.training import train as loop  # imports torch

        return Result(model.checkpoint.output_dir / "model", loop.train(model))
    return _run(TrainConfig, model, text, output_dir, tokenizer, options)


@with_keywords_of(*FINETUNE_OPTIONS)
def finetune(
    model: Model,
    text: Text | None = None,
    *,
    output_dir: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> Result:
    """Fine-tunes an n:m sparse model. Every zero stays zero, and the result is verified, in `output_dir/model`.

    Args:
        model: an n:m sparse model: a folder, plain or packed, a run of `train`, a hub id, a `PreTrainedModel`, or the
            result of another call. The pattern is the one in its castlm.json, unless `pattern` names another.
        text: the training text, as for `train`; conversations count the assistant's tokens.
        output_dir: a new folder for the run; without one, the result is a model in memory.
        tokenizer: of a model in memory; by default the one where it was loaded from.
        options: as of `castlm finetune`: `adapter`, `max_steps`, `learning_rate` and others.

    Returns:
        The result, as `train` returns it; `result.perplexity.start` is that of the model before.

    Raises:
        InputError: as `train`, or a model that is dense.

    Examples:
        >>> import castlm
        >>> tuned = castlm.finetune("run", "chats.jsonl", output_dir="tuned", adapter="shira")  # doctest: +SKIP
    """
    return _run(FinetuneConfig, model, text, output_dir, tokenizer, options)


def _run(
    kind: type[TrainConfig],
    model: Model,
    text: Text | None,
    output_dir: str | Path | None,
    tokenizer: PreTrainedTokenizerBase | None,
    options: dict[str, Any],
) -> Result:
    """Makes the config of a run whose models and texts may be objects, and runs it."""
    from castlm.training import train as loop  # imports torch

    with Objects(output_dir) as given:
        values = {"output_dir": given.output_dir, **options}
        values["model"] = given.model(model, tokenizer)
        if text is not None:
            values["dataset"] = given.text(text)
        if values.get("eval_dataset") is not None:
            values["eval_dataset"] = given.text(values["eval_dataset"], "eval_text")
        if values.get("teacher") is not None:
            values["teacher"] = given.model(values["teacher"], name="teacher")
        config = kind.from_mapping(values)
        if kind is FinetuneConfig:
            config = of_recorded_pattern(config)
        facts = loop.train(config)
        return given.result(config.checkpoint.output_dir / "model", facts)


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
