"""The end of a run: prune with the last mask, fold the scale, write the model, and verify it from the disk."""

from __future__ import annotations

import contextlib
import math
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel

from castlm.core.errors import DivergedError, InputError
from castlm.core.pattern import Pattern
from castlm.core.scaling import UnfoldedWarning, fold_weight_scaling
from castlm.core.sparsify import prune_
from castlm.distributed.export import ShardedResult, export_sharded
from castlm.distributed.sharding import free_blocks_, is_sharded, uncompile_blocks_
from castlm.distributed.world import World
from castlm.evaluation.perplexity import measured_on, perplexity
from castlm.export.cut_sizes import cut_pattern
from castlm.export.hf import export_model
from castlm.files.atomic_dir import atomic_dir
from castlm.files.atomic_file import atomic_write_json
from castlm.hardware import peak_memory
from castlm.methods.table import METHODS
from castlm.models.architecture import auto_class, linearize_
from castlm.models.io import parameters_in, save_dtype, save_model
from castlm.oneshot.options import UNIT_SCORES
from castlm.oneshot.solvers import SOLVERS
from castlm.training.config import TrainConfig
from castlm.training.finetune import cut_of_source
from castlm.training.metrics import held_out_perplexity, masked_histogram
from castlm.training.objective import Objective
from castlm.training.run_folder import RunFolder
from castlm.training.setup import Parts, filter_of, global_batch, local_masks
from castlm.training.verdict import verdict
from castlm.versions import model_versions


@dataclass(frozen=True)
class TrainedRun:
    """A run whose last step is done."""

    config: TrainConfig
    world: World
    output: RunFolder
    """The output folder."""
    parts: Parts
    figures: dict[str, dict[str, float]]
    """Evaluations by step."""
    tokens: int
    seconds: float
    say: Callable[[str], None]

    @property
    def folder(self) -> Path:
        """Where the model goes."""
        return self.output.model

    @property
    def model(self) -> PreTrainedModel:
        return self.parts.source.model

    @property
    def save_dtype(self) -> torch.dtype:
        """What the result is written in."""
        return save_dtype(self.config.save_dtype, self.parts.source.loaded.dtype)

    @property
    def is_sparse(self) -> bool:
        """Whether the method has sparse layers; the dense control has none."""
        return bool(self.parts.method.layers)


def finish(run: TrainedRun) -> dict[str, Any]:
    """Prunes, folds, exports and verifies the model of a finished run; returns its record, the same on every rank.

    Raises:
        DivergedError: the verification fails, and the perplexity of the pruned model is not finite.
        InputError: the disk is full, or the verification fails; the checkpoints are untouched.
    """
    pattern = Pattern.parse(run.config.pattern)
    run.world.on_main(lambda: run.parts.method.save_parts(run.output.path))
    run.parts.method.fold_()
    masks = run.parts.method.masks()
    histogram = masked_histogram(local_masks(masks), run.world)
    if masks:
        prune_(run.model, pattern, masks=masks, filter_fn=filter_of(run.config))
    del masks
    free_training_state_(run)
    is_cut = run.is_sparse and cut_pattern(pattern) is not None  # which takes the whole model
    with failing_as_diverged(run):
        if run.parts.source.stored is not None and not is_remote_code(run.model) and not is_cut:
            record = export_sharded(sharded_result(run), finished_record(run, histogram))
            say_result(run, record)
            return record
        model = gathered(run) if is_sharded(run.parts.objective) else run.model
        return run.world.on_main(lambda: write_result(run, model, histogram), beats=True)


@contextlib.contextmanager
def failing_as_diverged(run: TrainedRun) -> Iterator[None]:
    """Turns an export that fails into `DivergedError` if the last perplexity of the pruned model is not finite."""
    try:
        yield
    except InputError as error:
        if math.isfinite(run.figures[str(run.config.max_steps)].get("prune_now_ppl", 0.0)):
            raise
        raise DivergedError(f"{error}: the run diverged in its last steps; lower learning_rate") from error


def free_training_state_(run: TrainedRun) -> None:
    """Frees the teacher and the moments: verifying the result takes up to two more copies of the model."""
    objective = run.parts.objective
    if objective.teacher is not None and is_sharded(objective):
        free_blocks_(objective.teacher)
    objective.teacher = None
    run.parts.optimizer.state.clear()
    uncompile_blocks_(objective)


def sharded_result(run: TrainedRun) -> ShardedResult:
    """The record of the run that `export_sharded` takes."""
    config, world = run.config, run.world

    def measure(objective: Objective) -> float:
        return held_out_perplexity(
            objective, run.parts.text.held_out, seq_len=config.seq_len, batch=1, precision="fp32", world=world
        )

    return ShardedResult(
        model=run.model,
        tokenizer=run.parts.source.tokenizer,
        folder=run.folder,
        world=world,
        pattern=Pattern.parse(config.pattern),
        left_dense=run.parts.method.left_dense,
        dtype=run.save_dtype,
        is_sparse=run.is_sparse,
        root=run.parts.objective,
        precision=run.parts.evaluator.precision,
        wrap=lambda model: Objective(model, None, 0.0, 1.0),
        measure=measure,
    )


def is_remote_code(model: PreTrainedModel) -> bool:
    """Whether the model comes with its own Python code, which only `save_pretrained` can copy."""
    return type(model).__module__.startswith("transformers_modules")


def gathered(run: TrainedRun) -> PreTrainedModel | None:
    """The whole model in the memory of the main rank; None on the other ranks."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    with warnings.catch_warnings():  # it is loaded into a model that is scaled alike
        warnings.simplefilter("ignore", UnfoldedWarning)
        state = get_model_state_dict(run.model, options=options)
    if not run.world.is_main:
        return None
    model = auto_class(run.model.config).from_config(run.model.config, dtype=torch.float32)
    linearize_(model)
    run.parts.method.prepare(model)
    model.load_state_dict(state)
    model.generation_config = run.model.generation_config
    return model


def write_result(run: TrainedRun, model: PreTrainedModel | None, histogram: dict[str, Any]) -> dict[str, Any]:
    """Folds the weight scaling, writes the model and verifies it. Only the main rank calls it, with the whole model."""
    assert model is not None
    fold_weight_scaling(model)
    model.cpu()
    folder = run.folder
    seq_len, tokenizer = run.config.seq_len, run.parts.source.tokenizer

    def measure(m: PreTrainedModel) -> float:
        m.to(run.world.device)
        measured = perplexity(m, run.parts.text.held_out, seq_len=seq_len).perplexity
        m.cpu()
        return measured

    record = finished_record(run, histogram)
    if not run.is_sparse:  # the dense control has no pattern to verify
        with atomic_dir(folder, overwrite=True) as temporary, parameters_in(model, run.save_dtype):
            save_model(model, tokenizer, temporary)
            atomic_write_json(temporary / "castlm.json", record)
        say_result(run, record)
        return record
    result = export_model(
        model,
        tokenizer,
        folder,
        pattern=run.config.pattern,
        left_dense=run.parts.method.left_dense,
        record=record,
        overwrite=True,
        dtype=run.save_dtype,
        eval_fn=measure,
    )
    say_result(run, result)
    return result


def finished_record(run: TrainedRun, histogram: dict[str, Any]) -> dict[str, Any]:
    """The record of the run with its verdict and the histogram of the masked weights before the prune."""
    record = run_record(run) | {"masked_histogram": histogram}
    if not run.is_sparse:
        trained = run.figures[str(run.config.max_steps)]["perplexity"]
        record |= {"pattern": None, "perplexity": {**record["perplexity"], "trained": trained}}
        record |= {"versions": model_versions()}  # an export adds its own
    return record | {"verdict": verdict(record["perplexity"], perplexities_when_sparse(run))}


def perplexities_when_sparse(run: TrainedRun) -> list[float]:
    """What a run that becomes sparse on the way measured before its end, once every group was n:m: from the first mask
    refresh of its second half on. Empty for runs that start sparse, and for the dense control."""
    config = run.config
    if not (run.is_sparse and METHODS[config.method].starts_dense):
        return []
    first = config.max_steps / 2 + config.mask_interval
    return [f["prune_now_ppl"] for step, f in run.figures.items() if first <= int(step) < config.max_steps]


def say_result(run: TrainedRun, record: dict[str, Any]) -> None:
    """Says where the result is and, in the last line, whether training improved on the start."""
    if run.is_sparse:
        run.say(f"{run.folder}: {run.config.pattern} verified in {len(run.parts.method.layers)} layers")
    else:
        run.say(f"{run.folder}: the dense control")
    found = record["verdict"]
    run.say(found["reason"] if found["ok"] else f"THIS RUN {found['problem']}: {found['reason']}; {found['remedy']}")


def run_record(run: TrainedRun) -> dict[str, Any]:
    """The entries of castlm.json about a run: its figures, and what is needed to compare them with others."""
    config = run.config
    first, last = run.figures.get("0", {}), run.figures[str(config.max_steps)]
    figures = {
        "dense": first.get("dense_ppl", first.get("perplexity")),
        "one_shot": None if METHODS[config.method].starts_dense else first.get("prune_now_ppl"),
        "before_prune": last["perplexity"],
        "pruned": last.get("prune_now_ppl"),
    }
    if config.is_finetuning:
        figures = {"start": first.get("prune_now_ppl"), "pruned": last.get("prune_now_ppl")}
    measured = measured_on(
        run.parts.source.tokenizer,
        seq_len=config.seq_len,
        text=", ".join(config.eval_datasets) or f"held out of {', '.join(config.datasets)}",
        text_sha256=run.parts.text.eval_sha256,
        held_out=run.parts.text.held_out,
        precision=run.parts.evaluator.precision,
    )
    labels = {
        "start": f"{config.pattern}, before fine-tuning",
        "dense": "dense",
        "one_shot": f"pruned {'one-shot by' if config.start in (*SOLVERS, *UNIT_SCORES) else 'as'} {config.start}",
        "before_prune": f"{config.method}, before the prune",
        "pruned": f"{config.pattern}, fine-tuned" if config.is_finetuning else f"{config.method}, pruned",
    }
    rows = [{"name": labels[k], "perplexity": v, **measured} for k, v in figures.items() if v is not None]
    return {
        **(cut_of_source(config) if config.is_finetuning else {}),
        "run_id": run.output.run_id,
        "base_model": config.model,
        "method": config.method,
        "config": config.as_dict(),
        "world_batch": global_batch(config, run.world),
        "perplexity": {k: v for k, v in figures.items() if v is not None},
        "figures": rows,
        "measured": measured,
        "mask": {
            k: last[k] for k in ("sparse_weight_ratio", "flip_rate", "initial_flip_rate", "largest_masked") if k in last
        },
        "dataset": {"name": " + ".join(config.datasets), "sha256": run.parts.text.train_sha256},
        "num_params": sum(p.numel() for p in run.parts.names if config.adapter == "none" or not p.requires_grad),
        "train_tokens": run.tokens,
        "train_steps": config.max_steps,
        "train_seconds": round(run.seconds, 1),
        "start": run.parts.start,
        "world_size": run.world.size,
        "peak_memory_bytes": peak_memory(run.world.device.type),
        "machine": f"{platform.machine()} {run.world.device.type}",
    }
