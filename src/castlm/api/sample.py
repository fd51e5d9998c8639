"""`castlm.sample`: texts that a model writes, to train on."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castlm.api.objects import in_memory_or_named
from castlm.api.signature import with_keywords_of
from castlm.data.options import SamplingOptions

if TYPE_CHECKING:  # they import torch
    from transformers import PreTrainedTokenizerBase

    from castlm.api.objects import Model


@with_keywords_of(SamplingOptions)
def sample(
    model: Model,
    *,
    num_tokens: int = 1_000_000,
    prompts: Sequence[str] | None = None,
    chat: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dedup_prefix: int = 200,
    **options: Any,
) -> list[dict[str, Any]]:
    """Lets a model write texts to train on; `castlm sample` writes them to a file, and can be resumed.

    Args:
        model: a Hugging Face folder, a run of `train`, a hub id, a GGUF file, or "demo"; a `PreTrainedModel`, or the
            result of another call. A GPU computes in the dtype of the model, a CPU in fp32.
        num_tokens: how many tokens to write at least, without duplicates.
        prompts: texts to continue, or with `chat` to answer, in order and repeatedly.
        chat: write conversations of one turn, in the chat template.
        tokenizer: of a model in memory; by default the one where it was loaded from.
        dedup_prefix: the number of leading characters that two texts may not share; 0 compares whole texts.
        options: as of `castlm sample`: `temperature`, `top_p`, `max_new_tokens`, `batch_size` and `seed`.

    Returns:
        The documents, each {"text": ...} or {"messages": [...]}, as `train` and `prune` take them.

    Raises:
        InputError: an option out of range, a model that repeats itself, or one that cannot be loaded.

    Examples:
        >>> import castlm
        >>> texts = castlm.sample("demo", num_tokens=20_000)  # doctest: +SKIP
        >>> run = castlm.train("demo", texts, output_dir="run", max_steps=60)  # doctest: +SKIP
    """
    from castlm.fields import build, check_limits, convert
    from castlm.lab.sampling import Sampler, fill, load_to_sample, open_samples
    from castlm.models.locate import result_folder
    from castlm.progress import note, shown_progress

    check_limits("num_tokens", convert("num_tokens", num_tokens, int), {"at_least": 1})
    check_limits("dedup_prefix", convert("dedup_prefix", dedup_prefix, int), {"at_least": 0})
    chosen = build(SamplingOptions, options)
    given = in_memory_or_named(model, tokenizer)
    if isinstance(given, str):
        loaded = load_to_sample(result_folder(given))
        given = loaded.model, loaded.tokenizer
    sampler = Sampler(*given, chosen, prompts=prompts, chat=chat)
    with tempfile.TemporaryDirectory(prefix="castlm-") as folder:
        file = Path(folder) / "sampled.jsonl"
        with (
            open_samples(file, {}, prompts=prompts, dedup_prefix=dedup_prefix) as samples,
            shown_progress("sampling, tokens", rate="tokens/s") as progress,
        ):
            fill(samples, sampler, num_tokens=num_tokens, progress=progress, say=note)
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
