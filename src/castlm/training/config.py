"""TrainConfig: the options of a run as a Python object, a YAML file and a command line. Importing it is instant.

A config has a section for each component that reads options. Options have flat names on the command line, in YAML and
in Python; a default that depends on other options is filled in when a config is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from castlm.core.decay import DECAYS
from castlm.core.errors import InputError
from castlm.core.nm import NM, Pattern
from castlm.data.options import OF_CONVERSATIONS
from castlm.fields import check_complete, checked, convert, default_of, hints_of, is_required, label
from castlm.files.yaml_file import read_yaml_mapping, to_yaml
from castlm.methods.options import AdapterOptions, MethodOptions, OptimizerOptions
from castlm.methods.table import METHODS
from castlm.oneshot.options import BasisOptions, EffortOptions, Refinements, part_of, with_effort
from castlm.training.options import (
    HIDDEN_WEIGHT,
    CheckpointOptions,
    DataOptions,
    EvaluationOptions,
    ModelOptions,
    RuntimeOptions,
    StartOptions,
    TeacherOptions,
)

Layer = tuple[str, Mapping[str, Any]]
"""The source of values, as a file or the command line, and the values by name."""

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
"""The values of each `recipe`; options that are given override them."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Turn a dense causal LM into an n:m sparse one by continued training (CAST, arXiv 2509.25996).

    `TrainConfig.of` makes one from options, whose names are Hugging Face's where the meaning is the same, and
    `config.changed(learning_rate=1e-5)` makes a changed copy. Each attribute is a section, whose fields are options.

    Raises:
        InputError: a value of the wrong type or out of range, or options that exclude each other.

    Examples:
        >>> config = TrainConfig.of("my-model", "text.jsonl", "run", learning_rate=1e-4)
        >>> config.optimizer.learning_rate
        0.0001
        >>> config.start.init_from, config.changed(method="srste").start.init_from
        ('sparsegpt', 'magnitude')
    """

    model: ModelOptions
    data: DataOptions
    method: MethodOptions
    start: StartOptions
    adapter: AdapterOptions
    teacher: TeacherOptions
    optimizer: OptimizerOptions
    evaluation: EvaluationOptions
    checkpoint: CheckpointOptions
    runtime: RuntimeOptions
    given: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The options that were given, by name. `changed` fills the defaults that depend on them in again."""

    @classmethod
    def of(cls, model: str | Path, dataset: str | Iterable[str], output_dir: str | Path, **options: Any) -> Self:
        """The config with these options; see `castlm train --help-all` for all of them."""
        return cls.from_mapping({"model": model, "dataset": dataset, "output_dir": output_dir, **options})

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], source: str = "") -> Self:
        """The config of a mapping, whose options may be grouped in sections.

        Args:
            mapping: `{"max_steps": 300}` and `{"optimizer": {"max_steps": 300}}` mean the same. `recipe` names a row of
                `RECIPES`, which the other options override.
            source: the file of the mapping, for error messages.

        Raises:
            InputError: an unknown or missing option, one that is given twice, or whatever `TrainConfig` refuses.
        """
        return cls.from_layers([(source, mapping)])

    @classmethod
    def from_layers(cls, layers: Iterable[Layer]) -> Self:
        """`from_mapping` for several mappings with their sources; later ones override earlier ones."""
        values: dict[str, Any] = {}
        recipe, source = "castlm", ""
        for source, mapping in layers:
            options = without_sections(mapping, source)
            if "recipe" in options:
                recipe = convert(label("recipe", source), options.pop("recipe"), str, tuple(RECIPES))
            values |= checked(list(sections_of(cls).values()), options, source)
        values = {**RECIPES[recipe], **values}
        check_complete(sections_of(cls).values(), values, source)
        return cls._made(values)

    def changed(self, **options: Any) -> Self:
        """A copy with other values of these options."""
        values = checked(list(sections_of(type(self)).values()), options)
        return self._made({**self.given, **values})

    @classmethod
    def _made(cls, values: Mapping[str, Any]) -> Self:
        """The config of checked values."""
        chosen = with_effort(values)
        sections = {
            title: kind(**{name: chosen[name] for name in names_of(kind) if name in chosen})
            for title, kind in sections_of(cls).items()
        }
        return cls(**sections, given=values)

    def __post_init__(self) -> None:
        self._fill_in()
        self._check()

    def _fill_in(self) -> None:
        """Fills in the defaults that depend on options of another section."""
        method, pattern = self.method, self.model.pattern
        start = self.start.init_from
        if start is None:  # magnitude is the start in the papers of the other methods
            start = pattern.default_solver if method.row.starts_solved else "magnitude"
            object.__setattr__(self, "start", dataclasses.replace(self.start, init_from=start))
        if method.decay_end is None:
            decay_end = 0.3 if method.starts_at_zero(start, pattern) else 0.1
            object.__setattr__(self, "method", dataclasses.replace(method, decay_end=decay_end))
        if self.teacher.hidden_weight is None:
            reads_dense = self.teacher.teacher is None and self.teacher.teacher_cache is None
            compares = self.teacher.eta > 0 and reads_dense and method.row.is_sparse and not self.is_finetuning
            weight = HIDDEN_WEIGHT if compares else 0.0
            object.__setattr__(self, "teacher", dataclasses.replace(self.teacher, hidden_weight=weight))

    def _check(self) -> None:
        """Raises `InputError` for options of several sections that exclude each other."""
        start, pattern, teacher = self.start.name, self.model.pattern, self.teacher
        if start in pattern.solvers and start != "magnitude":
            part_of(self.start, Refinements).for_solver(start, pattern)
        if start != "magnitude" and self.method.row.starts_dense:
            raise InputError(f"init_from {start}: method {self.method.method} starts dense; omit init_from")
        if self.adapter.adapter != "none" and not self.is_finetuning:
            raise InputError(
                f"adapter {self.adapter.adapter} needs a model that is n:m already: use castlm finetune MODEL"
            )
        if self.start.rotate in ("values", "residual") and start not in ("wanda", "sparsegpt"):
            raise InputError(
                f"rotate {self.start.rotate} needs a calibrated start: set init_from to sparsegpt or wanda"
            )
        if teacher.teacher_cache and not (teacher.teacher_top_k and teacher.eta):
            raise InputError("teacher_cache stores the teacher's top-k tokens: set teacher_top_k (64, say) and eta > 0")
        if teacher.hidden_weight and (teacher.teacher_cache or not teacher.eta):
            remedy = "set eta above 0" if not teacher.eta else "omit teacher_cache, which holds no hidden states"
            raise InputError(f"hidden_weight {teacher.hidden_weight:g} needs the teacher itself: {remedy}, or use 0")
        if self.optimizer.num_train_epochs is not None:
            if self.optimizer.max_steps != OptimizerOptions.max_steps:
                raise InputError("max_steps and num_train_epochs both set the length of the run: give one")
            if isinstance(self.data.dataset, tuple):
                raise InputError("num_train_epochs needs a single dataset: a mixture has no epochs, give max_steps")

    @property
    def is_finetuning(self) -> bool:
        """Whether the model of the run is n:m already, and not dense."""
        return self.method.row.keeps_mask and self.start.init_from == self.model.model

    @property
    def inputs(self) -> dict[str, str | None]:
        """The models, texts and folders that the run reads, by option; an output folder may hold none of them."""
        texts = {f"dataset {text}": text for text in self.data.datasets}
        texts |= {f"eval_dataset {text}": text for text in self.evaluation.eval_datasets}
        folders = {"teacher_cache": self.teacher.teacher_cache, "init_from": self.start.init_from}
        return {"model": self.model.model, "teacher": self.teacher.teacher, **texts, **folders}

    def as_dict(self) -> dict[str, Any]:
        """Every option by its flat name, as text, numbers and tuples, with the defaults that depend on others."""
        return {
            name: _plain(getattr(getattr(self, title), name))
            for title, kind in sections_of(type(self)).items()
            for name in names_of(kind)
        }

    def as_yaml(self) -> str:
        """The run as a file for `--config`, in sections, without `resume` and `overwrite`.

        A default that the run does not read stays empty, because options in a file count as given.
        """
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in self.as_dict().items()}
        if not self.method.reads_decay_end:
            values["decay_end"] = self.given.get("decay_end")
        sections = {
            title: {name: values[name] for name in names_of(kind) if name not in ("resume", "overwrite")}
            for title, kind in sections_of(type(self)).items()
        }
        return to_yaml(sections)

    def needs(self, option: str) -> str | None:
        """The condition for an effect of `option` that this run does not meet, in words; None if it has an effect."""
        readers = [method for method, row in METHODS.items() if option in row.options]
        if readers and self.method.method not in readers:
            return f"method {' or '.join(readers)}"
        effect = EFFECTS.get(option)
        return None if effect is None or effect.when(self) else effect.needs

    def without_effect(self, is_plain: bool = False) -> dict[str, str]:
        """The options that were changed from their default and have no effect in this run, each with the reason.

        Args:
            is_plain: whether every text of the run is plain.

        Examples:
            >>> TrainConfig.of("model", "text.jsonl", "run", eta=0.0, temperature=2.0).without_effect()
            {'temperature': 'temperature = 2.0 has an effect only with eta above 0'}
        """
        defaults = {f.name: f for kind in sections_of(type(self)).values() for f in dataclasses.fields(kind)}
        found = {}
        for name, value in self.given.items():
            if is_required(defaults[name]) or value in (None, default_of(defaults[name])):
                continue
            needs = self.needs(name) or (OF_CONVERSATIONS.get(name) if is_plain else None)
            if needs is not None:
                found[name] = f"{name} = {value} has an effect only with {needs}"
        return found


def sections_of(kind: type[TrainConfig]) -> dict[str, type[Any]]:
    """The sections of a config by their titles, in the order of the help."""
    hints = hints_of(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.name != "given"}


def names_of(section: type[Any]) -> list[str]:
    """The names of the options of a section."""
    return [f.name for f in dataclasses.fields(section)]


def without_sections(mapping: Mapping[str, Any], source: str = "") -> dict[str, Any]:
    """Options by name, out of their sections: `{"optimizer": {"max_steps": 9}}` becomes `{"max_steps": 9}`.

    Raises:
        InputError: an option that is given twice.
    """
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        is_section = isinstance(value, Mapping) and key in sections_of(TrainConfig)
        for name, item in value.items() if is_section else [(key, value)]:
            if is_retired(name, item):
                continue
            if name in found:
                raise InputError(f"{label(name, source)} is given twice: once is enough")
            found[name] = item
    return found


def is_retired(name: str, value: Any) -> bool:
    """Whether castlm no longer has this option, and the older run had it turned off."""
    return name in RETIRED and value == RETIRED[name]


def read_layers(paths: Iterable[str]) -> list[Layer]:
    """The YAML files of `--config`, for `TrainConfig.from_layers`."""
    return [(path, read_yaml_mapping(path)) for path in paths]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, (Pattern, Path)) else value


# --------------------------------------------------------------------------------------- options without an effect


class Effect(NamedTuple):
    """The condition under which an option has an effect."""

    when: Callable[[TrainConfig], bool]
    needs: str
    """The same in words, as the end of "... has an effect only with"."""


def _reads_text(config: TrainConfig) -> bool:
    return config.start.name in config.model.pattern.solvers and config.start.name != "magnitude"


def _turns_axes(config: TrainConfig) -> bool:
    return _reads_text(config) and isinstance(config.model.pattern, NM)


def _refreshes_masks(config: TrainConfig) -> bool:
    start = config.start.name
    return start == "magnitude" or config.method.starts_at_zero(start, config.model.pattern)


def _is_on_hub(dataset: str) -> bool:
    from castlm.data.documents import find_files  # imports numpy, which would slow `--help`

    return find_files(dataset) is None


def _any_on_hub(datasets: Iterable[str]) -> bool:
    return any(map(_is_on_hub, datasets))


def _splits_local_text(config: TrainConfig) -> bool:
    """Whether a fraction of a local text is held out. A stream, of unknown length, gives a number of documents."""
    return config.evaluation.eval_dataset is None and not all(map(_is_on_hub, config.data.datasets))


EFFECTS: dict[str, Effect] = {
    "decay_end": Effect(lambda c: c.method.reads_decay_end, "a decay that ends before the run"),
    "lam": Effect(lambda c: c.method.reads_lam, "a decay that uses lam"),
    "ignore_decay_budget": Effect(lambda c: c.method.row.decays and DECAYS[c.method.decay].reduces, "a decay"),
    "lora_r": Effect(lambda c: c.adapter.adapter != "none", "adapter shira"),
    "mask_interval": Effect(
        lambda c: not c.method.row.decays or _refreshes_masks(c),
        "init_from magnitude, or an n:m pattern whose decay is horizon",
    ),
    **dict.fromkeys(
        ("calibration_sequences", *names_of(EffortOptions)),
        Effect(_reads_text, "a start that reads text, such as init_from sparsegpt"),
    ),
    **dict.fromkeys(
        names_of(Refinements),
        Effect(_reads_text, "init_from sparsegpt"),
    ),
    "refit_iterations": Effect(
        _reads_text,
        "init_from sparsegpt, or a structured pattern with a score that reads text",
    ),
    **dict.fromkeys(
        names_of(BasisOptions),
        Effect(_turns_axes, "an n:m pattern from a calibrated start: init_from sparsegpt or wanda"),
    ),
    "rotation_iterations": Effect(
        lambda c: _turns_axes(c) and c.start.rotates_values,
        "a rotation: rotate other than off, and an n:m pattern with init_from sparsegpt or wanda",
    ),
    "teacher": Effect(lambda c: c.teacher.eta > 0, "eta above 0"),
    "temperature": Effect(lambda c: c.teacher.eta > 0, "eta above 0"),
    "teacher_top_k": Effect(lambda c: c.teacher.eta > 0, "eta above 0"),
    "min_lr_ratio": Effect(lambda c: c.optimizer.lr_scheduler_type != "constant", "a learning rate that falls"),
    "hub_model_id": Effect(lambda c: c.checkpoint.push_to_hub, "push_to_hub"),
    "hub_private_repo": Effect(lambda c: c.checkpoint.push_to_hub, "push_to_hub"),
    "dataset_split": Effect(lambda c: _any_on_hub(c.data.datasets), "a dataset of the hub"),
    "eval_fraction": Effect(
        _splits_local_text, "a held-out part of local text: no eval_dataset, and no stream of the hub"
    ),
    "eval_split": Effect(lambda c: _any_on_hub(c.evaluation.eval_datasets), "an eval_dataset of the hub"),
    "eval_config": Effect(lambda c: c.evaluation.eval_dataset is not None, "an eval_dataset"),
    "left_dense": Effect(lambda c: c.method.row.is_sparse, "a method that makes weights sparse"),
    "pattern": Effect(lambda c: c.method.row.is_sparse, "a method that makes weights sparse"),
    "save_total_limit": Effect(lambda c: c.checkpoint.save_steps > 0, "save_steps above 0"),
    "async_save": Effect(lambda c: c.checkpoint.save_steps > 0, "save_steps above 0"),
}
"""The options whose effect depends on others; for the options of a method, see `METHODS`."""

RETIRED: dict[str, Any] = {"target_asymmetry": 0.0, "stream_correction": 0.0}
"""Former options, which files of older runs may still name, with the value that turned them off."""

# Options that do not change the result of a run.
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

# Options that may differ between a run and its resumption. The global batch must stay the same, not its factors.
FREE_ON_RESUME = WITHOUT_EFFECT | {
    "document_limit",  # so that a run that met a larger document can continue
    "save_dtype",
    "eval_steps",
    "device",
    "precision",  # compared by its effect, the fact `precision_used`
    "fused_optimizer",
    "torch_compile",
    "gradient_checkpointing",
    "sharding",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
}
