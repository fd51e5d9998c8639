"""Two short texts from the dense and from the sparse model, side by side for the page of a run.

A perplexity does not show a model that fits the training text and has lost the rest. So beside the beginning of the
evaluation text both models get a question that is no part of it, and a chat model gets it without a system message.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from castlm.core.errors import InputError
from castlm.data.columns import Kind
from castlm.data.documents import open_documents
from castlm.data.tokens import first_tokens, text_encoder
from castlm.files.atomic_file import atomic_write_json
from castlm.files.output import record_file
from castlm.hardware import collect_garbage
from castlm.lab.report.run_page import RunData
from castlm.models.io import load_model
from castlm.packed.generate import encode_prompt, generate_text
from castlm_runtime.reading import read_json_object

PROMPT_TOKENS, NEW_TOKENS = 32, 64
QUESTION = "What is the capital of France?"
"""Asked of every model: as a user of a chat model, otherwise as a text to continue."""
LARGEST_PARAMS = 1_000_000_000
"""A model with more parameters is only sampled on request."""


def read_sample(run: RunData) -> dict[str, Any] | None:
    """The sample of an earlier report of this result; None if there is none."""
    file = run.folder / "sample.json"
    found = read_json_object(file) if file.exists() else {}
    return found if found and found.get("run_id") == (run.facts and run.facts.run_id) else None


def write_sample(run: RunData) -> dict[str, Any]:
    """Generates a sample from a finished run and writes it to sample.json in its folder.

    Both models greedily continue the beginning of the evaluation text, or else of the training text, and answer
    `QUESTION`. Raises `InputError` if a model or the text cannot be read.
    """
    config, data, evaluation = run.config, run.config.data, run.config.evaluation
    if evaluation.eval_datasets:
        text, split = evaluation.eval_datasets[0], evaluation.eval_split
    else:
        text, split = next(iter(data.datasets)), data.dataset_split
    documents = open_documents(text, data, split=split)
    if documents.kind is Kind.WITH_EXTRA:
        raise InputError(f"{text} has images, and the sample continues text alone")
    models: list[dict[str, str]] = []
    figures = run.facts.perplexity if run.facts else None
    prompt = ""
    dense, result = config.model.loading, {**config.model.loading, "revision": None}
    for title, figure, name, loading in (
        ("Dense model", figures and figures.dense, config.model.model, dense),
        (f"After {config.method.method}", figures and figures.final, run.folder / "model", result),
    ):
        collect_garbage("cpu")  # of the model before this one, or of the run that asks for its page
        loaded = load_model(name, **loading)
        tokens = first_tokens(documents, text_encoder(loaded.tokenizer, data), PROMPT_TOKENS)
        ids = torch.from_numpy(tokens.ids).long()
        prompt = str(loaded.tokenizer.decode(ids, skip_special_tokens=True))
        found, answer = (
            generate_text(loaded.model, loaded.tokenizer, each, max_new_tokens=NEW_TOKENS).text
            for each in (ids[None], encode_prompt(loaded.tokenizer, QUESTION, raw=False))
        )
        del loaded
        named = title if figure is None else f"{title}, perplexity {figure:.2f}"
        models.append({"name": named, "completion": found, "answer": answer})
    sample = {
        "run_id": run.facts and run.facts.run_id,
        "text": Path(text).name,
        "prompt": prompt,
        "question": QUESTION,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "models": models,
    }
    atomic_write_json(run.folder / "sample.json", sample)
    record_file(run.folder / "sample.json")
    return sample
