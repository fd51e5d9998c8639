"""The end of a run: prune with the last mask, fold the scale, write the model, and verify it from the disk."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModelForCausalLM, PreTrainedModel

from castlm.core.pattern import parse_pattern
from castlm.core.scaling import fold_weight_scaling
from castlm.core.sparsify import prune_
from castlm.distributed.export import ShardedResult, export_sharded
from castlm.distributed.world import World
from castlm.evaluation.perplexity import measured_on, perplexity
from castlm.export.hf import export_model
from castlm.files import atomic_dir, atomic_write_json
from castlm.hardware import peak_memory
from castlm.models import linearize_conv1d_, parameters_in, save_dtype, save_model
from castlm.oneshot.solvers import SOLVERS
from castlm.training.config import TrainConfig
from castlm.training.metrics import held_out_perplexity
from castlm.training.objective import Objective
from castlm.training.setup import Parts, filter_of, local_masks


@dataclass(frozen=True)
class TrainedRun:
    """A run whose last step is done."""

    config: TrainConfig
    world: World
    folder: Path
    """Where the model goes."""
    parts: Parts
    figures: dict[str, dict[str, float]]
    """Evaluations by step."""
    tokens: int
    seconds: float
    say: Callable[[str], None]

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


def read_result(folder: Path) -> dict[str, Any]:
    """The castlm.json of a finished result."""
    record: dict[str, Any] = json.loads((folder / "castlm.json").read_text(encoding="utf-8"))
    return record


def finish(run: TrainedRun) -> dict[str, Any]:
    """Prunes, folds, exports and proves the model of a finished run; returns its record, on every rank the same.

    Raises:
        InputError: the disk is full, or the proof fails; the checkpoints are untouched.
    """
    n, m = parse_pattern(run.config.pattern)
    masks = run.parts.method.masks()
    histogram = masked_histogram(local_masks(masks), run.world)
    if masks:
        prune_(run.model, n, m, masks=masks, filter_fn=filter_of(run.config))
    if run.parts.source.stored is not None and not is_remote_code(run.model):
        record = export_sharded(sharded_result(run), finished_record(run, histogram))
        say_result(run, record)
        return record
    model = gathered(run) if run.world.mesh is not None else run.model
    return run.world.on_main(lambda: write_result(run, model, histogram))


def sharded_result(run: TrainedRun) -> ShardedResult:
    """What `export_sharded` needs to know of the run."""
    config, world = run.config, run.world

    def measure(objective: Objective) -> float:
        return held_out_perplexity(
            objective, run.parts.text.eval_ids, seq_len=config.seq_len, batch=1, precision="fp32", world=world
        )

    return ShardedResult(
        model=run.model,
        tokenizer=run.parts.source.tokenizer,
        folder=run.folder,
        world=world,
        pattern=parse_pattern(config.pattern),
        left_dense=run.parts.method.left_dense,
        dtype=run.save_dtype,
        is_sparse=run.is_sparse,
        root=run.parts.objective,
        precision=run.parts.evaluator.precision,
        wrap=lambda model: Objective(model, None, 0.0, 1.0),
        measure=measure,
    )


def masked_histogram(masks: dict[Tensor, Tensor], world: World) -> dict[str, Any]:
    """Counts of masked magnitudes, a quarter of a decade a bin, as they are before the prune; of all ranks together,
    each once.

    `zeros` are exact zeros, `counts[i]` those in `[edges[i], edges[i + 1])`; what is smaller or larger counts at the
    ends. Empty for the dense control.
    """
    if not masks:
        return {}
    exponents = torch.arange(-48, 5) / 4  # 1e-12 to 10
    counts = torch.zeros(len(exponents), dtype=torch.float64, device=world.device)
    for weight, mask in masks.items():
        masked = weight[~mask].abs().float()
        bins = (masked[masked > 0].log10() * 4).floor().clamp(-48, 3) + 48
        counts[1:] += torch.bincount(bins.long(), minlength=len(exponents) - 1)
        counts[0] += (masked == 0).sum()
    zeros, *rest = (world.sum(counts).long() // world.num_replicas).tolist()
    return {"edges": (10**exponents).tolist(), "zeros": zeros, "counts": rest}


def is_remote_code(model: PreTrainedModel) -> bool:
    """Whether the model comes with code of its own, which `save_pretrained` alone knows how to pass on."""
    return type(model).__module__.startswith("transformers_modules")


def gathered(run: TrainedRun) -> PreTrainedModel | None:
    """The sharded model as a whole one in the memory of the main rank; None on the others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(run.model, options=options)
    if not run.world.is_main:
        return None
    model = AutoModelForCausalLM.from_config(run.model.config, dtype=torch.float32)
    linearize_conv1d_(model)
    run.parts.method.prepare(model)
    model.load_state_dict(state)
    model.generation_config = run.model.generation_config
    return model


def write_result(run: TrainedRun, model: PreTrainedModel | None, histogram: dict[str, Any]) -> dict[str, Any]:
    """Folds the whole model, writes and proves it; on the main rank, which alone has one."""
    assert model is not None
    run.parts.objective.teacher = None  # frees its memory before the result is read back
    fold_weight_scaling(model)
    model.cpu()
    folder = run.folder
    seq_len, tokenizer = run.config.seq_len, run.parts.source.tokenizer

    def measure(m: PreTrainedModel) -> float:
        return perplexity(m, run.parts.text.eval_ids, seq_len=seq_len).perplexity

    record = finished_record(run, histogram)
    if not run.is_sparse:  # the dense control has nothing to prove
        with atomic_dir(folder, overwrite=True) as temporary, parameters_in(model, run.save_dtype):
            save_model(model, tokenizer, temporary)
            atomic_write_json(temporary / "castlm.json", record)
        say_result(run, record)
        return record
    n, m = parse_pattern(run.config.pattern)
    result = export_model(
        model,
        tokenizer,
        folder,
        n=n,
        m=m,
        left_dense=run.parts.method.left_dense,
        record=record,
        overwrite=True,
        dtype=run.save_dtype,
        eval_fn=measure,
    )
    say_result(run, result)
    return result


def finished_record(run: TrainedRun, histogram: dict[str, Any]) -> dict[str, Any]:
    record = run_record(run) | {"masked_histogram": histogram}
    if not run.is_sparse:
        trained = run.figures[str(run.config.max_steps)]["perplexity"]
        record |= {"pattern": None, "perplexity": {**record["perplexity"], "trained": trained}}
    return record


def say_result(run: TrainedRun, record: dict[str, Any]) -> None:
    folder, figures = run.folder, record["perplexity"]
    if not run.is_sparse:
        run.say(f"the dense control is in {folder}: perplexity {figures['trained']:.3f}")
        return
    dense = f" (dense {figures['dense']:.3f})" if "dense" in figures else ""
    run.say(
        f"{folder}: {run.config.pattern} proved in {len(run.parts.method.layers)} layers, perplexity "
        f"{record['proof']['perplexity_from_disk']:.3f}{dense}"
    )


def run_record(run: TrainedRun) -> dict[str, Any]:
    """What castlm.json says of a run: its figures with all that a figure needs to be compared."""
    config = run.config
    first, last = run.figures.get("0", {}), run.figures[str(config.max_steps)]
    figures = {
        # masked from step 0 on by some methods, and by then no more the dense model's where a one-shot method begins
        "dense": first.get("dense_ppl", first.get("perplexity")) if run.parts.method.mask_every is None else None,
        "one_shot": first.get("prune_now_ppl"),
        "before_prune": last["perplexity"],
        "pruned": last.get("prune_now_ppl"),
    }
    measured = measured_on(
        run.parts.source.tokenizer,
        seq_len=config.seq_len,
        text=config.eval_dataset or f"held out of {config.dataset}",
        text_sha256=run.parts.text.eval_sha256,
        num_tokens=len(run.parts.text.eval_ids),
        precision=run.parts.evaluator.precision,
    )
    labels = {
        "dense": "dense",
        "one_shot": f"pruned {'one-shot by' if config.initial_mask in SOLVERS else 'as'} {config.initial_mask}",
        "before_prune": f"{config.method}, before the prune",
        "pruned": f"{config.method}, pruned",
    }
    rows = [{"name": labels[k], "perplexity": v, **measured} for k, v in figures.items() if v is not None]
    return {
        "base_model": config.model,
        "method": config.method,
        "config": config.as_dict(),
        "perplexity": {k: v for k, v in figures.items() if v is not None},
        "figures": rows,
        "measured": measured,
        "mask": {
            k: last[k] for k in ("sparse_weight_ratio", "flip_rate", "initial_flip_rate", "largest_masked") if k in last
        },
        "dataset": {"name": config.dataset, "sha256": run.parts.text.train_sha256},
        "num_params": sum(p.numel() for p in run.parts.names),
        "train_tokens": run.tokens,
        "train_steps": config.max_steps,
        "train_seconds": round(run.seconds, 1),
        "world_size": run.world.size,
        "peak_memory_bytes": peak_memory(run.world.device.type),
        "machine": f"{platform.machine()} {run.world.device.type}",
    }
