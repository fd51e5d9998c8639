"""TrainConfig: one dataclass is the Python API, the YAML file and the command line. No torch here: help is instant."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from castlm.core.errors import InputError
from castlm.files import read_yaml_mapping

STARTS_DENSE = ("dense", "gradual_magnitude")
"""Methods that take no initial mask."""

Method = Literal["cast", "ste", "srste", "ast", "gradual_magnitude", "dense"]


@dataclass
class TrainConfig:
    """A dense causal LM in, an n:m sparse one out. Names are Hugging Face's where the meaning is the same."""

    model: str
    """Local Hugging Face folder, hub id, GGUF file, or "demo" for the embedded SmolLM2-135M-Instruct."""

    dataset: str
    """Training text: .txt, .jsonl, .jsonl.gz or .parquet, a folder or glob of these, or a hub name (streamed)."""

    output_dir: str
    """New folder for the run; the proven result comes to lie in `output_dir/model`."""

    pattern: str = "2:4"
    """n:m, n weights kept of every m along the input axis."""

    max_steps: int = 300
    """Optimizer steps, the horizon T of the method. It may not change on resume."""

    learning_rate: float = 3e-4
    """Peak learning rate."""

    per_device_train_batch_size: int = 8
    """Sequences per device and micro-step."""

    gradient_accumulation_steps: int = 1
    """Micro-steps per optimizer step."""

    seq_len: int = 512
    """Tokens per sequence."""

    method: Method = "cast"
    """cast, a rival, or the dense control trained alike."""

    recipe: Literal["castlm", "paper"] = "castlm"
    """castlm: our defaults. paper: decay, rates, betas, eta, batch and length as published for LLaMA2-7B."""

    decay: Literal["horizon", "proportional", "additive", "none"] = "horizon"
    """How masked weights go to zero; see AdamS."""

    decay_end: float = 0.1
    """Share of max_steps after which "horizon" has every masked weight at zero."""

    second_moment: Literal["gradient", "mix"] | None = None
    """What AdamS squares for its second moment: mix is the paper's; by default gradient, as Adam, where it can be."""

    lam: float | Literal["auto"] = 4e-7
    """Decay coefficient of "proportional" and "additive", of the order of the gradient; auto measures that first."""

    mask_interval: int = 10
    """Steps between mask refreshes (T1)."""

    initial_mask: str | None = None
    """Where the run starts: magnitude, wanda, sparsegpt, or an n:m model, folder or hub id, whose masks and weights are
    taken; by default sparsegpt for cast, magnitude for its rivals. cast keeps masks that are not magnitude's."""

    calibration_sequences: int = 128
    """Sequences of the training text, of seq_len tokens, that wanda and sparsegpt are calibrated on there."""

    srste_lam: float = 2e-4
    """Decay coefficient of the rivals srste and ast, times the masked weight, in the gradient."""

    scale_groups: int = 2
    """Learnable factors per weight row, folded in at the end; 0 turns weight scaling off."""

    eta: float = 2 / 3
    """Share of the KL to the dense teacher in the loss, 0 to 1; 0 trains without a teacher."""

    temperature: float = 1.0
    """Temperature of the KL, which is multiplied by its square."""

    teacher_top_k: int = 0
    """Teach by the teacher's so many most probable tokens and all others as one; 0: by its whole distribution."""

    teacher_cache: str | None = None
    """Folder that keeps them, 8 bytes each: text that a teacher has read in any run needs it no more."""

    repeat_blocks: bool = False
    """Every epoch has the blocks of the first: with teacher_cache the teacher reads each of them once."""

    warmup_ratio: float = 0.05
    """Share of max_steps in which the rate rises linearly from 0."""

    min_lr_ratio: float = 0.1
    """The cosine ends at this share of learning_rate."""

    adam_betas: tuple[float, float] = (0.5, 0.99)
    """Decay rates of Adam's moments."""

    moments: Literal["fp32", "bf16", "8bit"] = "fp32"
    """How Adam's moments are kept: bf16 is the first alone, 8bit both. Saves 2 and about 6 bytes a weight."""

    adam_epsilon: float = 1e-8
    """Added to the root of the second moment."""

    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down; 0 turns clipping off."""

    seed: int = 0
    """Order of the data, dropout, and the held-out split."""

    eval_dataset: str | None = None
    """Text for perplexity; without it, eval_fraction of the documents of `dataset` are held out."""

    eval_fraction: float = 0.02
    """Share of the documents held out when there is no eval_dataset."""

    eval_tokens: int = 32768
    """At most so many tokens are evaluated; 0 means all."""

    eval_steps: int = 0
    """Steps between evaluations; 0 means ten in a run."""

    column: str = "text"
    """Column of the text in .jsonl and .parquet."""

    dataset_split: str = "train"
    """Split of a hub dataset."""

    dataset_config: str | None = None
    """Configuration of a hub dataset."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute type of the forward and backward pass; master weights are always fp32. auto: bf16 where it is fast."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more time, far less memory."""

    fused_optimizer: Literal["auto", "on", "off"] = "auto"
    """AdamS in one pass over memory: C++ kernels on a CPU, torch.compile on a GPU. auto: on a CPU where the kernels are
    built, on a GPU from 10M parameters on, where it compiles."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA when there is a GPU, and says which."""

    sharding: Literal["full", "replicate", "hybrid"] = "full"
    """Under torchrun: FSDP2 over all ranks, one copy per rank, or FSDP2 inside a node and copies across nodes."""

    save_steps: int = 100
    """Steps between checkpoints, and one when training ends; 0 means only on Ctrl-C and SIGTERM."""

    save_total_limit: int = 2
    """Checkpoints kept."""

    async_save: bool = True
    """Write checkpoints while training goes on, from one more copy of weights and moments in host memory."""

    timeout_s: float = 600
    """Under torchrun: seconds a rank waits for the others before the run stops and names those that are missing."""

    log_steps: int = 1
    """Steps between lines in metrics.jsonl; mask refreshes between self-checks of the masks."""

    prefetch: bool = True
    """Tokenise the next batch in a thread meanwhile."""

    tensorboard: bool = True
    """Write TensorBoard events when the package is installed."""

    ignore_decay_budget: bool = False
    """Run even when the decay budget says that masked weights cannot reach zero."""

    save_dtype: Literal["source", "fp32", "bf16", "fp16"] = "source"
    """What the result is written in; source: what the dense model is stored in."""

    resume: bool = False
    """Continue from the newest whole checkpoint in output_dir."""

    overwrite: bool = False
    """Replace what output_dir holds."""

    trust_remote_code: bool = False
    """Run Python code that comes with a hub model."""

    revision: str | None = None
    """Revision of a hub model."""

    left_dense: tuple[str, ...] = field(default_factory=tuple)
    """Further layers to leave dense, each a part of its name."""

    def __post_init__(self) -> None:
        for name, right, remedy in (
            ("max_steps", self.max_steps >= 1, "at least 1"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "above 0"),
            ("per_device_train_batch_size", self.per_device_train_batch_size >= 1, "at least 1"),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps >= 1, "at least 1"),
            ("seq_len", self.seq_len >= 2, "at least 2"),
            ("decay_end", 0 < self.decay_end <= 1, "in (0, 1]"),
            ("lam", self.lam == "auto" or self.lam >= 0, "at least 0, or auto"),
            ("srste_lam", self.srste_lam >= 0, "at least 0"),
            ("mask_interval", self.mask_interval >= 1, "at least 1"),
            ("calibration_sequences", self.calibration_sequences >= 1, "at least 1"),
            ("scale_groups", self.scale_groups >= 0, "at least 0"),
            ("eta", 0 <= self.eta <= 1, "between 0 and 1"),
            ("temperature", self.temperature > 0, "above 0"),
            ("teacher_top_k", self.teacher_top_k >= 0, "at least 0"),
            ("warmup_ratio", 0 <= self.warmup_ratio < 1, "in [0, 1)"),
            ("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "between 0 and 1"),
            ("adam_betas", all(0 <= b < 1 for b in self.adam_betas), "in [0, 1)"),
            ("max_grad_norm", self.max_grad_norm >= 0, "at least 0"),
            ("eval_fraction", 0 < self.eval_fraction < 1, "between 0 and 1"),
            ("eval_tokens", self.eval_tokens >= 0, "at least 0"),
            ("eval_steps", self.eval_steps >= 0, "at least 0"),
            ("save_steps", self.save_steps >= 0, "at least 0"),
            ("save_total_limit", self.save_total_limit >= 1, "at least 1"),
            ("timeout_s", self.timeout_s > 0, "above 0"),
            ("log_steps", self.log_steps >= 1, "at least 1"),
        ):
            if not right:
                raise InputError(f"{name} = {getattr(self, name)} is out of range: it must be {remedy}")
        if self.initial_mask is None:
            self.initial_mask = "sparsegpt" if self.method == "cast" else "magnitude"
        if self.initial_mask != "magnitude" and self.method in STARTS_DENSE:
            raise InputError(f"initial_mask {self.initial_mask}: method {self.method} starts dense, leave it out")
        if self.teacher_cache and not (self.teacher_top_k and self.eta):
            raise InputError("teacher_cache keeps what teacher_top_k names: set that, 64 say, and eta above 0")
        if self.resume and self.overwrite:
            raise InputError("resume and overwrite exclude each other: choose one")

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def as_yaml(self) -> str:
        """The run as a file for `--config`, without how it was started."""
        import yaml

        kept = {k: v for k, v in self.as_dict().items() if k not in ("resume", "overwrite")}
        return yaml.safe_dump({k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}, sort_keys=False)


RECIPES: dict[str, dict[str, Any]] = {
    "castlm": {},
    # arXiv 2509.25996, Table XI; schedule, warm-up, betas and clipping are not given there
    "paper": {
        "decay": "proportional",
        "second_moment": "mix",
        "initial_mask": "magnitude",
        "learning_rate": 2e-5,
        "lam": 4e-7,
        "mask_interval": 10,
        "scale_groups": 2,
        "eta": 1 / 3,
        "temperature": 1.0,
        "adam_betas": (0.9, 0.999),
        "max_steps": 7500,
        "seq_len": 4096,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 256,
    },
}

# What the result of a run does not depend on.
WITHOUT_EFFECT = frozenset(
    {
        "output_dir",
        "resume",
        "overwrite",
        "teacher_cache",
        "log_steps",
        "save_steps",
        "save_total_limit",
        "async_save",
        "timeout_s",
        "prefetch",
        "tensorboard",
        "ignore_decay_budget",
        "recipe",
        "trust_remote_code",
    }
)

# What may differ between a run and its resumption; the split of the global batch is compared as a product.
FREE_ON_RESUME = WITHOUT_EFFECT | {
    "save_dtype",
    "eval_steps",
    "device",
    "fused_optimizer",
    "gradient_checkpointing",
    "sharding",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
}


def mapping_arguments(values: dict[str, Any]) -> list[str]:
    """Fields and values as command-line arguments, so that a YAML file and the command line are checked alike."""
    arguments: list[str] = []
    for key, value in values.items():
        option = f"--{str(key).replace('_', '-')}"
        if isinstance(value, bool):
            arguments.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, (list, tuple)):
            arguments += [option, *map(str, value)]
        else:
            arguments += [option, str(value)]
    return arguments


def parse_train_arguments(
    arguments: list[str],
    parse: Callable[[type[Any], list[str], str], Any],
    kind: type[Any] = TrainConfig,
    name: str = "train",
) -> Any:
    """`castlm train`'s arguments: the recipe's values, then `--config FILE`'s, then the rest; the last one counts.

    Args:
        kind: TrainConfig, or the options of the command `name`, with a TrainConfig among their fields.

    Raises:
        InputError: anything that `parse` or `TrainConfig` refuses.
    """
    given: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if option != "--config":
            given.append(argument)
            continue
        if not equals:
            value = next(rest, "")
        if not value:
            raise InputError(f"--config needs a YAML file: castlm {name} --config run.yaml")
        given = mapping_arguments(read_yaml_mapping(value)) + given
    recipe = "castlm"
    for at, argument in enumerate(given):
        if argument == "--recipe" and at + 1 < len(given):
            recipe = given[at + 1]
        elif argument.startswith("--recipe="):
            recipe = argument.partition("=")[2]
    return parse(kind, mapping_arguments(RECIPES.get(recipe, {})) + given, name)
