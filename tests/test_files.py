"""Atomic output: whatever ends the writer, the old result or the new one is there, whole."""

import errno
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from castlm.core.errors import InputError
from castlm.files import atomic_file as files
from castlm.files.atomic_file import (
    atomic_file,
    atomic_write_json,
    is_disk_full,
    remove_stale,
    remove_stale_inside,
    reporting_full_disk,
)
from castlm.files.output import atomic_dir, check_output
from castlm.files.record import OUTPUT, check_result


def entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def write(final: Path, **files: str) -> None:
    with atomic_dir(final, overwrite=True) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)


# ---- atomic_dir


def test_atomic_dir_replaces_with_overwrite_alone(tmp_path):
    final = tmp_path / "out"
    for version, overwrite in (("1", False), ("2", True), ("3", True)):
        with atomic_dir(final, overwrite) as folder:
            (folder / version).write_text(version)
    assert entries(final) == ["3", OUTPUT]  # nothing of the old is mixed in
    assert entries(tmp_path) == ["out", "out.previous"]
    assert entries(tmp_path / "out.previous") == ["2", OUTPUT]
    with pytest.raises(InputError, match="already holds something"), atomic_dir(final):
        pytest.fail("the block must not be entered")
    assert entries(tmp_path) == ["out", "out.previous"]


def test_what_a_killed_writer_left_inside_an_output_is_not_kept_in_the_previous_one(tmp_path):
    final, host = tmp_path / "out", socket.gethostname()
    write(final, a="old")
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (f".sub.tmp-{dead.pid}-0123abcd@{host}", f".sub.tmp-{os.getpid()}-0123abcd@{host}", ".sub.tmp-mine"):
        (final / "sub" / name).mkdir(parents=True)
        (final / "sub" / name / "x").write_text("x")
    write(final, a="new")
    (kept,) = tmp_path.glob("out.previous*")
    assert entries(kept / "sub") == sorted([f".sub.tmp-{os.getpid()}-0123abcd@{host}", ".sub.tmp-mine"])


def test_a_file_above_the_limit_of_the_system_is_reported_and_the_old_one_kept(tmp_path):
    atomic_write_json(tmp_path / "a.json", {"old": 1})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limit[1]))
        with pytest.raises(InputError, match=r"a\.json would be larger .*ulimit -f"):
            atomic_write_json(tmp_path / "a.json", {"new": "x" * 10_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert entries(tmp_path) == ["a.json"]


@pytest.mark.parametrize("how", ["added", "changed", "link", "in a folder", "no record", "name"])
def test_nothing_that_others_put_there_is_ever_deleted(tmp_path, capsys, how):
    final, mine = tmp_path / "out", tmp_path / "out" / "thesis.txt"
    write(final, a="old", b="old")
    if how == "added":
        mine.write_text("mine")
    elif how == "changed":
        mine = final / "b"
        mine.write_text("my")  # of another size
        mine.write_text("our")  # of the same size, at another time
    elif how == "link":
        (tmp_path / "elsewhere").write_text("mine")
        mine.symlink_to(tmp_path / "elsewhere")
    elif how == "in a folder":
        mine = final / "mine" / "thesis.txt"
        mine.parent.mkdir()
        mine.write_text("mine")
    elif how == "no record":
        (final / OUTPUT).unlink()
        mine = final / "a"
    elif how == "name":  # one that JSON cannot hold
        mine = final / os.fsdecode(b"caf\xe9")
        mine.write_text("mine")
    text, name = mine.read_text(), mine.relative_to(final)
    for version in "234":
        write(final, a=version)
    assert (final / "a").read_text() == "4"
    assert (tmp_path / "out.previous" / "a").read_text() == "3"
    assert (tmp_path / "out.previous-2" / name).read_text() == text
    others = ["elsewhere"] if how == "link" else []
    assert entries(tmp_path) == sorted(["out", "out.previous", "out.previous-2", *others])
    assert f"{tmp_path / 'out.previous-2'}" in capsys.readouterr().err


def test_a_kill_while_an_old_result_is_deleted_leaves_what_the_next_start_deletes(tmp_path):
    for version in "12":
        write(tmp_path / "out", a=version, b=version, c=version)
    (tmp_path / "out.previous" / "a").unlink()
    write(tmp_path / "out", a="3")
    assert entries(tmp_path) == ["out", "out.previous"]
    assert (tmp_path / "out.previous" / "a").read_text() == "2"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_atomic_dir_leaves_the_old_on_any_error(tmp_path, error):
    final = tmp_path / "out"
    write(final, a="old")

    def fail() -> None:
        with atomic_dir(final, overwrite=True) as folder:
            (folder / "a").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert (final / "a").read_text() == "old"
    assert entries(tmp_path) == ["out"]


def test_the_old_comes_back_when_the_second_rename_fails(tmp_path, monkeypatch):
    final = tmp_path / "out"
    write(final, a="old")
    rename = os.rename

    def failing(source, target):
        if ".tmp-" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        write(final, a="new")
    assert (final / "a").read_text() == "old"
    assert entries(tmp_path) == ["out"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for version in "12":
        write(tmp_path / "link", a=version)
    assert (tmp_path / "link").is_symlink()
    assert entries(tmp_path) == ["link", "real", "real.previous"]
    assert (tmp_path / "real" / "a").read_text() == "2"


def test_files_are_as_readable_as_their_folder(tmp_path):
    with atomic_dir(tmp_path / "out") as folder:
        (folder / "a").touch(0o600)
        (folder / "b").touch(0o755)
    reach = (tmp_path / "out").stat().st_mode & 0o666
    assert (tmp_path / "out" / "a").stat().st_mode & 0o777 == 0o600 | reach
    assert (tmp_path / "out" / "b").stat().st_mode & 0o777 == 0o755 | reach


def test_a_folder_appears_when_it_is_whole_and_flushed(tmp_path, monkeypatch):
    events, final = [], tmp_path / "new" / "out"
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda one, other: (events.append("rename"), rename(one, other)))
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    with atomic_dir(final) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        assert folder.parent == final.parent
        assert not final.exists()
    assert (final / "sub" / "a").read_text() == "1"
    assert entries(final.parent) == ["out"]
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert {str(folder / "sub" / "a"), str(folder / "sub"), str(folder)} <= set(before)
    assert after == [str(final.parent)]


def test_sigkill_at_every_moment_loses_neither_the_old_nor_the_new(tmp_path):
    command = [sys.executable, "-m", "tests.replaced", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    seen = []
    for held in map(json.loads, done.stdout.splitlines()):
        names = sorted(held)
        if names == ["out.previous"]:  # between the two renames
            assert held["out.previous"] == ["old", "old"]
        else:
            assert names in (["out"], ["out", "out.previous"])  # the older one, or what is left of it
            assert held["out"] in (["old", "old"], ["new", "new"])
            assert held["out"][0] == "old" or held["out.previous"] == ["old", "old"]
        seen.append(held.get("out", [None])[0])
    middle = seen.index(None) if None in seen else seen.index("new")
    assert set(seen[:middle]) == {"old"}
    assert set(filter(None, seen[middle:])) == {"new"}
    assert middle > 10


@pytest.mark.parametrize(
    ("name", "make", "begin"),
    [("out", Path.mkdir, check_output), ("a.json", Path.touch, lambda file: atomic_write_json(file, {}))],
)
def test_the_next_writer_removes_what_killed_ones_have_left_and_nothing_else(name, make, begin, tmp_path):
    here = socket.gethostname()
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    keep = [f".{name}.tmp-{pid}-01@{here}" for pid in (os.getppid(), os.getpid())]
    keep += [f".other.tmp-{dead.pid}-01@{here}", f".{name}.tmp-notes", f".{name}.tmp-{dead.pid}-01@another-machine"]
    for entry in [*keep, f".{name}.tmp-{dead.pid}-01@{here}"]:
        make(tmp_path / entry)
    begin(tmp_path / name)
    assert set(entries(tmp_path)) - {name} == set(keep)


@pytest.mark.parametrize(
    ("name", "write", "stale"),
    [
        ("out", atomic_dir, remove_stale),
        ("a.json", atomic_file, remove_stale),
        ("out", atomic_dir, lambda path: remove_stale_inside(path.parent)),
    ],
)
def test_what_another_container_of_the_same_name_still_writes_is_left_alone(name, write, stale, tmp_path, monkeypatch):
    """Its process has a number of its own, which this one does not know."""
    with write(tmp_path / name) as temporary:
        monkeypatch.setattr(files, "_is_alive", lambda pid: False)
        stale(tmp_path / name)
        assert temporary.exists()
        monkeypatch.undo()
    (left,) = tmp_path.iterdir()
    assert left.name == name
    killed = temporary
    killed.touch()
    monkeypatch.setattr(files, "_is_alive", lambda pid: False)
    stale(tmp_path / name)
    assert not killed.exists()


def test_a_record_cannot_name_what_is_outside(tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("x")
    about = [1, data.stat().st_mtime_ns]
    write(tmp_path / "out", a="1")
    (tmp_path / "out" / OUTPUT).write_text(json.dumps({"files": {"../data.txt": about, str(data): about}}))
    for version in "23":
        write(tmp_path / "out", a=version)
    assert data.read_text() == "x"


def test_a_result_is_read_only_while_its_files_are_there(tmp_path):
    write(tmp_path / "out", **{"castlm.json": "{}", "weights": "1234"})
    check_result(tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "copied", copy_function=shutil.copyfile)  # with other times
    check_result(tmp_path / "copied")
    (tmp_path / "out" / "weights").write_text("1235")
    with pytest.raises(InputError, match="weights is missing or has changed"):
        check_result(tmp_path / "out")
    for record in ("", "{", "[]", '{"files": 3}', '{"files": {"a": null}}', '{"files": {"a": [1, 2]}}'):
        (tmp_path / "out" / OUTPUT).write_text(record)
        with pytest.raises(InputError):
            check_result(tmp_path / "out")


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


def test_a_name_that_leaves_no_room_for_a_temporary_one_is_refused(tmp_path):
    for name in ("n" * 250, "ä" * 122):
        with pytest.raises(InputError, match="too long"):
            check_output(tmp_path / name)
        with pytest.raises(OSError, match="too long"), atomic_dir(tmp_path / name):
            pytest.fail("the work was begun")
    assert entries(tmp_path) == []


def test_a_full_disk_is_recognized_in_the_words_of_a_library(tmp_path):
    assert is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert is_disk_full(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)))
    with pytest.raises(ValueError, match="413"), reporting_full_disk(tmp_path / "a"):
        raise ValueError("HTTP 413: File too large")
