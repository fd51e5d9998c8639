"""Text from tokens as they come, equal to the decoding of all of them together.

A part of the tokens decodes to a part of the text only under two conditions. A tokenizer may drop the space that a
text begins with, so the part must begin with a token that has text before what is new. And a character may have its
bytes in several tokens, so text that ends inside of one waits. Bytes that are no character become U+FFFD; of tokenizers
like Llama 2's, whose decoding of all bytes in a row depends on the last one, they may become another number of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"
_MAX_OPEN = 8  # tokens that may wait for the end of a character: it has at most 4 bytes
_CLEAN_UPS = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m")),
    *((" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)
"""What transformers does to a text where `clean_up_tokenization_spaces` is set."""
_LONGEST = max(len(old) for old, _ in _CLEAN_UPS)


def clean_up(text: str) -> str:
    """A text without spaces before punctuation, as transformers makes it."""
    for old, clean in _CLEAN_UPS:
        text = text.replace(old, clean)
    return text


class Detokenizer:
    """Hands out text that no later token can change.

    Args:
        decode: the text of token ids.
        cleans_up: whether the decoding of a whole text removes spaces before punctuation.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], cleans_up: bool = False):
        self._decode, self._cleans_up = decode, cleans_up
        self._tokens: list[int] = []
        self._first = 0  # of the tokens that are decoded
        self._read = 0  # tokens whose text has been handed out
        self._held = ""  # text that the clean-up may still change

    def put(self, token: int | None, is_last: bool = False) -> str:
        """The text that has become certain with this token; None adds none.

        Args:
            is_last: no further token comes: all text is handed out.
        """
        if token is not None:
            self._tokens.append(token)
        text = self._decode(self._tokens[self._first :])
        end = len(self._tokens)
        if text.endswith(_BROKEN) and not is_last:
            if end - self._read <= _MAX_OPEN:
                return ""
            end, text = self._certain(text)
        return self._cleaned(self._advance(text, end), is_last)

    def _certain(self, text: str) -> tuple[int, str]:
        """The most tokens whose text is a beginning of `text`, which ends inside a character, and their text.

        A character has at most four bytes, so that one of the last five places is between two characters.
        """
        for end in range(len(self._tokens) - 1, len(self._tokens) - 6, -1):
            found = self._decode(self._tokens[self._first : end])
            if text.startswith(found):
                return end, found
        return len(self._tokens), text

    def _advance(self, text: str, end: int) -> str:
        before = self._decode(self._tokens[self._first : self._read])
        new = text[len(before) :]
        if new:  # else the next text must not be the beginning of a decoding
            self._first = self._read
        self._read = end
        return new

    def _cleaned(self, new: str, is_last: bool) -> str:
        if not self._cleans_up:
            return new
        text = self._held + new
        at = len(text) if is_last else _open_end(text)
        self._held = text[at:]
        return clean_up(text[:at])


def _open_end(text: str) -> int:
    """Where the end of a text begins that a clean-up may still change: each of them begins with a space."""
    at = text.find(" ", max(0, len(text) - _LONGEST + 1))
    while at >= 2 and text[at - 2 : at + 1] == " ' ":  # the one that ends with a space, too
        at -= 2
    return len(text) if at < 0 else at
