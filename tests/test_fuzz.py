"""Whatever a file or an option holds, castlm gives an answer or an error, and never hangs.

`make fuzz` tries many more inputs, for an hour.
"""

import copy
import dataclasses
import functools
import gzip
import io
import json
import math
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from castlm.cli.main import COMMANDS, main
from castlm.core.errors import InputError
from castlm.data.documents import open_documents, split_documents
from castlm.data.images import open_images
from castlm.export.card import packed_card
from castlm.export.folder import StoredUse
from castlm.export.verify import verify
from castlm.facts import Facts
from castlm.fields import choices_of, hints_of
from castlm.files.yaml_file import parse_yaml_mapping, read_yaml_mapping, to_yaml
from castlm.lab.planning.memory import PlannedRun, plan_memory
from castlm.lab.planning.points import read_points
from castlm.models.io import load_model
from castlm.names import markdown, markdown_code, printable
from castlm.training.config import TrainConfig
from castlm.training.telemetry import read_metrics
from castlm_runtime.packed import PackedSpec
from castlm_runtime.reading import open_regular
from tests.runs import CONDITIONS, PROOF

from .fuzzing import EXAMPLES, HOSTILE_JSON, VALUES, answers, damaged, fuzz, objects, to_json
from .test_verify import LLAMA, llama
from .tiny import save_tiny

CONFIG = LLAMA | {"num_hidden_layers": 1, "num_key_value_heads": 2}
WEIGHTS = {name: torch.zeros_like(t) for name, t in llama().items() if ".layers.0." in name and t.dim() == 2}
CHECKPOINT = save(WEIGHTS)
ROW = b'{"text": "once upon a time"}\n'
TEXTS = {".txt": b"once upon\n<|endoftext|>\na time\n", ".jsonl": 3 * ROW, ".jsonl.gz": gzip.compress(3 * ROW, mtime=0)}
RUN_YAML = "max_steps: 10\ndecay: horizon\nmethod: cast\n"


def parquet() -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"text": ["once", None, "upon a time"], "n": [1, 2, 3]}), stream)
    return stream.getvalue()


def put(folder: Path, **files: bytes) -> Path:
    """A folder with these files; `__` in a name stands for a dot."""
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def new(here: Path) -> Path:
    """An empty folder; the last one is removed."""
    folder = here / "files"
    if folder.is_dir():
        for file in folder.iterdir():
            file.unlink()
    folder.mkdir(exist_ok=True)
    return folder


# ---- checkpoints


BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1, "I64": 8, "BOOL": 1}


@st.composite
def whole_files(draw: st.DrawFn) -> bytes:
    """Files that the safetensors library accepts, with any names, dtypes, shapes and values."""
    stems = ("model.layers.0.mlp.up_proj", "model.layers.0.attn.in_proj", "h.0.attn.c_attn", "x.0.norm", "lm_head")
    kinds = (".weight", ".weight", "_weight", ".bias", ".qweight", ".values", "", ".\x1b[2J")
    chosen = st.builds("".join, st.tuples(st.sampled_from(stems), st.sampled_from(kinds)))
    header, data = {}, b""
    for name in draw(st.lists(chosen | st.text(max_size=6), max_size=4, unique=True)):
        dtype = draw(st.just("F32") | st.sampled_from(sorted(BYTES)))
        shape = draw(st.lists(st.integers(0, 8), max_size=4))
        size = math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += draw(st.binary(min_size=1, max_size=9)) * (size + 1)
        data = data[: header[name]["data_offsets"][1]]
    text = to_json(header)
    return len(text).to_bytes(8, "little") + text + data


@fuzz
@given(content=whole_files() | damaged(CHECKPOINT) | st.binary(max_size=40))
def test_weights(here, content):
    folder = put(new(here), model__safetensors=content, config__json=to_json(CONFIG))
    part = folder / "part.safetensors"  # of a name that is not compared with config.json
    for path in (folder, part):
        if path == part:
            (folder / "model.safetensors").rename(part)
        report = answers(verify, path)
        if not isinstance(report, Exception):
            json.dumps(report.as_dict())
            assert printable(report.text().replace("\n", "")) == report.text().replace("\n", "")


def packed_file(metadata: bytes) -> bytes:
    """A file with one layer in castlm's packed format, and this metadata of it."""
    mask = torch.full((8, 1), 0b011_011, dtype=torch.uint8)  # the code 3 in both groups of a row
    tensors = {"values": torch.zeros(8, 4, dtype=torch.bfloat16), "mask": mask}
    text = metadata.decode("utf-8", "replace")
    return save({f"model.layers.0.x.{name}": tensor for name, tensor in tensors.items()}, metadata={"castlm": text})


SPEC = PackedSpec(rows=8, columns=8, n=2, m=4, values="bf16").as_dict()
PACKED = {"features": 1, "tensors": {"model.layers.0.x": SPEC}}


NAME = "model.layers.0.x.weight"
USES = {NAME: StoredUse(NAME, 1, 8, "a sum over axis -1", True, True)}


def test_the_packed_file_that_is_fuzzed_is_valid(here):
    content = packed_file(to_json(PACKED))
    report = verify(put(new(here), a__safetensors=content) / "a.safetensors", uses=USES)
    assert report.totals()["groups"] == 16
    with pytest.raises(InputError, match="which transformers does not read"):
        verify(put(new(here), model__safetensors=content, config__json=to_json(CONFIG)))


METADATA = objects(PACKED) | objects(SPEC).map(lambda spec: to_json(PACKED).replace(to_json(SPEC), spec))


@fuzz
@given(content=METADATA.map(packed_file) | damaged(packed_file(to_json(PACKED))))
def test_packed_weights(here, content):
    answers(functools.partial(verify, uses=USES), put(new(here), a__safetensors=content) / "a.safetensors")


BESIDE = {
    "config__json": CONFIG,
    "model__safetensors__index__json": {"metadata": {}, "weight_map": dict.fromkeys(WEIGHTS, "a.safetensors")},
    "castlm__json": {"pattern": "2:4", "left_dense": {"model.layers.0.mlp": "why"}},
}


@fuzz
@given(data=st.data(), name=st.sampled_from(sorted(BESIDE)))
def test_json_beside_weights(here, data, name):
    weights = "a__safetensors" if "index" in name else "model__safetensors"
    files = {weights: CHECKPOINT, "config__json": to_json(CONFIG), name: data.draw(objects(BESIDE[name]))}
    report = answers(verify, put(new(here), **files))
    assert isinstance(report, Exception) or report.ok or name == "castlm__json"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, bytes]:
    """The files of a model folder."""
    folder = save_tiny(tmp_path_factory.mktemp("tiny") / "model")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@settings(fuzz, max_examples=1 + EXAMPLES // 2)
@given(data=st.data())
def test_model_folders(here, tiny, data):
    name = data.draw(st.sampled_from(sorted(tiny)))
    near = [objects(json.loads(tiny[name]))] if name.endswith(".json") else []
    folder = new(here)
    for file, content in tiny.items():
        (folder / file).write_bytes(content)
    (folder / name).write_bytes(data.draw(st.one_of(damaged(tiny[name]), st.binary(max_size=40), *near)))
    loaded = answers(load_model, folder)
    if not isinstance(loaded, Exception):
        assert all(parameter.isfinite().all() for parameter in loaded.model.parameters())


# ---- data


def gzipped(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def read_all(path: Path) -> None:
    documents = open_documents(path)
    documents.text_hash()
    list(documents.pieces(0))
    split_documents(documents, 0.5, 0)


@fuzz
@given(data=st.data(), suffix=st.sampled_from([*TEXTS, ".parquet"]))
def test_datasets(here, data, suffix):
    valid = parquet() if suffix == ".parquet" else TEXTS[suffix]
    rows = st.lists(objects({"text": "a"}), max_size=3).map(b"\n".join)
    content = data.draw(damaged(valid) | st.binary(max_size=60) | rows | rows.map(gzipped))
    file = new(here) / f"a{suffix}"
    file.write_bytes(content)
    answers(read_all, file)


# ---- plans


# ---- options


@fuzz
@given(
    content=damaged(RUN_YAML.encode()) | st.binary(max_size=80) | HOSTILE_JSON | st.text(max_size=80).map(str.encode)
)
def test_yaml(here, content):
    answers(read_yaml_mapping, put(new(here), a__yaml=content) / "a.yaml")


@pytest.mark.parametrize("text", ["0\x85", "a\u2028b", "a\nb", "2:4", "no", "1e-4", "\x1b[2J", "- 'a\"", "café"])
def test_text_comes_back_from_yaml(text):
    assert parse_yaml_mapping(to_yaml({"a": text}), "a.yaml") == {"a": text}


def test_yaml_that_would_grow_is_refused(here):
    bomb = "\n".join([f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(12)])
    for text in (bomb, "a: " + "[" * 5_000, "? " * 5_000):
        assert isinstance(answers(parse_yaml_mapping, text, "a.yaml"), Exception)
    with pytest.raises(InputError, match="larger than 128 KiB"):
        read_yaml_mapping(put(new(here), a__yaml=b"a: [" + 40_000 * b"[a],") / "a.yaml")


def option_values() -> st.SearchStrategy[dict[str, object]]:
    """Values for the options of a run: of the right type, of another one, or out of range."""
    sections = TrainConfig.sections().values()
    fields = {field.name: field for section in sections for field in dataclasses.fields(section)}
    hints = {name: hint for section in sections for name, hint in hints_of(section).items()}
    hints |= dict.fromkeys(("pattern", "output_dir"), str)

    def values(name: str) -> st.SearchStrategy[object]:
        choices = choices_of(fields[name])
        typed = st.from_type(hints[name]) if choices is None else st.sampled_from(choices)
        return typed | VALUES

    pair = st.sampled_from(sorted(fields)).flatmap(lambda name: st.tuples(st.just(name), values(name)))
    return st.lists(pair, max_size=4).map(dict)


@fuzz
@given(changes=option_values())
def test_options(changes):
    config = answers(TrainConfig.from_mapping, {"model": "m", "dataset": "d.txt", "output_dir": "o"} | changes)
    if isinstance(config, TrainConfig):
        again = answers(TrainConfig.from_mapping, parse_yaml_mapping(config.as_yaml(), "config.yaml"))
        assert isinstance(again, TrainConfig)
        assert again.as_yaml() == config.as_yaml()


# ---- names


@fuzz
@given(name=st.text(alphabet=st.characters(exclude_categories=[])))
def test_names(name):
    shown = printable(name)
    assert shown.isprintable()
    shown.encode()
    for text in (markdown(name), markdown_code(name)):
        assert "\n" not in text
    assert "|" not in markdown(name).replace("\\\\", "").replace("\\|", "")


CALIBRATION = {
    "text": "c",
    "text_sha256": "0",
    "tokens_sha256": "0",
    "seed": 0,
    "num_sequences": 3,
    "seq_len": 8,
    "precision": "fp32",
}
CARD = {
    "pattern": "32:64",
    "method": "cast",
    "base_model": "org/model",
    "license": "mit",
    "dtype": "bfloat16",
    "packed": {"format": 1, "castlm": "0"},
    "proof": {**PROOF},
    "verdict": {"ok": False, "problem": "diverged", "reason": "why"},
    "left_dense": {"model.layers.0.mlp.up_proj": "reason"},
    "quantized": {"kind": "int8", "text": "a.txt"},
    "figures": [{**CONDITIONS, "name": "dense", "perplexity": 3.0}],
    "earlier": [
        {"method": "flap", "cut": {"units": "channels:0.5", "before": {"width": 100}, "after": {"width": 50}}},
        {"method": "wanda", "pattern": "2:4", "calibration": CALIBRATION},
    ],
}


def places_of(tree: object) -> Iterator[tuple[dict | list, object]]:
    """The boxes and keys of all values in nested JSON."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield tree, key
        yield from places_of(value)


def card_of(source: Path, record: dict[str, object]) -> str:
    return packed_card(source, Facts.from_json(record, "here"), "32:64")


def test_no_entry_of_a_record_writes_markup_into_a_card(here):
    text, count = "x\n---\nlicense: mine\n---\n\n# Free\n</b><script>[a](http://b) `a` ![a](b)\x1b", 0
    for number in range(len(list(places_of(CARD)))):
        record = copy.deepcopy(CARD)
        box, key = list(places_of(record))[number]
        box[key] = text
        card = answers(card_of, here / text.replace("/", "_"), record)
        if isinstance(card, InputError):
            continue
        count += 1
        head, body = card.split("\n---\n", 1)
        fields = {"base_model", "license", "library_name", "pipeline_tag", "tags"}
        assert yaml.safe_load(head).keys() <= fields, key
        assert not re.search(r"^# Free|(?<!\\)<script|(?<!\\)\]\(http:|^license: mine|\x1b", body, re.M), (key, body)
    assert count > 15


# ---- what is not a file


def test_pipes_sockets_devices_and_folders_are_refused_at_once(here, monkeypatch):
    folder = new(here)
    monkeypatch.chdir(folder)
    os.mkfifo("pipe.jsonl")
    server = socket.socket(socket.AF_UNIX)
    server.bind("socket.jsonl")
    Path("device.jsonl").symlink_to("/dev/zero")
    Path("link.jsonl").symlink_to("pipe.jsonl")
    names = ("pipe.jsonl", "socket.jsonl", "device.jsonl", "link.jsonl", ".", "missing.jsonl", "a\0b", "x" * 5000, "")
    for name in names:
        for read in (open_regular, open_documents, read_yaml_mapping, open_image, verify, read_metrics, plan):
            assert isinstance(answers(read, name), Exception), (read, name)
        assert isinstance(answers(read_points, [name]), Exception)
    server.close()


def open_image(path: str) -> None:
    open_images([path])


def plan(path: str) -> None:
    plan_memory(path, PlannedRun(seq_len=8, micro_batch=1))


def test_a_pipe_in_a_model_folder_is_refused_before_transformers_opens_it(here):
    folder = put(new(here), model__safetensors=CHECKPOINT, config__json=to_json(CONFIG))
    os.mkfifo(folder / "tokenizer.json")
    assert main(["eval", str(folder), "--text", str(folder / "config.json")]) == 2


def test_every_command_says_in_one_line_what_is_wrong_with_its_names(here, capsys, monkeypatch):
    monkeypatch.chdir(new(here))
    for command in ("verify", "train --dataset a --output-dir o --model", "eval --text a", "plan fit"):
        for name in ("~nosuchuser/x", "\udcff", "x" * 5000, "\x1b[2J"):
            assert main([*command.split(), name]) == 2
            line = capsys.readouterr().err
            assert line.startswith("castlm: error: "), line
            assert line.count("\n") == 1
            assert printable(line[:-1]) == line[:-1]
    assert set(COMMANDS) >= {"verify", "train", "eval", "plan fit"}
