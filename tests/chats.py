"""Conversations and chat templates for tests: with and without generation marks, and one that rewrites its history."""

import random
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.texts import write_rows
from tests.tiny import tiny_model, tiny_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REWRITING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] if loop.last else "
    "message['content'].split('>')[-1]) + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRICT = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{{ message['content'] + eos_token }}"
    "{% endfor %}"
)


def chat_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def save_chat_model(folder: Path, family: str = "llama", template: str | None = CHATML, **over: Any) -> str:
    tiny_model(family, **over).save_pretrained(folder)
    chat_tokenizer(template).save_pretrained(folder)
    return str(folder)


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def talk(*contents: str) -> list[dict[str, Any]]:
    """A conversation of user and assistant in turns."""
    return [turn(("user", "assistant")[number % 2], content) for number, content in enumerate(contents)]


def talks(count: int, seed: int = 0, longest: int = 20) -> list[list[dict[str, Any]]]:
    draw = random.Random(seed)

    def words() -> str:
        return "".join(draw.choices("abcde", k=draw.randint(1, longest)))

    return [talk(*(words() for _ in range(2 * draw.randint(1, 2)))) for _ in range(count)]


def write_talks(path: Path, conversations: list[Any]) -> str:
    return write_rows(path, [{"messages": messages} for messages in conversations])
