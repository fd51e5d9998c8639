"""The options that training methods read: the method itself, an adapter, the optimizer with its schedule.

Importing this module does not import torch, so that `--help` is instant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from castlm.core.decay import DECAYS, decay_alpha
from castlm.core.errors import InputError
from castlm.fields import Bounded, Needs, choice, essential, option
from castlm.methods.table import METHODS, Method, Step0

STABLE = 0.8
"""Fraction of the run after which `warmup_stable_decay` falls."""

Shape = Callable[[float, float], float]
"""The height of the schedule, from 1 at the start to 0 at the end, as a function of the progress since the warm-up and
of the progress of the whole run, both in [0, 1]."""

SCHEDULES: dict[str, Shape] = {
    "cosine": lambda progress, overall: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress, overall: 1 - progress,
    "constant": lambda progress, overall: 1.0,
    "warmup_stable_decay": lambda progress, overall: min(1.0, (1 - overall) / (1 - STABLE)),
}
"""By the names of `transformers`; the learning rate is `min_lr_ratio + (1 - min_lr_ratio) * height` of its peak."""


def of_methods(option: str) -> Needs:
    """The condition of an option that only some methods read: a method that names it in its row of `METHODS`."""
    methods = [method for method, row in METHODS.items() if option in row.options]
    return Needs(f"method {' or '.join(methods)}", lambda run: option in run.row.options)


@dataclass(frozen=True, kw_only=True)
class MethodOptions(Bounded):
    """The method by which the model becomes sparse."""

    method: str = choice(
        "cast",
        METHODS,
        help="Training method: CAST, one of its rivals, or the dense control.",
    )

    decay: str = choice(
        "horizon",
        DECAYS,
        needs=of_methods("decay"),
        help="Rule by which CAST decays masked weights to zero; see AdamS.",
    )

    decay_end: float | None = option(
        None,
        above=0,
        at_most=1,
        needs=(
            of_methods("decay_end"),
            Needs("a decay that ends before the run", lambda run: run.reads_decay_end),
        ),
        help='Fraction of max_steps after which "horizon" has every masked weight at zero and the mask is final. '
        "The default is 0.3 for n:m from a given mask, else 0.1.",
    )

    lam: float | Literal["auto"] | None = option(
        None,
        at_least=0,
        needs=(of_methods("lam"), Needs("a decay that uses lam", lambda run: run.reads_lam)),
        help='Decay coefficient. Of "proportional" and "additive" it is about the size of the gradient: by default '
        "4e-7, and auto measures the momentum first. In the methods srste and ast the gradient of a masked weight "
        "gains lam times the weight (ast: AST's equation under plain Adam, not its authors' optimizer): by default "
        "0.005; our tables use 0.05 for stories260K.",
    )

    mask_interval: int = option(
        10,
        at_least=1,
        needs=(
            of_methods("mask_interval"),
            Needs(
                "init_from magnitude, or decay horizon",
                lambda run: (
                    not run.row.decays or run.init_from == "magnitude" or run.step0(run.init_from) == "from zero"
                ),
            ),
        ),
        help="Steps between mask refreshes (T1). With a given n:m mask, masked weights start at zero, and a "
        "refresh keeps one again if it has grown larger than a kept weight of its group.",
    )

    scale_groups: int = option(
        2,
        at_least=0,
        needs=of_methods("scale_groups"),
        help="Learnable scale factors per weight row, folded into the weights at the end. 0 turns weight scaling off.",
    )

    weight_bits: Literal[4, 3] | None = option(
        None,
        help="4 or 3 trains weights of so many bits, with a trained scale for each 64 columns of a row; castlm "
        "pack stores them as int4 or int3. By default, weights are not rounded.",
    )

    ignore_decay_budget: bool = option(
        False,
        needs=Needs("a decay", lambda run: run.row.decays and DECAYS[run.decay].reduces),
        changes_result=False,
        help="Run even if the decay budget says that masked weights cannot reach zero.",
    )

    @property
    def row(self) -> Method:
        """The row of the method in the table."""
        return METHODS[self.method]

    @property
    def reads_lam(self) -> bool:
        """Whether `lam` has an effect."""
        return "lam" in self.row.options and (not self.row.decays or DECAYS[self.decay].needs_lam)

    @property
    def default_lam(self) -> float:
        """The decay coefficient where none is given: of the mix in AdamS, or of a weight in a gradient (SR-STE)."""
        return 4e-7 if self.row.decays else 5e-3

    @property
    def reads_decay_end(self) -> bool:
        """Whether `decay_end` has an effect."""
        return self.row.decays and DECAYS[self.decay].uses_decay_end

    def step0(self, start: str) -> Step0:
        """The model at step 0, from `start`, the option `init_from`.

        A method that decays masked weights begins "from zero" if it is given a mask and its decay ends at zero. A
        refresh by magnitude then begins with the mask of the start, and a masked weight comes back once training has
        made it larger than a kept one. In all other cases masked weights decay from their dense values.
        """
        if not self.row.decays:
            return self.row.step0
        from_zero = start != "magnitude" and DECAYS[self.decay].exact_zero
        return "from zero" if from_zero else "dense"

    def alpha(self, step: int, max_steps: int) -> float:
        """The ramp of the decay before the 0-based `step`."""
        assert self.decay_end is not None
        return decay_alpha(step, max_steps, self.decay, self.decay_end)


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(Bounded):
    """The part of a sparse model that is trained."""

    adapter: Literal["none", "shira"] = essential(
        "none",
        needs=of_methods("adapter"),
        help="Trained part of the model. none: all weights that are not zero. shira: a PEFT adapter that keeps "
        "every zero when it is merged; it is also saved in `output_dir/adapter`.",
    )

    lora_r: int = option(
        16,
        at_least=1,
        needs=(of_methods("lora_r"), Needs("adapter shira", lambda run: run.adapter != "none")),
        help="Size of the adapter: as many trained weights as LoRA of this rank has.",
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(Bounded):
    """Optimizer, schedule and batch."""

    max_steps: int = essential(
        300,
        at_least=1,
        at_most=10**9,
        help="Optimizer steps, the horizon T of the method. It cannot change on resume.",
    )

    num_train_epochs: float | None = option(
        None,
        above=0,
        at_most=1000,
        help="Passes over the training documents, instead of max_steps, which is then computed before the run.",
    )

    learning_rate: float | None = essential(
        None,
        above=0,
        help="Peak learning rate. The default follows the number of weights of the model, see "
        "`default_learning_rate`: 3e-3 up to 4M, 3e-4 at 135M, 1.3e-4 at 0.5B and 2.2e-5 at 7B.",
    )

    per_device_train_batch_size: int = essential(
        8,
        at_least=1,
        may_change=True,
        help="Sequences per device and micro-step.",
    )  # the global batch may not

    gradient_accumulation_steps: int = option(
        1,
        at_least=1,
        may_change=True,
        help="Micro-steps per optimizer step.",
    )

    lr_scheduler_type: str = choice(
        "cosine",
        SCHEDULES,
        help="Learning rate after the warm-up: cosine or linear down to min_lr_ratio, constant, or "
        "warmup_stable_decay, which is constant until the last fifth of the run and then falls linearly.",
    )

    warmup_steps: float = option(
        0.05,
        at_least=0,
        help="Steps in which the learning rate rises linearly from 0. Below 1, the share of max_steps.",
    )

    min_lr_ratio: float = option(
        0.1,
        at_least=0,
        at_most=1,
        needs=Needs("a learning rate that falls", lambda run: run.lr_scheduler_type != "constant"),
        help="The learning rate ends at this fraction of its peak.",
    )

    weight_decay: float = option(
        0.0,
        at_least=0,
        help="Decoupled weight decay, as in AdamW, of embeddings, head and layers left dense; in the dense "
        "control, of all weight matrices. Norms, biases, scale factors and sparse weights are not decayed.",
    )

    adam_betas: tuple[float, float] = option(
        (0.5, 0.99),
        at_least=0,
        below=1,
        help="Decay rates of Adam's moments.",
    )

    max_grad_norm: float = option(
        1.0,
        at_least=0,
        help="Gradient norm above which gradients are scaled down. 0 turns clipping off.",
    )

    second_moment: Literal["gradient", "mix"] | None = option(
        None,
        needs=of_methods("second_moment"),
        help="Second moment of AdamS: averaged squares of the gradient, as in Adam, or of the paper's mix. The "
        "default is gradient wherever the decay allows it.",
    )

    moments: Literal["fp32", "8bit"] = option(
        "fp32",
        help="Storage of Adam's moments. 8bit stores each moment in one byte: about 6 bytes less per weight.",
    )

    step_in_backward: bool = option(
        False,
        may_change=True,
        help="Update each transformer block as soon as the backward pass has its gradients, and drop these: some 4 "
        "bytes less per weight, with the same bits on a CPU. For one rank and gradient_accumulation_steps 1. With "
        "max_grad_norm above 0, each step runs its passes twice, first for the norm of all gradients.",
    )

    moments_on_host: bool = option(
        False,
        needs=Needs("step_in_backward", lambda run: run.step_in_backward),
        changes_result=False,
        help="Keep Adam's moments in the memory of the host, and copy those of a block to the GPU while it is "
        "stepped. For a GPU.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_steps > 1 and self.warmup_steps % 1:
            raise InputError(f"warmup_steps = {self.warmup_steps}: give a whole number of steps, or a share below 1")
        if self.step_in_backward and self.gradient_accumulation_steps > 1:
            raise InputError(
                f"step_in_backward: gradient_accumulation_steps {self.gradient_accumulation_steps} keeps the gradients "
                "of all blocks: set it to 1 and raise per_device_train_batch_size, or omit step_in_backward"
            )

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of the 0-based `step`: linear from 0 over the warm-up, then as `lr_scheduler_type` says."""
        assert self.learning_rate is not None  # a run has filled the default in by now
        warmup = round(self.warmup_steps * self.max_steps if self.warmup_steps < 1 else self.warmup_steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1, self.max_steps - warmup)
        height = SCHEDULES[self.lr_scheduler_type](progress, step / self.max_steps)
        return self.learning_rate * (self.min_lr_ratio + (1 - self.min_lr_ratio) * height)

    def sequences_per_step(self, num_ranks: int) -> int:
        """Sequences of an optimizer step, on all ranks together."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * num_ranks


def default_learning_rate(num_weights: int) -> float:
    """The peak learning rate for a model of this many weights N: 3e-4 (135M / N)^(2/3), at most 3e-3, in two digits.

    3e-4 is the best that was tried for SmolLM2-135M and 3e-3 for stories260K (docs/results). The exponent leads from
    there to the rate that CAST publishes for LLaMA2-7B, 2e-5 (arXiv 2509.25996, Table XI). At 0.5B, 3e-4 raised the
    perplexity from 21.7 to 46.4 in 4 steps.

    Examples:
        >>> [default_learning_rate(n) for n in (260_000, 134_515_008, 494_000_000, 6_738_000_000)]
        [0.003, 0.0003, 0.00013, 2.2e-05]
    """
    return float(f"{min(3e-3, 3e-4 * (135e6 / num_weights) ** (2 / 3)):.2g}")
