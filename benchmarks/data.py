"""Fetches the texts and models of the tables by name, and checks their SHA-256.

    python -m benchmarks.data FOLDER [NAME ...] [--stand-ins]

Without a name it fetches everything. A file that is in FOLDER already is only checked. Some texts of the tables have no
public source: their hashes are here for whoever has them, and `--stand-ins` fetches a text of the same kind, with which
the order of the rows should hold and the figures will not.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from castlm.core.errors import InputError


def _wikitext2(file: Path) -> None:
    from datasets import load_dataset

    rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
    file.write_text("\n\n".join(rows["text"]), encoding="utf-8")


def _stories260k(folder: Path) -> None:
    from huggingface_hub import hf_hub_download

    from castlm.cli.main import main as castlm

    castlm(["unpack", hf_hub_download("ggml-org/models", "tinyllamas/stories260K.gguf"), "--output-dir", str(folder)])


def _tinystories(file: Path) -> None:
    from datasets import load_dataset

    rows = load_dataset("roneneldan/TinyStories", split="train", streaming=True)
    file.write_text("\n<|endoftext|>\n".join(row["text"] for row in itertools.islice(rows, 316)), encoding="utf-8")


def _wikipedia(first: int, count: int) -> Callable[[Path], None]:
    """Articles of English Wikipedia as .jsonl or .jsonl.gz."""

    def fetch(file: Path) -> None:
        from datasets import load_dataset

        rows = load_dataset("wikimedia/wikipedia", "20231101.en", split="train", streaming=True)
        articles = itertools.islice(rows, first, first + count)
        text = "".join(json.dumps({"text": row["text"]}) + "\n" for row in articles).encode()
        file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)

    return fetch


def _last(share: float, source: str) -> Callable[[Path], None]:
    """The last part of the characters of another text."""

    def cut(file: Path) -> None:
        text = (file.parent / source).read_text(encoding="utf-8")
        file.write_text(text[int(len(text) * (1 - share)) :], encoding="utf-8")

    return cut


class Source(NamedTuple):
    """Where a text or model of the tables comes from."""

    make: Callable[[Path], None] | None
    """Writes the file or folder; None if there is no way to fetch it."""
    sha256: str
    """Of the file, or of model.safetensors in the folder."""
    is_stand_in: bool = False
    """Whether `make` gives another text of the same kind."""
    how: str = ""
    """What to do without `make`."""


SOURCES = {
    "stories260K": Source(_stories260k, "407a7c581bdd66972383ce9ad24857713fb98786d06ea564a2fe9b34ebe77dfd"),
    "wikitext2_test.txt": Source(_wikitext2, "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"),
    "tinystories.txt": Source(
        _tinystories, "e9f4ad209f66bf742e4f75cfdcb9bdef27534f57771ad655cff3543b5a9497de", is_stand_in=True
    ),
    "tinystories_heldout.txt": Source(
        _last(0.15, "tinystories.txt"), "00cd987083c06223b170f06c4d1afc5ff44f9ef1b5e58dd75b93a4fe3f5dd0d4"
    ),
    "tinystories_selfgen.jsonl": Source(
        None,
        "dd443e9a301bc908f14856239b6608392beecb5085f50cfe0f5a9742ab9981ba",
        how="castlm sample stories260K --output-file tinystories_selfgen.jsonl --num-tokens 1600000",
    ),
    "wikipedia_train.jsonl.gz": Source(
        _wikipedia(150, 7177), "c7ec456709cdd09172d8faa21514efbe8a87237bcc14b5e3db32a3e28bbf89e6", is_stand_in=True
    ),
    "wikipedia_valid.jsonl": Source(
        _wikipedia(0, 150), "a1b1cfb58340a87411998610b7e1426bc68135ba6644810a37232001c6ec0829", is_stand_in=True
    ),
}
"""The sources by name, each after those that it is made from."""


def sha256(path: Path) -> str:
    """The SHA-256 of a file, or of the weights of a model folder."""
    file = path / "model.safetensors" if path.is_dir() else path
    return hashlib.sha256(file.read_bytes()).hexdigest()


def fetch(name: str, folder: Path, stand_ins: bool = False) -> str:
    """Fetches what is not in `folder` and returns a line about it.

    Raises:
        InputError: the name is unknown, there is no public source, or the file is not that of the tables.
    """
    if name not in SOURCES:
        raise InputError(f"{name} is none of {', '.join(SOURCES)}")
    source, path = SOURCES[name], folder / name
    if not path.exists():
        if source.make is None:
            raise InputError(f"{name} has no public source; a text of the same kind: {source.how}")
        if source.is_stand_in and not stand_ins:
            raise InputError(f"{name} has no public source; --stand-ins fetches a text of the same kind")
        source.make(path)
    found = sha256(path)  # which raises where nothing was written
    if found == source.sha256:
        return f"{path}: as in the tables"
    if stand_ins:
        return f"{path}: not the text of the tables, SHA-256 {found[:16]}"
    raise InputError(f"{path} has the SHA-256 {found}, that of the tables {source.sha256}")


def main(arguments: list[str] | None = None) -> int:
    """Fetches and checks; a name that fails does not stop the others."""
    parser = argparse.ArgumentParser(description="Fetch the texts and models of the tables.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=list(SOURCES))
    parser.add_argument(
        "--stand-ins", action="store_true", help="fetch texts of the same kind where there is no source"
    )
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in options.names:
        try:
            print(fetch(name, options.folder, options.stand_ins))
        except (InputError, OSError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed += 1
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
