"""The end of a run: prunes with the last mask, folds the scales, writes, verifies and uploads the model."""

from __future__ import annotations

import dataclasses
import functools
import math
import platform
import warnings
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel

from castlm.core.errors import DivergedError, InputError
from castlm.core.rounding import fit_rounding_
from castlm.core.scaling import UnfoldedWarning, fold_weight_scaling
from castlm.core.sparsify import prune_
from castlm.distributed.export import ShardedResult, export_sharded
from castlm.distributed.sharding import is_sharded, uncompile_blocks_
from castlm.evaluation.perplexity import measured_on, perplexity
from castlm.export.hf import export_model, push
from castlm.export.origin import origin_of
from castlm.facts import HELD_OUT_OF, Conditions, Dataset, Facts, Figure, Histogram, MaskFigures, Perplexities
from castlm.hardware import collect_garbage, peak_memory
from castlm.models.architecture import auto_class, linearize_, move_
from castlm.models.io import save_dtype
from castlm.oneshot.methods import methods_of
from castlm.progress import note
from castlm.say import Say
from castlm.training.metrics import held_out_loss, masked_histogram
from castlm.training.objective import Objective
from castlm.training.trainer import Trainer, local_masks
from castlm.training.verdict import perplexities_when_sparse
from castlm.training.verdict import verdict as verdict_on
from castlm.world import World


def finish(run: Trainer) -> Facts:
    """Prunes, folds, exports and verifies the model of a finished run; returns its facts, the same on every rank.

    Raises:
        DivergedError: the verification fails, and the perplexity of the pruned model is not finite.
        InputError: the disk is full, or the verification fails; the checkpoints are untouched.
    """
    pattern = run.config.model.pattern
    run.world.on_main(lambda: run.method.save_parts(run.folder.path, run_facts(run, None)))
    # The order matters: an adapter is merged before the prune, and weight scaling is folded after it (in the export),
    # because the masks belong to the weights beneath the scales.
    run.method.fold_()
    masks = run.method.masks()
    histogram = masked_histogram(local_masks(masks), run.world)
    if masks:
        prune_(run.model, pattern, masks=masks, filter_fn=run.method.filter_fn)
    del masks
    # Verifying the result takes up to two more copies of the model: the teacher and the moments are freed before.
    objective = run.objective
    objective.free_teacher()
    run.optimizer.state.clear()  # 8 bytes a weight
    uncompile_blocks_(objective)
    collect_garbage(run.world.device.type)
    is_remote_code = type(run.model).__module__.startswith("transformers_modules")  # only `save_pretrained` copies it
    try:
        if run.dense.stored is not None and not is_remote_code:
            facts = export_sharded(sharded_result(run), run_facts(run, histogram))
        else:
            model = gathered(run) if is_sharded(objective) else run.model
            facts = run.world.on_main(lambda: write_result(run, model, histogram), patient=True)
    except InputError as error:
        if math.isfinite(run.figures[str(run.total_steps)].get("prune_now_ppl", 0.0)):
            raise
        raise DivergedError(f"{error}: the run diverged in its last steps; lower learning_rate") from error
    say_result(run, facts, run.telemetry.say)
    return facts


def _save_dtype(run: Trainer) -> torch.dtype:
    """The dtype of the result's files."""
    return save_dtype(run.config.checkpoint.save_dtype, run.dense.loaded.dtype)


def sharded_result(run: Trainer) -> ShardedResult:
    """The sharded model with its settings, for `export_sharded`."""

    def measure(objective: Objective) -> float:
        held_out, seq_len = run.text.held_out, run.config.data.seq_len
        return float(held_out_loss(objective, held_out, seq_len, 1, "fp32", run.world).exp())

    return ShardedResult(
        model=run.model,
        tokenizer=run.dense.tokenizer,
        folder=run.folder.model,
        world=run.world,
        pattern=run.config.model.pattern,
        left_dense=run.method.left_dense,
        dtype=_save_dtype(run),
        is_sparse=bool(run.method.layers),
        root=run.objective,
        precision=run.precision,
        wrap=Objective,
        measure=measure,
    )


def gathered(run: Trainer) -> PreTrainedModel | None:
    """The whole model in the memory of the main rank; None on the other ranks."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    with warnings.catch_warnings():  # the model it is loaded into has weight scaling, too
        warnings.simplefilter("ignore", UnfoldedWarning)
        state = get_model_state_dict(run.model, options=options)
    if not run.world.is_main:
        return None
    kind = auto_class(run.model.config)
    model: PreTrainedModel = kind.from_config(run.model.config, dtype=torch.float32)
    linearize_(model)  # the same modules as the trained one, so that the names of the state fit
    run.method.parametrize_(model)
    model.load_state_dict(state)
    fit_rounding_(model, keep_scales=True)
    model.generation_config = run.model.generation_config
    return model


def write_result(run: Trainer, model: PreTrainedModel | None, histogram: Histogram | None) -> Facts:
    """Folds the weight scaling, writes the model and verifies it. Only the main rank calls it, with the whole model."""
    assert model is not None
    fold_weight_scaling(model)
    model.cpu()

    def measure(m: PreTrainedModel) -> float:
        move_(m, run.world.device)
        measured = perplexity(m, run.text.held_out, seq_len=run.config.data.seq_len).perplexity
        m.cpu()
        return measured

    return export_model(
        model,
        run.dense.tokenizer,
        run.folder.model,
        pattern=run.config.model.pattern if run.method.layers else None,  # None for the dense control
        left_dense=run.method.left_dense,
        record=run_facts(run, histogram),
        overwrite=True,
        dtype=_save_dtype(run),
        eval_fn=measure,
    )


def say_result(run: Trainer, facts: Facts, say: Say) -> None:
    """Says the folder of the result and, in the last line, whether training improved on the start."""
    if run.method.layers:
        say(f"{run.folder.model}: {run.config.model.pattern} verified in {len(run.method.layers)} layers")
    else:
        dense = f"dense, {run.rounding.kind} for castlm pack" if run.rounding else "the dense control"
        say(f"{run.folder.model}: {dense}")
    if rows := facts.general_figures:
        say(f"on {rows[0].text}: " + ", ".join(f"{row.name} {row.perplexity:,.3f}" for row in rows))
    verdict = facts.verdict
    assert verdict is not None  # it is a run's
    say(verdict.reason if verdict.ok else f"THIS RUN {verdict.problem}: {verdict.reason}; {verdict.remedy}")


def run_facts(run: Trainer, histogram: Histogram | None) -> Facts:
    """The entries of castlm.json about a run: its figures, its verdict, and the facts that are needed to compare them.

    Args:
        histogram: of the masked weights before the prune.
    """
    config, starts_dense = run.config, run.config.method.row.step0 == "dense"
    first, last = run.figures.get("0", {}), run.figures[str(run.total_steps)]
    if config.is_finetuning:
        measures = {"start": first.get("prune_now_ppl")}
    else:
        one_shot = first.get("prune_now_ppl")
        if starts_dense:  # only its rounding changes step 0
            one_shot = first.get("perplexity") if run.rounding else None
        dense = first.get("dense_ppl", first.get("perplexity"))
        measures = {"dense": dense, "one_shot": one_shot, "before_prune": last["perplexity"]}
    measures["pruned"] = last.get("prune_now_ppl")
    perplexities = Perplexities(**measures)
    measured = measured_on(
        run.dense.tokenizer,
        seq_len=run.config.data.seq_len,
        text=", ".join(config.evaluation.eval_datasets) or HELD_OUT_OF + ", ".join(config.data.datasets),
        text_sha256=run.text.eval_sha256,
        held_out=run.text.held_out,
        precision=run.precision,
    )
    pattern, method, start = config.model.pattern, config.method.method, config.start.name
    pruned_by = f"pruned {'one-shot by' if start in methods_of(pattern) else 'as'} {start}"
    labels = {
        "start": f"{pattern}, before fine-tuning",
        "dense": "dense",
        "one_shot": "rounded, before training" if starts_dense else pruned_by,
        "before_prune": f"{method}, before the prune",
        "pruned": f"{pattern}, fine-tuned" if config.is_finetuning else f"{method}, pruned",
    }
    figures = [
        Figure(name=labels[name], perplexity=ppl, **vars(measured)) for name, ppl in perplexities.known().items()
    ]
    general: dict[str, float | None] = {}
    if config.is_finetuning:
        general[labels["start"]] = first.get("general_ppl")
    else:
        general["dense"] = first.get("general_dense_ppl", first.get("general_ppl"))
        if not starts_dense:
            general[pruned_by] = first.get("general_ppl")
    general[labels["pruned"] if run.method.layers else f"{method}, trained"] = last.get("general_ppl")
    general_figures = [
        Figure(name=name, perplexity=perplexity, **vars(_general_conditions(run)))
        for name, perplexity in general.items()
        if perplexity is not None
    ]
    if not run.method.layers:
        perplexities = dataclasses.replace(perplexities, trained=last["perplexity"])
    becomes_sparse = config.method.row.is_sparse and starts_dense
    interval = config.method.mask_interval
    earlier = perplexities_when_sparse(run.figures, run.total_steps, interval) if becomes_sparse else []
    mask_names = ("sparse_weight_ratio", "flip_rate", "initial_flip_rate", "largest_masked")
    return Facts(
        pattern=None,  # the export writes it, and which layers are dense
        left_dense={},
        rounded=run.rounding,
        run_id=run.folder.run_id,
        **vars(origin_of(config.model.model, config.model.revision)),
        method=method,
        config=config.as_dict(),
        world_batch=config.optimizer.sequences_per_step(run.world.size),
        perplexity=perplexities,
        figures=figures,
        measured=measured,
        general_figures=general_figures or None,
        mask=MaskFigures(**{name: last[name] for name in mask_names if name in last}),
        dataset=Dataset(name=" + ".join(config.data.datasets), sha256=run.text.train_sha256),
        num_params=sum(parameter.numel() for parameter in run.method.own_parameters(run.names)),
        train_tokens=run.tokens,
        train_steps=run.total_steps,
        train_seconds=round(run.seconds, 1),
        start=run.start,
        world_size=run.world.size,
        peak_memory_bytes=peak_memory(run.world.device.type),
        machine=f"{platform.machine()} {run.world.device.type}",
        masked_histogram=histogram,
        verdict=verdict_on(perplexities, earlier),
    )


def _general_conditions(run: Trainer) -> Conditions:
    """The conditions of the perplexities on the general text."""
    text, options = run.text, run.config.evaluation
    assert text.general is not None
    assert text.general_sha256 is not None
    return measured_on(
        run.dense.tokenizer,
        seq_len=run.config.data.seq_len,
        text=str(options.general_dataset),
        text_sha256=text.general_sha256,
        held_out=text.general,
        precision=run.precision,
    )


def upload(model: Path, repo: str, facts: Facts, world: World) -> None:
    """Uploads the result, unless the run diverged or fell short: the repository may hold a better one."""
    if facts.verdict is not None and (wrong := facts.verdict.outcome):
        if world.is_main:
            note(f"not uploaded, because the run {wrong}; hf upload {repo} {model} uploads it anyway")
        return
    url = world.on_main(functools.partial(push, model, repo), patient=True)
    if world.is_main:
        note(f"uploaded: {url}")
