"""`castlm eval`: perplexity of a model on a text, and zero-shot tasks."""

from __future__ import annotations

from dataclasses import dataclass

from castlm.api.evaluate import EvaluateOptions, check, run_evaluation
from castlm.cli.command_line import check_json_path, to_stdout, write_json
from castlm.fields import COMMAND_LINE, option


@dataclass(frozen=True)
class EvalCommand(EvaluateOptions):
    """Measure the perplexity of a model on a text, its zero-shot accuracy on tasks of lm-eval, and its answers."""

    json: str | None = option(
        None,
        help='File for the figures as JSON; "-" prints them.',
    )

    def run(self) -> int:
        check(self, COMMAND_LINE)
        check_json_path(self.json)
        from castlm.hardware import keep_freed_memory

        keep_freed_memory()
        figures = run_evaluation(self, COMMAND_LINE)
        write_json(self.json, figures)
        if self.json == "-":
            return 0
        if "perplexity" in figures:
            which = "" if figures["tokens"] == "all" else f"{figures['tokens']} "
            to_stdout(
                f"perplexity {figures['perplexity']:.4f}  ({figures['num_tokens']:,} {which}tokens of "
                f"{self.text or figures['text']}, context {figures['seq_len']}, stride {figures['stride']})"
            )
        for row in figures.get("zero_shot", {}).get("results", []):
            error = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
            docs = "" if row["num_docs"] is None else f"  ({row['num_docs']:,} questions)"  # none of a group of tasks
            to_stdout(f"{row['task']:16}{row['metric']:12}{row['value']:.4f}{error}{docs}")
        if answers := figures.get("answers"):
            nats = answers.get("teacher_nats")
            by_teacher = "" if nats is None else f", {nats:.3f} nats a token under {self.teacher}"
            to_stdout(
                f"{answers['num_answers']:,} answers of {answers['answer_tokens']:,} tokens: "
                f"{answers['repetition']:.1%} of their 4-grams repeat an earlier one{by_teacher}"
            )
            for text in answers["first_answers"]:
                to_stdout(f"  {' '.join(text.split())[:200]!r}")
        return 0
