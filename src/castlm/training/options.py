"""The options of a run in sections, one dataclass each; `castlm.methods.options` has the sections of the methods.

A component takes the sections that it reads, never the whole config. The `help` of a field is its text in `--help`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from castlm.core.errors import InputError
from castlm.core.nm import NM, Pattern
from castlm.data.options import ScoredTextOptions
from castlm.fields import Bounded, Needs, essential, option, parsed
from castlm.oneshot.options import CALIBRATED, BasisOptions, EffortOptions, Refinements
from castlm.patterns import parse_pattern

SEQ_LEN = 512
"""Tokens per sequence, wherever a command trains or plans a training."""
HIDDEN_WEIGHT = 15.0
"""Default weight of the distance of hidden states; docs/results/start.md has the figures behind it."""

SPARSE = Needs("a method that makes weights sparse", lambda run: run.row.is_sparse)
DISTILLED = Needs("eta above 0", lambda run: run.eta > 0)
CHECKPOINTS = Needs("save_steps above 0", lambda run: run.save_steps > 0)
UPLOAD = Needs("push_to_hub", lambda run: run.push_to_hub)


def is_on_hub(dataset: str) -> bool:
    """Whether no file, folder or glob has this name, so that it names a dataset of the hub."""
    from castlm.data.documents import find_files  # imports numpy, which would slow `--help`

    return find_files(dataset) is None


@dataclass(frozen=True)
class ModelOptions(Bounded):
    """The dense model, and which of its layers become sparse."""

    model: str = essential(
        help='Dense causal LM: a local Hugging Face folder, hub id, GGUF file, or "demo" (SmolLM2-135M-Instruct).',
    )

    revision: str | None = option(
        None,
        help="Branch, tag or commit of a hub model.",
    )

    trust_remote_code: bool = option(
        False,
        changes_result=False,
        help="Run the Python code that comes with a hub model.",
    )

    pattern: Pattern = parsed(
        NM(2, 4),
        parse_pattern,
        needs=SPARSE,
        help="n:m, where n of every m consecutive weights along the input axis are kept.",
    )

    left_dense: tuple[str, ...] = option(
        (),
        needs=SPARSE,
        help="More layers to leave dense: every layer whose name contains one of these texts. In models with few "
        "key heads, v_proj gains the most for its bytes (docs/results/left-dense.md).",
    )

    @property
    def loading(self) -> dict[str, Any]:
        """The keyword arguments with which the model's config, tokenizer and weights are loaded."""
        return {"trust_remote_code": self.trust_remote_code, "revision": self.revision}


@dataclass(frozen=True)
class DataOptions(ScoredTextOptions):
    """The training text."""

    dataset: str | tuple[str, ...] = essential(
        help="Training text: .txt, .jsonl, .jsonl.gz or .parquet, a folder or glob of these, or a hub dataset "
        "(streamed), owner/name, owner/name:config or owner/name:config@revision. Several are mixed by their "
        "weights, which are shares of the tokens: a.txt:0.7 b.jsonl:0.3, or equally without weights. A .txt file "
        "is one document, or several separated by <|endoftext|>.",
    )

    dataset_split: str = option(
        "train",
        needs=Needs("a dataset of the hub", lambda run: any(map(is_on_hub, run.datasets))),
        help="Split of a hub dataset.",
    )

    seq_len: int = essential(
        SEQ_LEN,
        at_least=2,
        help="Tokens per sequence.",
    )

    cross_document_attention: bool = option(
        False,
        help="Let the documents that are packed into one training sequence attend to each other.",
    )

    seed: int = option(
        0,
        at_least=0,
        help="Seed of the data order, the dropout and the held-out split.",
    )

    def __post_init__(self) -> None:
        if isinstance(self.dataset, tuple) and len(self.dataset) == 1:
            object.__setattr__(self, "dataset", self.dataset[0])
        super().__post_init__()
        if isinstance(self.dataset, tuple):
            if not self.dataset or min(self.datasets.values()) <= 0:
                raise InputError(f"dataset = {list(self.dataset)}: give at least one text, and weights above 0")
            if len(self.datasets) < len(self.dataset):
                raise InputError("dataset names a text twice: give it once, with a larger weight")

    @property
    def datasets(self) -> dict[str, float]:
        """The training texts with their weights; a single one has the weight 1."""
        return weighted_texts(self.dataset)


@dataclass(frozen=True, kw_only=True)
class StartOptions(Refinements, BasisOptions, EffortOptions):
    """The sparse weights and masks before step 0."""

    init_from: str | None = essential(
        None,
        help="Start of the run: magnitude, wanda, sparsegpt, or an n:m model (folder or hub id) whose masks and "
        "weights are taken. The default of the methods cast and finetune is sparsegpt; that of the other methods is "
        "magnitude.",
    )

    calibration_sequences: int | None = option(
        None,
        at_least=1,
        needs=CALIBRATED,
        help="Training sequences for the calibration of the start; magnitude reads none. By default as many as "
        "hold 32,768 tokens, or 16 tokens for each input of the widest layer if that is more, but at most 128; "
        "with start_effort quick, a quarter of that.",
    )

    @property
    def solver(self) -> str:
        """The start by the name under which the conditions of its options ask for it."""
        return self.name

    @property
    def name(self) -> str:
        """The start that a run uses: a config fills `init_from` in where it is not given."""
        assert self.init_from is not None
        return self.init_from


@dataclass(frozen=True, kw_only=True)
class TeacherOptions(Bounded):
    """Distillation from the dense model, or from another one."""

    teacher: str | None = option(
        None,
        needs=DISTILLED,
        help="Model to distill from, such as a larger one with the same tokenizer: a folder, hub id or GGUF file. "
        "The default is the dense model.",
    )

    eta: float = option(
        2 / 3,
        at_least=0,
        at_most=1,
        help="Weight of the KL divergence to the teacher in the loss, 0 to 1. 0 trains without a teacher.",
    )

    hidden_weight: float | None = option(
        None,
        at_least=0,
        help="Weight of the distance between the hidden states of student and teacher after each transformer "
        "block. It falls linearly to 0 over the run. The default is 15. It is 0 with eta 0, with another teacher, "
        "with a teacher_cache (which holds no hidden states), for method dense, and in castlm finetune.",
    )

    temperature: float = option(
        1.0,
        above=0,
        needs=DISTILLED,
        help="Temperature of the KL divergence, which is multiplied by its square.",
    )

    teacher_top_k: int = option(
        0,
        at_least=0,
        needs=DISTILLED,
        help="Distill from the teacher's top-k tokens; the rest of the distribution is pooled into one bucket. 0 "
        "uses the full distribution.",
    )

    teacher_cache: str | None = option(
        None,
        may_change=True,
        help="Folder that stores the teacher's top-k tokens, 8 bytes each, for later epochs and runs on the same "
        "text. Of a single dataset, every epoch then has the sequences of the first.",
    )  # a repetition may not: `repeats_sequences`

    def hidden_weight_at(self, step: int, max_steps: int) -> float:
        """The weight of the distance of hidden states at the 0-based `step`: linear from its full value down to 0.

        At first, the teacher's hidden states are the nearest target for each block; at the end, a sparse model does
        better with hidden states of its own.
        """
        assert self.hidden_weight is not None
        return self.hidden_weight * (1 - step / max_steps)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(Bounded):
    """Perplexity on held-out text during the run."""

    eval_dataset: str | tuple[str, ...] | None = essential(
        None,
        help="Text for the perplexity. With several texts, each is reported; the main figure is over all of them. "
        "Without it, eval_fraction of the training documents are held out.",
    )

    general_dataset: str | None = option(
        None,
        help="Text of another kind than the training text, such as WikiText-2. Its perplexity is reported beside, "
        "at step 0 and at the end: training on one kind of text can cost what the model knew of others.",
    )

    eval_split: str = option(
        "validation",
        needs=Needs("an eval_dataset of the hub", lambda run: any(map(is_on_hub, run.eval_datasets))),
        help="Split of an eval_dataset on the hub.",
    )

    eval_fraction: float = option(
        0.02,
        above=0,
        below=1,
        needs=Needs(  # of a hub stream, the first documents are held out, whatever the fraction
            "local text, and no eval_dataset",
            lambda run: not run.eval_datasets and not all(map(is_on_hub, run.datasets)),
        ),
        help="Fraction of the documents that is held out if there is no eval_dataset.",
    )

    eval_tokens: int = option(
        32768,
        at_least=0,
        help="Maximum number of evaluated tokens of each text. 0 evaluates all of them.",
    )

    eval_steps: int = option(
        0,
        at_least=0,
        may_change=True,
        help="Steps between evaluations. 0 is a tenth of the run, rounded up, but at least 5 steps.",
    )

    def __post_init__(self) -> None:
        if self.eval_dataset == ():
            raise InputError("eval_dataset = () names no text: give at least one, or omit it")
        if self.eval_tokens == 1:
            raise InputError("eval_tokens = 1 leaves nothing to predict: give 0 for all tokens, or at least 2")
        if isinstance(self.eval_dataset, tuple) and len(self.eval_dataset) == 1:
            object.__setattr__(self, "eval_dataset", self.eval_dataset[0])
        super().__post_init__()

    @property
    def eval_datasets(self) -> tuple[str, ...]:
        """The evaluation texts; empty if a part of the training documents is held out."""
        texts = self.eval_dataset or ()
        return (texts,) if isinstance(texts, str) else texts

    def steps_between(self, max_steps: int) -> int:
        """`eval_steps`, or its default for a run of `max_steps`."""
        # On a CPU the default of 32,768 evaluated tokens takes as long as tens of steps of a few hundred tokens.
        return self.eval_steps or max(5, -(-max_steps // 10))


@dataclass(frozen=True)
class CheckpointOptions(Bounded):
    """The output folder, checkpoints and logs."""

    output_dir: Path = essential(
        changes_result=False,
        help="New folder for the run. The verified model is written to `output_dir/model`.",
    )

    save_dtype: Literal["source", "fp32", "bf16", "fp16"] = option(
        "source",
        may_change=True,
        help="Dtype of the result's files. source: the dtype in which the dense model is stored.",
    )

    save_steps: int = option(
        100,
        at_least=0,
        changes_result=False,
        help="Steps between checkpoints, of which the newest two are kept; the last step is also saved. 0 saves "
        "only on Ctrl-C and SIGTERM.",
    )

    async_save: bool = option(
        True,
        needs=CHECKPOINTS,
        changes_result=False,
        help="Write checkpoints during training, in the background. It takes one more copy of weights and moments "
        "in host memory.",
    )

    resume: bool = option(
        False,
        changes_result=False,
        help="Continue from the newest whole checkpoint in output_dir, or start if there is none.",
    )

    overwrite: bool = option(
        False,
        changes_result=False,
        help="Start again; an earlier output in output_dir becomes OUTPUT_DIR.previous.",
    )

    report_to: tuple[Literal["auto", "tensorboard", "wandb", "trackio", "none"], ...] = option(
        ("auto",),
        changes_result=False,
        help="Trackers for the metrics, besides metrics.jsonl. auto uses every installed one.",
    )

    push_to_hub: bool = option(
        False,
        changes_result=False,
        help="Upload the verified model to the Hugging Face Hub when the run ends, unless it diverged or fell short.",
    )

    hub_model_id: str | None = option(
        None,
        needs=UPLOAD,
        changes_result=False,
        help="Repository to upload to, owner/name. The default is the name of output_dir. One that does not exist "
        "is created as a public one.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume and self.overwrite:
            raise InputError("resume and overwrite exclude each other: choose one")

    @property
    def hub_repo(self) -> str:
        """The repository that `push_to_hub` uploads to."""
        return self.hub_model_id or self.output_dir.absolute().name


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions(Bounded):
    """Device, precision and ranks."""

    device: Literal["auto", "cpu", "cuda"] = option(
        "auto",
        may_change=True,
        help="auto uses CUDA if there is a GPU.",
    )

    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto",
        may_change=True,
        help="Compute type of the forward and backward pass; master weights are fp32. auto uses bf16 where it is fast.",
    )  # its effect may not: `precision_used`

    gradient_checkpointing: bool = option(
        False,
        may_change=True,
        help="Recompute activations in the backward pass: about a third more time, far less memory.",
    )

    torch_compile: bool = option(
        False,
        help="Compile the transformer blocks of student and teacher with torch.compile, on a GPU.",
    )

    sharding: Literal["full", "replicate", "hybrid"] = option(
        "full",
        may_change=True,
        help="Under torchrun: full shards the model over all ranks (FSDP2), replicate keeps a copy on each rank, "
        "and hybrid shards it within a node and keeps a copy on each node.",
    )

    timeout_s: float = option(
        600.0,
        above=0,
        at_most=10**9,
        changes_result=False,
        help="Under torchrun: seconds that a rank waits for the others before the run stops and names the missing "
        "ones.",
    )


def weighted_texts(dataset: str | Sequence[str]) -> dict[str, float]:
    """Training texts with their weights, as the option `dataset` names them.

    Examples:
        >>> weighted_texts(["a.txt:0.7", "b.jsonl"])
        {'a.txt': 0.7, 'b.jsonl': 1.0}
    """
    if isinstance(dataset, str):
        return {dataset: 1.0}
    weights: dict[str, float] = {}
    for text in dataset:
        name, _, weight = text.rpartition(":")
        has_weight = bool(name) and re.fullmatch(r"-?(\d+\.?\d*|\.\d+)", weight) is not None
        weights[name if has_weight else text] = float(weight) if has_weight else 1.0
    return weights
