"""The options of a comparison: read by `castlm compare` and filled in by `castlm plan sweep`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class CompareConfig:
    """Compare ways to n:m in one harness: same start, data, teacher, token budget and seeds, one table.

    A dense control with the same training is always among the runs. Finished runs are not repeated. The exit code is 1
    if a run failed or diverged; the table says why, and which runs fell short.
    """

    model: str
    """Local Hugging Face folder, hub id, GGUF file, or "demo"."""

    dataset: str
    """Training text, one as in `castlm train`."""

    eval_dataset: str
    """Text for the perplexity, the same for all runs."""

    output_dir: str
    """Folder of the runs and of table.md, table.json and table.html. Give it again to continue."""

    budget_tokens: int | None = None
    """Training tokens of each run; with `--preset budgets`, the budget of the largest runs."""

    max_steps: int | None = field(default=None, metadata={"at_least": 1})
    """Optimizer steps of each run, instead of --budget-tokens. A variant with larger steps makes fewer of them, so that
    all train on the same number of tokens."""

    methods: str | None = None
    """Methods, separated by commas: cast, finetune, ste, srste, ast, gradual_magnitude, dense, magnitude, wanda,
    sparsegpt; for structured patterns flap, taylor and random. The default is all of them, unless variants or a preset
    are given."""

    published_starts: bool = False
    """Give each method the start of its paper, instead of one to all of them. finetune then starts from SparseGPT as
    published: without the change of basis, ADMM and least squares, unless config sets them."""

    preset: Literal["oscillation", "decay", "parts", "budgets", "structured"] | None = None
    """One of the paper's ablations, all methods at four budgets, or decay against cut for a structured pattern."""

    variants: str | None = None
    """YAML file that maps the name of each variant to the options in which it differs. Its method is the option
    `method`, or its name if that is a method, or cast."""

    config: str | None = None
    """YAML file of options of `castlm train` for all runs."""

    seeds: int = 3
    """Runs of each variant, with the seeds 0, 1, ..."""

    learning_rates: str | None = None
    """Learning rates, separated by commas. Each variant without a rate of its own tries them with seed 0 and uses the
    best one for the other seeds."""

    tuning_dataset: str | None = None
    """Text whose perplexity chooses the learning rate, so that no choice is made on `eval_dataset`."""

    seq_len: int | None = None
    """Tokens per sequence, in training and evaluation."""

    per_device_train_batch_size: int | None = None
    """Sequences per device and micro-step."""

    eval_tokens: int | None = None
    """Maximum number of tokens that are evaluated. 0 evaluates all of them."""

    calibration: str | None = None
    """Text for the one-shot rows wanda and sparsegpt. The default is the training text."""

    num_sequences: int = field(default=128, metadata={"at_least": 1})
    """Calibration sequences of the one-shot rows."""

    tasks: str | None = None
    """Zero-shot tasks of lm-eval, separated by commas, that every result is measured on."""

    tasks_from: str | None = None
    """Folder with local files of the tasks."""

    limit: int | None = field(default=None, metadata={"at_least": 1})
    """Maximum number of questions per task."""
