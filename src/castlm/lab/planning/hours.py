"""The hours of a run on GPUs, without the machine: operations and gathered bytes of a step, from the model's config.

A step takes the longer of two times, since FSDP gathers the next block while one computes:

    compute    operations of the forward and backward passes / (peak of the GPU x `UTILIZATION`)
    gather     bytes of weights and gradients that a rank receives / the bandwidth of the link

The utilization is that of torchtitan's Llama 3.1 8B on 8 H100s under FSDP in bf16, without torch.compile: 5,762 tokens
per second and GPU with sequences of 8,192 tokens (benchmarks/llama3_h100_202412_torchtitan.md in its repository). The
same arithmetic gives the same on 128 GPUs, where 5,605 were measured. The start is not in these hours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from castlm.core.blocks import in_block
from castlm.devices import Device
from castlm.lab.planning.memory import PlannedRun, read_config
from castlm.models.architecture import shape_model
from castlm.training.metrics import forward_flops

UTILIZATION = 0.34
"""Share of the peak in bf16 that a training step reaches, by the model's own operations."""
LINK = 300.0
"""GB per second that a rank receives, by default: H100s with NVLink in a node, and 8 x 400 Gb/s between nodes."""


@dataclass(frozen=True)
class HoursPlan:
    """The time of a step on each rank, and its parts."""

    tokens: int
    """Tokens of a step over all ranks."""
    flops: float
    """Operations of a step on each rank."""
    gathered: float
    """Bytes that a rank receives in a step: weights and gradients of other ranks, or moments from the host."""
    compute_s: float
    gather_s: float

    @property
    def step_s(self) -> float:
        return max(self.compute_s, self.gather_s)

    @property
    def tokens_per_s(self) -> float:
        """Training tokens per second of all ranks."""
        return self.tokens / self.step_s

    def hours(self, max_steps: int) -> float:
        return max_steps * self.step_s / 3600

    def explain(self) -> str:
        """One line with the parts of a step."""
        compute = f"{self.flops / 1e12:,.0f} TFLOP on each rank in {self.compute_s:.2f} s"
        return (
            f"a step takes about {self.step_s:.2f} s: {compute} at {UTILIZATION:.0%} of the peak, and meanwhile "
            f"{self.gathered / 1e9:,.0f} GB received in {self.gather_s:.2f} s; {self.tokens_per_s:,.0f} tokens/s"
        )


def plan_hours(
    config: PretrainedConfig | str | Path,
    run: PlannedRun,
    device: Device,
    *,
    teacher: PretrainedConfig | str | Path | None = None,
    world_size: int = 1,
    accumulation: int = 1,
    link: float = LINK,
) -> HoursPlan:
    """The time of a training step of `accumulation` micro-batches on each of `world_size` GPUs, without evaluations.

    Args:
        config, teacher: as for `plan_memory`.
        link: GB per second that a rank receives; about 20 for cards in PCIe slots, and for moments on the host.

    Raises:
        InputError: as `plan_memory`.
    """
    student = _Work.of(read_config(config), run.seq_len)
    passes = 3 * student.flops  # a backward pass takes as many operations as two forward passes
    if run.checkpointing:
        passes += student.flops
    # Weights for the forward and the backward pass in the compute type, and fp32 gradients.
    num_bytes = 2 * run.compute.itemsize * student.parameters + 4 * student.parameters
    if run.measures_first:
        passes *= 2
    if run.teacher is not None and not run.cached:
        tutor = student if teacher is None else _Work.of(read_config(teacher), run.seq_len)
        passes += tutor.flops
        num_bytes += run.teacher.itemsize * tutor.parameters
    flops = passes * run.tokens * accumulation
    gathered = num_bytes * accumulation * (world_size - 1) / world_size
    if run.moments_on_host:  # both moments come from the host while others go back
        gathered = 2 * (1 if run.moments == "8bit" else 4) * student.total
    return HoursPlan(
        tokens=run.tokens * accumulation * world_size,
        flops=flops,
        gathered=gathered,
        compute_s=flops / (UTILIZATION * device.bf16_flops),
        gather_s=gathered / (1e9 * link),
    )


@dataclass(frozen=True)
class _Work:
    """The forward pass of a model."""

    flops: float
    """Operations of one token."""
    parameters: int
    """Those that are gathered for each micro-batch."""
    total: int

    @staticmethod
    def of(config: PretrainedConfig, seq_len: int) -> _Work:
        model = shape_model(config)
        named = {parameter: name for name, parameter in model.named_parameters()}
        gathered = [
            p for p, name in named.items() if in_block(name) or not config.get_text_config().tie_word_embeddings
        ]
        sizes = (sum(p.numel() for p in some) for some in (gathered, named))
        return _Work(forward_flops(named.items(), config, seq_len), *sizes)
