"""The time of a training step on GPUs by its operations alone: they, divided by `UTILIZATION` of the GPU's peak.

The utilization is that of torchtitan's Llama 3.1 8B on 8 H100s under FSDP in bf16, without torch.compile: 5,762 tokens
per second and GPU with sequences of 8,192 tokens (benchmarks/llama3_h100_202412_torchtitan.md in its repository). The
same arithmetic gives the same on 128 GPUs, where 5,605 were measured. A link that is slower than the GPUs compute, such
as PCIe under FSDP or for moments on the host, is not counted.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from castlm.devices import Device
from castlm.lab.planning.memory import PlannedRun, read_config
from castlm.models.architecture import shape_model
from castlm.training.metrics import forward_flops

UTILIZATION = 0.34
"""Share of the peak in bf16 that a training step reaches, by the model's own operations."""


def step_seconds(
    config: PretrainedConfig | str | Path,
    run: PlannedRun,
    device: Device,
    *,
    teacher: PretrainedConfig | str | Path | None = None,
    accumulation: int = 1,
) -> float:
    """The seconds of a step of `accumulation` micro-batches, on any number of GPUs with a batch each.

    Args:
        config, teacher: as for `plan_memory`.
    """

    def forward(of: PretrainedConfig | str | Path) -> float:
        model = shape_model(read_config(of))
        return forward_flops(((p, name) for name, p in model.named_parameters()), model.config, run.seq_len)

    # a backward pass takes as many operations as two forward passes, and a checkpointed one makes the first again
    flops = (4 if run.checkpointing else 3) * forward(config)
    if run.measures_first:
        flops *= 2
    if run.teacher is not None and not run.cached:
        flops += forward(teacher or config)
    return flops * run.tokens * accumulation / (UTILIZATION * device.bf16_flops)
