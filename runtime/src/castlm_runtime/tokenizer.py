"""The tokenizer of a model folder: `tokenizer.json` by the library tokenizers, and its special tokens and templates."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from castlm_runtime.detokenizer import Detokenizer, clean_up
from castlm_runtime.errors import InputError, one_line
from castlm_runtime.reading import check_regular, read_json_object, read_text

_FILE, _CONFIG, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


def _byte_characters() -> dict[str, int]:
    """The characters that stand for bytes in byte-level BPE: printable ones for themselves, others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_characters()


class Tokenizer:
    """Tokens from text and back, as transformers' fast tokenizers give them; tests compare the two.

    Args:
        backend: the tokenizer of tokenizer.json.
        config: the content of tokenizer_config.json.
        templates: chat templates by name; "default" is the one without tools.
    """

    def __init__(
        self,
        backend: Backend,
        config: Mapping[str, Any],
        templates: Mapping[str, str],
        name_or_path: str = "",
    ):
        self._backend, self._templates, self.name_or_path = backend, dict(templates), name_or_path
        found = {name: config.get(name) for name in config if name.endswith("_token")}
        texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
        self.special_tokens_map = {name: text for name, text in texts.items() if isinstance(text, str)}
        self.cleans_up = config.get("clean_up_tokenization_spaces") is True

    @classmethod
    def open(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a folder. Raises `InputError` where it has no tokenizer.json, or a damaged one."""
        folder = Path(folder)
        if not (folder / _FILE).is_file():
            raise InputError(f"{folder} has no {_FILE}: castlm generate runs the model with transformers")
        try:
            backend = Backend.from_file(str(check_regular(folder / _FILE)))
        except Exception as error:  # of any type: the library is written in Rust
            raise InputError(f"{folder / _FILE} is no tokenizer ({one_line(error)}): fetch it again") from error
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", _CONFIG):
            if (folder / name).is_file():
                config |= {key: value for key, value in read_json_object(folder / name).items() if value is not None}
        return cls(backend, config, _templates_of(folder, config), str(folder))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text."""
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of all tokens together, without special tokens."""
        text = str(self._backend.decode(list(ids), skip_special_tokens=True))
        return clean_up(text) if self.cleans_up else text

    def detokenizer(self) -> Detokenizer:
        """The text of tokens as they come."""
        return Detokenizer(lambda ids: str(self._backend.decode(list(ids), skip_special_tokens=True)), self.cleans_up)

    def token_text(self, token: int) -> str:
        """The text that a token adds to a text, also a special token; "\ufffd" for part of a character."""
        anchor, length = self._anchor
        return str(self._backend.decode([*anchor, token], skip_special_tokens=False))[length:]

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes that a token adds to a text; None where they are not known."""
        text = self.token_text(token)
        if "\ufffd" not in text:
            return text.encode()
        name = str(self._backend.id_to_token(token))
        if name.startswith("<0x") and len(name) == 6:  # of SentencePiece
            return bytes([int(name[3:5], 16)])
        if all(character in _BYTES for character in name):  # of byte-level BPE
            return bytes(_BYTES[character] for character in name)
        return None

    @functools.cached_property
    def _anchor(self) -> tuple[list[int], int]:
        """A token after which another one keeps the space that it begins with, and the length of its text."""
        anchor = list(self._backend.encode("a", add_special_tokens=False).ids[-1:])
        return anchor, len(self._backend.decode(anchor, skip_special_tokens=False))

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        return str(self._backend.to_str())

    def token_id(self, text: str) -> int | None:
        """The id of a token by its text; None if there is none."""
        found = self._backend.token_to_id(text)
        return None if found is None else int(found)

    @property
    def eos_token_id(self) -> int | None:
        """The id of the special token that ends a text."""
        text = self.special_tokens_map.get("eos_token")
        return None if text is None else self.token_id(text)

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The template for a conversation with or without tools. Raises ValueError without one."""
        if tools is not None and "tool_use" in self._templates:
            return self._templates["tool_use"]
        with contextlib.suppress(KeyError):
            return self._templates["default"]
        raise ValueError("no chat template")


def _templates_of(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    found = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(found, str):
        templates["default"] = found
    elif isinstance(found, list):
        templates = {entry["name"]: entry["template"] for entry in found if isinstance(entry, dict)}
    if (folder / _TEMPLATE).is_file():
        templates["default"] = read_text(folder / _TEMPLATE)
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = read_text(file)
    return templates
