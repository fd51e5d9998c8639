"""`castlm plan`: its commands but for sweep, as dataclasses of options over the functions of this folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from castlm.cli.options import parse, write_json
from castlm.core.errors import InputError
from castlm.core.pattern import parse_pattern
from castlm.planning.sweep import SweepCommand
from castlm.training.config import TrainConfig, parse_train_arguments


@dataclass
class CheckCommand:
    """Will a run converge, what does it take and cost, what lam suits it? Runs its first steps and throws them away.

    Takes the options of `castlm train`, --config among them.
    """

    train: TrainConfig

    price_per_hour: float | None = None
    """What an hour of one device costs; gives the run's cost beside its hours."""

    devices: int | None = None
    """Devices to pay for while the run is as fast as measured here; one a rank when not given."""

    def run(self) -> int:
        from castlm.distributed.world import close_world, init_world
        from castlm.planning.predict import check_price, gpu_hours
        from castlm.training.lam import calibrate

        config = self.train
        if self.price_per_hour is not None:
            check_price(self.price_per_hour, 1 if self.devices is None else self.devices)
        elif self.devices is not None:
            raise InputError(f"devices is {self.devices} without a price: give --price-per-hour too")
        if config.method != "cast":
            raise InputError(f"method {config.method} has no decay to check: plan check is for method cast")
        world = init_world(config.device, config.sharding, config.timeout_s)
        try:
            found = calibrate(config, world)
        finally:
            close_world(world)
        by_headroom = sorted(found.layers.items(), key=lambda item: item[1].headroom)
        print(f"{'layer':<48}{'momentum rms':>14}{'99 % of masked':>16}{'headroom':>10}")
        for name, layer in by_headroom[:10]:
            row = f"{name:<48}{layer.momentum_rms:>14.2e}{layer.budget.quantiles[2]:>16.3f}"
            print(f"{row}{layer.headroom:>9.2f}x")
        if len(by_headroom) > 10:
            print(f"... and {len(by_headroom) - 10} layers with more headroom")
        hours = gpu_hours(config.max_steps * found.tokens_per_step, found.tokens_per_s)
        print(f"lam from the momentum's rms over {found.steps} steps: {found.lam:.2e}")
        print(f"{found.tokens_per_s:,.0f} tokens/s: {hours:.2f} hours for {config.max_steps} steps of training alone")
        if self.price_per_hour is not None:
            devices = self.devices or world.size
            cost = hours * devices * self.price_per_hour
            print(f"cost: {cost:,.2f}, at {self.price_per_hour:g} an hour of each of {devices} devices")
        print(f"peak memory of this process: {found.peak_bytes / 2**30:.2f} GiB")
        worst = by_headroom[0][1].budget
        floor = f"; masked weights end near {worst.floor:.1e}, the last rate" if worst.floor else ""
        late = [name for name, layer in by_headroom if not layer.budget.reaches_zero]
        if not late:
            print(f"verdict: all {len(by_headroom)} layers reach zero{floor}")
            return 0
        factor = max(found.layers[name].budget.factor for name in late)
        print(
            f"verdict: {len(late)} of {len(by_headroom)} layers cannot reach zero; use decay='horizon', or "
            f"{factor:.1f}x the learning rate, or {factor:.1f}x the steps{floor}"
        )
        return 1


@dataclass
class FitCommand:
    """Fit the scaling law of finished runs: loss(D) = L_inf + B * D^-beta, in nats a token over training tokens."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders, folders of runs, compare results (.json), or CSVs: tokens,perplexity[,params][,seed][,method]."""

    form: Literal["power", "loglinear", "joint"] = "power"
    """power; loglinear for short ranges; joint in parameters and tokens."""

    method: str | None = None
    """Only the runs of this method."""

    json: str | None = None
    """Write the law there, for `castlm plan predict`; "-" prints it."""

    plot: str | None = None
    """Write a picture of fit and residuals there (.png or .svg)."""

    def run(self) -> int:
        from castlm.planning.law import fit_law, plot_law
        from castlm.planning.points import read_points

        points = read_points(self.runs, method=self.method)
        law = fit_law(points, self.form)
        write_json(self.json, law.as_dict())
        if self.plot:
            plot_law(law, points, self.plot)
        if self.json == "-":
            return 0
        for name, (low, high) in law.intervals.items():
            print(f"{name:<6} {getattr(law, name):.5g}  (90 %: {low:.5g} to {high:.5g})")
        print(f"{law.num_points} runs at {law.num_budgets} budgets")
        if law.holdout is not None:
            print(f"the largest budget, predicted from the others: off by {law.holdout.error:+.3f} perplexity")
        else:
            print(f"the largest budget was not predicted from the others: {law.holdout_reason}")
        return 0


@dataclass
class PredictCommand:
    """What a fitted law promises: the perplexity of a budget, or the tokens that a perplexity needs."""

    law: Annotated[str, tyro.conf.Positional]
    """JSON written by `castlm plan fit --json`."""

    tokens: float | None = None
    """Training tokens to predict the perplexity of."""

    target_ppl: float | None = None
    """Perplexity to find the training tokens for."""

    params: float | None = None
    """Parameters of the model, for a joint law."""

    tokens_per_s: float | None = None
    """Measured throughput of one GPU (or CPU), to give hours."""

    price_per_hour: float | None = None
    """What an hour of that GPU costs; gives the cost beside the hours."""

    def run(self) -> int:
        from castlm.planning.law import Law
        from castlm.planning.predict import check_price, gpu_hours, predict_perplexity, tokens_for

        if (self.tokens is None) == (self.target_ppl is None):
            raise InputError("give one of --tokens and --target-ppl")
        if self.price_per_hour is not None:
            check_price(self.price_per_hour)
            if self.tokens_per_s is None:
                raise InputError(f"price_per_hour is {self.price_per_hour:g} of unknown hours: give --tokens-per-s too")
        law = Law.from_dict(_read_json(self.law))
        if self.tokens is not None:
            found = predict_perplexity(law, self.tokens, self.params)
            beyond = f", {found.beyond:.1f}x beyond the fitted budgets" if found.beyond > 1 else ""
            interval = f"90 %: {found.low:.3f} to {found.high:.3f}"
            print(f"{self.tokens:.3g} tokens: perplexity {found.perplexity:.3f} ({interval}){beyond}")
            tokens: float | None = self.tokens
        else:
            needed = tokens_for(law, float(self.target_ppl or 0), self.params)
            print(needed)
            tokens = needed.tokens
        if tokens is not None and self.tokens_per_s is not None:
            hours = gpu_hours(tokens, self.tokens_per_s)
            print(f"{hours:.2f} hours at {self.tokens_per_s:,.0f} tokens/s")
            if self.price_per_hour is not None:
                print(f"cost: {hours * self.price_per_hour:,.2f}, at {self.price_per_hour:g} an hour")
        return 0 if tokens is not None else 1


@dataclass
class WatchCommand:
    """Extrapolate a running run's prune-now perplexity to its end. Exit 1 when it will miss the target."""

    run_folder: Annotated[str, tyro.conf.Positional]
    """Output folder of `castlm train`."""

    target_ppl: float | None = None
    """Perplexity that the run should reach."""

    def run(self) -> int:
        from castlm.planning.watch import watch_run

        report = watch_run(self.run_folder, self.target_ppl)
        print(report.message)
        return 1 if report.verdict == "will miss" else 0


@dataclass
class MemoryCommand:
    """Bytes on each rank, from the model's config alone: no weights are needed."""

    model: str
    """Hugging Face folder, or a config .json such as configs/models/*.json."""

    world_size: int = 1
    """Ranks that shard the run."""

    seq_len: int = 4096
    """Tokens per sequence."""

    micro_batch: int = 1
    """Sequences per rank and micro-step."""

    accumulation: int = 1
    """Micro-steps per optimizer step."""

    pattern: str = "2:4"
    """n:m."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""

    precision: Literal["fp32", "bf16"] = "bf16"
    """Compute type."""

    moments: Literal["fp32", "bf16", "8bit"] = "fp32"
    """How Adam's moments are kept, as in castlm train."""

    initial_mask: str = "sparsegpt"
    """As in castlm train: for sparsegpt and wanda the first rank holds the whole model before step 0."""

    calibration_sequences: int = 128
    """Sequences that such an initial mask is calibrated on."""

    no_teacher: bool = False
    """As with eta 0."""

    gpu: str | None = None
    """Card that it should fit: H100-80GB, A100-80GB, ..., or a number of GiB."""

    def run(self) -> int:
        from castlm.planning.memory import GPUS, plan_memory

        gib = None
        if self.gpu is not None:
            try:
                gib = GPUS[self.gpu] if self.gpu in GPUS else float(self.gpu)
            except ValueError:
                raise InputError(
                    f"no such card {self.gpu!r}: use one of {', '.join(GPUS)}, or a number of GiB"
                ) from None
        n, m = parse_pattern(self.pattern)
        prunes = self.initial_mask in ("sparsegpt", "wanda")
        plan = plan_memory(
            self.model,
            world_size=self.world_size,
            seq_len=self.seq_len,
            micro_batch=self.micro_batch,
            n=n,
            m=m,
            accumulation=self.accumulation,
            gradient_checkpointing=self.gradient_checkpointing,
            compute_dtype=self.precision,
            teacher_dtype=self.precision,
            teacher=not self.no_teacher,
            moments=self.moments,
            calibration_tokens=self.calibration_sequences * self.seq_len if prunes else 0,
            gpu_gib=gib,
        )
        print(plan.table())
        return 0 if plan.fits in (True, None) else 1


COMMANDS = {"fit": FitCommand, "predict": PredictCommand, "watch": WatchCommand, "memory": MemoryCommand}


def plan_usage() -> str:
    kinds = {"check": CheckCommand, "sweep": SweepCommand, **COMMANDS}
    lines = [f"  {name:10}{kind.__doc__.splitlines()[0]}" for name, kind in kinds.items()]
    return "\n".join(
        ["usage: castlm plan COMMAND [OPTIONS]   (castlm plan COMMAND --help lists the options)", "", *lines]
    )


def _read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; write a law with castlm plan fit --json") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): write a law with castlm plan fit --json") from None


def main(arguments: list[str]) -> int:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name == "check":
        return parse_train_arguments(rest, parse, CheckCommand, "plan check").run()
    if name == "sweep":
        return int(parse(SweepCommand, rest, "plan sweep").run(parse))
    if name in COMMANDS:
        return int(parse(COMMANDS[name], rest, f"plan {name}").run())
    if name not in ("", "-h", "--help"):
        raise InputError(f"there is no castlm plan {name!r}: use check, sweep, {', '.join(COMMANDS)}")
    print(plan_usage())
    return 0 if name else 2
