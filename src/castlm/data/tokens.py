"""Turns documents into token ids, with the tokens that separate them, and checks the ids against a vocabulary."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from castlm.core.errors import InputError, is_panic, one_line
from castlm.data.chat import Chat, begin_of, with_template
from castlm.data.columns import Document, Kind
from castlm.data.documents import AnyDocuments, Documents, HubDocuments, open_documents
from castlm.data.extra import Extra
from castlm.data.images import ImageReader, open_processor
from castlm.data.options import TextOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

# The separator of documents in pretraining, for models whose `eos_token` has become the end of a chat turn.
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")

IGNORED = -100
"""The label of a token that does not count."""


class Tokens(NamedTuple):
    """The tokens of a piece, as three arrays of shape (num_tokens,)."""

    ids: np.ndarray
    """int32."""
    labels: np.ndarray
    """int32: the ids themselves, not shifted, and -100 where a token does not count."""
    begins: np.ndarray
    """bool: whether the token is the first of a document."""
    extra: Extra | None = None
    """The tensors that the document brings beside its tokens."""

    @classmethod
    def of(cls, ids: list[int], counts: list[bool] | None, first: bool) -> Tokens:
        """From token ids; `counts`: which tokens count (None: all); `first`: whether a document begins here."""
        array, begins = np.asarray(ids, dtype=np.int32), np.zeros(len(ids), dtype=bool)
        begins[:1] = first
        return cls(array, array if counts is None else np.where(counts, array, IGNORED).astype(np.int32), begins)

    @classmethod
    def filler(cls, eos: int, count: int) -> Tokens:
        """`count` end-of-text tokens that do not count."""
        return cls.of([eos] * count, [False] * count, True)

    def part(self, rows: slice) -> Tokens:
        return Tokens(self.ids[rows], self.labels[rows], self.begins[rows])

    @staticmethod
    def joined(parts: list[Tokens]) -> Tokens:
        ids, labels, begins, _ = zip(*parts)
        return Tokens(np.concatenate(ids), np.concatenate(labels), np.concatenate(begins))


class Encoder:
    """Turns documents of any kind into token ids and the mask of the tokens that count.

    Args:
        assistant_only: count only the assistant's tokens of a conversation; see `castlm.data.chat`.
        processor: prepares images; see `open_encoder`.
        document_limit: see `castlm.data.options`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        assistant_only: bool = True,
        processor: ProcessorMixin | None = None,
        document_limit: float = 1.0,
    ) -> None:
        # A copy: a fast tokenizer that another thread uses meanwhile may raise "Already borrowed".
        self._tokenizer = copy.deepcopy(tokenizer)
        self.chat = Chat(self._tokenizer, assistant_only, document_limit)
        self._images = ImageReader(processor, assistant_only, document_limit) if processor is not None else None
        self.counted = "assistant" if assistant_only else "all"
        """The tokens of a conversation that count."""
        self.template_sha256 = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()
        self.tokenizer_name = str(tokenizer.name_or_path)
        self.eos = end_of_text_id(tokenizer)
        bos = tokenizer.bos_token_id
        self.bos = [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
        """The tokens that the tokenizer itself puts before a text."""
        self._line_break, with_letter = self.plain(["\n", "\na"])
        self._letter = with_letter[len(self._line_break) :]
        self._first = self.bos if self.bos != [self.eos] else []  # where it is the end-of-text of the document before

    def __call__(self, pieces: list[Document]) -> list[Tokens]:
        if any(piece.kind is not Kind.TEXT for piece in pieces):  # no dataset has both
            return [self.conversation(piece) for piece in pieces]
        encoded = []
        for piece, ids in zip(pieces, self._ids_of(pieces)):
            if ids or not (piece.first and piece.last):
                if piece.first:
                    ids = [*self._first, *ids]
                if piece.last:
                    ids = [*ids, self.eos]
            counts = [*[True] * (len(ids) - 1), False] if piece.is_cut and ids else None
            encoded.append(Tokens.of(ids, counts, piece.first))
        return encoded

    def _ids_of(self, pieces: list[Document]) -> list[list[int]]:
        """Tokenizes pieces of plain text to the tokens that the whole text would give.

        A piece from the middle of a text gets a line break before it, because some tokenizers put a space before the
        first word of their input. A piece that ends with a line break gets a letter behind it, because GPT-2 joins the
        line breaks at the end of its input, and keeps the last one apart before a word.
        """
        before = ["" if piece.first else "\n" for piece in pieces]
        after = ["a" if piece.text.endswith("\n") and not piece.last else "" for piece in pieces]
        found = self.plain([start + piece.text + end for start, piece, end in zip(before, pieces, after)])
        for number, (start, piece, end) in enumerate(zip(before, pieces, after)):
            ids, head, tail = found[number], self._line_break if start else [], self._letter if end else []
            stop = len(ids) - len(tail)
            is_apart = ids[: len(head)] == head and ids[stop:] == tail
            found[number] = ids[len(head) : stop] if is_apart else self.plain([piece.text])[0]
        return found

    def conversation(self, document: Document) -> Tokens:
        """The tokens of a conversation, with the tensors of its images, which need a processor.

        An end-of-text token follows unless the template ended with one. It counts as the end of a completion, but not
        as part of a conversation.
        """
        extra = None
        try:
            if self._images is not None:
                (ids, counts, is_rendered), extra = self._images(document.text, document.extra)
            elif not document.extra:
                ids, counts, is_rendered = self.chat(document.text)
            else:
                raise InputError(
                    "it has images, which are read by castlm train, finetune, prune and eval of a vision-language "
                    "model: give text alone"
                )
        except InputError as error:
            raise InputError(f"the conversation that begins {begin_of(document.text)}: {error}") from error
        if is_rendered and ids and ids[-1] == self.eos:
            return Tokens.of(list(ids), list(counts), True)._replace(extra=extra)
        first = [] if is_rendered else self._first
        ends = not is_rendered or self.counted == "all"
        counts = [self.counted == "all"] * len(first) + [*counts, ends]
        return Tokens.of([*first, *ids, self.eos], counts, True)._replace(extra=extra)

    def text_alone(self, document: str) -> list[int]:
        """The token ids of a conversation without its images, followed by an end-of-text token."""
        assert self._images is not None
        return [*self._images.text_alone(document), self.eos]

    def plain(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        try:
            encoded = self._tokenizer(
                texts,
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # silences its warning about documents longer than the context
            )
        except BaseException as error:
            if not is_panic(error):
                raise
            raise InputError(
                f"the tokenizer cannot read one of {len(texts)} texts, of which the first begins {texts[0][:40]!r}: "
                f"{one_line(error)}"
            ) from error
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def joined(self, documents: Documents | HubDocuments, seed: int | None = None) -> Iterator[Tokens]:
        """The pieces of the documents, in file order or shuffled by `seed`. The separator stands before each document;
        the last plain text has no end-of-text after it.
        """
        if documents.kind is not Kind.TEXT:
            yield from map(self.conversation, documents.pieces(seed))
            return
        before, counts = self.bos, True
        for piece in documents.pieces(seed):
            (ids,) = self._ids_of([piece])
            if piece.first:
                ids = [*before, *ids]
            yield Tokens.of(ids, None if counts else [False, *[True] * (len(ids) - 1)], piece.first)
            before, counts = [self.eos, *self._first], not piece.is_cut


def open_encoder(
    texts: Iterable[AnyDocuments],
    tokenizer: PreTrainedTokenizerBase,
    model: str,
    options: TextOptions,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Encoder:
    """Opens the encoder of these texts for a model, with an image processor if a text has images.

    Args:
        tokenizer: the model's. It receives the chat template of `options`. If there is none, it keeps its own, or
            receives the processor's.
        model: name of the model, with the options that it was loaded with.
    """
    with_template(tokenizer, options.chat_template_path)
    processor = None
    if any(text.kind is Kind.WITH_EXTRA for text in texts):
        processor = open_processor(model, tokenizer, trust_remote_code=trust_remote_code, revision=revision)
    return Encoder(
        tokenizer, assistant_only=options.assistant_only, processor=processor, document_limit=options.document_limit
    )


def text_encoder(tokenizer: PreTrainedTokenizerBase, options: TextOptions) -> Encoder:
    """An encoder with these options, which refuses images; otherwise as `open_encoder`."""
    return open_encoder((), tokenizer, "", options)


def token_ids(
    documents: Documents | HubDocuments | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
) -> Tensor:
    """The tokens of documents in file order, joined with end-of-text: int64, shape (num_tokens,).

    One document gives the ids of `tokenizer(text)` without any token that the tokenizer appends, so perplexities agree
    with the usual protocol. A long document of a text file is tokenized in pieces of about 256 KiB up to `limit`.
    Conversations are rendered with the chat template.

    Args:
        documents: documents, or a dataset for `open_documents`.
        limit: at most this many tokens, from the start.
    """
    if isinstance(documents, str | Path):
        documents = open_documents(documents)
    tokens = first_tokens(documents, Encoder(tokenizer, assistant_only=False), limit)
    return torch.from_numpy(tokens.ids).long()


def first_tokens(
    documents: Documents | HubDocuments, encoder: Encoder, limit: int | None, seed: int | None = None
) -> Tokens:
    """The first `limit` tokens of `Encoder.joined`, or all of them.

    If the text is longer and a `seed` is given, its documents are taken in the order of that seed.
    """
    tokens = up_to(limit, encoder.joined(documents))
    if seed is not None and len(tokens.ids) == limit:
        tokens = up_to(limit, encoder.joined(documents, seed))
    return tokens


def up_to(limit: int | None, parts: Iterable[Tokens]) -> Tokens:
    """The first `limit` tokens of `parts`; stops reading parts once it has them."""
    return Tokens.joined([Tokens.of([], None, False), *parts_up_to(limit, parts)]).part(slice(limit))


def parts_up_to(limit: int | None, parts: Iterable[Tokens]) -> list[Tokens]:
    """The first of `parts` that have `limit` tokens together, or all of them; reads no more."""
    found, count = [], 0
    for part in parts:
        found.append(part)
        count += len(part.ids)
        if limit is not None and count >= limit:
            break
    return found


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token between documents: an end-of-text token among the added ones, else `eos_token_id`, which must exist."""
    added = tokenizer.get_added_vocab()
    found = next((added[token] for token in _END_OF_TEXT if token in added), tokenizer.eos_token_id)
    if found is None:
        raise InputError(f"tokenizer {tokenizer.name_or_path!r} has no end-of-text token: set its eos_token")
    return int(found)


def check_vocabulary(input_ids: Tensor, vocab_size: int) -> None:
    """Raises `InputError` for a token id that the model has no embedding for."""
    if input_ids.dtype not in (torch.int64, torch.int32):  # as torch's embedding takes them
        raise InputError(f"token ids are {input_ids.dtype}: give a tensor of torch.int64")
    for token in map(int, input_ids.aminmax()) if input_ids.numel() else ():
        if not 0 <= token < vocab_size:
            raise InputError(
                f"token id {token} is outside the model's vocabulary of {vocab_size}: use the model's own tokenizer"
            )
