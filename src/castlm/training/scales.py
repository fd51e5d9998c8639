"""Trains the scales of a model that `castlm quantize` has rounded: the option `train_steps`.

It is a run of the Trainer: the rounded model is the student, whose codes stay, and the model before the rounding its
teacher. An n:m model stays n:m, because the code of a masked weight is 0. Checkpoints hold scales and moments alone.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from castlm.core.adams import AdamS
from castlm.core.errors import DivergedError, InputError
from castlm.core.rounding import ScaledCodes, add_weight_rounding, rounded_layers
from castlm.core.scaling import fold_weight_scaling
from castlm.core.sparsify import weight_parameter
from castlm.data.options import TextOptions
from castlm.formats.rounding import Rounded
from castlm.methods.dense import Dense
from castlm.models.architecture import context_length, vocab_size
from castlm.models.io import open_config, open_model
from castlm.say import Say, silent
from castlm.signals import Interrupt
from castlm.training.config import TrainConfig
from castlm.training.metrics import held_out_loss
from castlm.training.text import open_training_text
from castlm.training.trainer import Trainer
from castlm.world import closing, init_world
from castlm_runtime.formats import FORMATS

SAVE_STEPS = 25
EVAL_TOKENS = 8192


class Scales(Dense):
    """Trains the scales of rounded layers, and nothing else, at the learning rate of the run."""

    group = 64
    """Columns that share a scale."""

    def parametrize_(self, model: nn.Module) -> None:
        self.prepare(model)
        model.requires_grad_(False)
        bits = self.options.weight_bits
        assert bits is not None
        add_weight_rounding(model, bits, self.group, rounding=ScaledCodes)

    def build_optimizer(self, model: nn.Module, fused: bool) -> AdamS:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        group = {"params": [p for _, p in named], "param_names": [name for name, _ in named], "sparse": False}
        return self.optimize([group], fused)

    def _with_scales_apart(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        return [group]  # at the rate of the run


class BlockScales(Scales):
    """Trains the scales of the blocks of a GGUF file."""

    group = FORMATS["q4_0"].group


@dataclass(frozen=True)
class ScaleTraining:
    """`training(rounded, run)` trains the scales of the model in the folder `rounded`.

    It returns the model on the CPU, with codes and scales by layer (of experts, by the layer's name and the expert's
    number), and continues from the newest checkpoint in the folder `run`.

    Raises:
        DivergedError: the KL divergence on held-out text has risen.
        InputError: `run` has checkpoints of other options or another model, or the text is too short.
    """

    teacher: str
    """The model before the rounding."""
    text: str
    steps: int
    """Each reads one sequence."""
    kind: str
    """"int4", "int3" or "q4_0"."""
    learning_rate: float
    seq_len: int
    seed: int
    device: str
    trust_remote_code: bool
    of_text: TextOptions
    """How the text is read."""
    restart: bool
    """Begin again if `run` holds checkpoints that cannot be continued."""
    say: Say = silent

    def check(self) -> None:
        """Opens the text as the training will, to refuse one that is too short before anything is rounded."""
        config = self.config(self.teacher, Path("scales"))
        _, of_model, tokenizer = open_model(config.model.model, **config.model.loading)
        with closing(init_world(self.device, "full")) as world:
            options = config.model, config.data, config.evaluation
            open_training_text(*options, tokenizer, vocab_size(of_model), world, rows_per_rank=1)

    def config(self, model: str | Path, run: Path) -> TrainConfig:
        """The run that trains the scales of `model`, in the folder `run`."""
        longest = context_length(open_config(str(model), trust_remote_code=self.trust_remote_code))
        text = {field.name: getattr(self.of_text, field.name) for field in fields(TextOptions)}
        options: dict[str, Any] = {name: value for name, value in text.items() if value is not None}
        return TrainConfig.of(
            model,
            self.text,
            run,
            method="dense",
            weight_bits=FORMATS[self.kind].bits,
            teacher=self.teacher,
            eta=1.0,  # the KL alone: the rounded model shall compute as the teacher, and learn nothing of the text
            learning_rate=self.learning_rate,
            max_steps=self.steps,
            per_device_train_batch_size=1,
            seq_len=min(self.seq_len, longest or self.seq_len),
            seed=self.seed,
            eval_tokens=EVAL_TOKENS,
            eval_steps=self.steps,
            save_steps=SAVE_STEPS,
            async_save=False,  # they are small
            report_to=("none",),
            resume=True,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            **options,
        )

    @torch.enable_grad()
    def __call__(self, rounded: Path, run: Path) -> tuple[PreTrainedModel, dict[str, Rounded]]:
        with closing(init_world(self.device, "full")) as world:
            config = self.config(rounded, run)
            method_class = BlockScales if FORMATS[self.kind].of_gguf else Scales
            try:
                trainer = Trainer(config, world, method_class=method_class)
            except InputError as error:
                if not run.exists():
                    raise
                if not self.restart:
                    raise InputError(f"{error}; --overwrite trains the scales again") from error
                shutil.rmtree(run)
                trainer = Trainer(config, world, method_class=method_class)
            with trainer.recording(announce=False):
                trainer.train(Interrupt())  # a signal ends it at once: a run loses at most `SAVE_STEPS`
            layers = list(rounded_layers(trainer.model))
            measure = trainer.objective, trainer.text.held_out, config.data.seq_len, 1, trainer.precision, world
            after = float(held_out_loss(*measure, "kl"))
            for _, _, rounding in layers:
                rounding.on = False  # the weights as they were rounded
            before = float(held_out_loss(*measure, "kl"))
            for _, _, rounding in layers:
                rounding.on = True
            if not after <= before:
                raise DivergedError(
                    f"the KL divergence from {self.teacher} rose from {before:.4f} to {after:.4f} on held-out text: "
                    "pass a lower --learning-rate with --overwrite, or leave --train-steps out"
                )
            self.say(f"trained scales: KL divergence {before:.4f} -> {after:.4f} on held-out text")
            found: dict[str, Rounded] = {}
            for name, layer, rounding in layers:
                assert isinstance(rounding, ScaledCodes)
                codes, scales = rounding.stored(weight_parameter(layer).detach())
                found |= _matrices(name, self.kind, codes.to(torch.int8).cpu(), scales.detach().float().cpu())
            fold_weight_scaling(trainer.model)
            return trainer.model.cpu(), found


def _matrices(name: str, kind: str, codes: Tensor, scales: Tensor) -> dict[str, Rounded]:
    """The matrices of a layer: one, or one for each expert."""
    if codes.dim() == 2:
        return {name: Rounded(kind, codes, scales)}
    return {f"{name}.{expert}": Rounded(kind, *parts) for expert, parts in enumerate(zip(codes, scales))}
