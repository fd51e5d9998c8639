"""The keyword arguments of `castlm.prune` and its siblings, for editors and type checkers.

Written by python -m tests.keywords from the fields of the options, which have the defaults, limits and descriptions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from castlm.core.nm import Pattern


class PruneKeywords(TypedDict, total=False):
    """Options of `castlm.prune`."""

    method: str | None
    num_sequences: int | None
    seq_len: int
    seed: int
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16"]
    memory: Literal["auto", "model", "block"]
    save_dtype: Literal["source", "fp32", "bf16", "fp16"]
    overwrite: bool
    revision: str | None
    trust_remote_code: bool
    column: str | None
    chat_template_path: str | None
    document_limit: float
    start_effort: Literal["best", "quick"]
    rotate: Literal["auto", "off", "values"]
    permute: bool
    rotation_iterations: int
    permute_iterations: int
    staged_statistics: bool
    mask_iterations: int
    refit_iterations: int | None
    reconstruct_epochs: int
    reconstruct_rate: float
    damping: float


class TrainKeywords(TypedDict, total=False):
    """Options of `castlm.train`."""

    recipe: str
    revision: str | None
    trust_remote_code: bool
    pattern: Pattern | str
    left_dense: Sequence[str]
    column: str | None
    chat_template_path: str | None
    document_limit: float
    assistant_only_loss: bool
    dataset_split: str
    dataset_config: str | None
    seq_len: int
    cross_document_attention: bool
    repeat_sequences: bool
    seed: int
    method: str
    decay: str
    decay_end: float | None
    lam: float | Literal["auto"]
    mask_interval: int
    srste_lam: float
    scale_groups: int
    weight_bits: Literal[3] | None
    ignore_decay_budget: bool
    start_effort: Literal["best", "quick"]
    rotate: Literal["auto", "off", "values"]
    permute: bool
    rotation_iterations: int
    permute_iterations: int
    staged_statistics: bool
    mask_iterations: int
    refit_iterations: int | None
    reconstruct_epochs: int
    reconstruct_rate: float
    damping: float
    init_from: str | None
    calibration_sequences: int | None
    teacher: str | None
    eta: float
    hidden_weight: float | None
    temperature: float
    teacher_top_k: int
    teacher_cache: str | None
    max_steps: int
    num_train_epochs: float | None
    learning_rate: float
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    lr_scheduler_type: str
    warmup_ratio: float
    min_lr_ratio: float
    weight_decay: float
    adam_betas: tuple[float, float]
    adam_epsilon: float
    max_grad_norm: float
    second_moment: Literal["gradient", "mix"] | None
    moments: Literal["fp32", "8bit"]
    step_in_backward: bool
    moments_on_host: bool
    eval_dataset: str | Sequence[str] | None
    eval_split: str
    eval_config: str | None
    eval_fraction: float
    eval_tokens: int
    eval_steps: int
    save_dtype: Literal["source", "fp32", "bf16", "fp16"]
    save_steps: int
    save_total_limit: int
    async_save: bool
    resume: bool
    overwrite: bool
    report_to: Sequence[Literal["auto", "tensorboard", "wandb", "trackio", "none"]]
    push_to_hub: bool
    hub_model_id: str | None
    hub_private_repo: bool
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16"]
    gradient_checkpointing: bool
    torch_compile: bool
    sharding: Literal["full", "replicate", "hybrid"]
    timeout_s: float


class FinetuneKeywords(TypedDict, total=False):
    """Options of `castlm.finetune`."""

    revision: str | None
    trust_remote_code: bool
    pattern: Pattern | str
    left_dense: Sequence[str]
    column: str | None
    chat_template_path: str | None
    document_limit: float
    assistant_only_loss: bool
    dataset_split: str
    dataset_config: str | None
    seq_len: int
    cross_document_attention: bool
    repeat_sequences: bool
    seed: int
    adapter: Literal["none", "shira"]
    lora_r: int
    teacher: str | None
    eta: float
    hidden_weight: float | None
    temperature: float
    teacher_top_k: int
    teacher_cache: str | None
    max_steps: int
    num_train_epochs: float | None
    learning_rate: float | None
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    lr_scheduler_type: str
    warmup_ratio: float
    min_lr_ratio: float
    weight_decay: float
    adam_betas: tuple[float, float]
    adam_epsilon: float
    max_grad_norm: float
    second_moment: Literal["gradient", "mix"] | None
    moments: Literal["fp32", "8bit"]
    step_in_backward: bool
    moments_on_host: bool
    eval_dataset: str | Sequence[str] | None
    eval_split: str
    eval_config: str | None
    eval_fraction: float
    eval_tokens: int
    eval_steps: int
    save_dtype: Literal["source", "fp32", "bf16", "fp16"]
    save_steps: int
    save_total_limit: int
    async_save: bool
    resume: bool
    overwrite: bool
    report_to: Sequence[Literal["auto", "tensorboard", "wandb", "trackio", "none"]]
    push_to_hub: bool
    hub_model_id: str | None
    hub_private_repo: bool
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16"]
    gradient_checkpointing: bool
    torch_compile: bool
    sharding: Literal["full", "replicate", "hybrid"]
    timeout_s: float


class EvaluateKeywords(TypedDict, total=False):
    """Options of `castlm.evaluate`."""

    column: str | None
    chat_template_path: str | None
    document_limit: float
    assistant_only_loss: bool
    eval_split: str
    eval_config: str | None
    eval_tokens: int
    seq_len: int | None
    stride: int | None
    tasks_from: str | None
    limit: int | None
    prompts: str | None
    teacher: str | None
    max_new_tokens: int
    temperature: float
    precision: Literal["auto", "fp32", "bf16"]
    device: Literal["auto", "cpu", "cuda"]
    revision: str | None
    trust_remote_code: bool


class PackKeywords(TypedDict, total=False):
    """Options of `castlm.pack`."""

    pattern: Pattern | str | None
    dtype: Literal["bf16", "fp16", "fp32"] | None
    head: str | None
    overwrite: bool
