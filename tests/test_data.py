"""Blocks against a packing written out plainly, positions against the undisturbed run, files against their texts."""

import contextlib
import gzip
import hashlib
import json
import random
import re
from itertools import pairwise
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from castlm.core.errors import InputError
from castlm.data import columns, readers
from castlm.data import documents as documents_module
from castlm.data import packing as data_module
from castlm.data.calibration import CalibrationText, calibration_sequences
from castlm.data.columns import Columns
from castlm.data.documents import Documents, HubDocuments, open_documents, split_documents
from castlm.data.options import TextOptions
from castlm.data.packing import BatchLoader, PackedSequences
from castlm.data.scored import scored_text
from castlm.data.tokens import Encoder, end_of_text_id, token_ids
from castlm_runtime.reading import read_text
from tests.chats import chat_tokenizer, talks, write_talks
from tests.refusals import refusal
from tests.slow import slow_but
from tests.texts import same, sequences, write_rows, write_texts
from tests.tiny import EOS, EOS_ID, tiny_tokenizer

TOKENIZER = chat_tokenizer()
ENCODER = Encoder(TOKENIZER)


def make_texts(count, seed=0, most=60):
    rng = random.Random(seed)
    return [f"<{i}> " + "".join(rng.choices("abc défg\n", k=rng.randint(1, most))) + "." for i in range(count)]


def ids_of(text):
    return TOKENIZER(text)["input_ids"]


def texts_of(documents, seed=None, epoch=0):
    """Whole documents in the order of `pieces`."""
    found, begun = [], None
    for piece in documents.pieces(seed, epoch):
        assert piece.first == (begun is None)
        begun = (begun or "") + piece.text
        if piece.last:
            found.append(begun)
            begun = None
    assert begun is None
    return found


def local(count=23):
    return Documents.from_texts(make_texts(count))


def hub(count=23):
    rows = datasets.Dataset.from_dict({"text": make_texts(count)})
    return HubDocuments(
        lambda: rows.to_iterable_dataset(num_shards=3), Columns("text", False), "some/name", "some/name@abc"
    )


def chat(folder):
    path = write_talks(folder / "talks.jsonl", talks(9))
    return lambda: open_documents(path)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(data_module, "_BATCH_PIECES", 3)
    monkeypatch.setattr(documents_module, "HUB_BUFFER", 7)


@pytest.fixture(params=[local, hub])
def plain(request):
    return request.param


@pytest.fixture(params=[local, hub, chat])
def collection(request, tmp_path):
    return chat(tmp_path) if request.param is chat else request.param


def stream_of(documents, seq_len=16, seed=5, **kwargs):
    return PackedSequences(documents, Encoder(TOKENIZER), seq_len=seq_len, seed=seed, **kwargs)


# Small inputs of a large cost


LARGER = TextOptions(document_limit=4)


def test_a_line_that_expands_to_more_than_a_text_can_be_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1 << 20)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 1 << 16)
    for name in ("a.jsonl", "a.jsonl.gz"):
        path = write_texts(tmp_path / name, ["short", "a" * (3 << 20)])
        with pytest.raises(InputError, match=rf"{name}, line 2 .*1,048,576.*document_limit"):
            open_documents(path)
        assert len(open_documents(path, LARGER)) == 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_text_that_cannot_be_tokenized_at_once_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "MAX_CHARACTERS", 1000)
    path = write_texts(tmp_path / name, ["short", "a" * 1001])
    with pytest.raises(InputError, match=r"1,001 .*1,000.*document_limit"):
        texts_of(open_documents(path))
    assert len(texts_of(open_documents(path, LARGER))) == 2


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"] * 9), pa.array(["b"] * 9)], names=["text", "text"])
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet has two columns 'text': rename"):
        open_documents(tmp_path / "a.parquet")


def test_a_text_at_which_the_tokenizer_panics_is_named(capfd):
    """Its library in Rust panics at patterns that take exponential time."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    with pytest.raises(InputError, match=r"cannot read one of 1 texts, .*begins 'aaaa"):
        Encoder(tokenizer).plain(["a" * 60 + "b"])
    capfd.readouterr()  # the library prints where it panicked


# Packing and order


def test_blocks_are_the_documents_joined_with_end_of_text(plain):
    flat = [t for epoch in range(3) for text in texts_of(plain(), 5, epoch) for t in [*ids_of(text), EOS_ID]]
    count = (len(flat) - 1) // 16
    for i, block in enumerate(sequences(stream_of(plain()), count)):
        assert block["input_ids"].tolist() == flat[16 * i : 16 * i + 16]
        assert block["labels"].tolist() == flat[16 * i + 1 : 16 * i + 17]
        assert block["labels"].dtype == torch.int64


def test_repeated_epochs_have_the_sequences_of_the_first(plain):
    flat = [t for text in texts_of(plain(), 5, 0) for t in [*ids_of(text), EOS_ID]]
    count = len(flat) // 16
    blocks = sequences(stream_of(plain(), repeat=True), 3 * count)
    for i, block in enumerate(blocks):
        start = 16 * (i % count)
        assert block["input_ids"].tolist() == flat[start : start + 16]
    assert [blocks[count - 1]["labels"][-1].item(), blocks[count - 1]["labels"][0].item()] == [
        flat[0],
        flat[16 * count - 15],
    ]


def test_every_document_once_an_epoch_in_another_order(plain):
    texts = make_texts(23)
    orders = [texts_of(plain(), seed, epoch) for seed, epoch in ((5, 0), (5, 1), (6, 0))]
    assert all(sorted(order) == sorted(texts) for order in orders)
    assert len({tuple(order) for order in [*orders, texts]}) == 4
    assert texts_of(plain(), 5, 1) == orders[1]
    assert texts_of(plain()) == texts


# Position


@pytest.mark.parametrize("count", slow_but((0, 17, 100), [0, 1, 2, 17, 59, 60, 61, 100]))
@pytest.mark.parametrize("repeat", [False, True])
def test_restored_stream_goes_on_bit_for_bit(collection, count, repeat):
    straight = sequences(stream_of(collection(), repeat=repeat), count + 130)  # an epoch is about 60
    stopped = stream_of(collection(), repeat=repeat)
    sequences(stopped, count)
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = stream_of(collection(), repeat=repeat)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert state["sequences"] == count
    assert same(sequences(resumed, 130), straight[count:])
    assert same(sequences(stopped, 130), straight[count:])


def test_restored_in_the_middle_of_a_long_document(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PIECE_BYTES", 100)
    path = tmp_path / "long.txt"
    path.write_text("\n".join(make_texts(40)))
    straight = sequences(stream_of(open_documents(path)), 200)
    for count in (3, 50, 101):
        stopped = stream_of(open_documents(path))
        sequences(stopped, count)
        resumed = stream_of(open_documents(path))
        resumed.load_state_dict(stopped.state_dict())
        assert same(sequences(resumed, 40), straight[count : count + 40])
    flat = torch.cat([block["input_ids"] for block in straight]).tolist()
    assert [*ids_of(path.read_text()), EOS_ID][:3000] == flat[: min(3000, flat.index(EOS_ID) + 1)]


@pytest.mark.parametrize("prefetch", [False, True])
def test_resume_on_other_world_sizes(collection, prefetch):
    straight = sequences(stream_of(collection()), 130)
    state, at = None, 0
    for world_size, rows, batches in ((1, 3, 9), (2, 2, 6), (4, 1, 12), (1, 1, 20)):
        ranks = []
        for rank in range(world_size):
            loader = BatchLoader(
                stream_of(collection()), rows_per_rank=rows, rank=rank, world_size=world_size, prefetch=prefetch
            )
            if state is not None:
                loader.load_state_dict(state)
            ranks.append(loader)
        for _ in range(batches):
            rank_rows = [next(loader) for loader in ranks]
            batch = {key: torch.cat([r[key] for r in rank_rows]) for key in ("input_ids", "labels")}
            assert rank_rows[0]["input_ids"].shape == (rows, 16)
            expected = straight[at : at + world_size * rows]
            assert same([{key: value[i] for key, value in batch.items()} for i in range(len(expected))], expected)
            at += world_size * rows
        states = [json.dumps(loader.state_dict(), sort_keys=True) for loader in ranks]
        assert len(set(states)) == 1
        state = json.loads(states[0])
        assert state["sequences"] == at


# Files


def test_all_types_hold_the_same_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "SEGMENT_BYTES", 700)
    monkeypatch.setattr(readers, "READ_BYTES", 50)
    texts = make_texts(200)
    write_texts(tmp_path / "a.jsonl", texts)
    write_texts(tmp_path / "a.jsonl.gz", texts)
    write_texts(tmp_path / "a.parquet", texts, 9)
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(texts) + "\n<|endoftext|>\n", newline="")
    assert len(open_documents(tmp_path / "a.jsonl.gz")._unit_bytes) > 10
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt"):
        documents = open_documents(tmp_path / name)
        assert len(documents) == 200
        assert texts_of(documents) == texts, name
        assert sorted(texts_of(documents, 3)) == sorted(texts), name


def test_little_is_held_when_units_do_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "SEGMENT_BYTES", 700)
    monkeypatch.setattr(readers, "READ_BYTES", 50)
    monkeypatch.setattr(documents_module, "SHUFFLE_BYTES", 5000)
    texts = make_texts(400)
    write_texts(tmp_path / "a.jsonl.gz", texts[:200])
    write_texts(tmp_path / "b.parquet", texts[200:300], 9)
    write_texts(tmp_path / "c.jsonl", texts[300:])
    documents = open_documents(tmp_path)
    loads, read = [], readers.GzipJsonLines._segment
    monkeypatch.setattr(readers.GzipJsonLines, "_segment", lambda self, unit: loads.append(unit) or read(self, unit))
    order = texts_of(documents, 1)
    assert sorted(order) == sorted(texts)
    assert documents._pool._bytes <= 5000
    assert len(loads) == len(set(loads))  # each segment inflated once an epoch
    place = {text: i for i, text in enumerate(order)}
    plain = np.array([place[text] for text in texts[300:]])
    assert plain.min() < 100  # the random-access file is spread over the epoch
    assert plain.max() > 300
    assert texts_of(documents, 1, epoch=1) != order


def test_folder_and_glob(tmp_path):
    write_texts(tmp_path / "b.jsonl", ["two", "three"])
    (tmp_path / "a.txt").write_text("one")
    write_texts(tmp_path / "c.parquet", ["four"])
    write_texts(tmp_path / ".hidden.jsonl", ["hidden"])
    (tmp_path / "README.md").write_text("not data")
    assert texts_of(open_documents(tmp_path)) == ["one", "two", "three", "four"]
    assert texts_of(open_documents(str(tmp_path / "[bc].*"))) == ["two", "three", "four"]


def test_text_file_without_separator_is_one_document_byte_for_byte(tmp_path):
    path = tmp_path / "a.txt"
    text = " \n = Title = \n \n\n A paragraph .\r\n"
    path.write_bytes(text.encode())
    assert texts_of(open_documents(path)) == [text] == [read_text(path)]
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert texts_of(open_documents(path)) == [text] == [read_text(path)]


def test_long_text_is_cut_at_lines_else_at_words(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PIECE_BYTES", 50)
    path = tmp_path / "a.txt"
    for text, before, after in (("é line here\n" * 40, "\n", "é"), ("word " * 80, "d", " "), ("x" * 400, None, None)):
        path.write_text(text)
        pieces = [piece.text for piece in open_documents(path).pieces(None)]
        assert "".join(pieces) == text
        if before is None:
            assert len(pieces) == 1
        else:
            assert len(pieces) >= 5
            assert all(one[-1] == before and two[0] == after for one, two in pairwise(pieces))
    assert len(open_documents(path)) == 1


def test_opening_a_large_file_tells_how_far_it_is(tmp_path, monkeypatch):
    told: list[tuple[int, int]] = []
    shown: list[str] = []

    @contextlib.contextmanager
    def show(what, rate):
        shown.append(what)
        yield lambda done, total: told.append((done, total))

    texts = [f"{number} {random.Random(number).randbytes(700).hex()}" for number in range(2500)]  # 3.4 MB
    for name in ("a.jsonl", "a.jsonl.gz", "a.txt"):
        path = write_texts(tmp_path / name, texts)
        open_documents(path, shown=show)
        assert not told  # seconds are too short for a bar
        monkeypatch.setattr(documents_module, "LARGE_BYTES", 1 << 20)
        open_documents(path, shown=show)
        monkeypatch.undo()
        size = path.stat().st_size >> 20
        assert told == sorted(told)
        assert told[-1] == (size, size)
        assert len(told) > size  # a call for each MiB of the file, and one for the rest
        assert [path.name in what for what in shown] == [True]
        shown.clear()
        told.clear()


def test_gzip_of_several_members_and_padding(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in ("one", "two")]
    path.write_bytes(gzip.compress(lines[0]) + gzip.compress(lines[1]) + bytes(10))
    assert texts_of(open_documents(path)) == ["one", "two"]


def test_blank_documents_are_skipped_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": ""}\n{"text": null}\n{"text": " \\n"}\n{"text": "two"}')
    documents = open_documents(path)
    assert (texts_of(documents), len(documents)) == (["one", "two"], 2)
    assert texts_of(open_documents(write_texts(tmp_path / "a.parquet", ["", "one", None]))) == ["one"]
    assert len(Documents.from_texts(["", "one", " "])) == 1


def test_a_parquet_file_that_repeats_a_text_without_end_is_refused(tmp_path, monkeypatch):
    """A row group of equal texts takes some bytes in the file, and all of them in memory."""
    once = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), pa.array(["word " * 200]))
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"text": once}), path, row_group_size=2500, store_schema=False)
    assert path.stat().st_size < 10_000
    documents = open_documents(path)
    assert len(texts_of(documents, 0)) == 5000
    (source,), pool = documents._sources, documents._pool
    assert pool._bytes > 2 * 2_400_000 > 2 * source.unit_bytes[0]
    assert len(pool._held) == 2
    documents = open_documents(path)
    documents._pool.limit = 4_000_000
    assert len(texts_of(documents, 0)) == 5000
    assert len(documents._pool._held) == 1
    monkeypatch.setattr(readers, "MAX_GROUP_BYTES", 1_000_000)
    with pytest.raises(InputError, match=r"row group [01] takes more than 1,000,000 bytes"):
        texts_of(open_documents(path))
    assert len(texts_of(open_documents(path, LARGER))) == 5000
    monkeypatch.setattr(readers, "MAX_ROWS", 4999)
    with pytest.raises(InputError, match="5,000 rows, more than 4,999"):
        open_documents(path)


def test_blank_lines_are_skipped_all_at_once_and_counted(monkeypatch):
    """A gzip file of 3 MB may hold 3,000 million of them."""
    draw = random.Random(0)
    for _ in range(300):
        text = bytes(draw.choices(b"a \n\n\r\tb", k=draw.randrange(60)))
        expected, at = [], 0
        for number, line in enumerate(re.findall(rb"[^\n]*\n|[^\n]+$", text), 1):
            expected += [(number, at, line)] if line.strip() else []
            at += len(line)
        cuts = [0, *sorted(draw.choices(range(len(text) + 1), k=3)), len(text)]
        chunks = [text[begin:end] for begin, end in pairwise(cuts)]
        assert list(readers.split_lines(chunks, "a")) == expected
    skips = []
    monkeypatch.setattr(readers, "_BLANK", SimpleNamespace(match=lambda *a: skips.append(a) or re.match(rb"\s*", a[0])))
    assert list(readers.split_lines([b" \n\n" * 10_000] * 3, "a")) == []
    assert len(skips) == 3


def test_text_hash_is_of_the_contents(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", ["one", "two"])
    assert open_documents(path).text_hash() == hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "b.txt").write_text("three")
    assert open_documents(tmp_path).text_hash() != open_documents(path).text_hash()
    assert Documents.from_texts(["ab", "c"]).text_hash() != Documents.from_texts(["a", "bc"]).text_hash()
    parts = split_documents(open_documents(path), 0.5, seed=0)
    assert len({open_documents(path).text_hash(), *(part.text_hash() for part in parts)}) == 3


# Held-out text and evaluation


def test_split_is_by_document_and_deterministic():
    documents = local(40)
    train, held_out = split_documents(documents, 0.1, seed=3)
    assert (len(train), len(held_out)) == (36, 4)
    assert sorted(texts_of(train, 1) + texts_of(held_out)) == sorted(texts_of(documents))
    assert texts_of(split_documents(documents, 0.1, seed=3)[1]) == texts_of(held_out)
    assert texts_of(split_documents(documents, 0.1, seed=4)[1]) != texts_of(held_out)


@pytest.mark.parametrize("piece_bytes", [256 << 10, 100])
def test_split_of_one_document_is_its_end(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(readers, "PIECE_BYTES", piece_bytes)
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i} of it\n" for i in range(200)))
    train, held_out = (texts_of(part) for part in split_documents(open_documents(path), 0.1, seed=0))
    assert len(train) == len(held_out) == 1
    assert train[0] + held_out[0] == path.read_text()
    assert held_out[0].startswith("line ")
    assert 0.05 < len(held_out[0]) / len(path.read_text()) < 0.15


def test_a_limit_of_a_held_out_part_takes_documents_from_all_of_it(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", [f"<{i:03}>" for i in range(400)])
    _, held_out = split_documents(open_documents(path), 0.5, seed=0)
    found = [int(n) for n in re.findall(r"<(\d+)>", TOKENIZER.decode(scored_text(held_out, ENCODER, 90, seed=0).ids))]
    assert len(found) >= 14
    assert min(found) < 100
    assert max(found) > 300
    everything = [scored_text(held_out, ENCODER, 10**6, seed=seed).ids.tolist() for seed in (None, 0)]
    assert everything[0] == everything[1]


def places_of(dataset, num_sequences=4, seq_len=10):
    ids, _ = calibration_sequences(open_documents(dataset), ENCODER, num_sequences, seq_len)
    return [int(n) for row in ids for n in re.findall(r"<(\d+)>", TOKENIZER.decode(row))]


def test_the_record_of_a_calibration_text_tells_other_images_apart():
    ids = torch.zeros(2, 8, dtype=torch.int64)
    images = [{"pixel_values": torch.rand(1, 3, 4, 4), "mask": torch.ones(3, dtype=torch.bool)} for _ in range(2)]
    other = [images[0], {**images[1], "pixel_values": images[1]["pixel_values"].clone()}]
    assert CalibrationText(ids, images).record() == CalibrationText(ids, other).record()
    other[1]["pixel_values"][0, 0, 0, 0] += 1e-6
    texts = [
        *(CalibrationText(ids, extras) for extras in (images, other, images[::-1], images[:1], None)),
        CalibrationText(ids, [images[0], {**images[1], "pixel_values": images[1]["pixel_values"].view(1, 3, 2, 8)}]),
        CalibrationText(ids, [images[0], {**images[1], "pixel_values": images[1]["pixel_values"].half()}]),
    ]
    assert len({json.dumps(text.record()) for text in texts}) == len(texts)


def test_calibration_comes_from_all_over_a_long_document_and_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PIECE_BYTES", 100)
    (tmp_path / "long.txt").write_text("\n".join(f"<{i:04}>" for i in range(2000)))
    assert max(places_of(tmp_path / "long.txt")) > 1000
    (tmp_path / "files").mkdir()
    for number in range(4):
        write_texts(
            tmp_path / "files" / f"{number}.jsonl", [f"<{i:04}>" for i in range(500 * number, 500 * number + 500)]
        )
    assert max(places_of(tmp_path / "files")) > 1000
    assert max(places_of(tmp_path / "files" / "0.jsonl")) < 120


def test_calibration_from_the_start_of_a_much_longer_file_is_said(tmp_path):
    path, said = write_texts(tmp_path / "a.jsonl", [f"<{i:04}>" for i in range(2000)]), []
    for num_sequences in (4, 40):
        calibration_sequences(open_documents(path), ENCODER, num_sequences, 10, say=said.append)
    (line,) = said  # a sixteenth or more of a file is not little
    assert all(part in line for part in ("92 of the 2,000", str(path), "shuffle"))


@pytest.mark.parametrize("bos", ["<s>", EOS])  # as LLaMA has it, and as OPT
def test_beginning_of_text_as_the_tokenizer_has_it(bos, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PIECE_BYTES", 100)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": bos})
    start = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = start
    bos_id, repeated = tokenizer.bos_token_id, [tokenizer.bos_token_id] if bos != EOS else []
    text = "Once upon a time there was a cat.\n" * 30
    (tmp_path / "a.txt").write_text(text)
    assert token_ids(tmp_path / "a.txt", tokenizer).tolist() == [bos_id, *ids_of(text)] == tokenizer(text)["input_ids"]
    documents = Documents.from_texts([text, "a dog"])
    expected = [bos_id, *ids_of(text), EOS_ID, *repeated, *ids_of("a dog")]
    assert token_ids(documents, tokenizer).tolist() == expected
    rows = PackedSequences(documents, Encoder(tokenizer), seq_len=100, seed=0).take(9)
    flat = [token for row in rows for token in row.ids[:-1].tolist()]
    order = [t for text in texts_of(documents, 0) for t in [*repeated, *ids_of(text), EOS_ID]]
    assert flat == order[: len(flat)]


def test_the_end_of_text_behind_a_cut_document_does_not_count(tmp_path):
    rows = [{"text": "ab", "is_cut": True}, {"text": "cd"}]
    for path in (tmp_path / "a.jsonl", tmp_path / "a.parquet"):
        write_rows(path, rows)
        ids = [*ids_of("ab"), EOS_ID, *ids_of("cd")]
        scored = scored_text(open_documents(path), ENCODER)
        assert scored.ids.tolist() == ids
        assert [ids[place] for place in (scored.labels < 0).nonzero().flatten()] == [EOS_ID]
        (row,) = stream_of(open_documents(path), seq_len=5).take(1)
        (uncounted,) = (row.labels < 0).nonzero()[0]
        assert row.ids[uncounted] == EOS_ID
        assert row.ids[uncounted - 1] == ids_of("ab")[-1]


def splitting_tokenizer(regex):
    """Splits a text as `regex` does. A token is a byte, two or four line breaks, or a full stop with two of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("ĊĊ", "ĊĊ"), (".", "ĊĊ")]
    vocab = {symbol: i for i, symbol in enumerate([*alphabet, *(one + two for one, two in merges), EOS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


@pytest.mark.parametrize(
    "regex",
    [
        r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",  # Llama 3
    ],
)
@pytest.mark.parametrize("between", ["\n\n", ".\n\n", "\n\n\n\n", " \n \n", "。\r\n\r\n"])
def test_a_border_behind_blank_lines_changes_no_token(monkeypatch, regex, between):
    monkeypatch.setattr(readers, "PIECE_BYTES", 50)
    text = between.join(["word" * 8, "字" * 12] * 6)
    tokenizer, documents = splitting_tokenizer(regex), Documents.from_texts([text])
    assert len(list(documents.pieces(None))) > 3
    assert token_ids(documents, tokenizer).tolist() == tokenizer(text)["input_ids"]


def test_end_of_text_is_not_the_end_of_a_turn():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    assert tokenizer.eos_token_id != EOS_ID
    assert end_of_text_id(tokenizer) == EOS_ID
    bare = SimpleNamespace(get_added_vocab=dict, eos_token_id=None, name_or_path="x")
    with pytest.raises(InputError, match="end-of-text"):
        end_of_text_id(bare)


# Hub


def test_hub_dataset_is_streamed(tmp_path, monkeypatch):
    files = [str(write_texts(tmp_path / f"{i}.jsonl", make_texts(9, seed=i))) for i in range(3)]
    load = datasets.load_dataset

    def from_files(name, config, *, split, revision, streaming):
        assert (name, config, split, revision, streaming) == ("some/name", "small", "train", "abc", True)
        return load("json", data_files=files, split="train", streaming=True)

    info = SimpleNamespace(sha="abc")
    monkeypatch.setattr(datasets, "load_dataset", from_files)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, revision: info)
    monkeypatch.setattr(documents_module, "HUB_BUFFER", 7)
    monkeypatch.setattr(documents_module, "HUB_HELD_OUT", 4)
    documents = open_documents("some/name:small@v1")
    texts = [text for i in range(3) for text in make_texts(9, seed=i)]
    assert texts_of(documents) == texts
    assert sorted(texts_of(documents, 1)) == sorted(texts)
    train, held_out = split_documents(documents, 0.1, seed=0)
    assert (texts_of(train), texts_of(held_out)) == (texts[4:], texts[:4])
    straight = sequences(stream_of(train), 100)
    stopped = stream_of(train)
    sequences(stopped, 41)
    assert texts_of(held_out) == texts[:4]  # reading one part leaves the other's position alone
    resumed = stream_of(split_documents(open_documents("some/name:small"), 0.1, 0)[0])
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert same(sequences(resumed, 59), straight[41:])
    assert same(sequences(stopped, 59), straight[41:])
    first_hash = documents.text_hash()
    info.sha = "def"
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: load("json", data_files=files, split="train", streaming=True)
    )
    assert open_documents("some/name:small").text_hash() != first_hash
    with pytest.raises(InputError, match=r"no column 'body'; there are: id, text"):
        open_documents("some/name:small", TextOptions(column="body"))


def test_unreachable_hub_dataset():
    with pytest.raises(InputError, match="some/name"):
        open_documents("some/name")


# What a user can get wrong


def bad(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return path


LINE = b'{"text": "one", "id": 1}\n'
BAD_FILES = [
    ("a.csv", LINE, r"supported .*\.jsonl.* but a\.csv"),
    ("a.jsonl", LINE + b'{"text": "tw', r"a\.jsonl, line 2 is not readable JSON"),
    ("a.jsonl", LINE + b"[1]\n", r"line 2: holds a JSON list"),
    ("a.jsonl", LINE + b'{"id": 2}\n', r"line 2: no column 'text'; there are: id"),
    ("a.jsonl", b'{"body": "one", "id": 1}\n', r"no column 'text'; there are: body, id"),
    ("a.jsonl", b'{"text": 3}\n', r"holds a int"),
    ("a.jsonl", LINE + b'{"text": "\xff"}\n', r"line 2 .*utf-8"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', r"surrogate"),
    ("a.jsonl", b'{"text": " "}\n', r"no document with text in it"),
    ("a.txt", b" \n\n", r"no document with text"),
    ("a.txt", b"caf\xe9 and more", r"not UTF-8 near byte 3"),
    ("a.jsonl.gz", LINE, r"not a whole gzip file"),
    ("a.jsonl.gz", gzip.compress(LINE * 50, mtime=0)[:-12], r"not a whole gzip file"),
    ("a.jsonl.gz", gzip.compress(LINE + b"{", mtime=0), r"a\.jsonl\.gz, line 2 is not readable JSON"),
    ("a.parquet", b"PAR1 not really", r"not a whole parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_file(tmp_path, name, content, message):
    with refusal(message):
        open_documents(bad(tmp_path, name, content))


def test_bad_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    write_rows(path, [{"body": "one", "text": 1}])
    with pytest.raises(InputError, match=r"'story'.*body, text"):
        open_documents(path, TextOptions(column="story"))
    with pytest.raises(InputError, match="column 'text' holds a int"):
        texts_of(open_documents(path))
    write_rows(path, [{"text": text} for text in make_texts(500)], 500)
    whole = path.read_bytes()
    bad(tmp_path, "a.parquet", whole[:200] + bytes(2000) + whole[2200:])
    with pytest.raises(InputError, match="not a whole parquet file"):
        texts_of(open_documents(path))


def test_missing_and_empty_places(tmp_path):
    for dataset, message in (
        (tmp_path / "no.txt", "no such file"),
        (tmp_path / "no" / "folder", "no such file"),
        (tmp_path / "*.jsonl", "no file .* but nothing"),
        (tmp_path, "no file .* but nothing"),
    ):
        with pytest.raises(InputError, match=message):
            open_documents(dataset)
    (tmp_path / "train").mkdir()
    with pytest.raises(InputError, match="but train"):
        open_documents(tmp_path)
    with pytest.raises(InputError, match="cannot read"):
        read_text(tmp_path / "no.txt")
    with pytest.raises(InputError, match=r"a\.txt:small: no such file"):
        open_documents(f"{bad(tmp_path, 'a.txt', b'text')}:small")


def test_text_shorter_than_one_sequence():
    documents = Documents.from_texts(["abcd", "efg"])  # 9 tokens with their ends
    assert len(sequences(stream_of(documents, seq_len=8), 3)) == 3
    with pytest.raises(InputError, match=r"10 tokens.*seq_len 9"):
        stream_of(documents, seq_len=9)
    again = sequences(stream_of(documents, seq_len=9, repeat=True), 3)
    assert all(torch.equal(again[0]["input_ids"], block["input_ids"]) for block in again)
    with pytest.raises(InputError, match=r"10 tokens.*seq_len 10"):
        stream_of(documents, seq_len=10, repeat=True)
