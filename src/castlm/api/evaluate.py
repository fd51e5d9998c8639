"""`castlm.evaluate`: perplexity of a model on a text, and zero-shot tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from castlm.api.objects import Objects
from castlm.api.signature import with_keywords_of
from castlm.core.errors import InputError
from castlm.data.options import ScoredTextOptions
from castlm.facts import Facts
from castlm.fields import Needs, build, checked, label, like, option, positional
from castlm.files.record import RESULT
from castlm.training.config import names_of
from castlm.training.options import DataOptions, EvaluationOptions, ModelOptions, RuntimeOptions

if TYPE_CHECKING:  # they import torch
    from transformers import PreTrainedTokenizerBase

    from castlm.api.objects import Model, Text
    from castlm.models.io import Loaded

TEXT = Needs("a text", lambda options: options.reads_text)
FIGURE = Needs("a text, or the figure of a run", lambda options: options.reads_text or options.repeats)
PROMPTS = Needs("prompts", lambda options: options.prompts is not None)
TASKS = Needs("tasks", lambda options: options.tasks is not None)


@dataclass(frozen=True)
class EvaluateOptions(ScoredTextOptions):
    """The options of an evaluation."""

    model: str = positional(
        help='Local Hugging Face folder, run of `castlm train`, hub id, GGUF file, or "demo".',
    )

    text: str | None = option(
        None,
        help="Text to evaluate on: a file, folder, glob or hub dataset, as --dataset of castlm train.",
    )

    eval_split: str = option(
        "validation",
        needs=TEXT,
        help="Split of a hub dataset.",
    )

    eval_tokens: int = option(
        0,
        at_least=0,
        needs=TEXT,
        help="Maximum number of tokens of the text. 0 scores all of it.",
    )

    seq_len: int | None = option(
        None,
        needs=FIGURE,
        help="Tokens per sequence. The default is 1024, or the model's context length if that is shorter; without a "
        "text, that of the run. Perplexities at different lengths cannot be compared.",
    )

    stride: int | None = option(
        None,
        needs=FIGURE,
        help="Tokens between the starts of two sequences. The default is seq_len: sequences do not overlap.",
    )

    tasks: str | None = option(
        None,
        help="Tasks of lm-eval, separated by commas, such as piqa,arc_easy; run without examples and without a "
        "chat template.",
    )

    tasks_from: str | None = option(
        None,
        needs=TASKS,
        help="Folder with local files of the tasks, instead of the hub.",
    )

    limit: int | None = option(
        None,
        at_least=1,
        needs=TASKS,
        help="Maximum number of questions per task.",
    )

    prompts: str | None = option(
        None,
        help="File of prompts, one on each line of a .txt file. The model answers each, and the answers are "
        "measured: the share of their 4-grams that repeat an earlier one, and with a teacher its nats per token of "
        "them.",
    )

    teacher: str | None = option(
        None,
        needs=PROMPTS,
        help="Model that scores the answers to the prompts, such as the dense model: a folder, hub id, GGUF file "
        'or "demo".',
    )

    max_new_tokens: int = option(
        64,
        at_least=1,
        needs=PROMPTS,
        help="Maximum number of tokens of an answer.",
    )

    temperature: float = option(
        0.0,
        at_least=0,
        needs=PROMPTS,
        help="Temperature of the answers. 0 always takes the most probable token.",
    )

    precision: Literal["auto", "fp32", "bf16"] | None = option(
        None,
        help="Compute type of the forward pass. The default is fp32; without a text, that of the run. auto: bf16 if "
        "the hardware multiplies it faster.",
    )

    device: Literal["auto", "cpu", "cuda"] = like(RuntimeOptions, "device")

    revision: str | None = like(ModelOptions, "revision")
    trust_remote_code: bool = like(ModelOptions, "trust_remote_code")

    @property
    def reads_text(self) -> bool:
        return self.text is not None

    @property
    def repeats(self) -> bool:
        """Whether the evaluation is that of a run, as the run made it."""
        return self.text is None and self.tasks is None and self.prompts is None


@dataclass(frozen=True)
class Evaluation:
    """The result of `castlm.evaluate`.

    Attributes:
        perplexity: of the text; None without one.
        zero_shot: a row for every metric of every task; empty without tasks.
        figures: everything with its conditions (sequence length, stride, text and its hash, tokenizer, versions), as
            `castlm eval --json` writes it.
    """

    figures: dict[str, Any]

    @property
    def perplexity(self) -> float | None:
        return self.figures.get("perplexity")

    @property
    def zero_shot(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.figures.get("zero_shot", {}).get("results", [])
        return found


@with_keywords_of(EvaluateOptions)
def evaluate(
    model: Model,
    text: Text | None = None,
    *,
    tasks: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> Evaluation:
    """Measures the perplexity of a model on a text, its zero-shot accuracy on tasks of lm-eval, or its answers.

    Args:
        model: a Hugging Face folder, plain or packed, a run of `train`, a hub id, a GGUF file, or "demo"; a
            `PreTrainedModel`, or the result of another call. For a model in memory and token ids, see `perplexity`.
        text: a file, folder, glob or hub dataset, a list of texts, a `datasets.Dataset`, or any other iterable of
            documents. Without one, and without tasks and prompts, a run repeats its own figure: on its texts, with its
            `seq_len` and precision.
        tasks: names of lm-eval, separated by commas, such as "piqa,arc_easy".
        tokenizer: of a model in memory; by default the one where it was loaded from.
        options: as of `castlm eval`: `prompts`, `teacher`, `seq_len`, `stride`, `eval_tokens`, `limit` and others.

    Raises:
        InputError: no text, tasks or prompts, an option out of range, or a model or text that cannot be read.

    Examples:
        >>> import castlm
        >>> castlm.evaluate("run", "held_out.txt", seq_len=1024).perplexity  # doctest: +SKIP
        19.26
    """
    with Objects(None) as given:
        values = {"model": given.model(model, tokenizer), "text": given.text(text), "tasks": tasks, **options}
        if values.get("teacher") is not None:
            values["teacher"] = given.model(values["teacher"], name="teacher")
        values = {name: value for name, value in values.items() if value is not None}
        return Evaluation(run_evaluation(build(EvaluateOptions, values)))


def check(options: EvaluateOptions, source: str = "") -> None:
    """Raises `InputError` if there is no text, task or prompt, and the model is not the result of a run.

    Args:
        source: `COMMAND_LINE` if the options are from there; errors then write `--text` instead of `text`.
    """
    text, tasks, prompts = (label(name, source) for name in ("text", "tasks", "prompts"))
    if options.repeats and _own_figure(options.model) is None:
        raise InputError(f"nothing to evaluate on: give {text} FILE, {tasks} piqa,arc_easy or {prompts} FILE")


def _own_figure(model: str) -> Facts | None:
    """The facts of a run with the conditions of its figure; None if the model is no result of a run."""
    from castlm.models.locate import result_folder

    folder = Path(result_folder(model))
    facts = Facts.read(folder) if folder.is_dir() else None
    is_of_run = facts is not None and facts.measured is not None and "dataset" in (facts.config or {})
    return facts if is_of_run else None


def _repeat(own: Facts, loaded: Loaded, options: EvaluateOptions, **how: Any) -> dict[str, Any]:
    """Measures the figure of a run again, on its texts; raises `InputError` if they have changed."""
    from castlm.data.documents import joined_digest
    from castlm.data.scored import ScoredText
    from castlm.data.tokens import open_encoder
    from castlm.evaluation.perplexity import evaluate_tokens
    from castlm.training.text import open_splits, scored_parts

    def section(kind: type[Any]) -> Any:
        """A section of the options of the run."""
        given = {name: value for name, value in (own.config or {}).items() if name in names_of(kind)}
        return kind(**checked([kind], given, f"{RESULT} of {options.model}"))

    assert own.measured is not None
    data, evaluation = section(DataOptions), section(EvaluationOptions)
    documents, held_out = open_splits(data, evaluation)
    digest = joined_digest([text.text_hash() for text in held_out])
    if digest != own.measured.text_sha256:
        raise InputError(f"the evaluation text of the run, {own.measured.text}, has changed: give --text FILE")
    code: dict[str, Any] = {"trust_remote_code": options.trust_remote_code, "revision": options.revision}
    encoder = open_encoder([documents, *held_out], loaded.tokenizer, options.model, data, **code)
    text = ScoredText.joined(scored_parts(held_out, encoder, evaluation))
    identity = {"text": own.measured.text, "text_sha256": digest, "tokenizer": encoder.tokenizer_name}
    return evaluate_tokens(loaded.model, text, identity, **how)


def run_evaluation(options: EvaluateOptions, source: str = "") -> dict[str, Any]:
    """`evaluate` with converted options; `source` as for `check`."""
    check(options, source)
    if options.tasks is not None:
        from castlm.evaluation.zero_shot import check_tasks, zero_shot

        names = [name.strip() for name in options.tasks.split(",")]
        check_tasks(names, options.tasks_from)
    import torch

    from castlm.data.documents import open_documents
    from castlm.data.tokens import open_encoder
    from castlm.evaluation.perplexity import evaluate_text
    from castlm.hardware import choose_device, choose_precision, why_slow
    from castlm.lab.sampling import read_prompts
    from castlm.models.io import load_model
    from castlm.progress import note, shown_progress

    prompts = [] if options.prompts is None else read_prompts(options.prompts, options)
    if options.text is not None:
        documents = open_documents(options.text, options, split=options.eval_split, shown=shown_progress)
    device = choose_device(options.device)
    code: dict[str, Any] = {"trust_remote_code": options.trust_remote_code, "revision": options.revision}
    loaded = load_model(options.model, unpack=device != "cpu", **code)  # measures the computation of castlm generate
    model = loaded.model
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it without its types
    own = _own_figure(options.model) if options.repeats else None
    conditions = None if own is None else own.measured
    precision = options.precision or ("fp32" if conditions is None else conditions.precision)
    precision = choose_precision(precision, model.device, model.config)
    if slow := why_slow(precision, model.device):
        note(slow)
    dtype = torch.bfloat16 if precision == "bf16" else None
    figures: dict[str, Any] = {"model": options.model}
    if options.text is not None:
        encoder = open_encoder([documents], loaded.tokenizer, options.model, options, **code)
        with shown_progress("perplexity, sequences") as progress:
            figures |= evaluate_text(
                model,
                documents,
                encoder,
                limit=options.eval_tokens or None,
                seq_len=options.seq_len,
                stride=options.stride,
                autocast_dtype=dtype,
                progress=progress,
            )
    if own is not None and conditions is not None:
        seq_len = options.seq_len or conditions.seq_len
        with shown_progress("perplexity, sequences") as progress:
            how = {"seq_len": seq_len, "stride": options.stride or seq_len, "autocast_dtype": dtype}
            figures |= _repeat(own, loaded, options, **how, progress=progress)
    if options.tasks is not None:
        figures["zero_shot"] = zero_shot(
            model, loaded.tokenizer, names, folder=options.tasks_from, limit=options.limit, autocast_dtype=dtype
        )
    if prompts:
        from castlm.evaluation.answers import answer_figures, ask

        with shown_progress("answers") as progress:
            lengths: Any = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
            answers = ask(model, loaded.tokenizer, prompts, progress=progress, **lengths)
        teacher = None if options.teacher is None else load_model(options.teacher, **code).model
        figures["answers"] = {"teacher": options.teacher, **lengths, **answer_figures(answers, teacher)}
    return figures
