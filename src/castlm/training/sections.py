"""The options of a run in sections, one dataclass each. `TrainConfig` inherits them all.

A component declares the sections that it reads, and nothing else of the config: `def learning_rate(step, config:
OptimizerOptions)`. The docstring after a field is its help text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from castlm.core.decay import DECAYS
from castlm.fields import Bound, choice, essential
from castlm.methods.table import METHODS
from castlm.oneshot.options import BasisOptions, Refinements
from castlm.training.lr_shapes import SCHEDULES
from castlm.training.run_options import CheckpointOptions, EvaluationOptions, RuntimeOptions

HIDDEN_WEIGHT = 15.0
"""Default weight of the distance of hidden states; docs/results/stories260k-start.md has what it was chosen by."""


@dataclass(frozen=True)
class ModelOptions:
    """The dense model, and which of its layers become sparse."""

    model: str = essential()
    """Dense causal LM: a local Hugging Face folder, hub id, GGUF file, or "demo" (SmolLM2-135M-Instruct)."""

    revision: str | None = field(default=None, kw_only=True)
    """Branch, tag or commit of a hub model."""

    trust_remote_code: bool = field(default=False, kw_only=True)
    """Run the Python code that comes with a hub model."""

    pattern: str = field(default="2:4", kw_only=True)
    """n:m, where n of every m consecutive weights along the input axis are kept. Or a share of whole units, as
    channels:0.5 (of the MLPs) or heads:0.5 (KV heads with their query heads), each with n:m as in channels:0.75+2:4.
    Channels and heads are cut out in the end."""

    left_dense: tuple[str, ...] = field(default=(), kw_only=True)
    """More layers to leave dense: every layer whose name contains one of these texts."""

    def bounds(self) -> Iterator[Bound]:
        yield "left_dense", all(part.strip() for part in self.left_dense), "parts of names"


@dataclass(frozen=True)
class DataOptions:
    """The training text."""

    dataset: str | tuple[str, ...] = essential()
    """Training text: .txt, .jsonl, .jsonl.gz or .parquet, a folder or glob of these, or a hub name (streamed). Several
    are mixed by their weights, which are shares of the tokens: a.txt:0.7 b.jsonl:0.3, or equally without weights. A
    .txt file is one document, or several separated by <|endoftext|>."""

    column: str | None = field(default=None, kw_only=True)
    """Column of .jsonl and .parquet that holds the text, or messages. By default it is found: messages, prompt with
    completion, or text. Images of messages are in the column images, or image."""

    assistant_only_loss: bool = field(default=True, kw_only=True)
    """In the loss and the perplexity, count only the assistant's tokens of a conversation, and only the completion of a
    prompt. Plain text counts in full."""

    chat_template_path: str | None = field(default=None, kw_only=True)
    """File with a Jinja chat template to use, and to save, in place of the tokenizer's own."""

    dataset_split: str = field(default="train", kw_only=True)
    """Split of a hub dataset."""

    dataset_config: str | None = field(default=None, kw_only=True)
    """Configuration of a hub dataset."""

    seq_len: int = essential(512)
    """Tokens per sequence."""

    cross_document_attention: bool = field(default=False, kw_only=True)
    """Let the documents that share a training sequence attend to each other, as if they were one text."""

    repeat_sequences: bool = field(default=False, kw_only=True)
    """Cut every epoch into the same sequences, in the same order, so that teacher_cache serves all epochs after the
    first."""

    seed: int = field(default=0, kw_only=True)
    """Seed of the data order, the dropout and the held-out split."""

    prefetch: bool = field(default=True, kw_only=True)
    """Tokenize the next batch in a thread during the current step."""

    def bounds(self) -> Iterator[Bound]:
        yield "dataset", bool(self.dataset), "at least one text"
        yield "seq_len", self.seq_len >= 2, "at least 2"
        yield "seed", self.seed >= 0, "at least 0"


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """How the model becomes sparse."""

    method: str = choice("cast", METHODS)
    """Training method: CAST, one of its rivals, or the dense control."""

    decay: str = choice("horizon", DECAYS)
    """How CAST decays masked weights to zero; see AdamS."""

    decay_end: float | None = None
    """Fraction of max_steps after which "horizon" has every masked weight at zero and the mask is final. The default is
    0.3 for n:m from a given mask, else 0.1."""

    lam: float | Literal["auto"] = 4e-7
    """Decay coefficient of "proportional" and "additive", about the size of the gradient. auto measures the momentum
    first."""

    mask_interval: int = 10
    """Steps between mask refreshes (T1), as long as masked weights decay. From a given mask they start at zero and come
    back where they grow larger than kept ones; structured patterns keep a given mask."""

    srste_lam: float = 5e-3
    """Decay coefficient of the methods srste and ast: the gradient of a masked weight gains srste_lam times the weight.
    Our tables use 0.005 for SmolLM2-135M and 0.05 for stories260K."""

    scale_groups: int = 2
    """Learnable scale factors per weight row, folded into the weights at the end. 0 turns weight scaling off."""

    adapter: Literal["none", "shira", "lora"] = "none"
    """What `castlm finetune` trains: none trains all weights; shira and lora train a PEFT adapter that keeps every zero
    when it is merged, and write it to `output_dir/adapter` too."""

    lora_r: int = 16
    """Size of the adapter: as many trained weights as LoRA of this rank has."""

    ignore_decay_budget: bool = False
    """Run even if the decay budget says that masked weights cannot reach zero."""

    def bounds(self) -> Iterator[Bound]:
        yield "decay_end", self.decay_end is None or 0 < self.decay_end <= 1, "in (0, 1]"
        yield "lam", self.lam == "auto" or float(self.lam) >= 0, "at least 0, or auto"
        yield "srste_lam", self.srste_lam >= 0, "at least 0"
        yield "mask_interval", self.mask_interval >= 1, "at least 1"
        yield "lora_r", self.lora_r >= 1, "at least 1"
        yield "scale_groups", self.scale_groups >= 0, "at least 0"


@dataclass(frozen=True, kw_only=True)
class StartOptions(Refinements, BasisOptions):
    """The sparse weights and masks before step 0."""

    init_from: str | None = essential(None)
    """Start of the run: magnitude, wanda, sparsegpt, or an n:m model (folder or hub id) whose masks and weights are
    taken. Structured patterns: magnitude, wanda, flap, taylor or random. The default for cast and finetune is
    sparsegpt, flap for channels and taylor for heads; for the other methods it is magnitude."""

    calibration_sequences: int = 128
    """Training sequences that the start is calibrated on, except for magnitude and random."""

    def bounds(self) -> Iterator[Bound]:
        yield "calibration_sequences", self.calibration_sequences >= 1, "at least 1"
        yield from BasisOptions.out_of_range(self)
        yield from Refinements.out_of_range(self)


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """Distillation from the dense model."""

    eta: float = 2 / 3
    """Weight of the KL divergence to the dense teacher in the loss, 0 to 1. 0 trains without a teacher."""

    hidden_weight: float | None = None
    """Weight of the distance between the hidden states of student and teacher behind each transformer block. It falls
    linearly to 0 over the run. The default is 15 where the student is sparse and a teacher is at work: not with eta 0,
    a teacher_cache (which holds no hidden states), method dense, or castlm finetune."""

    temperature: float = 1.0
    """Temperature of the KL divergence, which is multiplied by its square."""

    teacher_top_k: int = 0
    """Distill from the teacher's top-k tokens; the rest of the distribution is pooled into one bucket. 0 uses the full
    distribution."""

    teacher_cache: str | None = None
    """Folder that stores the teacher's top-k tokens, 8 bytes each, for later epochs and runs on the same text."""

    def bounds(self) -> Iterator[Bound]:
        yield "eta", 0 <= self.eta <= 1, "between 0 and 1"
        yield "hidden_weight", self.hidden_weight is None or self.hidden_weight >= 0, "at least 0"
        yield "temperature", self.temperature > 0, "above 0"
        yield "teacher_top_k", self.teacher_top_k >= 0, "at least 0"


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Optimizer, schedule and batch."""

    max_steps: int = essential(300)
    """Optimizer steps, the horizon T of the method. It cannot change on resume."""

    num_train_epochs: float | None = None
    """Passes over the training documents, instead of max_steps, which is then computed before the run."""

    learning_rate: float = essential(3e-4)
    """Peak learning rate."""

    per_device_train_batch_size: int = essential(8)
    """Sequences per device and micro-step."""

    gradient_accumulation_steps: int = 1
    """Micro-steps per optimizer step."""

    lr_scheduler_type: str = choice("cosine", SCHEDULES)
    """Learning rate after the warm-up: cosine or linear down to min_lr_ratio, constant, or warmup_stable_decay, which
    is constant until the last fifth of the run and then falls linearly."""

    warmup_ratio: float = 0.05
    """Fraction of max_steps in which the learning rate rises linearly from 0."""

    min_lr_ratio: float = 0.1
    """The learning rate ends at this fraction of its peak."""

    weight_decay: float = 0.0
    """Decoupled weight decay (as AdamW) of the dense weight matrices: embeddings, head and layers left dense; in the
    dense control all of them. Norms, biases, scale factors and sparse weights are not decayed."""

    adam_betas: tuple[float, float] = (0.5, 0.99)
    """Decay rates of Adam's moments."""

    adam_epsilon: float = 1e-8
    """Added to the square root of the second moment."""

    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down. 0 turns clipping off."""

    second_moment: Literal["gradient", "mix"] | None = None
    """What AdamS squares for its second moment: the gradient, as Adam does, or the paper's mix. The default is
    gradient wherever the decay allows it."""

    moments: Literal["fp32", "8bit"] = "fp32"
    """Storage of Adam's moments. 8bit stores each moment in one byte: about 6 bytes less per weight."""

    def bounds(self) -> Iterator[Bound]:
        yield "max_steps", 1 <= self.max_steps <= 10**9, "between 1 and 1000000000"
        yield "num_train_epochs", self.num_train_epochs is None or 0 < self.num_train_epochs <= 10**6, "above 0"
        yield "learning_rate", self.learning_rate > 0, "above 0"
        yield "weight_decay", self.weight_decay >= 0, "at least 0"
        yield "per_device_train_batch_size", self.per_device_train_batch_size >= 1, "at least 1"
        yield "gradient_accumulation_steps", self.gradient_accumulation_steps >= 1, "at least 1"
        yield "warmup_ratio", 0 <= self.warmup_ratio < 1, "in [0, 1)"
        yield "min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "between 0 and 1"
        yield "adam_betas", all(0 <= beta < 1 for beta in self.adam_betas), "in [0, 1)"
        yield "adam_epsilon", self.adam_epsilon > 0, "above 0"
        yield "max_grad_norm", self.max_grad_norm >= 0, "at least 0"


SECTIONS: dict[str, type] = {
    "model": ModelOptions,
    "data": DataOptions,
    "method": MethodOptions,
    "start": StartOptions,
    "teacher": TeacherOptions,
    "optimizer": OptimizerOptions,
    "evaluation": EvaluationOptions,
    "checkpoint": CheckpointOptions,
    "runtime": RuntimeOptions,
}
"""The sections in the order of the help, by the name that a YAML file may use."""
