"""`castlm plan`: whether a run converges and how long it takes, its memory, and the scaling law of a model and text."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from castlm.cli.command_line import check_json_path, to_stdout, write_json
from castlm.cli.train import parse_train
from castlm.core.errors import InputError
from castlm.fields import choice, essential, option, positional
from castlm.names import aligned, duration
from castlm.oneshot.methods import method_of, methods_of, trained_from
from castlm.oneshot.options import EFFORTS
from castlm.training.config import TrainConfig, names_of
from castlm.training.options import CheckpointOptions, EvaluationOptions
from castlm_runtime.formats import FORMATS, rounded_formats
from castlm_runtime.reading import read_json

if TYPE_CHECKING:
    from castlm.lab.planning.law import Law
    from castlm.lab.planning.memory import MemoryPlan

FARTHEST = 10
"""How far beyond the largest run of a law `plan predict` predicts without --force, as a factor."""
MAX_SEQUENCES = 128
"""Calibration sequences of a start that names no number; it reads at most as many."""


@dataclass
class CheckOptions:
    """Run and discard the first steps of a training, to predict whether it will converge and how long it takes."""


def check(arguments: list[str]) -> int:
    """Prints the findings. Returns the exit code: 1 if the masked weights cannot reach zero."""
    config, _ = parse_train(arguments, "plan check", CheckOptions)
    if not config.method.row.decays:
        raise InputError(f"method {config.method.method} has no decay to check: plan check is for method cast")
    from castlm.oneshot.folder import partial_folder
    from castlm.training.first_steps import measure_first_steps
    from castlm.training.model import learning_rate_for
    from castlm.world import closing, init_world

    runtime = config.runtime
    with closing(init_world(runtime.device, runtime.sharding, runtime.timeout_s)) as world:
        if config.optimizer.learning_rate is None:
            config = config.changed(learning_rate=world.on_main(lambda: learning_rate_for(config.model)))
        first = measure_first_steps(config, world)
    if not world.is_main:
        return 0
    by_headroom = sorted(first.budgets.items(), key=lambda item: item[1].headroom)
    has_headroom = config.method.decay != "horizon"  # reaches zero by construction, at any learning rate
    table = [["layer", "momentum rms", "99 % of masked", *(["headroom"] if has_headroom else [])]]
    for name, budget in by_headroom[:10]:
        headroom = [f"{budget.headroom:.2f}x"] if has_headroom else []
        table.append([name, f"{first.momentum_rms[name]:.2e}", f"{budget.quantiles[2]:.3f}", *headroom])
    to_stdout("\n".join(aligned(table)), keep="\n")
    if len(by_headroom) > 10:
        to_stdout(f"... and {len(by_headroom) - 10} layers{' with more headroom' if has_headroom else ''}")
    max_steps = config.optimizer.max_steps
    hours = max_steps * first.tokens_per_step / first.tokens_per_s / 3600
    to_stdout(f"lam from the momentum's rms over {first.steps} steps: {first.lam:.2e}")
    to_stdout(f"{first.tokens_per_s:,.0f} tokens/s: {duration(3600 * hours)} for {max_steps} steps of training alone")
    if first.start_seconds:
        steps = first.start_seconds * first.tokens_per_s / first.tokens_per_step
        to_stdout(f"start: {first.start_seconds:,.1f} s before step 0, as long as {steps:,.0f} steps")
        kept = partial_folder(config.checkpoint.output_dir)
        to_stdout(f"its transformer blocks are in {kept}: castlm train with the same options takes them from there")
    to_stdout(f"peak memory of this process: {first.peak_bytes / 2**30:.2f} GiB")
    worst = by_headroom[0][1]
    floor = f"; masked weights end near {worst.floor:.1e}, the last rate" if worst.floor else ""
    late = [name for name, budget in by_headroom if not budget.reaches_zero]
    if not late:
        to_stdout(f"verdict: all {len(by_headroom)} layers reach zero{floor}")
        return 0
    factor = max(first.budgets[name].factor for name in late)
    to_stdout(
        f"verdict: {len(late)} of {len(by_headroom)} layers cannot reach zero; use decay='horizon', or "
        f"{factor:.1f}x the learning rate, or {factor:.1f}x the steps{floor}"
    )
    return 1


@dataclass
class MemoryOptions:
    """Predict the memory of each rank of a run, from the model's config alone, without weights. The options are those
    of `castlm train`, so that a run's config.yaml fits. Without --gpu and without a GPU here, it is the plan of a run
    on this CPU; otherwise precision auto is planned as bf16. A teacher_cache is planned as full. With --prune, predict
    `castlm prune`; its --solver is --init-from here. With --quantize, predict `castlm quantize`.
    """

    world_size: int = essential(
        1,
        at_least=1,
        help="Ranks that shard the run.",
    )

    gpu: float | str | None = essential(
        None,
        above=0,
        help="GPU that the run should fit on: h100, a100, ..., or a number of GiB.",
    )

    prune: bool = essential(
        False,
        help="Predict `castlm prune` on a CPU instead of a training run.",
    )

    quantize: str | None = choice(
        None,
        rounded_formats,
        essential=True,
        help="Predict `castlm quantize` to this format on a CPU instead of a training run, with a calibration text "
        "for int4 and int3.",
    )

    memory: Literal["model", "block"] = essential(
        "block",
        help="With --prune and --quantize: keep the whole model in memory, or one transformer block. Experts and "
        "images need the whole model.",
    )


def memory(arguments: list[str]) -> int:
    nothing = {"dataset": "none", "output_dir": "none"}
    of_files = {*names_of(CheckpointOptions), *names_of(EvaluationOptions)} - {"output_dir", "save_steps", "async_save"}
    config, options = parse_train(
        arguments, "plan memory", MemoryOptions, nothing, of_files, lambda more: more.world_size
    )
    import torch

    from castlm.core.distill import default_chunk_tokens
    from castlm.devices import DEVICES
    from castlm.dtypes import FLOATS
    from castlm.hardware import choose_device, choose_precision
    from castlm.lab.planning.hours import step_seconds
    from castlm.lab.planning.memory import PlannedRun, plan_memory, read_config

    if options.prune and options.quantize is not None:
        raise InputError(f"--prune and --quantize {options.quantize} are two commands: give one of them")
    model, pattern, start, teacher = config.model.model, config.model.pattern, config.start, config.teacher
    if start.name not in methods_of(pattern) and not Path(start.name).expanduser().is_dir():
        solvers = ", ".join(methods_of(pattern))
        raise InputError(f"init_from {start.name} is neither {solvers} nor the folder of a model of {pattern}")
    if options.prune or options.quantize is not None:
        to_stdout(_one_shot(config, options).table(), keep="\n")
        return 0
    num_sequences, seq_len = start.calibration_sequences or MAX_SEQUENCES, config.data.seq_len
    on_cpu = options.gpu is None and choose_device(config.runtime.device) == "cpu"
    precision: str = config.runtime.precision
    if on_cpu:
        precision = choose_precision(precision, torch.device("cpu"), read_config(model))
    dtype = FLOATS["fp32" if precision == "fp32" else "bf16"]
    solver = trained_from(start.name, pattern)
    run = PlannedRun(
        seq_len=seq_len,
        micro_batch=config.optimizer.per_device_train_batch_size,
        pattern=pattern,
        scale_groups=config.method.scale_groups,
        weight_bits=config.method.weight_bits,
        apart=not config.data.cross_document_attention,
        accumulates=config.optimizer.gradient_accumulation_steps > 1,
        steps_in_backward=config.optimizer.step_in_backward,
        measures_first=config.optimizer.step_in_backward and config.optimizer.max_grad_norm > 0,
        moments_on_host=config.optimizer.moments_on_host,
        checkpointing=config.runtime.gradient_checkpointing,
        compute=dtype,
        teacher=dtype if teacher.eta > 0 else None,
        cached=teacher.teacher_cache is not None,
        hidden_states=bool(teacher.hidden_weight),
        moments=config.optimizer.moments,
        calibration_tokens=num_sequences * seq_len if solver and solver.reads_text else 0,
        on_cpu=on_cpu,
        saves_in_background=config.checkpoint.save_steps > 0 and config.checkpoint.async_save,
        chunk_tokens=default_chunk_tokens(torch.device("cpu" if on_cpu else "cuda")),
    )
    gib = options.gpu
    if isinstance(gib, str):
        known = {name: device.memory_gib for name, device in DEVICES.items() if device.memory_gib is not None}
        if gib not in known:
            raise InputError(f"there is no card {gib!r}: use one of {', '.join(known)}, or a number of GiB")
        gib = known[gib]
    plan = plan_memory(model, run, teacher=teacher.teacher, world_size=options.world_size, gpu_gib=gib)
    to_stdout(plan.table(), keep="\n")
    if isinstance(options.gpu, str):
        accumulation = config.optimizer.gradient_accumulation_steps
        seconds = step_seconds(model, run, DEVICES[options.gpu], teacher=teacher.teacher, accumulation=accumulation)
        tokens, steps = run.tokens * accumulation * options.world_size, config.optimizer.max_steps
        speed = f"{tokens / seconds:,.0f} tokens/s"
        to_stdout(f"a step of {tokens:,} tokens takes about {seconds:.2f} s by its operations: {speed}")
        to_stdout(f"{steps:,} steps take {duration(steps * seconds)}, without start and evaluations")
    return 0 if plan.fits in (True, None) else 1


def _one_shot(config: TrainConfig, options: MemoryOptions) -> MemoryPlan:
    """The plan of `castlm prune` or `castlm quantize`."""
    from castlm.lab.planning.one_shot import ROUND, plan_one_shot

    start, pattern = config.start, config.model.pattern
    seq_len = config.data.seq_len if "seq_len" in config.given else None
    if options.quantize is not None:
        return plan_one_shot(
            config.model.model,
            memory=options.memory,
            rule=ROUND,
            reads_text=FORMATS[options.quantize].reads_text,
            num_sequences=start.calibration_sequences or 64,
            seq_len=seq_len or 512,
        )
    return plan_one_shot(
        config.model.model,
        memory=options.memory,
        pattern=pattern,
        reads_text=method_of(start.name, pattern).reads_text,
        num_sequences=start.calibration_sequences,
        seq_len=seq_len,
        effort=EFFORTS[start.start_effort],
        reconstructs=bool(start.reconstruct_epochs),
    )


@dataclass
class FitCommand:
    """Fit a scaling law to finished runs: loss(D) = L_inf + B * D^-beta, in nats per token, for D training tokens."""

    runs: tuple[str, ...] = positional(
        help="Run folders, folders of runs, compare results (.json), or CSVs: tokens,perplexity[,seed][,method].",
    )

    method: str | None = option(
        None,
        help="Use only the runs of this method.",
    )

    json: str | None = option(
        None,
        help='File for the law, for `castlm plan predict`; "-" prints it.',
    )

    plot: str | None = option(
        None,
        help="File for a plot of the fit and its residuals (.pdf, .png or .svg).",
    )

    def run(self) -> int:
        from castlm.lab.planning.fit import fit_law
        from castlm.lab.planning.law import check_plot, plot_law
        from castlm.lab.planning.points import read_points

        check_json_path(self.json)
        if self.plot is not None:
            check_plot(self.plot)
            if self.json is not None and os.path.realpath(self.json) == os.path.realpath(self.plot):
                raise InputError(f"--json and --plot both name {self.plot}: choose another name for one of them")
        points = read_points(self.runs, method=self.method)
        law = fit_law(points)
        write_json(self.json, law.as_dict())
        if self.plot is not None:
            plot_law(law, points, self.plot)
        if self.json == "-":
            return 0
        for name, (low, high) in law.intervals.items():
            to_stdout(f"{name:<6} {getattr(law, name):.5g}  (90 %: {low:.5g} to {high:.5g})")
        to_stdout(f"{law.num_points} runs at {law.num_budgets} budgets")
        to_stdout(law.tested(), keep="\n")
        return 0


@dataclass
class PredictCommand:
    """Predict the perplexity of a token budget, or the tokens that a perplexity needs, from a scaling law."""

    runs: tuple[str, ...] = positional(
        help="A law from `castlm plan fit --json`, or the runs to fit one to: folders of runs, or of `castlm "
        "compare`, or CSVs.",
    )

    method: str | None = option(
        None,
        help="Use only the runs of this method.",
    )

    tokens: float | None = option(
        None,
        above=0,
        below=1e30,
        help="Training tokens to predict the perplexity for.",
    )

    target_ppl: float | None = option(
        None,
        above=1,
        below=1e30,
        help="Perplexity to find the training tokens for.",
    )

    tokens_per_s: float | None = option(
        None,
        above=0,
        help="Measured throughput of one GPU or CPU; adds the hours of training.",
    )

    force: bool = option(
        False,
        help="Predict more than 10 times beyond the largest run of the law, too.",
    )

    def run(self) -> int:
        from castlm.lab.planning.fit import fit_law
        from castlm.lab.planning.law import Law, predict_perplexity, readable, tokens_for
        from castlm.lab.planning.points import read_points

        if (self.tokens is None) == (self.target_ppl is None):
            raise InputError("give one of --tokens and --target-ppl")
        file = Path(self.runs[0])
        content = read_json(file) if len(self.runs) == 1 and file.suffix == ".json" else None
        if isinstance(content, dict) and "draws" in content:
            law = Law.from_dict(content)
        else:
            law = fit_law(read_points(self.runs, method=self.method), leave_largest_out=False)
        if law.runs_of:
            to_stdout("law of " + ", ".join(f"{name} {value}" for name, value in law.runs_of.items()))
        if self.tokens is not None:
            self._check_reach(law, self.tokens, f"--tokens {self.tokens:.3g}")
            found = predict_perplexity(law, self.tokens)
            beyond = f", {found.beyond:.1f}x beyond the fitted budgets" if found.beyond > 1 else ""
            beyond = f", {found.below:.1f}x below the fitted budgets" if found.below > 1 else beyond
            ppl, low, high = (readable(value) for value in (found.perplexity, found.low, found.high))
            least = ", the least that is predicted, since the law itself falls below the dense model" * found.is_least
            to_stdout(f"{self.tokens:.3g} tokens: perplexity {ppl} (90 %: {low} to {high}){beyond}{least}")
            tokens: float | None = self.tokens
        else:
            assert self.target_ppl is not None
            needed = tokens_for(law, self.target_ppl)
            tokens = needed.tokens
            if tokens is not None:
                self._check_reach(law, tokens, f"--target-ppl {self.target_ppl:g} needs {tokens:.3g} tokens, which")
            to_stdout(needed, keep="\n")
        if tokens is not None and self.tokens_per_s is not None:
            hours = tokens / self.tokens_per_s / 3600
            to_stdout(f"{duration(3600 * hours)} at {self.tokens_per_s:,.0f} tokens/s")
        return 0 if tokens is not None else 1

    def _check_reach(self, law: Law, tokens: float, what: str) -> None:
        """Raises `InputError`, which begins with `what`, for tokens far beyond the runs of a law, unless forced."""
        largest = law.tokens_range[1]
        if tokens > FARTHEST * largest and not self.force:
            raise InputError(
                f"{what} is {tokens / largest:,.0f} times the largest run of the law, {largest:.3g} tokens, and a law "
                f"tells little beyond {FARTHEST} times: add longer runs, or give --force"
            )
