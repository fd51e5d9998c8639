"""Opens a dataset, local or on the Hugging Face Hub, as documents in a reproducible random order, and mixes several.

Local files are read in place (`readers`); `datasets.load_dataset` would first copy them, decompressed, to the disk. A
hub dataset is streamed: only the rows that are read are downloaded.
"""

from __future__ import annotations

import contextlib
import copy
import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from castlm.core.errors import InputError, naming, one_line
from castlm.data.columns import Columns, Document, Kind, Position, find_columns
from castlm.data.options import DEFAULTS, TextOptions
from castlm.data.readers import (
    GzipJsonLines,
    JsonLines,
    ParquetRows,
    Pieces,
    Pool,
    open_text,
    texts_in_memory,
)
from castlm.say import Progress, silent
from castlm_runtime.reading import check_regular, user_path

OPENERS: dict[str, Callable[[Path, TextOptions, Pool], Pieces]] = {
    ".txt": lambda file, options, pool: open_text(file, pool.told),
    ".jsonl": lambda file, options, pool: JsonLines(file, options, pool.told),
    ".jsonl.gz": lambda file, options, pool: GzipJsonLines(file, options, pool),
    ".parquet": lambda file, options, pool: ParquetRows(file, options, pool),
}
"""The reader of a file by its suffix: a function of the file, the options and the cache of decompressed units."""
SHUFFLE_BYTES = 256 << 20  # decompressed gzip segments and parquet row groups that are held and shuffled together
HUB_NAME = re.compile(r"([\w-][\w.-]*(?:/[\w.-]+)?)(?::([\w.-]+))?(?:@([\w./-]+))?")
"""The name of a hub dataset: repository, configuration and revision."""
LARGE_BYTES = 64 << 20  # of files, from which on opening them takes seconds
HUB_HELD_OUT = 200  # documents of a stream
HUB_BUFFER = 1000  # documents of a stream that are held and shuffled together
_SMALL_BUFFER = 64  # for documents with images


class Documents:
    """Local documents; `len` is their number. Made by `open_documents` or `Documents.from_texts`.

    Args:
        sources: files opened by `readers`, in order.
        pool: the cache of the sources' decompressed units.
        name: the dataset as the user wrote it, for messages.
    """

    def __init__(self, sources: Sequence[Pieces], pool: Pool, name: str) -> None:
        self.name = name
        self.kind = max(source.kind for source in sources)
        self._sources, self._pool = list(sources), pool
        self._piece = np.arange(sum(len(source.last) for source in sources))
        self._last = np.concatenate([source.last for source in sources])
        self._source_ends = np.cumsum([len(source.last) for source in sources])
        unit_ends = np.cumsum([len(source.unit_bytes) for source in sources])
        self._unit_bytes = np.concatenate([source.unit_bytes for source in sources])
        self._unit = np.concatenate(
            [source.unit + end - len(source.unit_bytes) for source, end in zip(sources, unit_ends)]
        )
        self._selection = b""
        pool.limit = max(pool.limit, int(self._unit_bytes.max(initial=0)))

    @classmethod
    def from_texts(cls, texts: Sequence[str], name: str = "texts") -> Documents:
        """Texts in memory, each one document; blank ones are dropped."""
        return cls([texts_in_memory(texts)], Pool(SHUFFLE_BYTES), name)

    def __len__(self) -> int:
        return int(self._last.sum())

    def pieces(self, seed: int | None, epoch: int = 0, position: Position = None) -> Iterator[Document]:
        """The pieces of all documents once, shuffled by (seed, epoch), or in file order if `seed` is None.

        Args:
            position: of the piece to start with; None for the first.
        """
        order = np.arange(len(self._piece)) if seed is None else self._order(seed, epoch)
        start = 0 if position is None else position
        assert isinstance(start, int)
        for here, index in enumerate(order[start:].tolist(), start):
            first, last = index == 0 or bool(self._last[index - 1]), bool(self._last[index])
            document = self._read(index)
            if not (first and last) or document.text.strip():
                yield document._replace(first=first, last=last, position=here)

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        """A permutation of the pieces, shape (num_pieces,), int64; the pieces of one document stay together.

        All documents are shuffled together, except compressed ones: random units of up to `SHUFFLE_BYTES` are shuffled
        together, one batch of units after another.
        """
        rng = np.random.default_rng([seed, epoch])  # random() alone has the same stream in every version of numpy
        unit_order = np.argsort(rng.random(len(self._unit_bytes)), kind="stable")
        pool_of_unit = np.zeros(len(self._unit_bytes), dtype=np.int64)
        if self._unit_bytes.any():
            held = pool = 0
            for unit, num_bytes in zip(unit_order.tolist(), self._unit_bytes[unit_order].tolist()):
                if held and held + num_bytes > SHUFFLE_BYTES:
                    pool, held = pool + 1, 0
                held += num_bytes
                pool_of_unit[unit] = pool
        key = rng.random(len(self))[self._document]  # one draw a document: its pieces stay together, in their order
        order: np.ndarray = np.lexsort((key, pool_of_unit[self._unit]))
        return order

    @property
    def _document(self) -> np.ndarray:
        """The number of the document of each piece."""
        numbers: np.ndarray = np.cumsum(self._last) - self._last
        return numbers

    def _read(self, index: int) -> Document:
        piece = int(self._piece[index])
        which = int(np.searchsorted(self._source_ends, piece, side="right"))
        source = self._sources[which]
        return source.read(piece - int(self._source_ends[which]) + len(source.last))

    def _select(self, keep: np.ndarray) -> Documents:
        """Keeps the pieces where `keep` (bool, num_pieces) is True; a document may only lose its end."""
        part = copy.copy(self)
        part._piece, part._last, part._unit = self._piece[keep], self._last[keep].copy(), self._unit[keep]
        part._last[-1:] = True
        part._selection = hashlib.sha256(self._selection + part._piece.tobytes()).digest()
        return part

    def scattered(self) -> Documents | None:
        """Makes each piece a document, so that `pieces` draws from all of a text; None if that changes nothing."""
        if len(self._sources) == 1 and self._last.all():
            return None
        part = copy.copy(self)
        part._last = np.ones_like(self._last)
        return part

    def text_hash(self) -> str:
        """A SHA-256 in hexadecimal that changes with the text; a resumed run compares it.

        For one file it equals the output of `sha256sum`; for several it hashes their digests in order. A part made by
        `split_documents` has its own hash.
        """
        digest = joined_digest([source.sha256() for source in self._sources])
        return hashlib.sha256(digest.encode() + self._selection).hexdigest() if self._selection else digest


class HubDocuments:
    """A streamed dataset of the Hugging Face Hub. `HUB_BUFFER` documents at a time are held and shuffled, fewer with
    images.

    Args:
        open_stream: returns a new `datasets.IterableDataset` of the same rows at each call; copies of one would share
            its position.
        columns: what a row holds.
        identity: name, revision, config, split and column, which `text_hash` hashes.
    """

    def __init__(
        self, open_stream: Callable[[], Any], columns: Columns, name: str, identity: str, kind: Kind = Kind.TEXT
    ) -> None:
        self.name, self.kind = name, kind
        self._buffer = _SMALL_BUFFER if self.kind is Kind.WITH_EXTRA else HUB_BUFFER
        self._open_stream, self._columns, self._identity = open_stream, columns, identity

    def pieces(self, seed: int | None, epoch: int = 0, position: Position = None) -> Iterator[Document]:
        """See `Documents.pieces`. A position holds the state of the stream, not the text of the held documents."""
        stream = self._open_stream()
        state, buffer, start = stream.state_dict(), 0, 0
        if position is not None:
            assert isinstance(position, dict)
            state, buffer, start = position["stream"], position["buffer"], position["index"]
            stream.load_state_dict(state)
        rows = iter(stream)
        while True:
            with naming(self.name):
                documents = [self._columns.document(row) for row in islice(rows, self._buffer)]
            if not documents:
                return
            order = np.arange(len(documents))
            if seed is not None:
                order = np.argsort(np.random.default_rng([seed, epoch, buffer]).random(len(documents)), kind="stable")
            for index, row in enumerate(order[start:].tolist(), start):
                if documents[row].text.strip():
                    yield documents[row]._replace(position={"stream": state, "buffer": buffer, "index": index})
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


class Mixture:
    """Several texts and their shares.

    Args:
        parts: the texts.
        weights: the share of each, above 0; they need not add up to 1.
    """

    def __init__(self, parts: Sequence[Documents | HubDocuments], weights: Sequence[float]) -> None:
        for part in parts:
            if part.kind is Kind.TEXT and any(other.kind is Kind.WITH_EXTRA for other in parts):
                raise InputError(f"{part.name}: plain text beside conversations with images: give it as conversations")
        self.parts, self.weights = list(parts), [weight / sum(weights) for weight in weights]
        shares = (f"{part.name} ({weight:.0%})" for part, weight in zip(parts, self.weights))
        self.name = " + ".join(shares)
        self.kind = max(part.kind for part in parts)

    def text_hash(self) -> str:
        """A SHA-256 of the texts and their shares, in hexadecimal."""
        content = [[part.text_hash(), weight] for part, weight in zip(self.parts, self.weights)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def furthest_behind(used: Sequence[float], weights: Sequence[float]) -> int:
    """The number of the text that is furthest behind its share.

    Adding one half makes the counts equal rounded shares, so a text of small weight does not come first.
    """
    return min(range(len(used)), key=lambda number: (used[number] + 0.5) / weights[number])


Shown = Callable[..., contextlib.AbstractContextManager[Progress]]
"""`castlm.progress.shown_progress`, or a function with its parameters `what`, `rate` and `is_main`."""
AnyDocuments = Documents | HubDocuments | Mixture


def open_documents(
    dataset: str | Path,
    options: TextOptions = DEFAULTS,
    *,
    split: str = "train",
    shown: Shown | None = None,
) -> Documents | HubDocuments:
    """Opens a file, a folder, a glob, or a dataset of the Hugging Face Hub.

    - .txt (UTF-8): the file is one document, or several separated by `<|endoftext|>`.
    - .jsonl, .jsonl.gz: a document is the string in `column` of each line, or its conversation, with its images.
    - .parquet: a document is a row of `column`.
    - A folder: all files of these types directly in it except hidden ones, sorted by name. A glob likewise.
    - Otherwise the name of a hub dataset, which is streamed: `owner/name`, `owner/name:config`, `owner/name@revision`
      or `owner/name:config@revision`.

    Args:
        split: of a hub dataset.
        shown: shows the progress of opening files of `LARGE_BYTES` and more.

    Raises:
        InputError: the dataset does not exist, its type is not supported, it has no such column or several that could
            be meant, a conversation in it is not one, it holds only blank documents, or a file is corrupt or not a
            regular file.
    """
    files = find_files(dataset)
    if files is None:
        return open_hub(str(dataset), options, split)
    total, read = sum(file.stat().st_size for file in files), 0
    with contextlib.ExitStack() as stack:
        progress: Progress = silent
        if shown is not None and total >= LARGE_BYTES:
            progress = stack.enter_context(shown(f"reading {Path(dataset).name}, MiB", rate="MiB/s"))

        def told(num_bytes: int) -> None:
            nonlocal read
            read = min(read + num_bytes, total)
            progress(read >> 20, total >> 20)

        pool = Pool(SHUFFLE_BYTES, told)
        sources = [OPENERS[_suffix(file)](file, options, pool) for file in files]
    documents = Documents(sources, pool, str(dataset))
    plain = [file for file, source in zip(files, sources) if source.kind is Kind.TEXT and len(source.last)]
    if plain and documents.kind is not Kind.TEXT:
        other = next(file for file, source in zip(files, sources) if source.kind is not Kind.TEXT)
        raise InputError(f"{other} holds conversations and {plain[0]} plain text: give them as two datasets")
    if len(documents) == 0:
        raise InputError(f"{dataset}: no document with text in it; give it some text")
    return documents


def _suffix(path: Path) -> str:
    """The suffix of a file that castlm reads; empty for another file."""
    return next((suffix for suffix in OPENERS if path.name.lower().endswith(suffix)), "")


def find_files(dataset: str | Path) -> list[Path] | None:
    """The local files that `dataset` names, sorted; None if it can only be the name of a hub dataset."""
    path, known = user_path(dataset), ", ".join(OPENERS)
    if path.is_dir():
        found = [file for file in sorted(path.iterdir()) if not file.name.startswith(".")]
    elif path.exists():
        found = [path]
    elif glob.has_magic(str(path)):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    elif _suffix(path) or not HUB_NAME.fullmatch(str(dataset)):
        raise InputError(f"{dataset}: no such file or folder; name a file ({known}), a folder or a glob of them")
    else:
        return None
    files = [file for file in found if not file.is_dir() and _suffix(file)]
    if not files:
        others = ", ".join(file.name for file in found[:5]) or "nothing"
        raise InputError(f"{dataset}: no file of a type that is supported ({known}), but {others}")
    return [check_regular(file) for file in files]


def split_documents(
    documents: Documents | HubDocuments, holdout_fraction: float, seed: int
) -> tuple[Documents | HubDocuments, Documents | HubDocuments]:
    """Holds out whole documents for evaluation, the same ones for the same seed.

    The end of a single document is held out, from the start of a line. A hub stream has no length: its first
    `HUB_HELD_OUT` documents are held out.

    Returns:
        The documents for training, and those held out.
    """
    assert 0 < holdout_fraction < 1
    if isinstance(documents, HubDocuments):
        return documents.split(HUB_HELD_OUT)
    count, num_pieces = len(documents), len(documents._piece)
    if count > 1:
        num_held_out = min(max(1, round(count * holdout_fraction)), count - 1)
        chosen = np.argsort(np.random.default_rng(seed).random(count), kind="stable")[:num_held_out]
        held_out = np.isin(documents._document, chosen)
    else:
        held_out = np.arange(num_pieces) >= num_pieces - int(num_pieces * holdout_fraction)
    if held_out.any():
        return documents._select(~held_out), documents._select(held_out)
    text = "".join(piece.text for piece in documents.pieces(None))
    at = round(len(text) * (1 - holdout_fraction))
    near = text[at : (at + len(text)) // 2]
    cut = at + 1 + (near.find("\n") if "\n" in near else near.find(" "))  # at `at` if there is neither
    if documents.kind is not Kind.TEXT or not text[:cut].strip() or not text[cut:].strip():
        raise InputError(
            f"{documents.name} is too short to train on it and hold out {holdout_fraction} of it: give eval_dataset"
        )
    return Documents.from_texts([text[:cut]], documents.name), Documents.from_texts([text[cut:]], documents.name)


def joined_digest(digests: Sequence[str]) -> str:
    """The digest of a single text, or the SHA-256 of several digests in order."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def open_hub(name: str, options: TextOptions, split: str) -> HubDocuments:
    """A split of a hub dataset; see `open_documents` for its name."""
    import datasets  # slow to import
    from huggingface_hub import HfApi

    parts = HUB_NAME.fullmatch(name)
    assert parts is not None
    repository, data_config, revision = parts.groups()
    try:
        commit = HfApi().dataset_info(repository, revision=revision).sha

        def open_stream() -> Any:
            found = datasets.load_dataset(repository, data_config, split=split, revision=commit, streaming=True)
            return found if found.features is None else found.decode(False)  # images stay bytes, as in a file

        stream, columns = open_stream(), None
        for row in islice(stream, HUB_BUFFER):
            columns = find_columns(row, options)
            if columns is not None:
                break
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except Exception as error:  # datasets raises exceptions of many types
        raise InputError(
            f"{name} is neither a local file nor available on the Hugging Face Hub: {one_line(error)}"
        ) from error
    if columns is None:
        raise InputError(
            f"{name}: split {split!r} begins with {HUB_BUFFER:,} empty rows, or has none: name another split"
        )
    with naming(f"{name}, its first row with a text"):
        document = columns.document(row)
    kind = max(document.kind, columns.kind_of(stream.features or row))
    identity = f"{repository}@{commit} {data_config} {split} {columns.name}"
    return HubDocuments(open_stream, columns, name, identity, kind)
