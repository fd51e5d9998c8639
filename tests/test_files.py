"""Atomic output: whatever ends the writer, the old result or the new one is there, whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from castlm.core.errors import InputError
from castlm.files import atomic_dir as atomic_dir_module
from castlm.files.atomic_dir import atomic_dir, make_writable, remove_stale_temporaries
from castlm.files.atomic_file import atomic_file, atomic_write_json
from castlm.files.disk import disk_full_is_said, is_disk_full
from castlm.files.owned import sha256_file


def entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# ---- atomic_dir


def test_atomic_dir_appears_when_whole(tmp_path):
    final = tmp_path / "new" / "out"
    with atomic_dir(final) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        assert folder.parent == final.parent
        assert not final.exists()
    assert (final / "sub" / "a").read_text() == "1"
    assert entries(final.parent) == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
def test_atomic_dir_replaces_with_overwrite_alone(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic_dir_module, "_exchange", lambda one, other: False)
    final = tmp_path / "out"
    for version, overwrite in (("1", False), ("2", True)):
        with atomic_dir(final, overwrite) as folder:
            (folder / version).write_text(version)
    assert entries(final) == ["2", "castlm.json"]  # nothing of the old is mixed in
    assert entries(tmp_path) == ["out"]
    with pytest.raises(InputError, match="already holds something"), atomic_dir(final):
        pytest.fail("the block must not be entered")
    assert entries(tmp_path) == ["out"]


def test_exchange_is_one_system_call_here(tmp_path):
    if sys.platform != "linux":
        pytest.skip("renameat2 is Linux")
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not atomic_dir_module._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system has no RENAME_EXCHANGE")
    assert entries(tmp_path / "a") == ["b"]
    assert entries(tmp_path / "b") == ["a"]
    with pytest.raises(FileNotFoundError):
        atomic_dir_module._exchange(tmp_path / "a", tmp_path / "none")


def test_what_castlm_did_not_write_outlives_a_replacement(tmp_path, capsys):
    """A file that came into the folder after the check is kept, and the new result takes its place all the same."""
    with atomic_dir(tmp_path / "out") as folder:
        (folder / "a").write_text("old")
        (folder / "b").write_text("old")
    with atomic_dir(tmp_path / "out", overwrite=True) as folder:
        (tmp_path / "out" / "thesis.txt").write_text("mine")
        (tmp_path / "out" / "b").write_text("my own b")
        (folder / "a").write_text("new")
    assert (tmp_path / "out" / "a").read_text() == "new"
    assert entries(tmp_path) == ["out", "out.kept"]
    assert entries(tmp_path / "out.kept") == ["b", "thesis.txt"]
    assert (tmp_path / "out.kept" / "b").read_text() == "my own b"
    assert "castlm did not write it" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_atomic_dir_leaves_the_old_on_any_error(tmp_path, error):
    final = tmp_path / "out"
    with atomic_dir(final) as folder:
        (folder / "a").write_text("old")

    def fail() -> None:
        with atomic_dir(final, overwrite=True) as folder:
            (folder / "a").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert (final / "a").read_text() == "old"
    assert entries(tmp_path) == ["out"]


def test_fallback_puts_the_old_back_when_the_second_rename_fails(tmp_path, monkeypatch):
    final = tmp_path / "out"
    with atomic_dir(final) as folder:
        (folder / "a").write_text("old")
    monkeypatch.setattr(atomic_dir_module, "_exchange", lambda one, other: False)
    rename = os.rename

    def failing(source, target):
        if ".tmp-" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="Input/output"), atomic_dir(final, overwrite=True) as folder:
        (folder / "a").write_text("new")
    assert (final / "a").read_text() == "old"
    assert entries(tmp_path) == ["out"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_dir(tmp_path / "link") as folder:
        (folder / "a").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert entries(tmp_path / "real") == ["a", "castlm.json"]


def test_files_are_as_readable_as_their_folder(tmp_path):
    with atomic_dir(tmp_path / "out") as folder:
        (folder / "a").touch(0o600)
        (folder / "b").touch(0o755)
    reach = (tmp_path / "out").stat().st_mode & 0o666
    assert (tmp_path / "out" / "a").stat().st_mode & 0o777 == 0o600 | reach
    assert (tmp_path / "out" / "b").stat().st_mode & 0o777 == 0o755 | reach


def test_everything_is_flushed_before_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda one, other: (events.append("rename"), rename(one, other)))
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    with atomic_dir(tmp_path / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert {str(folder / "sub" / "a"), str(folder / "sub"), str(folder)} <= set(before)
    assert after == [str(tmp_path)]


@pytest.mark.parametrize("exchanges", [True, False])
def test_sigkill_at_every_moment_leaves_the_old_or_the_new(exchanges, tmp_path):
    command = [sys.executable, "-m", "tests.replaced", str(tmp_path), *([] if exchanges else ["--no-exchange"])]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    seen = []
    for was_there, beside, versions in map(json.loads, done.stdout.splitlines()):
        assert was_there or not exchanges  # without any help
        assert beside == ["out"]
        assert len(set(versions)) == 1
        seen.append(versions[0])
    assert seen == sorted(seen, reverse=True)  # old up to one moment, new from there on
    assert seen.count("old") > 10
    assert seen.count("new") > 3


def test_a_result_moved_aside_comes_back(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    writer = f"{dead.pid}@{socket.gethostname()}"
    (tmp_path / f".out.old-{writer}").mkdir()
    (tmp_path / f".out.old-{writer}" / "a").write_text("old")
    (tmp_path / f".out.tmp-{writer}").mkdir()
    remove_stale_temporaries(tmp_path, "out")
    assert entries(tmp_path) == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_stale_is_what_no_live_process_writes(tmp_path):
    here = socket.gethostname()
    keep = [
        f".out.tmp-{os.getppid()}@{here}",
        ".out.tmp-notes",
        f".other.tmp-1@{here}",
        f".out.old-{os.getppid()}@{here}",
    ]
    keep += [f".out.tmp-{os.getpid()}@another-machine"]
    for name in [*keep, f".out.tmp-{os.getpid()}@{here}"]:
        (tmp_path / name).mkdir()
    remove_stale_temporaries(tmp_path, "out")
    assert entries(tmp_path) == sorted(keep)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB, or a skip where mounting is not permitted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=256k", "castlm-test", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no permission to mount a small tmpfs")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_disk_full_leaves_the_old(small_disk):
    import torch
    from safetensors.torch import save_file

    final = small_disk / "out"
    with atomic_dir(final) as folder:
        (folder / "a").write_text("old")
    writers = {
        "plain": lambda folder: (folder / "a").write_bytes(bytes(1 << 20)),
        "safetensors": lambda folder: save_file({"a": torch.zeros(1 << 18)}, folder / "a.safetensors"),
    }
    for write in writers.values():
        with pytest.raises(InputError, match=rf"disk full while writing {final}"), atomic_dir(final, True) as folder:
            write(folder)
        assert entries(small_disk) == ["out"]
        assert (final / "a").read_text() == "old"
    with pytest.raises(InputError, match="disk full"):
        atomic_write_json(small_disk / "big.json", ["x" * 1000] * 1000)
    assert entries(small_disk) == ["out"]


# ---- small files


def test_atomic_write_json(tmp_path):
    file = tmp_path / "a.json"
    atomic_write_json(file, {"b": [1, float("inf")], "p": tmp_path, 3: (2.5, None)})
    assert json.loads(file.read_text()) == {"b": [1, None], "p": str(tmp_path), "3": [2.5, None]}
    with pytest.raises(TypeError):
        atomic_write_json(file, {"b": object()})
    assert json.loads(file.read_text())["b"] == [1, None]
    assert entries(tmp_path) == ["a.json"]


def test_the_next_writer_of_a_file_removes_what_killed_ones_have_left(tmp_path):
    child = os.fork()
    if not child:
        try:
            with atomic_file(tmp_path / "a.json") as temporary:
                temporary.write_text("half")
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    (left,) = entries(tmp_path)
    here = left.rpartition("@")[2]
    live = [f".a.json.tmp-{pid}-0123@{here}" for pid in (os.getpid(), os.getppid())]
    others = [left.replace("a.json", "b.json"), f"{left}-of-another-machine", ".a.json.tmp-notes"]
    for name in (*live, *others):
        (tmp_path / name).touch()
    atomic_write_json(tmp_path / "a.json", {})
    assert entries(tmp_path) == sorted(["a.json", *live, *others])


def test_a_process_lists_a_folder_once_for_all_the_files_it_writes_there(tmp_path, monkeypatch):
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    for name in "ab":
        (tmp_path / f".{name}.json.tmp-{dead.pid}-0123@{socket.gethostname()}").touch()
    listed, listdir = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: listed.append(folder) or listdir(folder))
    for name in "aba":
        atomic_write_json(tmp_path / f"{name}.json", {})
    assert listed == [tmp_path]
    assert sorted(listdir(tmp_path)) == ["a.json", "b.json"]


def test_sha256_file(tmp_path):
    content = os.urandom(3 << 20)
    (tmp_path / "a").write_bytes(content)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


# ---- what castlm did not write, at any moment


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")])
def test_a_stop_right_after_the_exchange_keeps_what_castlm_did_not_write(tmp_path, monkeypatch, exchange, error):
    final = tmp_path / "out"
    with atomic_dir(final) as folder:
        (folder / "a").write_text("1")
    if not exchange:
        monkeypatch.setattr(atomic_dir_module, "_exchange", lambda one, other: False)
    flush = atomic_dir_module.flush_folder

    def stop(folder: Path) -> None:
        if folder == tmp_path:
            raise error
        flush(folder)

    def replace() -> None:
        with atomic_dir(final, overwrite=True) as folder:
            (folder / "a").write_text("2")
            (final / "thesis.txt").write_text("mine")
            monkeypatch.setattr(atomic_dir_module, "flush_folder", stop)

    with pytest.raises(type(error)):
        replace()
    assert (final / "a").read_text() == "2"
    assert (tmp_path / "out.kept" / "thesis.txt").read_text() == "mine"
    assert entries(tmp_path) == ["out", "out.kept"]


def test_a_kill_while_the_old_result_is_deleted_keeps_what_castlm_did_not_write(tmp_path, monkeypatch):
    final = tmp_path / "out"
    with atomic_dir(final) as folder:
        (folder / "a").write_text("1")
    pid = os.fork()
    if not pid:
        try:
            monkeypatch.setattr(os, "rename", lambda *paths: os.kill(os.getpid(), signal.SIGKILL))
            with atomic_dir(final, overwrite=True) as folder:
                (folder / "a").write_text("2")
                (final / "thesis.txt").write_text("mine")
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert (final / "a").read_text() == "2"
    remove_stale_temporaries(tmp_path, "out")
    assert (tmp_path / "out.kept" / "thesis.txt").read_text() == "mine"
    assert entries(tmp_path) == ["out", "out.kept"]


def test_a_name_that_leaves_no_room_for_a_temporary_one_is_refused(tmp_path):
    for name in ("n" * 250, "ä" * 122):
        with pytest.raises(InputError, match="bytes too long for this file system: choose a shorter one"):
            make_writable(tmp_path / "new" / name)
        with (
            pytest.raises(InputError, match="bytes too long for this file system"),
            atomic_dir(tmp_path / name),
        ):
            pytest.fail("the work was begun")
    assert entries(tmp_path) == []


def test_a_file_that_is_too_large_is_said(tmp_path):
    said = pytest.raises(InputError, match=r"limit \(ulimit -f\) does not allow so large a file")
    with said, disk_full_is_said(tmp_path / "a"):
        raise OSError(errno.EFBIG, "File too large")
    with pytest.raises(InputError, match="so large a file"), disk_full_is_said(tmp_path / "a"):
        raise RuntimeError("I/O error: File too large (os error 27)")
    assert is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    with pytest.raises(ValueError, match="413"), disk_full_is_said(tmp_path / "a"):
        raise ValueError("HTTP 413: File too large")
