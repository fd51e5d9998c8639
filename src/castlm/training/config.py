"""TrainConfig: the options of a run as a Python object, a YAML file and a command line. Importing it is instant.

Defaults that depend on other options are properties, so that `dataclasses.replace` never carries a derived value over.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from castlm.core.combined import is_structured
from castlm.core.decay import DECAYS
from castlm.core.errors import InputError
from castlm.core.pattern import Pattern
from castlm.fields import check_complete, checked, choices_of, convert, hints_of, label, unknown
from castlm.files.yaml_file import read_yaml_mapping, to_yaml
from castlm.methods.table import METHODS
from castlm.oneshot.options import CALIBRATED, UNIT_SCORES, Refinements, default_start, part_of
from castlm.training.sections import (
    HIDDEN_WEIGHT,
    SECTIONS,
    CheckpointOptions,
    DataOptions,
    EvaluationOptions,
    MethodOptions,
    ModelOptions,
    OptimizerOptions,
    RuntimeOptions,
    StartOptions,
    TeacherOptions,
)

Layer = tuple[str, Mapping[str, Any]]
"""Where values come from, and the values by name."""


def weighted_texts(dataset: str | Sequence[str]) -> dict[str, float]:
    """Training texts with their weights, as the option `dataset` names them.

    Examples:
        >>> weighted_texts(["a.txt:0.7", "b.jsonl"])
        {'a.txt': 0.7, 'b.jsonl': 1.0}
    """
    if isinstance(dataset, str):
        return {dataset: 1.0}
    found: dict[str, float] = {}
    for text in dataset:
        name, _, weight = text.rpartition(":")
        has_weight = bool(name) and re.fullmatch(r"-?(\d+\.?\d*|\.\d+)", weight) is not None
        found[name if has_weight else text] = float(weight) if has_weight else 1.0
    return found


@dataclass(frozen=True)
class TrainConfig(  # the fields of the last base come first
    RuntimeOptions,
    CheckpointOptions,
    EvaluationOptions,
    OptimizerOptions,
    TeacherOptions,
    StartOptions,
    MethodOptions,
    DataOptions,
    ModelOptions,
):
    """Turn a dense causal LM into an n:m sparse one by continued training (CAST, arXiv 2509.25996).

    Option names are Hugging Face's where the meaning is the same. `dataclasses.replace` makes a changed copy.

    Raises:
        InputError: a value of the wrong type or out of range, or options that exclude each other.

    Examples:
        >>> config = TrainConfig("my-model", "text.jsonl", "run", learning_rate=1e-4)
        >>> config.start, dataclasses.replace(config, method="srste").start
        ('sparsegpt', 'magnitude')
    """

    SECTIONS: ClassVar[dict[str, type]] = SECTIONS
    # Options that the command line of `castlm train` leaves out, each with the command that reads it.
    UNUSED: ClassVar[dict[str, str]] = dict.fromkeys(("adapter", "lora_r"), "finetune")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = convert(field.name, getattr(self, field.name), hints_of(type(self))[field.name], choices_of(field))
            object.__setattr__(self, field.name, value)
        for name in ("dataset", "eval_dataset"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) == 1:
                object.__setattr__(self, name, value[0])
        for section in SECTIONS.values():
            for name, right, remedy in section.bounds(self):  # type: ignore[attr-defined]
                if not right:
                    raise InputError(f"{name} = {getattr(self, name)} is out of range: it must be {remedy}")
        pattern = Pattern.parse(self.pattern)
        if self.start in (UNIT_SCORES if is_structured(pattern) else CALIBRATED):
            part_of(self, Refinements).for_solver(self.start, pattern)
        if self.init_from not in (None, "magnitude") and METHODS[self.method].starts_dense:
            raise InputError(f"init_from {self.init_from}: method {self.method} starts dense, leave it out")
        if self.rotate in ("values", "residual") and self.start not in ("wanda", "sparsegpt"):
            raise InputError(f"rotate {self.rotate} needs a calibrated start: set init_from to sparsegpt or wanda")
        if self.teacher_cache and not (self.teacher_top_k and self.eta):
            raise InputError("teacher_cache stores the teacher's top-k tokens: set teacher_top_k (64, say) and eta > 0")
        if self.hidden_weight and (self.teacher_cache or not self.eta):
            remedy = "set eta above 0" if not self.eta else "a teacher_cache holds no hidden states, leave it out"
            raise InputError(f"hidden_weight {self.hidden_weight:g} needs the teacher at work: {remedy}, or use 0")
        if self.num_train_epochs is not None and self.max_steps != OptimizerOptions.max_steps:
            raise InputError("max_steps and num_train_epochs both set the length of the run: give one")
        if isinstance(self.dataset, tuple):
            if len(self.datasets) < len(self.dataset):
                raise InputError("dataset names a text twice: give it once, with a larger weight")
            if self.repeat_sequences or self.num_train_epochs is not None:
                option = "repeat_sequences" if self.repeat_sequences else "num_train_epochs"
                raise InputError(f"{option} needs a single dataset: a mixture has no epochs, its texts have their own")
        if len(set(self.eval_datasets)) < len(self.eval_datasets):
            raise InputError("eval_dataset names a text twice: give it once")
        if self.resume and self.overwrite:
            raise InputError("resume and overwrite exclude each other: choose one")

    @property
    def start(self) -> str:
        """Where the run starts: `init_from`, or the default of the method."""
        if self.init_from is None and METHODS[self.method].starts_solved:
            return default_start(Pattern.parse(self.pattern))
        return self.init_from or "magnitude"  # as in the papers of the other methods

    @property
    def starts_at_zero(self) -> bool:
        """Whether CAST's masked weights start at zero: from a given n:m mask, with a decay that ends at zero.

        A refresh by magnitude then keeps the mask of the start at first, and a masked weight comes back where training
        makes it larger than a kept one. A unit that is zero as a whole has no gradient and could not come back: the
        units of structured patterns decay from their dense values under a fixed mask.
        """
        is_given = (
            self.method == "cast" and self.start != "magnitude" and not is_structured(Pattern.parse(self.pattern))
        )
        return is_given and DECAYS[self.decay].exact_zero

    @property
    def keeps_dense_values(self) -> bool:
        """Whether the masked weights of a given start begin at their dense values: CAST's that do not start at zero."""
        return self.method == "cast" and not self.starts_at_zero

    @property
    def decay_end_used(self) -> float:
        """`decay_end`, or its default for this run."""
        return self.decay_end if self.decay_end is not None else (0.3 if self.starts_at_zero else 0.1)

    @property
    def reads_decay_end(self) -> bool:
        """Whether `decay_end` has an effect."""
        return "decay_end" in METHODS[self.method].options and DECAYS[self.decay].uses_decay_end

    @property
    def eval_steps_used(self) -> int:
        """`eval_steps`, or its default for this run."""
        return self.eval_steps or -(-self.max_steps // 10)

    @property
    def hidden_loss_weight(self) -> float:
        """Weight of the distance of hidden states: `hidden_weight`, or its default for this run."""
        if self.hidden_weight is not None:
            return self.hidden_weight
        is_default = self.eta > 0 and not self.teacher_cache and self.method != "dense" and not self.is_finetuning
        return HIDDEN_WEIGHT if is_default else 0.0

    @property
    def is_finetuning(self) -> bool:
        """Whether the run starts from a model that is n:m already, and not from a dense one."""
        return self.method == "finetune" and self.init_from == self.model

    def is_begun_as(self, begun: TrainConfig) -> bool:
        """Whether a run with these options writes down `begun` once those that depend on text and model are known."""
        found_later = {"resume", "overwrite"}
        found_later |= {"max_steps", "num_train_epochs"} if self.num_train_epochs is not None else set()
        found_later |= {"lam"} if self.lam == "auto" else set()
        found_later |= {"left_dense"} if self.is_finetuning else set()
        written = begun.as_dict()
        return all(written[name] == value for name, value in self.as_dict().items() if name not in found_later)

    @property
    def datasets(self) -> dict[str, float]:
        """The training texts with their weights; a single one has the weight 1."""
        return weighted_texts(self.dataset)

    @property
    def eval_datasets(self) -> tuple[str, ...]:
        """The evaluation texts; empty if a part of the training documents is held out."""
        texts = self.eval_dataset or ()
        return (texts,) if isinstance(texts, str) else texts

    @property
    def hub_repo(self) -> str:
        """The repository that `push_to_hub` uploads to."""
        return self.hub_model_id or Path(self.output_dir).absolute().name

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], source: str = "") -> TrainConfig:
        """The config that a mapping describes, by option or in sections.

        Args:
            mapping: `{"max_steps": 300}` and `{"optimizer": {"max_steps": 300}}` mean the same. `recipe` names values
                of `RECIPES` that the others override.
            source: the file of the mapping, for error messages.

        Raises:
            InputError: an unknown or missing option, one that is given twice, or whatever `TrainConfig` refuses.
        """
        return cls.from_layers([(source, mapping)])

    @classmethod
    def from_layers(cls, layers: Iterable[Layer]) -> TrainConfig:
        """As `from_mapping`, for several mappings with their sources; later ones override earlier ones."""
        values: dict[str, Any] = {}
        recipe, source = "castlm", ""
        for source, mapping in layers:
            flat = flatten(mapping, source)
            if "recipe" in flat:
                recipe = convert(label("recipe", source), flat.pop("recipe"), str, tuple(RECIPES))
            values |= checked(cls, flat, source)
        values = {**RECIPES[recipe], **values}
        check_complete(cls, values, source)
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Every option of the run by name, with the defaults that depend on others filled in."""
        used = {"init_from": self.start, "hidden_weight": self.hidden_loss_weight, "decay_end": self.decay_end_used}
        return dataclasses.asdict(self) | used

    def as_yaml(self) -> str:
        """The run as a file for `--config`, in sections, without `resume` and `overwrite`.

        A default that the run does not read is not filled in, so that the file does not look as if it had been given.
        """
        used = self.as_dict() | ({} if self.reads_decay_end else {"decay_end": self.decay_end})
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in used.items()}
        sections = {
            title: {name: values[name] for name in section_fields(section) if name not in ("resume", "overwrite")}
            for title, section in SECTIONS.items()
        }
        return to_yaml(sections)


def section_fields(section: type) -> list[str]:
    """The names of the options of a section."""
    return [field.name for field in dataclasses.fields(section)]


def flatten(mapping: Mapping[str, Any], source: str = "") -> dict[str, Any]:
    """`mapping` without sections: `{"optimizer": {"max_steps": 9}}` becomes `{"max_steps": 9}`.

    Raises:
        InputError: an option in a section where it does not belong, or one that is given twice.
    """
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        items = value if isinstance(value, Mapping) and key in SECTIONS else {key: value}
        for name, item in items.items():
            if items is value and name not in section_fields(SECTIONS[key]):
                raise InputError(f"{unknown(name, section_fields(SECTIONS[key]), source)} (section {key})")
            if name in flat:
                raise InputError(f"{label(name, source)} is given twice: once is enough")
            flat[name] = item
    return flat


def read_layers(paths: Iterable[str]) -> list[Layer]:
    """The YAML files of `--config`, for `TrainConfig.from_layers`."""
    return [(path, read_yaml_mapping(path)) for path in paths]


RECIPES: dict[str, dict[str, Any]] = {
    "castlm": {},
    # arXiv 2509.25996, Table XI. It does not give the schedule, warm-up, betas and clipping.
    "paper": {
        "decay": "proportional",
        "second_moment": "mix",
        "init_from": "magnitude",
        "learning_rate": 2e-5,
        "lam": 4e-7,
        "mask_interval": 10,
        "scale_groups": 2,
        "eta": 1 / 3,
        "hidden_weight": 0.0,
        "temperature": 1.0,
        "adam_betas": (0.9, 0.999),
        "max_steps": 7500,
        "seq_len": 4096,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 256,
    },
}
"""Values that `recipe` stands for; an option that is given as well overrides them."""

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
        "report_to",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
        "ignore_decay_budget",
        "trust_remote_code",
    }
)

# What may differ between a run and its resumption; the split of the global batch is compared as a product.
FREE_ON_RESUME = WITHOUT_EFFECT | {
    "save_dtype",
    "eval_steps",
    "device",
    "precision",  # what it amounts to is compared
    "fused_optimizer",
    "torch_compile",
    "gradient_checkpointing",
    "sharding",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
}
