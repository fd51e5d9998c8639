"""Streams a dataset of the Hugging Face Hub as documents: only what is read is downloaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from castlm.core.errors import InputError
from castlm.data.columns import Columns, Kind, find_columns, is_undecided, types_of
from castlm.data.options import TextOptions
from castlm.data.readers import Piece, Position

HUB_BUFFER = 1000  # documents of a stream that are held and shuffled together
_SMALL_BUFFER = 64  # for documents with images


class HubDocuments:
    """A streamed dataset of the Hugging Face Hub. `HUB_BUFFER` documents at a time are held and shuffled, fewer with
    images.

    Args:
        open_stream: returns a new `datasets.IterableDataset` of the same rows at each call; copies of one would share
            its position.
        columns: what a row holds.
        identity: name, revision, config, split and column, which `text_hash` hashes.
        kind: the kind of the documents, if rows bring more than `columns` tells.
    """

    def __init__(
        self, open_stream: Callable[[], Any], columns: Columns, name: str, identity: str, kind: Kind | None = None
    ) -> None:
        self.name, self.kind = name, columns.kind_of({}) if kind is None else kind
        self._buffer = _SMALL_BUFFER if self.kind is Kind.WITH_EXTRA else HUB_BUFFER
        self._open_stream, self._columns, self._identity = open_stream, columns, identity

    def pieces(self, seed: int | None, epoch: int = 0, position: Position = None) -> Iterator[Piece]:
        """See `Documents.pieces`. A position holds the state of the stream, not the text of the held documents."""
        stream = self._open_stream()
        state, buffer, start = stream.state_dict(), 0, 0
        if position is not None:
            state, buffer, start = position["stream"], position["buffer"], position["index"]
            stream.load_state_dict(state)
        rows = iter(stream)
        while documents := [self._columns.document(row, self.name) for row in islice(rows, self._buffer)]:
            order = np.arange(len(documents))
            if seed is not None:
                order = np.argsort(np.random.default_rng([seed, epoch, buffer]).random(len(documents)), kind="stable")
            for index, row in enumerate(order[start:].tolist(), start):
                text, *more = documents[row]
                if text and not text.isspace():
                    yield Piece(text, True, True, {"stream": state, "buffer": buffer, "index": index}, *more)
            state, buffer, start = stream.state_dict(), buffer + 1, 0

    def split(self, num_held_out: int) -> tuple[HubDocuments, HubDocuments]:
        """Splits off the first `num_held_out` documents; returns the others, then those."""

        def part(cut: str) -> HubDocuments:
            return HubDocuments(
                lambda: getattr(self._open_stream(), cut)(num_held_out),
                self._columns,
                self.name,
                f"{self._identity} {cut} {num_held_out}",
                self.kind,
            )

        return part("skip"), part("take")

    def text_hash(self) -> str:
        """The hash of name, revision, config, split and column; see `Documents.text_hash`."""
        return hashlib.sha256(self._identity.encode()).hexdigest()


def _undecoded(load: Callable[[], Any]) -> Any:
    """A stream that leaves images as bytes, as in a file."""
    stream = load()
    return stream if stream.features is None else stream.decode(False)


def open_hub(name: str, options: TextOptions, split: str, data_config: str | None) -> HubDocuments:
    """The split of `name`, owner/name or owner/name@revision. See `open_documents`."""
    import datasets  # slow to import
    from huggingface_hub import HfApi

    repository, _, revision = name.partition("@")
    try:
        revision = HfApi().dataset_info(repository, revision=revision or None).sha
        load = partial(datasets.load_dataset, repository, data_config, split=split, revision=revision, streaming=True)
        open_stream = partial(_undecoded, load)
        stream = open_stream()
        row = None
        for row in islice(stream, HUB_BUFFER):
            if not is_undecided(types_of(row), options.column):
                break
    except Exception as error:  # datasets raises exceptions of many types
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{name} is neither a local file nor available on the Hugging Face Hub: {reason}") from error
    if row is None:
        raise InputError(f"{name}: split {split!r} is empty; name another split")
    columns = find_columns(types_of(row), options, name)
    document = columns.document(row, f"{name}, its first row with a text")
    kind = max(document.kind, columns.kind_of(dict.fromkeys(stream.features or row, "a feature")))
    identity = f"{repository}@{revision} {data_config} {split} {columns.name}"
    return HubDocuments(open_stream, columns, name, identity, kind)
