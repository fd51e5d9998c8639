"""HellaSwag from its text file, six lines a question, back into what lm-eval's own task makes of the hub's rows."""

from __future__ import annotations

import re

from datasets import Dataset

LINES = 6  # context, number of the right ending, four endings
_LAST_SENTENCE = re.compile(r"""([.!?]["')]* )([a-z])([^.!?]*)$""")


def process_docs(lines: Dataset) -> Dataset:
    """Rows of `text`, one a line, as rows of `query`, `choices` and `gold`.

    lm-eval capitalizes the sentence that the ending completes and takes out `[...]`; the file has neither done.

    Raises:
        ValueError: the number of lines does not divide by six, or the label is no number.
    """
    text = list(lines["text"])
    if len(text) % LINES:
        raise ValueError(f"{len(text)} lines are not {LINES} for each question: context, label, four endings")
    groups = [text[i : i + LINES] for i in range(0, len(text), LINES)]
    return Dataset.from_list(
        [
            {"query": capitalized(clean(context)), "choices": [clean(e) for e in endings], "gold": int(label)}
            for context, label, *endings in groups
        ]
    )


def clean(text: str) -> str:
    """lm-eval's own `preprocess` of HellaSwag."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def capitalized(context: str) -> str:
    """The context with its last sentence, where that is unfinished, begun with a capital."""
    return _LAST_SENTENCE.sub(lambda m: m[1] + m[2].upper() + m[3], context)
