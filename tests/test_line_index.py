"""The places of documents that a run leaves for its restart: the same documents, and anew where something changed."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors import safe_open

from castlm.data.documents import open_documents
from castlm.data.line_index import LineIndexes
from castlm.data.options import DEFAULTS, TextOptions
from castlm.data.readers import JsonRows
from castlm.files.weights import layout_of, write_safetensors
from castlm.training.text import steps_of_epochs
from castlm.training.train import train
from tests.runs import small

TURNS = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": f"{i} it is"}] for i in range(9)]
ROWS = [{"messages": None}, {"messages": []}, *({"messages": turns} for turns in TURNS)]


@pytest.fixture
def left(tmp_path):
    """A file, the folder with its index, and its documents as the first start saw them."""
    file, folder = tmp_path / "text.jsonl", tmp_path / "run"
    file.write_text("\n\n".join(json.dumps(row) for row in ROWS))
    indexes = LineIndexes()
    seen = look(file, indexes)
    indexes.save(folder)
    return file, folder, seen


def look(file, indexes, options=DEFAULTS):
    documents = open_documents(file, options, indexes=indexes)
    return documents.text_hash(), documents.kind, list(documents.pieces(3, 1)), list(documents.pieces(3, 1, 4))


@pytest.fixture
def parses(monkeypatch):
    index, parsed = JsonRows.index, []
    monkeypatch.setattr(JsonRows, "index", lambda rows, chunks: parsed.append(1) or index(rows, chunks))
    return parsed


def test_a_restart_sees_the_same_documents_without_parsing_the_file(left, parses):
    file, folder, seen = left
    assert look(file, LineIndexes(folder)) == seen
    assert not parses
    assert len(seen[2]) == 9


def test_the_steps_of_epochs_are_counted_at_a_restart_without_parsing_the_file(llama, tmp_path, parses):
    file, folder = tmp_path / "text.jsonl", tmp_path / "index"
    file.write_text("\n".join(json.dumps({"text": f"{i} is a number. " * 9}) for i in range(40)))
    config = small(llama, str(file), tmp_path / "run", max_steps=300)
    sections = config.model, config.data, config.evaluation
    indexes = LineIndexes()
    open_documents(file, config.data, indexes=indexes)
    indexes.save(folder)
    expected = steps_of_epochs(*sections, 2.0, 4)
    assert parses == [1, 1]
    assert steps_of_epochs(*sections, 2.0, 4, LineIndexes(folder)) == expected
    assert parses == [1, 1]


def test_a_run_of_epochs_parses_its_text_once(llama, tmp_path, parses):
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"{i} is a number. " * 9}) for i in range(40)))
    over = {"max_steps": 300, "num_train_epochs": 0.04, "init_from": "magnitude", "eta": 0.0}
    train(small(llama, str(file), tmp_path / "run", **over))
    assert parses == [1]


CHANGES = ["longer", "newer", "other words at the old time", "options", "cut short", "outside", "no index"]


@pytest.mark.parametrize("what", CHANGES)
def test_what_has_changed_is_parsed_again(what, left, parses):
    file, folder, seen = left
    (index,) = folder.iterdir()
    options = TextOptions(document_limit=2.0) if what == "options" else DEFAULTS
    if what == "longer":
        file.write_text(file.read_text() + "\n" + json.dumps(ROWS[-1]))
    elif what == "newer":
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    elif what == "other words at the old time":
        time = file.stat().st_mtime_ns
        file.write_text(file.read_text().replace("it is", "is it"))
        os.utime(file, ns=(time, time))
    elif what == "cut short":
        index.write_bytes(index.read_bytes()[:-8])
    elif what == "no index":
        index.unlink()
    elif what == "outside":
        with safe_open(index, "np") as stored:
            about = stored.metadata()
        spans = {"spans": torch.from_numpy(np.array([[0, file.stat().st_size + 1]]))}
        write_safetensors(index, layout_of(spans), spans.items(), about)
    indexes = LineIndexes(folder)
    found = look(file, indexes, options)
    assert parses == [1]
    assert (found == seen) == (what not in ("longer", "other words at the old time"))
    indexes.save(folder)
    assert look(file, LineIndexes(folder), options) == found
    assert parses == [1]
