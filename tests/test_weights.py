"""No reader takes other weights than those that were counted, and none unpickles."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from castlm.core.errors import InputError
from castlm.core.nm import NM
from castlm.export.packed import pack_folder, pattern_of, unpack_folder
from castlm.export.quantized import quantize_folder
from castlm.export.verify import verify
from castlm.models.io import load_config, load_model
from castlm.models.loading import open_sharded
from castlm.models.locate import find
from castlm.models.weights import loading_only, stored_weights
from castlm.packed.generate import load_to_generate
from castlm_runtime.stored import INDEX, PACKED_INDEX, PACKED_SINGLE, SINGLE, check_weight_files
from tests.runs import edit_json
from tests.tiny import save_tiny, sparse_model, tiny_tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sparse")
    sparse_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(whole, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "packed"
    pack_folder(whole, folder)
    return folder


@pytest.fixture(autouse=True)
def no_pickle(monkeypatch) -> None:
    def load(*_, **__):
        raise AssertionError("a file was unpickled")

    monkeypatch.setattr(torch, "load", load)


def readers(folder: Path, out: Path) -> dict[str, Callable[[], object]]:
    return {
        "verify": lambda: verify(folder),
        "load": lambda: load_model(folder),
        "generate": lambda: load_to_generate(str(folder), as_stored=False, say=print),
        "ranks": lambda: open_sharded(str(folder), trust_remote_code=False, revision=None),
        "pattern": lambda: pattern_of(folder, None),
        "pack": lambda: pack_folder(folder, out),
        "unpack": lambda: unpack_folder(folder, out),
        "quantize": lambda: quantize_folder(folder, out, "int8", pattern=NM(2, 4)),
    }


def assert_refused(
    folder: Path, out: Path, named: str, leave_out: tuple[str, ...] = (), only: tuple[str, ...] = ()
) -> None:
    for reader, read in readers(folder, out).items():
        if reader not in leave_out and (not only or reader in only):
            with pytest.raises(InputError) as caught:
                read()
            assert named in str(caught.value), reader
    assert not out.exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": "someone/kernel"},
        {"attn_implementation": {"": "paged|someone/kernel@main:f"}},
        {"experts_implementation": "someone/kernel"},
    ],
)
def test_a_config_that_asks_for_code_of_the_hub_is_refused_by_every_reader(fields, whole, packed, tmp_path):
    for source, others in ((whole, ("pattern", "unpack")), (packed, ("pattern", "pack"))):
        folder = Path(shutil.copytree(source, tmp_path / source.name))
        edit_json(folder / "config.json", **fields)
        assert_refused(folder, tmp_path / "out", "someone/kernel", leave_out=others)
    trusted = load_config(find(str(folder), None), trust_remote_code=True)
    assert "someone/kernel" in str(vars(trusted).values())


NO_NAMES = [
    *(
        "w.bin",
        "w.pt",
        "w.safetensors.bin",
        "w.SAFETENSORS",
        "w.safetensors ",
        "w.safetensors\n",
        "w.safetensors\u200b",
    ),
    *("./w.safetensors", "sub/w.safetensors", "..\\w.safetensors", "/w.safetensors"),
    *("\uff57.safetensors", "wé.safetensors", "w\0.safetensors", "w\x1b[1A.safetensors"),
    *("", ".safetensors", ".w.safetensors", 7, None, ["w.safetensors"]),
]


@pytest.mark.parametrize("index", [INDEX, PACKED_INDEX])
@pytest.mark.parametrize("name", NO_NAMES)
def test_an_index_that_names_anything_but_safetensors_is_refused_by_every_reader(name, index, whole, packed, tmp_path):
    folder = Path(shutil.copytree(whole if index == INDEX else packed, tmp_path / "m"))
    single = folder / (SINGLE if index == INDEX else PACKED_SINGLE)
    tensors = load_file(single)
    try:
        file = folder / str(name)
        file.parent.mkdir(exist_ok=True)
        shutil.copyfile(single, file)
    except (OSError, ValueError):
        assert name in ("", "w\0.safetensors", "/w.safetensors")
    first, *others = tensors
    if index == INDEX:
        single.rename(folder / "other.safetensors")
    else:
        single.unlink()
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["weights"] = index
        (folder / "config.json").write_text(json.dumps(config))
        save_file({"unused": torch.zeros(2)}, folder / "other.safetensors")
    weight_map = dict.fromkeys(others, "other.safetensors") | {first: name}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    named = repr(name)[:200]
    leave_out = ("unpack",) if index == INDEX else ("pack", "quantize", "pattern")
    some = () if name in ("w.bin", "sub/w.safetensors") else ("verify", "load")  # the others ask the same function
    assert_refused(folder, tmp_path / "out", named, leave_out, some)


@pytest.mark.parametrize("link", [os.link, os.symlink, shutil.copyfile], ids=lambda link: link.__name__)
def test_one_file_under_two_names_is_refused(link, whole, tmp_path):
    """Also two names that a file system without upper and lower case takes for one."""
    folder = Path(shutil.copytree(whole, tmp_path / "m"))
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).rename(folder / "a.safetensors")
    link(folder / "a.safetensors", folder / "A.safetensors")
    first, *others = tensors
    weight_map = dict.fromkeys(others, "a.safetensors") | {first: "A.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_refused(folder, tmp_path / "out", "one file under two names", ("unpack",))


def dense_beside(folder: Path, name: str) -> None:
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    save_file({key: torch.rand_like(tensor) + 1 for key, tensor in load_file(folder / SINGLE).items()}, file)


@pytest.mark.parametrize(
    "name", ["sub/other.safetensors", "other.safetensors", "model.safetensors.index.json", "w.bin"]
)
def test_a_config_that_sends_transformers_to_other_weights_is_refused(name, whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "m"))
    if name.endswith(".json"):
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(folder / SINGLE), "w.bin")}
        (folder / name).write_text(json.dumps(index))
        shutil.copyfile(folder / SINGLE, folder / "w.bin")
    else:
        dense_beside(folder, name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
    assert_refused(folder, tmp_path / "out", "", ("unpack", "pattern"))


def test_weights_that_transformers_finds_in_another_way_are_refused(whole, tmp_path, monkeypatch):
    """As the files that some classes add, and a distributed checkpoint, which it prefers."""
    folder = Path(shutil.copytree(whole, tmp_path / "m"))
    shard = "shard-00001-model-00001-of-00001.safetensors"
    dense_beside(folder, shard)
    for read in (lambda: verify(folder), lambda: load_model(folder)):
        with pytest.raises(InputError):
            read()
    (folder / shard).unlink()
    dense_beside(folder, "head.safetensors")
    assert load_model(folder).model is not None
    monkeypatch.setattr(LlamaConfig, "extra_files", ("head.safetensors",), raising=False)
    with pytest.raises(InputError, match=r"head\.safetensors"):
        load_model(folder)
    (folder / "head.safetensors").rename(folder / "head.txt")
    monkeypatch.setattr(LlamaConfig, "extra_files", ("head.txt",))
    with pytest.raises(InputError, match=r"head\.txt"):
        verify(folder)


def test_loading_of_another_thread_is_left_alone(whole, tmp_path):
    other = save_tiny(tmp_path / "other")
    before = PreTrainedModel._load_pretrained_model
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(AutoModelForCausalLM.from_pretrained(other)))

    def load() -> None:
        with loading_only(stored_weights(whole).values()):
            thread.start()
            thread.join()

    with pytest.raises(InputError, match="loaded other weights"):
        load()
    assert len(found) == 1
    assert PreTrainedModel._load_pretrained_model is before


def test_a_snapshot_of_the_cache_is_read_through_its_links(whole, tmp_path):
    """The cache of the hub stores the files under their hashes, and a snapshot links to them."""
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for file in whole.iterdir():
        shutil.copyfile(file, tmp_path / "blobs" / f"{hash(file.name):x}")
        (snapshot / file.name).symlink_to(tmp_path / "blobs" / f"{hash(file.name):x}")
    assert verify(snapshot).ok
    assert load_model(snapshot).model is not None
    assert find(snapshot, None).target == str(snapshot)
    check_weight_files([snapshot / SINGLE])
