"""The options of a run beside its training: perplexity, output folder and checkpoints, device and ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from castlm.fields import Bound, essential


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Perplexity during the run."""

    eval_dataset: str | tuple[str, ...] | None = essential(None)
    """Text for the perplexity. With several texts, each is reported; the main figure is over all of them. Without it,
    eval_fraction of the training documents are held out."""

    eval_split: str = "validation"
    """Split of an eval_dataset on the hub."""

    eval_config: str | None = None
    """Configuration of an eval_dataset on the hub."""

    eval_fraction: float = 0.02
    """Fraction of the documents that is held out if there is no eval_dataset."""

    eval_tokens: int = 32768
    """Maximum number of tokens that are evaluated, of each text. 0 evaluates all of them."""

    eval_steps: int = 0
    """Steps between evaluations. 0 is a tenth of the run, rounded up."""

    def bounds(self) -> Iterator[Bound]:
        yield "eval_dataset", self.eval_dataset != (), "at least one text"
        yield "eval_fraction", 0 < self.eval_fraction < 1, "between 0 and 1"
        yield "eval_tokens", self.eval_tokens == 0 or self.eval_tokens >= 2, "0 for all, or at least 2"
        yield "eval_steps", self.eval_steps >= 0, "at least 0"


@dataclass(frozen=True)
class CheckpointOptions:
    """The output folder, checkpoints and logs."""

    output_dir: str = essential()
    """New folder for the run. The verified model is written to `output_dir/model`."""

    save_dtype: Literal["source", "fp32", "bf16", "fp16"] = field(default="source", kw_only=True)
    """What the result is written in. source: what the dense model is stored in."""

    save_steps: int = field(default=100, kw_only=True)
    """Steps between checkpoints; there is one at the end too. 0 saves only on Ctrl-C and SIGTERM."""

    save_total_limit: int = field(default=2, kw_only=True)
    """Number of checkpoints that are kept."""

    async_save: bool = field(default=True, kw_only=True)
    """Write checkpoints while training goes on. It takes one more copy of weights and moments in host memory."""

    resume: bool = field(default=False, kw_only=True)
    """Continue from the newest whole checkpoint in output_dir."""

    overwrite: bool = field(default=False, kw_only=True)
    """Replace an earlier run in output_dir."""

    log_steps: int = field(default=1, kw_only=True)
    """Steps between lines in metrics.jsonl."""

    report_to: tuple[Literal["auto", "tensorboard", "wandb", "trackio", "none"], ...] = field(
        default=("auto",), kw_only=True
    )
    """Trackers that get the metrics besides metrics.jsonl. auto uses every one that is installed."""

    push_to_hub: bool = field(default=False, kw_only=True)
    """Upload the verified model to the Hugging Face Hub when the run ends, unless it diverged or fell short."""

    hub_model_id: str | None = field(default=None, kw_only=True)
    """Repository to upload to, owner/name. The default is the name of output_dir."""

    hub_private_repo: bool = field(default=False, kw_only=True)
    """Make the repository private if it is created."""

    def bounds(self) -> Iterator[Bound]:
        yield "save_steps", self.save_steps >= 0, "at least 0"
        yield "save_total_limit", self.save_total_limit >= 1, "at least 1"
        yield "log_steps", self.log_steps >= 1, "at least 1"


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions:
    """Device, precision and ranks."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses CUDA if there is a GPU."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute type of the forward and backward pass; master weights are fp32. auto uses bf16 where it is fast."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more time, far less memory."""

    fused_optimizer: Literal["auto", "on", "off"] = "auto"
    """Update of AdamS in one pass: C++ kernels on a CPU, torch.compile on a GPU. auto uses it on a CPU if the kernels
    are built and on a GPU from 10M parameters; off runs torch operators. Masks take their C++ kernel in any case."""

    torch_compile: bool = False
    """Compile the transformer blocks of student and teacher with torch.compile, on a GPU."""

    sharding: Literal["full", "replicate", "hybrid"] = "full"
    """Under torchrun: FSDP2 over all ranks, one copy per rank, or FSDP2 within a node and copies across nodes."""

    timeout_s: float = 600
    """Under torchrun: seconds that a rank waits for the others before the run stops and names the missing ones."""

    def bounds(self) -> Iterator[Bound]:
        yield "timeout_s", 0 < self.timeout_s <= 10**9, "above 0 and at most 1000000000"
