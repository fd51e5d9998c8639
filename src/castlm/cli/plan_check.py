"""`castlm plan check`: predicts whether a run converges and how long it takes, and estimates lam."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from castlm.cli.train import parse_train
from castlm.core.errors import InputError

if TYPE_CHECKING:
    from castlm.training.lam import Calibration


@dataclass
class CheckOptions:
    """Run and discard the first steps of a training, to predict whether it will converge and its cost."""

    price_per_hour: float | None = None
    """Price of one device per hour; adds the cost of the run."""

    devices: int | None = field(default=None, metadata={"at_least": 1})
    """Number of devices to pay for, at the speed measured here. The default is one per rank."""


def main(arguments: list[str]) -> int:
    config, given = parse_train(arguments, "plan check", CheckOptions)
    options = CheckOptions(**given)
    from castlm.planning.law import check_positive

    if options.price_per_hour is not None:
        check_positive("price_per_hour", options.price_per_hour)
    elif options.devices is not None:
        raise InputError(f"devices is {options.devices} without a price: give --price-per-hour too")
    if not config.method.row.decays:
        raise InputError(f"method {config.method.method} has no decay to check: plan check is for method cast")
    from castlm.distributed.world import closing, init_world
    from castlm.training.train import calibrate

    runtime = config.runtime
    with closing(init_world(runtime.device, runtime.sharding, runtime.timeout_s)) as world:
        found = calibrate(config, world)
    return report(config.method.decay, config.optimizer.max_steps, options, found, world.size) if world.is_main else 0


def report(decay: str, max_steps: int, options: CheckOptions, found: Calibration, world_size: int) -> int:
    """Prints the findings. Returns the exit code: 1 if the masked weights cannot reach zero."""
    from castlm.planning.law import duration, gpu_hours

    by_headroom = sorted(found.layers.items(), key=lambda item: item[1].headroom)
    has_headroom = decay != "horizon"  # reaches zero by construction, at any learning rate
    print(f"{'layer':<48}{'momentum rms':>14}{'99 % of masked':>16}" + f"{'headroom':>10}" * has_headroom)
    for name, layer in by_headroom[:10]:
        row = f"{name:<48}{layer.momentum_rms:>14.2e}{layer.budget.quantiles[2]:>16.3f}"
        print(row + f"{layer.headroom:>9.2f}x" * has_headroom)
    if len(by_headroom) > 10:
        print(f"... and {len(by_headroom) - 10} layers" + " with more headroom" * has_headroom)
    hours = gpu_hours(max_steps * found.tokens_per_step, found.tokens_per_s)
    print(f"lam from the momentum's rms over {found.steps} steps: {found.lam:.2e}")
    print(f"{found.tokens_per_s:,.0f} tokens/s: {duration(hours)} for {max_steps} steps of training alone")
    if found.start_seconds:
        steps = found.start_seconds * found.tokens_per_s / found.tokens_per_step
        print(f"start: {found.start_seconds:,.1f} s before step 0, as long as {steps:,.0f} steps")
        hours += found.start_seconds / 3600
    if options.price_per_hour is not None:
        devices = options.devices or world_size
        cost = hours * devices * options.price_per_hour
        print(
            f"cost without evaluations: {cost:,.2f}, at {options.price_per_hour:g} an hour of each of {devices} devices"
        )
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
