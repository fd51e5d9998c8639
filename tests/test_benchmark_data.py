"""The texts and models of the tables, by name and SHA-256."""

import hashlib

import pytest
from benchmarks import data
from benchmarks.data import SOURCES, Source, fetch, main

from castlm.core.errors import InputError


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def sources(monkeypatch) -> None:
    """Two texts: one that is written as the tables have it, and one without a source."""
    whole, last = "0123456789" * 4, "456789"
    texts = {
        "whole.txt": Source(lambda file: file.write_text(whole), hash_of(whole)),
        "last.txt": Source(data._last(0.15, "whole.txt"), hash_of(last)),
        "like.txt": Source(lambda file: file.write_text("like it"), hash_of("it"), is_stand_in=True),
        "own.txt": Source(None, hash_of("own"), how="castlm sample"),
    }
    monkeypatch.setattr(data, "SOURCES", texts)


def test_a_text_is_fetched_and_what_is_there_is_checked(sources, tmp_path, capsys):
    assert main([str(tmp_path), "whole.txt", "last.txt"]) == 0
    assert (tmp_path / "last.txt").read_text() == "456789"
    (tmp_path / "whole.txt").write_text("something else")
    assert main([str(tmp_path), "whole.txt"]) == 2
    assert hash_of("something else") in capsys.readouterr().err


def test_a_text_without_a_source_is_refused_or_has_a_stand_in(sources, tmp_path):
    for name in ("like.txt", "own.txt"):
        with pytest.raises(InputError, match=name):
            fetch(name, tmp_path)
    assert "not the text" in fetch("like.txt", tmp_path, stand_ins=True)
    (tmp_path / "own.txt").write_text("own")
    assert "as in the tables" in fetch("own.txt", tmp_path)


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(InputError, match="wikitext3"):
        fetch("wikitext3", tmp_path)


def test_every_source_has_a_hash():
    assert all(len(source.sha256) == 64 for source in SOURCES.values())
