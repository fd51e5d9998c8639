"""`castlm eval`: perplexity of a model on a text, and zero-shot tasks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from castlm.cli.options import check_json_path, refuse_given, result_folder, to_stdout, write_json
from castlm.core.errors import InputError
from castlm.data.options import ScoredTextOptions
from castlm.fields import like, number, positional
from castlm.training.options import ModelOptions, RuntimeOptions

_READING = [field.name for field in fields(ScoredTextOptions)]
_OF_TEXT = ("eval_split", "eval_config", "eval_tokens", "seq_len", "stride", *_READING)
"""Options without an effect on tasks."""


@dataclass(frozen=True)
class EvalCommand(ScoredTextOptions):
    """Measure the perplexity of a model on a text, its zero-shot accuracy on tasks of lm-eval, or both."""

    path: str = positional()
    """Local Hugging Face folder, run of `castlm train`, hub id, GGUF file, or "demo"."""

    text: str | None = None
    """Text to evaluate on: .txt, .jsonl, .jsonl.gz or .parquet, a folder or glob of these, or a hub dataset."""

    eval_split: str = "validation"
    """Split of a hub dataset."""

    eval_config: str | None = None
    """Configuration of a hub dataset."""

    eval_tokens: int = number(0, at_least=0)
    """Maximum number of tokens of the text. 0 scores all of it."""

    seq_len: int | None = None
    """Tokens per sequence. The default is 1024, or the model's context length if that is shorter. Perplexities at
    different lengths cannot be compared.
    """

    stride: int | None = None
    """Tokens between the starts of two sequences. The default is seq_len: sequences do not overlap."""

    tasks: str | None = None
    """Tasks of lm-eval, separated by commas, such as piqa,arc_easy; run without examples and without a chat template.
    """

    tasks_from: str | None = None
    """Folder with local files of the tasks, instead of the hub."""

    limit: int | None = number(None, at_least=1)
    """Maximum number of questions per task."""

    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """Compute type of the forward pass. auto: bf16 if the hardware multiplies it faster."""

    device: Literal["auto", "cpu", "cuda"] = like(RuntimeOptions, "device")

    json: str | None = None
    """File for the figures as JSON; "-" prints them."""

    revision: str | None = like(ModelOptions, "revision")
    trust_remote_code: bool = like(ModelOptions, "trust_remote_code")

    def run(self) -> int:
        if self.text is None and self.tasks is None:
            raise InputError("nothing to evaluate on: give --text FILE, or --tasks piqa,arc_easy, or both")
        if self.text is None:
            refuse_given(self, _OF_TEXT, "is for --text: name a text, or leave it out")
        check_json_path(self.json)
        if self.tasks is not None:
            from castlm.evaluation.zero_shot import check_tasks, zero_shot

            names = [name.strip() for name in self.tasks.split(",")]
            check_tasks(names, self.tasks_from)
        else:
            refuse_given(self, ("tasks_from", "limit"), "is for --tasks: name tasks, or leave it out")
        import torch

        from castlm.data.documents import open_documents
        from castlm.data.tokens import open_encoder
        from castlm.evaluation.perplexity import evaluate_text
        from castlm.hardware import choose_device, choose_precision, keep_freed_memory, why_slow
        from castlm.models.io import load_model
        from castlm.progress import note, shown_progress

        if self.text is not None:
            documents = open_documents(self.text, self, split=self.eval_split, data_config=self.eval_config)
        keep_freed_memory()
        device = choose_device(self.device)
        name = result_folder(self.path)
        code: dict[str, Any] = {"trust_remote_code": self.trust_remote_code, "revision": self.revision}
        loaded = load_model(name, unpack=device != "cpu", **code)  # measures the computation of castlm generate
        model = loaded.model
        model.to(device)
        precision = choose_precision(self.precision, model.device, model.config)
        if slow := why_slow(precision, model.device):
            note(slow)
        dtype = torch.bfloat16 if precision == "bf16" else None
        figures: dict[str, Any] = {"model": self.path}
        if self.text is not None:
            encoder = open_encoder([documents], loaded.tokenizer, name, self, **code)
            with shown_progress("perplexity, sequences") as progress:
                figures |= evaluate_text(
                    model,
                    documents,
                    encoder,
                    limit=self.eval_tokens or None,
                    seq_len=self.seq_len,
                    stride=self.stride,
                    autocast_dtype=dtype,
                    progress=progress,
                )
        if self.tasks is not None:
            figures["zero_shot"] = zero_shot(
                model, loaded.tokenizer, names, folder=self.tasks_from, limit=self.limit, autocast_dtype=dtype
            )
        write_json(self.json, figures)
        if self.json == "-":
            return 0
        if self.text is not None:
            which = "" if figures["tokens"] == "all" else f"{figures['tokens']} "
            to_stdout(
                f"perplexity {figures['perplexity']:.4f}  ({figures['num_tokens']:,} {which}tokens of "
                f"{self.text}, context {figures['seq_len']}, stride {figures['stride']})"
            )
        for row in figures.get("zero_shot", {}).get("results", []):
            error = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
            docs = "" if row["num_docs"] is None else f"  ({row['num_docs']:,} questions)"  # none of a group of tasks
            to_stdout(f"{row['task']:16}{row['metric']:12}{row['value']:.4f}{error}{docs}")
        return 0
