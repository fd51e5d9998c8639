"""Measures zero-shot accuracy by lm-eval, on its tasks from the hub or on the same tasks from local files.

Every figure is stored with its metric and its standard error: `acc` and `acc_norm` of one task differ by up to 19
points.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from castlm.core.errors import InputError, one_line
from castlm.dtypes import dtype_name
from castlm.files.yaml_file import read_yaml_mapping
from castlm.hardware import library_versions
from castlm.packages import require
from castlm_runtime.reading import sha256_file, user_path

SHIPPED = Path(__file__).parent / "tasks"
"""The folder of the tasks that castlm ships, a file each, with the name, prompt and metrics of lm-eval's task."""


def local_task_names() -> list[str]:
    """Names of the tasks with a file in castlm; each has the name, prompt and metrics of lm-eval's task."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def local_task(name: str, folder: str | Path) -> dict[str, Any]:
    """lm-eval's configuration of a task whose data is in `folder`: of `NAME.yaml` there, or of `local_task_names`."""
    own, is_shipped = user_path(folder) / f"{name}.yaml", name in local_task_names()
    if own.is_file() and is_shipped:
        raise InputError(f"{own} has the name of a task of castlm: rename it")
    if not own.is_file() and not is_shipped:
        raise InputError(f"there is no local task {name!r}: use {', '.join(local_task_names())}, or write {own}")
    config = read_yaml_mapping(SHIPPED / own.name if is_shipped else own)
    if name == "hellaswag":
        from castlm.evaluation.tasks.hellaswag import process_docs  # imports `datasets`, which is slow

        config["process_docs"] = process_docs
    try:
        files: dict[str, str] = config["dataset_kwargs"]["data_files"]
        config["task"] = name
    except (KeyError, TypeError):
        raise InputError(f"{own} names no files under dataset_kwargs, data_files: see docs/how-to/extend.md") from None
    for split, data in files.items():
        files[split] = data.replace("{folder}", str(user_path(folder)))
        if not Path(files[split]).is_file():
            raise InputError(f"task {name} needs {files[split]}, which does not exist: pass the folder that holds it")
    return config


def check_tasks(tasks: Sequence[str], folder: str | Path | None) -> None:
    """Checks that the tasks can be evaluated, before a model is loaded."""
    require("zero-shot tasks need", "lm_eval", install="'.[eval]' in the clone of castlm")
    if folder is not None:
        for name in tasks:
            local_task(name, folder)
        return
    known = _task_manager(True).all_tasks
    if unknown := [name for name in tasks if name not in known]:
        raise InputError(f"lm-eval has no task {', '.join(unknown)}: `lm_eval ls tasks` lists them")


@functools.cache  # it takes 18 s of CPU time to index the tasks of lm-eval
def _task_manager(include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    limit: int | None = None,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Accuracies of a model on lm-eval's tasks, without examples in the prompt and without a chat template.

    Args:
        tasks: names, as `["piqa", "arc_easy"]`.
        folder: folder with local files of the tasks; None reads lm-eval's own from the hub.
        limit: only the first `limit` questions of each task, at least 1; None for all.
        autocast_dtype: e.g. `torch.bfloat16`; None computes in the model's dtype.

    Returns:
        `{"results": [row, ...], ...}`, ready for JSON. There is a row for every metric of every task ("acc",
        "acc_norm", "exact_match", "perplexity", ...), with `task`, `metric`, `value`, `stderr` (None if lm-eval has
        none), `num_docs`, `num_fewshot` (always 0), and the source of the data.
    """
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    wanted: list[Any] = list(tasks) if folder is None else [local_task(name, folder) for name in tasks]
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, mixed_precision_dtype=autocast_dtype)
    try:
        loaded = _task_manager(folder is None).load(wanted)
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=0)
        # Not `simple_evaluate`, which also asks git and the machine about themselves, and seeds this process.
        results: dict[str, Any] = evaluator.evaluate(
            lm=lm,
            task_dict=loaded,
            limit=limit,
            log_samples=False,
            bootstrap_iters=1000,  # for perplexity's error; the error of accuracies is exact
        )
    except (ConnectionError, OSError, ValueError) as error:  # `datasets` raises all three if it cannot get its data
        raise InputError(
            f"the tasks {', '.join(tasks)} could not run: {one_line(error)}; use --tasks-from FOLDER for data on this "
            "machine"
        ) from error
    rows = []
    for name, figures in results["results"].items():
        source = {"data": "hub"}
        if folder is not None:
            config = next(c for c in wanted if c["task"] == name)
            file = next(iter(config["dataset_kwargs"]["data_files"].values()))
            source = {"data": Path(file).name, "sha256": sha256_file(file)}
        num_docs = results["n-samples"][name]["effective"] if name in results["n-samples"] else None
        rows += [
            {"task": name, **figure, "num_docs": num_docs, "num_fewshot": 0, **source} for figure in metrics_of(figures)
        ]
    return {
        "results": rows,
        "limit": limit,
        "tokenizer": tokenizer.name_or_path,
        "dtype": dtype_name(autocast_dtype or model.dtype),
        "device": model.device.type,
        "versions": library_versions("lm-eval", "torch", "transformers"),
    }


def metrics_of(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Every metric of a task, as `metric`, `value` and `stderr`, from lm-eval's figures.

    lm-eval names a figure "metric,filter". The filter stays in the name if there is one: "exact_match,strict-match".
    """
    metrics = []
    for key, value in figures.items():
        metric, comma, answer_filter = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = figures.get(f"{metric}_stderr,{answer_filter}")
            stderr = float(error) if isinstance(error, float) else None
            name = metric if answer_filter == "none" else key
            metrics.append({"metric": name, "value": float(value), "stderr": stderr})
    return metrics
