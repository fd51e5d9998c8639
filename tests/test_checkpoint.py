"""A checkpoint from a stranger is safe to inspect and to resume; a damaged one of our own is named."""

import json
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from castlm.core.errors import InputError
from castlm.training import checkpoint as module
from castlm.training.checkpoint import Saver, _checksum, checkpoint_steps, load_checkpoint, read_manifest
from castlm.world import World
from tests.refusals import refusal

ALONE = World(0, 1, torch.device("cpu"), None)
MANIFEST = {"config": {"model": "m"}, "facts": {}, "data": {}, "tokens": 3, "seconds": 1.5, "flips": 0}


SHARD = "shard-00000.safetensors"


def state(value: float) -> dict[str, Tensor]:
    return {
        "model.a.weight": torch.full((4, 6), value),
        "model.b": torch.full((3,), value, dtype=torch.bfloat16),
        "optimizer.a.weight.step": torch.tensor(value),
        "optimizer.a.weight.mask": torch.full((4, 6), bool(value)),
    }


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    saver = Saver(tmp_path, ALONE, background=True, say=lambda text: None)
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
    assert all(torch.equal(into[name], value) for name, value in state(3.0).items())
    assert sorted(file.name for file in checkpoint.iterdir()) == ["manifest.json", SHARD]
    assert (checkpoint / SHARD).stat().st_mode & 0o666 == checkpoint.stat().st_mode & 0o666


@pytest.mark.parametrize("where", [SHARD, "manifest.json"])
def test_a_pickle_in_a_checkpoint_is_not_run(where, checkpoint, tmp_path):
    content = pickle.dumps(Payload(tmp_path / "executed"))
    if where == SHARD:
        reseal(checkpoint, where, content)
    else:
        (checkpoint / where).write_bytes(content)
    with pytest.raises(InputError, match=r"step-00000003.* remove"):
        load_checkpoint(checkpoint, state(0.0), ALONE)
    assert not (tmp_path / "executed").exists()


OTHERS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "another width": lambda t: t.update({"model.a.weight": torch.zeros(4, 7)}),
    "half a tensor": lambda t: t.update({"model.a.weight": torch.zeros(2, 6)}),
    "another dtype": lambda t: t.update({"model.b": torch.zeros(3)}),
    "no tensor": lambda t: t.pop("model.b"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_tensors_than_those_of_the_run_are_refused(case, checkpoint):
    tensors = load_file(checkpoint / SHARD)
    OTHERS[case](tensors)
    reseal(checkpoint, SHARD, save(tensors))
    with refusal(r"does not describe this run \(model\."):
        load_checkpoint(checkpoint, state(0.0), ALONE)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"\0", b"[" * 200_000, b'{"format": 2}'])
def test_a_corrupt_manifest_is_one_line(content, checkpoint):
    (checkpoint / "manifest.json").write_bytes(content)
    with refusal("step-00000003"):
        read_manifest(checkpoint)


def flip_a_byte(checkpoint: Path) -> None:
    content = bytearray((checkpoint / SHARD).read_bytes())
    content[len(content) // 2] ^= 0xFF
    (checkpoint / SHARD).write_bytes(content)


def leave_a_link(checkpoint: Path) -> None:
    (checkpoint / SHARD).rename(checkpoint.parent / "elsewhere")
    (checkpoint / SHARD).symlink_to(checkpoint.parent / "elsewhere")


def edit_manifest(checkpoint: Path) -> None:
    text = (checkpoint / "manifest.json").read_text()
    (checkpoint / "manifest.json").write_text(text.replace('"tokens": 3', '"tokens": 4'))


@pytest.mark.parametrize(
    ("damage", "named"), [(flip_a_byte, SHARD), (leave_a_link, SHARD), (edit_manifest, "its checksum")]
)
def test_a_damaged_file_or_a_link_is_named(damage, named, checkpoint):
    damage(checkpoint)
    with pytest.raises(InputError, match=named):
        load_checkpoint(checkpoint, state(0.0), ALONE)


def test_rotation_leaves_what_a_user_put_into_a_checkpoint(checkpoint, tmp_path):
    (checkpoint / "notes.txt").write_text("mine")
    saver = Saver(tmp_path, ALONE, background=False, say=lambda text: None)
    for step in (4, 5):
        saver.save(step, state(4.0), {**MANIFEST, "figures": {}})
    assert list(checkpoint_steps(tmp_path)) == [4, 5]
    assert [file.name for file in checkpoint.iterdir()] == ["notes.txt"]


def test_without_memory_for_a_copy_a_checkpoint_is_written_at_once_and_reported(tmp_path, monkeypatch):
    said: list[str] = []
    saver = Saver(tmp_path, ALONE, background=True, say=said.append)
    monkeypatch.setattr(module, "available_memory", lambda: 10.0)
    saver.save(3, state(1.0), {})
    assert read_manifest(tmp_path / "step-00000003")["step"] == 3  # without `finish`
    assert "step 3" in said[0]
    assert "0.00 GiB are free" in said[0]
    monkeypatch.undo()
    saver.save(4, state(1.0), {})
    assert len(said) == 2  # the message of step 3 being saved; step 4 is written in the background
    saver.finish()


def test_an_error_of_one_rank_alone_does_not_wait_for_the_others(tmp_path, monkeypatch):
    saver = Saver(tmp_path, ALONE, background=True, say=lambda text: None)
    saver.save(4, state(4.0), {**MANIFEST, "figures": {}})
    several = World(0, 2, torch.device("cpu"), mesh=object())
    monkeypatch.setattr(World, "gather", lambda *_: pytest.fail("it waits for the other ranks"))
    saver.world = several
    saver.finish_despite_error()
    monkeypatch.setattr(World, "gather", lambda self, value: [value, value])
    saver.finish_despite_error(on_all_ranks=True)
    assert list(checkpoint_steps(tmp_path)) == [4]
