"""Measures the answers of a model: how much they repeat themselves, and how likely a teacher finds them.

A perplexity scores text of others. People judge what a model writes, and there a model with a good perplexity can
still repeat itself. The two figures belong together: text that repeats itself becomes likely, also to the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from castlm.core.errors import InputError
from castlm.models.architecture import eval_mode
from castlm.packed.generate import encode_prompt, generate_text
from castlm.say import Progress, silent

NGRAM = 4
"""Tokens that must come again, in the same order, to count as repeated."""


class Answer(NamedTuple):
    """An answer to a prompt."""

    prompt: Tensor
    """Token ids (1, num_tokens), with the chat template where the tokenizer has one."""
    text: str
    ids: list[int]
    """The text as tokens, without special ones."""


def repetition(ids: Sequence[int]) -> float:
    """The share of the groups of `NGRAM` consecutive tokens that occurred earlier in the same text.

    >>> repetition([1, 2, 3, 4, 5, 1, 2, 3, 4, 5])  # of 7 groups, 2 come again
    0.2857142857142857
    >>> repetition([1, 2, 3])
    0.0
    """
    groups = [tuple(ids[start : start + NGRAM]) for start in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(groups)) / len(groups) if groups else 0.0


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Answer]:
    """The answers of a model to prompts, each on its own, decoded as by `castlm generate`."""
    answers = []
    for number, prompt in enumerate(prompts, 1):
        ids = encode_prompt(tokenizer, prompt, raw=False)
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        text = generate_text(model, tokenizer, ids, **options).text  # type: ignore[arg-type]
        answers.append(Answer(ids, text, list(tokenizer(text, add_special_tokens=False)["input_ids"])))
        progress(number, len(prompts))
    return answers


@torch.no_grad()
def nats_per_token(teacher: PreTrainedModel, answers: Sequence[Answer]) -> float:
    """The mean of -ln p of each token of the answers, under a teacher with the same tokenizer; lower is likelier."""
    total, count = 0.0, 0
    with eval_mode(teacher):
        for answer in answers:
            if not answer.ids:
                continue
            ids = torch.cat([answer.prompt[0], torch.tensor(answer.ids)])[None].to(teacher.device)  # (1, 30 + 64)
            logits = teacher(input_ids=ids, use_cache=False).logits[0, -len(answer.ids) - 1 : -1]  # (64, 49152)
            total += F.cross_entropy(logits.float(), ids[0, -len(answer.ids) :], reduction="sum").item()
            count += len(answer.ids)
    if not count:
        raise InputError("every answer is empty: give other prompts")
    return total / count


def answer_figures(answers: Sequence[Answer], teacher: PreTrainedModel | None = None) -> dict[str, Any]:
    """The figures of answers, as in `castlm eval --json`: `repetition` is the mean over the answers."""
    figures: dict[str, Any] = {
        "num_answers": len(answers),
        "answer_tokens": sum(len(answer.ids) for answer in answers),
        "repetition": sum(repetition(answer.ids) for answer in answers) / len(answers),
        "ngram": NGRAM,
        "first_answers": [answer.text for answer in answers[:2]],
    }
    return figures if teacher is None else figures | {"teacher_nats": nats_per_token(teacher, answers)}
