"""TrainConfig and FinetuneConfig: the options of a run as a Python object, a YAML file and a command line.

A config has a section for each component that reads options. Options have flat names on the command line, in YAML and
in Python; a default that depends on other options is filled in when a config is made. Importing this is instant.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from castlm.core.errors import InputError, check_type
from castlm.core.nm import NM, Pattern
from castlm.fields import (
    Joined,
    check_complete,
    checked,
    convert,
    essential,
    label,
    option,
    parsed,
    positional,
    unmet,
    without_effect,
)
from castlm.files.yaml_file import to_yaml
from castlm.methods.options import AdapterOptions, MethodOptions, OptimizerOptions
from castlm.oneshot.methods import applied, default_method, reads_of, trained_from
from castlm.oneshot.options import Refinements, part_of, with_effort
from castlm.patterns import parse_pattern
from castlm.signals import num_ranks
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

RECIPES: dict[str, dict[str, Any]] = {
    "castlm": {},
    # arXiv 2509.25996, Table XI. It does not give schedule, warm-up, betas and clipping: these betas are Adam's, the
    # others castlm's defaults.
    "paper": {
        "decay": "proportional",
        "second_moment": "mix",
        "init_from": "magnitude",
        "learning_rate": 2e-5,
        "mask_interval": 10,
        "scale_groups": 2,
        "eta": 1 / 3,
        "hidden_weight": 0.0,
        "temperature": 1.0,
        "adam_betas": (0.9, 0.999),
        "max_steps": 7500,
        "seq_len": 4096,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 256,  # on one rank: `_batch_on` keeps the 256 sequences of a step on any number
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
    off_recipe: str = field(default="", repr=False, compare=False)
    """The options that override the recipe, with its values, for the first lines of a run; empty if none does."""

    @classmethod
    def of(
        cls,
        model: str | Path,
        dataset: str | Path | Sequence[str],
        output_dir: str | Path,
        **options: Any,
    ) -> Self:
        """The config with these options; see `castlm train --help-all` for all of them."""
        return cls.from_mapping({"model": model, "dataset": dataset, "output_dir": output_dir, **options})

    @classmethod
    def sections(cls) -> dict[str, type[Any]]:
        """The sections of a config by their titles, in the order of the help."""
        hints = typing.get_type_hints(cls)
        return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.name not in ("given", "off_recipe")}

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
    def from_layers(cls, layers: Iterable[tuple[str, Mapping[str, Any]]], ranks: int | None = None) -> Self:
        """`from_mapping` for several sources, each with its mapping; later ones override earlier ones.

        Args:
            ranks: the number of ranks that share a recipe's batch; by default, those that torchrun has started.
        """
        values: dict[str, Any] = {}
        recipe, source = "castlm", ""
        for source, mapping in layers:
            options = without_sections(mapping, source)
            if "recipe" in options:
                recipe = convert(label("recipe", source), options.pop("recipe"), str, tuple(RECIPES))
            values |= checked(list(cls.sections().values()), options, source)
        row = _batch_on(ranks or num_ranks(), recipe, values)
        off_recipe = _off_recipe(recipe, row, values)
        values = {**row, **values}
        check_complete(cls.sections().values(), values, source)
        return cls._made(values, off_recipe)

    def changed(self, **options: Any) -> Self:
        """A copy with other values of these options."""
        # again from what was given, so that defaults follow the change
        values = checked(list(self.sections().values()), options)
        return self._made({**self.given, **values}, self.off_recipe)

    @classmethod
    def _made(cls, values: Mapping[str, Any], off_recipe: str) -> Self:
        """The config of checked values."""
        chosen = with_effort(values)
        sections = {
            title: kind(**{name: chosen[name] for name in names_of(kind) if name in chosen})
            for title, kind in cls.sections().items()
        }
        return cls(**sections, given=values, off_recipe=off_recipe)

    def __post_init__(self) -> None:
        for title, kind in self.sections().items():
            remedy = f"{type(self).__name__}.of(model, dataset, output_dir, ...) makes the sections of options"
            check_type(getattr(self, title), kind, f"the section {title} must be {kind.__name__}", remedy)
        self._fill_in()
        self._check()

    def _set(self, section: str, **options: Any) -> None:
        """Fills in options of a section; the config is frozen afterwards."""
        object.__setattr__(self, section, dataclasses.replace(getattr(self, section), **options))

    def _fill_in(self) -> None:
        """Fills in the defaults that depend on options of another section."""
        method, pattern = self.method, self.model.pattern
        if self.start.init_from is None:  # magnitude is the start in the papers of the other methods
            self._set("start", init_from=default_method(pattern) if method.row.starts_solved else "magnitude")
        if method.decay_end is None:
            # From zero, a masked weight needs some steps to outgrow a kept one: the mask stays open longer.
            self._set("method", decay_end=0.3 if method.step0(self.start.name) == "from zero" else 0.1)
        if method.lam is None and method.reads_lam:
            self._set("method", lam=method.default_lam)
        if self.teacher.hidden_weight is None:
            reads_dense = self.teacher.teacher is None and self.teacher.teacher_cache is None
            changes = method.row.is_sparse or method.weight_bits is not None
            compares = self.teacher.eta > 0 and reads_dense and changes and not self.is_finetuning
            self._set("teacher", hidden_weight=HIDDEN_WEIGHT if compares else 0.0)

    def _check(self) -> None:
        """Raises `InputError` for options of several sections that exclude each other."""
        start, pattern, teacher = self.start.name, self.model.pattern, self.teacher
        if trained_from(start, pattern) is not None:
            applied(part_of(self.start, Refinements), start, pattern, self.start.start_effort)
        if self.method.row.is_sparse and not isinstance(pattern, self.method.row.patterns):
            raise InputError(f"method {self.method.method} does not train to {pattern}: use another method, or 2:4")
        if self.method.lam == "auto" and self.method.reads_lam and not self.method.row.decays:
            raise InputError(
                f"lam auto measures the momentum, which method {self.method.method} does not decay: give a number"
            )
        if start != "magnitude" and self.method.row.step0 == "dense":
            raise InputError(f"init_from {start}: method {self.method.method} starts dense; omit init_from")
        if self.adapter.adapter != "none" and not self.is_finetuning:
            raise InputError(
                f"adapter {self.adapter.adapter} needs a model that is n:m already: use castlm finetune MODEL"
            )
        if bits := self.method.weight_bits:
            if self.adapter.adapter != "none":
                raise InputError(f"weight_bits {bits} rounds every weight: omit adapter {self.adapter.adapter}")
            if self.method.row.is_sparse and not isinstance(pattern, NM):
                raise InputError(f"weight_bits {bits} is for n:m and for method dense, not for {pattern}: use 2:4")
        if teacher.teacher_cache and not (teacher.teacher_top_k and teacher.eta):
            raise InputError("teacher_cache stores the teacher's top-k tokens: set teacher_top_k (64, say) and eta > 0")
        if teacher.hidden_weight and (teacher.teacher_cache or not teacher.eta):
            remedy = "set eta above 0" if not teacher.eta else "omit teacher_cache, which holds no hidden states"
            raise InputError(f"hidden_weight {teacher.hidden_weight:g} needs the teacher itself: {remedy}, or use 0")
        if self.optimizer.num_train_epochs is not None and self.optimizer.max_steps != OptimizerOptions.max_steps:
            raise InputError("max_steps and num_train_epochs both set the length of the run: give one")

    @property
    def is_finetuning(self) -> bool:
        """Whether the model of the run is n:m already, and not dense."""
        return self.method.row.keeps_mask and self.start.init_from == self.model.model

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step on a single rank."""
        return self.optimizer.sequences_per_step(1) * self.data.seq_len

    def schedule(self) -> tuple[list[float], list[float]]:
        """The learning rate and the ramp of the decay at each step."""
        optimizer, steps = self.optimizer, range(self.optimizer.max_steps)
        alphas = [self.method.alpha(step, optimizer.max_steps) for step in steps]
        return [optimizer.learning_rate_at(step) for step in steps], alphas

    @property
    def inputs(self) -> dict[str, str | None]:
        """The models, texts and folders that the run reads, by option; an output folder may hold none of them."""
        texts: dict[str, str | None] = {f"dataset {text}": text for text in self.data.datasets}
        texts |= {f"eval_dataset {text}": text for text in self.evaluation.eval_datasets}
        texts |= {"general_dataset": self.evaluation.general_dataset}
        folders = {"teacher_cache": self.teacher.teacher_cache, "init_from": self.start.init_from}
        return {"model": self.model.model, "teacher": self.teacher.teacher, **texts, **folders}

    def as_dict(self) -> dict[str, Any]:
        """Every option by its flat name, as text, numbers and tuples, with the defaults that depend on others."""
        return {
            name: _plain(getattr(getattr(self, title), name))
            for title, kind in self.sections().items()
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
            for title, kind in self.sections().items()
        }
        return to_yaml(sections)

    def needs(self, option: str) -> str | None:
        """The condition for an effect of `option` that this run does not meet, in words; None if it has an effect."""
        fields = {field.name: field for kind in self.sections().values() for field in dataclasses.fields(kind)}
        return unmet(fields[option], self._joined())

    def without_effect(self, is_plain: bool = False) -> dict[str, str]:
        """The options that were given, ask for something and have no effect in this run, each with the reason.

        Args:
            is_plain: whether every text of the run is plain.

        Examples:
            >>> TrainConfig.of("model", "owner/text", "run", eta=0.0, temperature=2.0).without_effect()
            {'temperature': 'temperature = 2.0 has an effect only with eta above 0'}
        """
        return without_effect(self.sections().values(), self.given, self._joined(is_plain))

    def _joined(self, is_plain: bool = False) -> Joined:
        """All options of the run as attributes of one object, with the facts that their conditions ask for."""
        sections = [getattr(self, title) for title in self.sections()]
        reads = reads_of(trained_from(self.start.name, self.model.pattern), self.model.pattern)
        return Joined(SimpleNamespace(is_plain=is_plain, reads=reads), *sections)


def _batch_on(ranks: int, recipe: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe, whose number of sequences of a step stays the same on this number of ranks."""
    row = dict(RECIPES[recipe])
    accumulated = row.get("gradient_accumulation_steps")
    if accumulated is None or "gradient_accumulation_steps" in given:
        return row
    batch = accumulated * row["per_device_train_batch_size"]
    at_once = given.get("per_device_train_batch_size", row["per_device_train_batch_size"]) * ranks
    if batch % at_once:
        raise InputError(
            f"recipe {recipe} has {batch} sequences in a step, which {ranks} ranks of {at_once // ranks} at a time do "
            "not divide: give another per_device_train_batch_size, or gradient_accumulation_steps"
        )
    return row | {"gradient_accumulation_steps": batch // at_once}


def _off_recipe(recipe: str, row: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """The text of `TrainConfig.off_recipe`. Sequences at a time do not count where the sequences of a step stay."""
    names = [name for name in row if name in given and given[name] != row[name]]
    if "gradient_accumulation_steps" not in given:
        names = [name for name in names if name != "per_device_train_batch_size"]
    if not names:
        return ""
    return f"recipe {recipe}, except " + ", ".join(f"{name} {given[name]} (not {row[name]})" for name in names)


def names_of(section: type[Any]) -> list[str]:
    """The names of the options of a section."""
    return [f.name for f in dataclasses.fields(section)]


def without_sections(mapping: Mapping[str, Any], source: str = "") -> dict[str, Any]:
    """Options by name, out of their sections: `{"optimizer": {"max_steps": 9}}` becomes `{"max_steps": 9}`.

    Raises:
        InputError: an option that is given twice.
    """
    options: dict[str, Any] = {}
    for key, value in mapping.items():
        is_section = isinstance(value, Mapping) and key in TrainConfig.sections()
        for name, item in value.items() if is_section else [(key, value)]:
            if name in options:
                raise InputError(f"{label(name, source)} is given twice: once is enough")
            options[name] = item
    return options


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, (Pattern, Path)) else value


FULL_LEARNING_RATE, ADAPTER_LEARNING_RATE = 5e-5, 5e-4


@dataclass(frozen=True)
class SparseModelOptions(ModelOptions):
    """The sparse model that is fine-tuned."""

    model: str = positional(
        essential=True,
        help="n:m sparse causal LM: a folder, plain or packed, or a hub id. Its zeros become the mask.",
    )

    pattern: Pattern = parsed(
        NM(2, 4),
        parse_pattern,
        help="Pattern of the model, which stays. On the command line, the default is the pattern in the model's "
        "castlm.json.",
    )


@dataclass(frozen=True, kw_only=True)
class FixedMaskOptions(MethodOptions):
    """The method of fine-tuning: a fixed mask."""

    method: str = "finetune"


@dataclass(frozen=True, kw_only=True)
class FinetuneTeacherOptions(TeacherOptions):
    """Distillation from the model before fine-tuning, or from another one."""

    eta: float = option(
        0.0,
        at_least=0,
        at_most=1,
        help="Weight in the loss of the KL divergence to the teacher, by default the model before fine-tuning, 0 "
        "to 1. Above 0, the model stays closer to it.",
    )


@dataclass(frozen=True, kw_only=True)
class FinetuneOptimizerOptions(OptimizerOptions):
    """Optimizer, schedule and batch of fine-tuning."""

    learning_rate: float | None = essential(
        None,
        above=0,
        help="Peak learning rate. The default is 5e-5, and 5e-4 for adapters.",
    )

    adam_betas: tuple[float, float] = option(
        (0.9, 0.999),
        at_least=0,
        below=1,
        help="Decay rates of Adam's moments.",
    )


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Fine-tune an n:m sparse model on your text. Every zero stays zero, and the result is verified.

    It has the options of `TrainConfig` with some other defaults: no teacher, Adam's usual betas, a lower learning rate.
    `castlm.train` runs it.

    Raises:
        InputError: as `TrainConfig`, and for options that make it another kind of run.

    Examples:
        >>> config = FinetuneConfig.of("my-2of4-model", "text.jsonl", "run", adapter="shira")
        >>> config.method.method, config.start.init_from, config.teacher.eta, config.optimizer.learning_rate
        ('finetune', 'my-2of4-model', 0.0, 0.0005)
    """

    model: SparseModelOptions
    method: FixedMaskOptions
    teacher: FinetuneTeacherOptions
    optimizer: FinetuneOptimizerOptions

    def _fill_in(self) -> None:
        if self.start.init_from is None:
            self._set("start", init_from=self.model.model)
        if self.optimizer.learning_rate is None:
            rate = FULL_LEARNING_RATE if self.adapter.adapter == "none" else ADAPTER_LEARNING_RATE
            self._set("optimizer", learning_rate=rate)
        super()._fill_in()

    def _check(self) -> None:
        if not self.is_finetuning:
            raise InputError(
                f"method {self.method.method} from init_from {self.start.init_from}: fine-tuning keeps the mask of its "
                "model; omit both options, or use castlm train"
            )
        super()._check()
