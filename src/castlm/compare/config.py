"""The options of a comparison, and of its one-shot runs; without torch, so that planning is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from castlm.data.options import ScoredTextOptions
from castlm.fields import essential
from castlm.training.options import SEQ_LEN


@dataclass(kw_only=True)
class SharedOptions:
    """Options that all runs of a comparison or a sweep share."""

    model: str = essential()
    """Local Hugging Face folder, hub id, GGUF file, or "demo"."""

    dataset: str = essential()
    """Training text, as in `castlm train`, but only one."""

    eval_dataset: str = essential()
    """Text for the perplexity, the same for all runs."""

    output_dir: str = essential()
    """Folder for the runs and the result. The same command continues an earlier start there."""

    config: str | None = essential(None)
    """YAML file of `castlm train` options for all runs."""

    seq_len: int | None = None
    """Tokens per sequence, in training and evaluation."""

    per_device_train_batch_size: int | None = None
    """Sequences per device and micro-step."""

    eval_tokens: int | None = None
    """Maximum number of tokens to evaluate on. 0 is all of them."""


@dataclass(kw_only=True)
class CompareConfig(SharedOptions):
    """Compare methods that make a model n:m, with the same start, data, teacher, token budget and seeds, in one table.

    A dense control with the same training is always included. Finished runs are not repeated. The exit code is 1 if a
    run failed or diverged; the table gives the reason, and lists runs that fell short.
    """

    budget_tokens: int | None = essential(None)
    """Training tokens of each run; with `--preset budgets`, of the largest runs."""

    max_steps: int | None = essential(None, at_least=1)
    """Optimizer steps of each run, instead of --budget-tokens. Variants with larger steps take fewer, so that all train
    on the same number of tokens.
    """

    methods: str | None = essential(None)
    """Methods, separated by commas: cast, finetune, ste, srste, ast, gradual_magnitude, dense, magnitude, wanda,
    sparsegpt; for structured patterns flap and taylor. The default is all of them, unless variants or a preset
    are given.
    """

    published_starts: bool = False
    """Start each method as in its paper, instead of all from the same weights. finetune then starts from SparseGPT as
    published: without rotation, permutation, ADMM and least squares, unless config sets them.
    """

    preset: Literal["oscillation", "decay", "parts", "budgets", "structured"] | None = essential(None)
    """A prepared set of variants: one of the paper's ablations, all methods at four budgets, or decay against cut for a
    structured pattern.
    """

    variants: str | None = None
    """YAML file that maps the name of each variant to its own options of `castlm train`. Its method is the option
    `method`, otherwise its name if that is a method, otherwise cast.
    """

    seeds: int = essential(3, at_least=1)
    """Number of runs of each variant, with seeds 0, 1, ..."""

    learning_rates: str | None = essential(None)
    """Learning rates to try, separated by commas. Each variant without its own rate tries them with seed 0 and uses the
    best for the other seeds.
    """

    tuning_dataset: str | None = essential(None)
    """Text whose perplexity selects the learning rate, so that `eval_dataset` plays no part in the choice."""

    calibration: str | None = None
    """Calibration text of one-shot methods such as wanda and sparsegpt. The default is the training text."""

    num_sequences: int = field(default=128, metadata={"at_least": 1})
    """Number of calibration sequences of one-shot methods."""


@dataclass(frozen=True, kw_only=True)
class OneshotConfig(ScoredTextOptions):
    """The options of a one-shot run, named as in TrainConfig."""

    model: str
    method: str
    calibration: str
    eval_dataset: str
    output_dir: str = ""
    pattern: str = "2:4"
    seq_len: int = SEQ_LEN
    """Tokens per sequence of the evaluation. Calibration sequences have the model's context, at most 2,048 tokens."""
    num_sequences: int = 128
    eval_tokens: int = 32768
    calibration_split: str = "train"
    calibration_config: str | None = None
    eval_split: str = "validation"
    eval_config: str | None = None
    device: str = "auto"
    precision: str = "auto"
    """Compute type of the evaluation and of the passes over the calibration text."""
    seed: int = 0
    trust_remote_code: bool = False
    revision: str | None = None
