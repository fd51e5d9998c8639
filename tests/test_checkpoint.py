"""A checkpoint from a stranger is safe to inspect and to resume; a damaged one of our own is named."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from castlm.core.errors import InputError
from castlm.distributed.world import World
from castlm.training.checkpoint import Saver, _checksum, checkpoint_steps, load_checkpoint, read_manifest

ALONE = World(0, 1, torch.device("cpu"), None)
MANIFEST = {"config": {"model": "m"}, "facts": {}, "data": {}, "tokens": 3, "seconds": 1.5, "flips": 0}


def state(value: float) -> dict[str, Any]:
    return {
        "model": {"a.weight": torch.full((4, 6), value), "b": torch.full((3,), value, dtype=torch.bfloat16)},
        "optimizer": {"a.weight": {"step": torch.tensor(value), "moment": torch.full((4, 6), value)}},
    }


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    saver = Saver(tmp_path, 2, ALONE, background=True, say=lambda text: None)
    for step in (1, 2, 3):
        saver.save(step, state(float(step)), {**MANIFEST, "figures": {"0": {"perplexity": float("inf")}}})
    saver.finish()
    assert list(checkpoint_steps(tmp_path)) == [2, 3]
    return tmp_path / "step-00000003"


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifest as a stranger would who knows the format."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("checksum")
    change(manifest)
    manifest["checksum"] = _checksum(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def reseal(path: Path, name: str, content: bytes) -> None:
    """Replaces a file of the checkpoint, with its right size and CRC in the manifest."""
    (path / name).write_bytes(content)
    rewrite(path, lambda manifest: manifest["files"].update({name: [len(content), zlib.crc32(content)]}))


def metadata_with(path: Path, change: Callable[[dict[str, Any]], None]) -> bytes:
    metadata = json.loads((path / "metadata.json").read_text())
    change(metadata["tensors"])
    return json.dumps(metadata).encode()


class Payload:
    """A pickle that makes a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def test_round_trip(checkpoint):
    into = state(0.0)
    manifest = load_checkpoint(checkpoint, into, ALONE)
    assert manifest["step"] == 3
    assert manifest["figures"] == {"0": {"perplexity": float("inf")}}
    expected = state(3.0)
    assert torch.equal(into["model"]["a.weight"], expected["model"]["a.weight"])
    assert torch.equal(into["model"]["b"], expected["model"]["b"])
    assert torch.equal(into["optimizer"]["a.weight"]["step"], torch.tensor(3.0))
    assert sorted(file.name for file in checkpoint.iterdir()) == ["__0_0.distcp", "manifest.json", "metadata.json"]


@pytest.mark.parametrize("where", [".metadata", "metadata.json", "__0_0.distcp", "a tensor", "manifest.json"])
def test_a_pickle_in_a_checkpoint_is_not_run(where, checkpoint, tmp_path):
    content = pickle.dumps(Payload(tmp_path / "executed"))
    if where == "a tensor":
        stream = io.BytesIO()
        torch.save(Payload(tmp_path / "executed"), stream)
        content = stream.getvalue()
        end = (checkpoint / "__0_0.distcp").stat().st_size
        reseal(checkpoint, "__0_0.distcp", (checkpoint / "__0_0.distcp").read_bytes() + content)
        place = {"start": end, "length": len(content)}
        metadata = metadata_with(checkpoint, lambda tensors: tensors["model.b"]["chunks"][0].update(place))
        reseal(checkpoint, "metadata.json", metadata)
    elif where == "manifest.json" or where == ".metadata":
        (checkpoint / where).write_bytes(content)
    else:
        reseal(checkpoint, where, content)
    if where == ".metadata":  # nothing looks at it
        load_checkpoint(checkpoint, state(0.0), ALONE)
    else:
        with pytest.raises(InputError, match=r"step-00000003.* remove"):
            load_checkpoint(checkpoint, state(0.0), ALONE)
    assert not (tmp_path / "executed").exists()


def nested(depth: int) -> bytes:
    return b"[" * depth


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a path": lambda t: t["model.b"]["chunks"][0].update(file="../../secret"),
    "an absolute path": lambda t: t["model.b"]["chunks"][0].update(file="/etc/passwd"),
    "a path that is no text": lambda t: t["model.b"]["chunks"][0].update(file=["a"]),
    "past the end": lambda t: t["model.b"]["chunks"][0].update(start=1 << 40),
    "a negative offset": lambda t: t["model.b"]["chunks"][0].update(start=-1),
    "an absurd size": lambda t: t["model.b"].update(size=[1 << 60]),
    "an absurd part": lambda t: t["model.b"]["chunks"][0].update(sizes=[1 << 60]),
    "a part outside": lambda t: t["model.b"]["chunks"][0].update(offsets=[2]),
    "half a tensor": lambda t: t["model.a.weight"]["chunks"][0].update(sizes=[2, 6]),
    "another dtype": lambda t: t["model.b"].update(dtype="torch.float32"),
    "a dtype that is none": lambda t: t["model.b"].update(dtype="os.system"),
    "no tensor": lambda t: t.pop("model.b"),
    "bytes for a tensor": lambda t: t.update({"model.b": {"type": "bytes"}}),
    "1e400": lambda t: t["model.b"]["chunks"][0].update(sizes=[float("inf")]),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_metadata_that_lies_is_refused(case, checkpoint):
    reseal(checkpoint, "metadata.json", metadata_with(checkpoint, HOSTILE[case]))
    with pytest.raises(InputError, match=r"metadata\.json does not describe this run") as refusal:
        load_checkpoint(checkpoint, state(0.0), ALONE)
    assert "\n" not in str(refusal.value)


def test_a_tensor_that_unpacks_to_more_than_it_is_is_refused(checkpoint):
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(1 << 22), plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    content = packed.getvalue()
    end = (checkpoint / "__0_0.distcp").stat().st_size
    reseal(checkpoint, "__0_0.distcp", (checkpoint / "__0_0.distcp").read_bytes() + content)
    place = {"start": end, "length": len(content)}
    reseal(
        checkpoint,
        "metadata.json",
        metadata_with(checkpoint, lambda tensors: tensors["model.b"]["chunks"][0].update(place)),
    )
    with pytest.raises(InputError, match="holds compressed tensors"):
        load_checkpoint(checkpoint, state(0.0), ALONE)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"\0", nested(200_000), b'{"format": 2}'])
def test_a_corrupt_manifest_is_one_line(content, checkpoint):
    (checkpoint / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match="step-00000003") as refusal:
        read_manifest(checkpoint)
    assert "\n" not in str(refusal.value)


def test_a_manifest_carries_its_own_checksum(checkpoint):
    text = (checkpoint / "manifest.json").read_text()
    (checkpoint / "manifest.json").write_text(text.replace('"tokens": 3', '"tokens": 4'))
    with pytest.raises(InputError, match="its checksum does not match"):
        read_manifest(checkpoint)


FIELDS = {
    **{"step": -1, "tokens": "3", "flips": None, "seconds": float("nan"), "config": [], "facts": 3, "data": None},
    **{"figures": {"0": 3}, "files": {"../../x": [1, 2], "metadata.json": [0, 0]}},
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_manifest_of_other_types_is_refused(field, checkpoint):
    rewrite(checkpoint, lambda manifest: manifest.update({field: FIELDS[field]}))
    with pytest.raises(InputError, match=f"{field} is not what castlm writes"):
        read_manifest(checkpoint)


def test_a_link_in_a_checkpoint_is_refused(checkpoint, tmp_path):
    (checkpoint / "__0_0.distcp").rename(tmp_path / "elsewhere")
    (checkpoint / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="missing or corrupt"):
        load_checkpoint(checkpoint, state(0.0), ALONE)


def test_rotation_leaves_what_a_user_put_into_a_checkpoint(checkpoint, tmp_path):
    (checkpoint / "notes.txt").write_text("mine")
    saver = Saver(tmp_path, 1, ALONE, background=False, say=lambda text: None)
    saver.save(4, state(4.0), {**MANIFEST, "figures": {}})
    assert list(checkpoint_steps(tmp_path)) == [4]
    assert [file.name for file in checkpoint.iterdir()] == ["notes.txt"]


def test_a_failed_save_names_its_own_step(checkpoint, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    saver = Saver(tmp_path, 1, ALONE, background=False, say=lambda text: None)
    monkeypatch.setattr("castlm.training.checkpoint._remove", full)
    with pytest.raises(InputError, match=r"step 4 could not be saved .*: the disk is full; the last whole"):
        saver.save(4, state(4.0), {**MANIFEST, "figures": {}})


def test_an_error_of_one_rank_alone_does_not_wait_for_the_others(tmp_path, monkeypatch):
    saver = Saver(tmp_path, 1, ALONE, background=True, say=lambda text: None)
    saver.save(4, state(4.0), {**MANIFEST, "figures": {}})
    several = World(0, 2, torch.device("cpu"), mesh=object())
    monkeypatch.setattr(World, "gather", lambda *_: pytest.fail("it waits for the other ranks"))
    saver.world = several
    saver.finish_despite_error()
    monkeypatch.setattr(World, "gather", lambda self, value: [value, value])
    saver.finish_despite_error(on_all_ranks=True)
    assert list(checkpoint_steps(tmp_path)) == [4]
