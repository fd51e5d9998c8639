"""Converts the text file of HellaSwag, six lines per question, to the rows of lm-eval's own task."""

from __future__ import annotations

import re

from datasets import Dataset

LINES = 6  # context, number of the right ending, four endings
_LAST_SENTENCE = re.compile(r"""([.!?]["')]* )([a-z])([^.!?]*)$""")


def process_docs(lines: Dataset) -> Dataset:
    """Converts rows of `text`, one per line of the file, to rows of `query`, `choices` and `gold`.

    As in lm-eval, the sentence that the ending completes is capitalized and `[...]` is removed.

    Raises:
        ValueError: the number of lines is not a multiple of six, or a label is not a number.
    """
    text = list(lines["text"])
    if len(text) % LINES:
        raise ValueError(f"{len(text)} lines: each question needs {LINES}, a context, a label and four endings")
    groups = [text[i : i + LINES] for i in range(0, len(text), LINES)]
    return Dataset.from_list(
        [
            {"query": capitalized(clean(context)), "choices": [clean(e) for e in endings], "gold": int(label)}
            for context, label, *endings in groups
        ]
    )


def clean(text: str) -> str:
    """The function `preprocess` of lm-eval's HellaSwag task."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def capitalized(context: str) -> str:
    """The context with a capital at the start of its last sentence, if that sentence is unfinished."""
    return _LAST_SENTENCE.sub(lambda m: m[1] + m[2].upper() + m[3], context)
