"""`castlm.generate`: text from a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from castlm.api.objects import Result

if TYPE_CHECKING:  # they import torch
    from transformers import PreTrainedTokenizerBase

    from castlm.api.objects import Model
    from castlm_runtime.generate import Generated


def generate(
    model: Model,
    prompt: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    raw: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Generated:
    """Continues or answers a prompt.

    Args:
        model: a Hugging Face folder, plain or packed, a run of `train`, a hub id, a GGUF file, or "demo"; a
            `PreTrainedModel`, which generates where and as it is, or the result of another call.
        prompt: text, which is a user's turn where the tokenizer has a chat template.
        tokenizer: of a `PreTrainedModel`.
        temperature: 0 always takes the most probable token.
        seed: of the samples.
        raw: continue the prompt as it is, without a chat template.
        device: of a model that is loaded: "auto", "cpu" or "cuda".

    Returns:
        The text, the numbers of tokens of prompt and text, and their times.

    Raises:
        InputError: an empty prompt, more tokens than the context of the model, or a model that cannot be loaded.

    Examples:
        >>> import castlm
        >>> castlm.generate("run", "Name three rivers.").text  # doctest: +SKIP
    """
    from transformers import PreTrainedModel

    from castlm.api.objects import known_tokenizer
    from castlm.core.errors import check_type
    from castlm.fields import check_limits, convert
    from castlm.models.io import Loaded
    from castlm.models.locate import result_folder
    from castlm.packed.generate import encode_prompt, generate_text, load_to_generate

    check_type(prompt, str, "prompt must be text", "give one")
    check_limits("max_new_tokens", convert("max_new_tokens", max_new_tokens, int), {"at_least": 1})
    check_limits("temperature", convert("temperature", temperature, float), {"at_least": 0})
    if isinstance(model, (Result, Loaded)):
        tokenizer = tokenizer or model.tokenizer
        model = model.model
    if isinstance(model, PreTrainedModel):
        loaded, tokenizer = model, tokenizer or known_tokenizer(model, "model")
    else:
        check_type(model, (str, Path), "model must be a name, a path or a PreTrainedModel", "give one")
        name = result_folder(str(model))
        loaded, tokenizer = load_to_generate(name, device=device, as_stored=False, trust_remote_code=trust_remote_code)
    ids = encode_prompt(tokenizer, prompt, raw)
    return generate_text(loaded, tokenizer, ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
