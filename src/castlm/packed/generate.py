"""Streams text from a model: a plain folder through transformers, a packed one on castlm's kernels."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from castlm.core.errors import InputError
from castlm.data.chat import Chat
from castlm.data.tokens import check_vocabulary
from castlm.hardware import choose_device, has_fast_bf16
from castlm.models.architecture import check_context, generating, vocab_size
from castlm.models.io import load_weights, open_model, unpack_on_load_
from castlm.packed.in_engine import is_packed, session_of, why_not_in_engine
from castlm.say import Say, silent
from castlm_runtime.generate import Generated

ONE_SEQUENCE = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}
"""Options of `generate` to return the tokens of one sequence, overriding the model's generation config."""


class FiniteLogits(LogitsProcessor):
    """Refuses logits from which no token can be chosen: finite weights may be too large for a finite product."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not bool(scores.amax().isfinite()):  # -inf alone is a token that is left out
            raise InputError("the logits of the model are not finite: its weights are damaged, or too large")
        return scores


def load_to_generate(
    name: str,
    *,
    device: str = "auto",
    as_stored: bool = True,
    trust_remote_code: bool = False,
    say: Say = silent,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in the dtype of its config, and its tokenizer.

    Args:
        name: a folder, plain or packed, a hub id, a .gguf file or "demo".
        device: as for `castlm.hardware.choose_device`. The packed kernels are for a CPU: on a GPU a packed model is
            unpacked to dense layers.
        as_stored: keep the stored dtype; otherwise plain weights of 16 bits run in fp32 on a CPU that multiplies it
            many times faster.
        say: called with a line if weights run in another dtype, or if a packed model is unpacked.

    Raises:
        InputError: as `castlm.models.io.open_model`, damaged packed files, or weights that `load_weights` refuses.
    """
    device = choose_device(device)
    where, config, tokenizer = open_model(name, trust_remote_code=trust_remote_code)
    is_plain = getattr(config, "quantization_config", None) is None
    is_slow = is_plain and config.dtype in (torch.bfloat16, torch.float16)
    dtype = "auto"
    if is_slow and not (as_stored or torch.cuda.is_available() or has_fast_bf16()):
        say("this CPU has no bf16 units: plain weights of 16 bits run in fp32 (an n:m model is faster packed)")
        dtype = "float32"
    if device == "cuda" and unpack_on_load_(config):
        say("the packed kernels are for a CPU: on this GPU the model runs unpacked, at dense speed")
    model = load_weights(where, config, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.eval().to(device), tokenizer  # a `device_map` would need accelerate


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, raw: bool) -> Tensor:
    """Token ids (1, num_tokens) of a prompt: as a user's turn where the tokenizer has a chat template, unless `raw`.

    Raises:
        InputError: an empty prompt, or a template that refuses it.
    """
    if tokenizer.chat_template and not raw:
        text = Chat(tokenizer).render([{"role": "user", "content": prompt}], reply=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.numel() == 0:
        raise InputError("the prompt is empty: give some text")
    tokens: Tensor = ids.to(torch.int64)
    return tokens


class _Stream(TextStreamer):
    """Passes finished words to `write`, and records the times of the tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.pieces: list[str] = []
        self.times: list[float] = []
        """Of the prompt and of each new token, in seconds."""

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)
        self.write(text)


@torch.inference_mode()
def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    *,
    extra: Mapping[str, Tensor] | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    write: Say = silent,
    say: Say = silent,
) -> Generated:
    """Continues `input_ids` (1, num_tokens), calling `write` with text as it comes.

    Args:
        extra: further arguments of the model's forward, such as images.
        temperature: 0 always takes the most probable token, as does less than 1e-6; above, tokens are sampled.
        seed: seed of the samples.
        say: called with a line if a packed model decodes in transformers' loop, which is slower, with the reason.

    Raises:
        InputError: more tokens than the model's context holds, a token outside its vocabulary, or logits that are not
            finite.
    """
    assert max_new_tokens >= 1
    check_context(model.config, input_ids.shape[1], max_new_tokens)
    if not extra:  # tokens of images may have no embedding
        check_vocabulary(input_ids, vocab_size(model.config))
    if not extra and is_packed(model):
        reason = why_not_in_engine(model)
        if reason is None:
            session = session_of(model, tokenizer, kind="fp32")  # to the tokens of transformers
            return session.generate(
                input_ids[0].tolist(), max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, write=write
            )
        say(f"castlm's engine is not used, which makes decoding slower: {reason}")
    stream = _Stream(tokenizer, write)
    sampling = {"do_sample": True, "temperature": temperature} if temperature >= 1e-6 else {"do_sample": False}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = input_ids.to(model.device)
    dtypes = {name: model.dtype if t.is_floating_point() else t.dtype for name, t in (extra or {}).items()}
    beside = {name: t.to(ids.device, dtypes[name]) for name, t in (extra or {}).items()}
    with torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []):
        torch.manual_seed(seed)
        output = generating(model).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            streamer=stream,
            logits_processor=LogitsProcessorList([FiniteLogits()]),
            pad_token_id=pad,
            tokenizer=tokenizer,  # for stop_strings of the generation config
            **ONE_SEQUENCE,
            **beside,
            **sampling,
        )
    num_prompt, (began, first), last = input_ids.shape[1], stream.times[:2], stream.times[-1]
    return Generated(
        "".join(stream.pieces),
        prompt_tokens=num_prompt,
        new_tokens=output.shape[1] - num_prompt,
        prompt_seconds=first - began,
        # after the first token, which comes with the prompt
        tokens_per_second=(len(stream.times) - 2) / (last - first) if last > first else 0.0,
    )
