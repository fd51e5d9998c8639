"""Plans and starts the runs of a comparison of methods on one model, text and budget."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from castlm.core.errors import DivergedError, InputError
from castlm.core.nm import NM, Pattern
from castlm.data.options import TextOptions
from castlm.fields import build, checked, convert, essential, option
from castlm.files.output import begin_output, output_folder
from castlm.files.yaml_file import read_yaml_mapping
from castlm.lab.compare.presets import ONESHOT, PRESETS, RETRAINING, SPARSEGPT, Preset, every_method
from castlm.lab.compare.report import Report
from castlm.lab.compare.runs import (
    CASTLM,
    ComparedRun,
    OneshotConfig,
    Result,
    content_hash,
    execute,
    refuse_running,
    run_key,
)
from castlm.methods.options import default_learning_rate
from castlm.methods.table import METHODS, is_control
from castlm.oneshot.methods import default_method, methods_of
from castlm.progress import shown_progress
from castlm.say import Say
from castlm.training.config import TrainConfig, without_sections
from castlm.training.options import SEQ_LEN, ModelOptions


@dataclass(kw_only=True)
class CompareConfig:
    """Compare methods that make a model n:m, with the same start, data, teacher, token budget and seeds, in one table.

    A dense control with the same training is always included. Finished runs are not repeated. The exit code is 1 if a
    run failed; the table gives the reason, and lists runs that diverged or fell short.
    """

    model: str = essential(
        help='Local Hugging Face folder, hub id, GGUF file, or "demo".',
    )

    dataset: str = essential(
        help="Training text, as in `castlm train`, but only one.",
    )

    eval_dataset: str = essential(
        help="Text for the perplexity, the same for all runs.",
    )

    output_dir: str = essential(
        help="Folder for the runs and the result. The same command continues an earlier start there.",
    )

    config: str | None = essential(
        None,
        help="YAML file of `castlm train` options for all runs.",
    )

    seq_len: int | None = option(
        None,
        help="Tokens per sequence, in training and evaluation.",
    )

    per_device_train_batch_size: int | None = option(
        None,
        help="Sequences per device and micro-step.",
    )

    eval_tokens: int | None = option(
        None,
        help="Maximum number of tokens to evaluate on. 0 is all of them.",
    )

    budget_tokens: int | None = essential(
        None,
        help="Training tokens of each run; with `--preset budgets`, of the largest runs.",
    )

    max_steps: int | None = essential(
        None,
        at_least=1,
        help="Optimizer steps of each run, instead of --budget-tokens. Variants with larger steps take fewer, so "
        "that all train on the same number of tokens.",
    )

    methods: str | None = essential(
        None,
        help="Methods, separated by commas: cast, finetune, ste, srste, ast, gradual_magnitude, dense, magnitude, "
        "wanda, sparsegpt. The default is all of them, unless variants or a preset are given.",
    )

    published_starts: bool = option(
        False,
        help="Start each method as in its paper, instead of all from the same weights. finetune then starts from "
        "SparseGPT as published: without rotation, permutation, ADMM and least squares, unless config sets them.",
    )

    preset: Literal["oscillation", "decay", "parts", "budgets", "law"] | None = essential(
        None,
        help="A prepared set of variants: one of the paper's ablations, all methods at four budgets, or CAST at eight.",
    )

    variants: str | None = option(
        None,
        help="YAML file that maps the name of each variant to its own options of `castlm train`. Without the "
        "option `method`, its method is its name if that is a method, otherwise cast.",
    )

    seeds: int = essential(
        3,
        at_least=1,
        help="Number of runs of each variant, with seeds 0, 1, ...",
    )

    learning_rates: str | None = essential(
        None,
        help="Learning rates to try, separated by commas. Each variant without its own rate tries them with seed 0 "
        "and uses the best for the other seeds.",
    )

    tuning_dataset: str | None = essential(
        None,
        help="Text whose perplexity selects the learning rate, so that `eval_dataset` plays no part in the choice.",
    )

    calibration: str | None = option(
        None,
        help="Calibration text of one-shot methods such as wanda and sparsegpt. The default is the training text.",
    )

    calibration_sequences: int = option(
        128,
        at_least=1,
        help="Number of calibration sequences of one-shot methods.",
    )


EVALUATIONS = 4
"""Evaluations of a run; the verdict on a run that becomes sparse in training compares the last ones."""
_NAMED = ("model", "dataset", "eval_dataset", "output_dir", "seed")
_OF_COMPARE = (*_NAMED, "max_steps", "num_train_epochs", "resume", "overwrite")
"""Options of a run that a comparison sets itself."""
_OF_ALL = ("seq_len", "eval_tokens", "eval_split", "assistant_only_loss")
"""Options that define what a perplexity measures; perplexities that differ in one are not compared."""

_OF_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps", "seq_len")
"""Options whose product is the number of tokens per optimizer step."""


def compare(config: CompareConfig, command: str, say: Say, program: Sequence[str] = CASTLM) -> tuple[int, Report]:
    """Starts or continues a comparison and writes its report after each variant.

    Returns the exit code, 1 if a run failed or diverged, and the report, in which `command` repeats the comparison.
    Calls `say` with a line for each run, whose process `program` starts. Raises `InputError` as `Plan`, for a model
    that no run could open, or if another comparison is running in the folder.
    """
    plan = Plan(config, say, program)
    plan.check_model()
    root = Path(config.output_dir)
    say(f"{plan.preset.question}  {len(plan.variants)} variants, {plan.num_runs} runs, in {root}")
    say(f"the progress of each run is in its .log in {root / 'runs'}")
    results: list[Result] = []
    with output_folder(root, "compare", resume=True):
        begin_output(root, "compare", resume=True)
        refuse_running(root)
        for name in plan.variants:
            for tokens in plan.budgets(name):
                results += plan.settle(name, tokens, root)
                report = Report(plan.preset.question, results, command, plan.hashes)
                report.write(root)
    has_failed = any(r.failure is not None and not isinstance(r.failure, DivergedError) for r in results)
    return int(has_failed), report


class Plan:
    """The runs of a comparison. Raises `InputError` for unknown methods or fields, missing files, or a budget below a
    step.
    """

    def __init__(self, command: CompareConfig, say: Say, program: Sequence[str] = CASTLM) -> None:
        self.command, self.say, self.program = command, say, program
        self.num_begun = 0
        """Runs that `measure` has begun."""
        rates = command.learning_rates.split(",") if command.learning_rates else []
        self.rates: list[float] = [convert("learning_rates", rate.strip(), float) for rate in rates]
        if command.tuning_dataset and not self.rates:
            raise InputError("tuning_dataset chooses between learning rates: give --learning-rates 1e-4,3e-4")
        self.common = without_sections(read_yaml_mapping(command.config), command.config) if command.config else {}
        _refuse_taken(self.common, _OF_COMPARE, f"{command.config} sets")
        for name in ("seq_len", "per_device_train_batch_size", "eval_tokens"):
            if getattr(command, name) is not None:
                self.common[name] = getattr(command, name)
        pattern = _pattern_of(self.common)
        self.preset = PRESETS[command.preset] if command.preset else every_method(pattern)
        self.variants = _variants(command, self.preset)
        for name, options in self.variants.items():
            pattern = _pattern_of({**self.common, **options})
            if options["method"] in ONESHOT and options["method"] not in methods_of(pattern):
                raise InputError(f"variant {name}: method {options['method']} is not for {pattern}: leave it out")
        self.largest_budget = self._largest_budget()
        self.texts = self._texts()
        self.hashes = self._hashes()
        for name in self.variants:  # report a mistake in any of them before the first one runs
            for tokens, rate in itertools.product(self.budgets(name), self._rates_of(name)):
                self.make(name, tokens, 0, rate)

    def _largest_budget(self) -> int:
        """The training tokens of the largest run."""
        command = self.command
        if (command.budget_tokens is None) == (command.max_steps is None):
            raise InputError("how long is a run? Give one of --budget-tokens and --max-steps")
        if command.budget_tokens is not None:
            return command.budget_tokens
        assert command.max_steps is not None
        named = {"model": command.model, "dataset": command.dataset, "output_dir": command.output_dir}
        shared = {name: self.common[name] for name in _OF_STEP if name in self.common}
        return command.max_steps * TrainConfig.from_mapping({**named, **shared}).tokens_per_step

    def _texts(self) -> dict[str, tuple[str, str]]:
        """The texts of the runs, by option: name and split."""
        command, common = self.command, self.common
        dataset = command.dataset, common.get("dataset_split", "train")
        held_out = common.get("eval_split", "validation")
        texts = {
            "dataset": dataset,
            "eval_dataset": (command.eval_dataset, held_out),
            "calibration": dataset if command.calibration is None else (command.calibration, "train"),
        }
        if command.tuning_dataset:
            texts["tuning_dataset"] = (command.tuning_dataset, held_out)
        return texts

    def check_model(self) -> None:
        """Raises `InputError` if config or tokenizer of the model cannot be read, or its context is too short: every
        run would fail.
        """
        from castlm.models.io import open_model
        from castlm.training.model import check_sizes

        revision = self.common.get("revision")
        _, config, _ = open_model(self.command.model, trust_remote_code=self._trusts, revision=revision)
        check_sizes(config, seq_len=self.common.get("seq_len", SEQ_LEN), teacher_top_k=0)

    @functools.cached_property
    def _default_rate(self) -> float:
        """The learning rate that `castlm train` would take."""
        from castlm.training.model import num_weights_of

        options = ModelOptions(self.command.model, revision=self.common.get("revision"), trust_remote_code=self._trusts)
        return default_learning_rate(num_weights_of(options))

    @property
    def _trusts(self) -> bool:
        """Whether any run trusts the code of its model."""
        return any(fields.get("trust_remote_code") for fields in (self.common, *self.variants.values()))

    def _hashes(self) -> dict[str, str]:
        """SHA-256 of the model and the texts, by option; for those on the hub, of name and revision."""
        from castlm.data.documents import open_documents

        command, options = self.command, TextOptions.of(self.common)
        digests = {
            name: open_documents(text, options, split=split, shown=shown_progress).text_hash()
            for name, (text, split) in self.texts.items()
        }
        if digests.get("tuning_dataset") == digests["eval_dataset"]:
            raise InputError(
                f"tuning_dataset {command.tuning_dataset} is the text of eval_dataset: give another one to choose by"
            )
        model = content_hash(command.model, self.common.get("revision"), trust_remote_code=self._trusts)
        return {"model": model, **digests}

    def budgets(self, name: str) -> list[int]:
        """Token budgets of a variant; 0 for a one-shot method."""
        if self.variants[name]["method"] in ONESHOT:
            return [0]
        return [round(share * self.largest_budget) for share in self.preset.budget_shares]

    @property
    def num_runs(self) -> int:
        num = 0
        for name in self.variants:
            trials = len(self._rates_of(name))
            of_a_budget = self._num_seeds(name) + (trials if self._is_tuned(name) else trials - 1)
            num += len(self.budgets(name)) * of_a_budget
        return num

    def _num_seeds(self, name: str) -> int:
        return 1 if self.variants[name]["method"] == "magnitude" else self.command.seeds

    def _is_tuned(self, name: str) -> bool:
        """Whether its learning rate is selected on a separate text."""
        return self.command.tuning_dataset is not None and self._rates_of(name) != [None]

    def _rates_of(self, name: str) -> list[float | None]:
        fields = self.variants[name]
        fixed = not self.rates or "learning_rate" in fields or fields["method"] in ONESHOT
        return [None] if fixed else list(self.rates)

    def settle(self, name: str, tokens: int, root: Path) -> list[Result]:
        """Measures a variant at a budget: seed 0 at each learning rate, then the other seeds at the best one.

        With a tuning text, seed 0 runs again at the best rate, evaluated on the evaluation text.
        """
        tuned = self._is_tuned(name)
        runs = [self.make(name, tokens, 0, rate, tuning=tuned) for rate in self._rates_of(name)]
        candidates = [self.measure(run, root, ", on the tuning text" if tuned else "") for run in runs]
        best = min(candidates, key=lambda r: r.perplexity if math.isfinite(r.perplexity) else math.inf)
        for candidate in candidates:
            candidate.trial = tuned or candidate is not best
        rate = best.run.config.get("learning_rate")
        seeds = range(0 if tuned else 1, self._num_seeds(name))
        return candidates + [self.measure(self.make(name, tokens, s, rate), root) for s in seeds]

    def measure(self, run: ComparedRun, root: Path, where: str = "") -> Result:
        """The result of a run: reads a finished one, otherwise starts or resumes it; `where` ends the line about it."""
        self.num_begun += 1
        self.say(f"{self.num_begun}/{self.num_runs}  {run}{where}")
        result = Result(run, run.folder(root))
        try:
            result.facts = execute(run, root, self.say, self.program)
        except InputError as error:
            result.failure = error
        self.say(f"  {result.failure or f'perplexity {result.perplexity:.3f}'}")
        return result

    def make(self, name: str, budget: int, seed: int, rate: float | None, *, tuning: bool = False) -> ComparedRun:
        """The run of a variant.

        Args:
            budget: training tokens, rounded down to whole steps.
            rate: learning rate; None takes it from the options.
            tuning: whether to evaluate on the tuning text.
        """
        command, hashes = self.command, self.hashes
        named = {"model": command.model, "eval_dataset": command.eval_dataset, "seed": seed}
        if tuning:
            named["eval_dataset"] = command.tuning_dataset
            hashes = {**hashes, "eval_dataset": hashes["tuning_dataset"]}
        if self.variants[name]["method"] in ONESHOT:
            return self._make_oneshot(name, named)
        fields = {**self._with_start(name), **named, "dataset": command.dataset, "output_dir": command.output_dir}
        fields["report_to"] = ("none",)
        if rate is not None:
            fields["learning_rate"] = rate
        config = TrainConfig.from_mapping(fields, f"variant {name}")
        if config.optimizer.learning_rate is None:
            config = config.changed(learning_rate=self._default_rate)
        batch = config.tokens_per_step
        steps = budget // batch
        if steps < 1:
            raise InputError(f"a budget of {budget} tokens is less than one step of {batch}: raise it")
        config = config.changed(
            max_steps=steps,
            eval_steps=config.evaluation.eval_steps or max(1, steps // EVALUATIONS),
            # a short run saves at its end alone: a checkpoint of SmolLM2-135M is 1.5 GiB
            save_steps=config.checkpoint.save_steps if "save_steps" in fields else max(10, steps // 4),
        )
        content = {k: v for k, v in config.as_dict().items() if k not in ("output_dir", "resume", "overwrite")}
        if config.start.name not in ONESHOT:
            hashes = {**hashes, "init_from": content_hash(config.start.name, None, trust_remote_code=self._trusts)}
        return ComparedRun(name, budget, steps * batch, content, run_key(content, hashes))

    def _with_start(self, name: str) -> dict[str, Any]:
        """The options of a variant that trains, with its start."""
        fields = {**self.common, **self.variants[name]}
        method = METHODS[fields["method"]]
        if method.step0 == "dense":
            if "init_from" not in self.variants[name]:
                fields.pop("init_from", None)  # the start of all runs is for the methods that have one
        elif "init_from" not in fields and self.command.published_starts:
            if method.published_start == "sparsegpt":
                fields = {**SPARSEGPT, **fields}
            fields["init_from"] = method.published_start
        elif "init_from" not in fields:
            fields["init_from"] = default_method(_pattern_of(fields))
        return fields

    def _make_oneshot(self, name: str, named: dict[str, Any]) -> ComparedRun:
        variant = self.variants[name]
        fields = {**self.common, **variant}
        calibration = ("calibration", "calibration_split")
        shared = {option.name for option in dataclasses.fields(OneshotConfig)} - {*calibration, "calibration_sequences"}
        unused = [option for option in variant if option not in shared]
        unused += ["left_dense"] if fields.get("left_dense") else []
        if unused:
            raise InputError(
                f"variant {name}: {unused[0]} is no option of {variant['method']}, which prunes every layer here: take "
                "it out"
            )
        given = {option: value for option, value in fields.items() if option in shared}
        given |= {
            **named,
            "calibration_sequences": self.command.calibration_sequences,
        }  # of all rows alike, as the text
        given |= dict(zip(calibration, self.texts["calibration"]))
        content = build(OneshotConfig, given, f"variant {name}").as_dict()
        del content["output_dir"]
        return ComparedRun(name, 0, 0, content, run_key(content, self.hashes))


def _variants(command: CompareConfig, preset: Preset) -> dict[str, dict[str, Any]]:
    """The options of each variant, by name: methods or a preset, then the file of variants, then the dense control."""
    known = (*RETRAINING, *ONESHOT)
    if command.methods:
        named = [convert("methods", name, str, known) for name in command.methods.split(",")]
        variants = {name: preset.variants.get(name, {"method": name}) for name in named}
    else:
        variants = {} if command.variants and not command.preset else dict(preset.variants)
    if command.variants:
        for name, fields in read_yaml_mapping(command.variants).items():
            start = variants.get(name, {"method": name if name in known else "cast"})
            variants[name] = {**start, **without_sections(fields or {}, f"{command.variants}: variant {name}")}
    for name, fields in variants.items():
        convert(f"variant {name}: method", fields["method"], str, known)
        _refuse_taken(fields, (*_OF_COMPARE, *_OF_ALL), f"variant {name} sets")
    if not is_control(method := variants.get("dense", {"method": "dense"})["method"]):
        raise InputError(f"variant dense: method = {method!r}, but the name is the dense control's: rename it")
    if not any(is_control(fields["method"]) for fields in variants.values()):
        variants["dense"] = {"method": "dense"}
    return variants


def _refuse_taken(fields: Mapping[str, Any], taken: Sequence[str], source: str) -> None:
    """Raises `InputError` for an option that is the comparison's to set."""
    if found := [option for option in taken if option in fields]:
        where = "set it for all variants in --config" if found[0] in _OF_ALL else "castlm compare sets it: take it out"
        raise InputError(f"{source} {found[0]}, which all runs share: {where}")


def _pattern_of(fields: Mapping[str, Any]) -> Pattern:
    """The pattern of a run with these options."""
    given = {name: value for name, value in fields.items() if name == "pattern"}
    pattern: Pattern = checked([ModelOptions], given).get("pattern", NM(2, 4))
    return pattern
