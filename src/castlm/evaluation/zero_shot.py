"""Zero-shot accuracy through lm-eval, on its own tasks from the hub or on the same tasks from local files.

Every figure carries its metric, since `acc` and `acc_norm` differ by up to 19 points on one task, and its error.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import castlm
from castlm.core.errors import InputError
from castlm.files import sha256_file

SHIPPED = Path(__file__).parent / "tasks"
METRICS = ("acc", "acc_norm", "perplexity")


class _Loader(yaml.SafeLoader):
    """YAML with lm-eval's `!function module.name`, for functions in `castlm.evaluation.tasks`."""


def _function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Callable[..., Any]:
    module, _, name = str(loader.construct_scalar(node)).rpartition(".")
    function: Callable[..., Any] = getattr(importlib.import_module(f"castlm.evaluation.tasks.{module}"), name)
    return function


_Loader.add_constructor("!function", _function)


def local_task_names() -> list[str]:
    """The tasks that castlm has files for: each one of lm-eval's, with its name, prompt and metrics."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def local_task(name: str, folder: str | Path) -> dict[str, Any]:
    """lm-eval's configuration of a task whose data lies in `folder`.

    `folder/<name>.yaml` where there is one, else the file that castlm ships; in it `{folder}` stands for `folder`.

    Raises:
        InputError: an unknown task, or data that is not in the folder.
    """
    folder = Path(folder).expanduser()
    file = next((f for f in (folder / f"{name}.yaml", SHIPPED / f"{name}.yaml") if f.is_file()), None)
    if file is None:
        raise InputError(
            f"there is no local task {name!r}: use {', '.join(local_task_names())}, or put {name}.yaml into {folder}"
        )
    config: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    files = config["dataset_kwargs"]["data_files"]
    for split, data in files.items():
        files[split] = str(data).replace("{folder}", str(folder))
        if not Path(files[split]).is_file():
            raise InputError(f"task {name} needs {files[split]}, which is not there: pass the folder that holds it")
    return config


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Accuracies of a model on lm-eval's tasks, without examples in the prompt and without a chat template.

    Args:
        tasks: names, as `["piqa", "arc_easy"]`.
        folder: where local files of the tasks lie; None asks the hub for lm-eval's own.
        limit: only the first so many questions of each task.
        batch_size: sequences a forward pass.
        autocast_dtype: e.g. `torch.bfloat16`; None computes in the model's dtype.

    Returns:
        `{"results": [row, ...], ...}`, JSON-ready; a row has `task`, `metric` ("acc", "acc_norm", "perplexity"),
        `value`, `stderr` (None where lm-eval gives none), `num_docs`, `num_fewshot` 0 and the data's source.

    Raises:
        InputError: lm-eval is not installed, an unknown task, or data that cannot be had.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("zero-shot tasks need lm-eval: pip install 'castlm[eval]'")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}: it must be at least 1, or left out for all questions")
    if not tasks:
        raise InputError("no task is named: pass, for example, --tasks piqa,arc_easy")
    configs = None if folder is None else [local_task(name, folder) for name in tasks]
    with _quiet():
        results = _evaluate(model, tokenizer, tasks, configs, limit, batch_size, autocast_dtype)
    rows = []
    for name, figures in results["results"].items():
        source = {"data": "hub"} if configs is None else _source(configs, name)
        for metric in METRICS:
            if f"{metric},none" in figures:
                error = figures.get(f"{metric}_stderr,none")
                rows.append(
                    {
                        "task": name,
                        "metric": metric,
                        "value": float(figures[f"{metric},none"]),
                        "stderr": float(error) if isinstance(error, float) else None,
                        "num_docs": results["n-samples"][name]["effective"] if name in results["n-samples"] else None,
                        "num_fewshot": 0,
                        **source,
                    }
                )
    return {
        "results": rows,
        "limit": limit,
        "tokenizer": tokenizer.name_or_path,
        "dtype": str(autocast_dtype or model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "versions": {
            "castlm": castlm.__version__,
            "lm-eval": version("lm_eval"),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
    }


def _source(configs: list[dict[str, Any]], name: str) -> dict[str, str]:
    config = next(c for c in configs if c["task"] == name)
    file = next(iter(config["dataset_kwargs"]["data_files"].values()))
    return {"data": Path(file).name, "sha256": sha256_file(file)}


def _evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    configs: list[dict[str, Any]] | None,
    limit: int | None,
    batch_size: int,
    autocast_dtype: torch.dtype | None,
) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=configs is None)
    if configs is None:
        unknown = [name for name in tasks if name not in manager.all_tasks]
        if unknown:
            raise InputError(f"lm-eval has no task {', '.join(unknown)}: `lm_eval ls tasks` lists them")
    lm = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        mixed_precision_dtype=autocast_dtype,
    )
    try:
        results: dict[str, Any] = simple_evaluate(
            lm,
            tasks=configs or list(tasks),
            num_fewshot=0,
            limit=limit,
            log_samples=False,
            bootstrap_iters=1000,  # perplexity's error; that of accuracies is exact
            task_manager=manager,
        )
    except (ConnectionError, OSError, ValueError) as error:  # `datasets` raises all three when it cannot get its data
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the tasks {', '.join(tasks)} could not be run: {reason}; data on this disk is given with --tasks-from"
        ) from error
    return results


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's log from errors on; its progress bars stay."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
