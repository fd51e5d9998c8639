"""`castlm.generate`: text from a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    from castlm.api.objects import in_memory_or_named
    from castlm.core.errors import check_type
    from castlm.fields import check_limits, convert
    from castlm.models.locate import result_folder
    from castlm.packed.generate import encode_prompt, generate_text, load_to_generate
    from castlm.progress import note

    check_type(prompt, str, "prompt must be text", "give one")
    check_limits("max_new_tokens", convert("max_new_tokens", max_new_tokens, int), {"at_least": 1})
    check_limits("temperature", convert("temperature", temperature, float), {"at_least": 0})
    given = in_memory_or_named(model, tokenizer)
    if isinstance(given, str):
        name = result_folder(given)
        given = load_to_generate(name, device=device, as_stored=False, say=note, trust_remote_code=trust_remote_code)
    loaded, tokenizer = given
    ids = encode_prompt(tokenizer, prompt, raw)
    return generate_text(
        loaded, tokenizer, ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, say=note
    )
