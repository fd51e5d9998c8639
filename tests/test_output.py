"""Output folders: nothing of others is lost, no input is overwritten, and one process has a folder."""

import contextlib
import errno
import json
import os
import time
from pathlib import Path

import pytest
import torch

from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.files.output import begin_output, check_output, output_folder, record_file, refuse_inputs_inside
from castlm.files.record import LOCK, OUTPUT, command_of, unrecorded
from castlm_runtime.reading import user_path
from tests.ranks import start_process, wait_for
from tests.refusals import disk_full, refuse_mkdir
from tests.replaced import killed_at
from tests.runs import prune_to
from tests.slow import slow_but
from tests.tiny import save_tiny


def write(file: Path, text: str = "x") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def run(folder: Path, text: str, *, error: BaseException | None = None, **options: bool) -> None:
    """A run that writes `text` to `folder`, and ends with `error`."""
    with output_folder(folder, "train", **options) as claimed:
        begin_output(claimed, "train", {"config.yaml": text}, resume=options.get("resume", False))
        write(claimed / "checkpoints" / "step" / "weights", text)
        if error is not None:
            raise error


def tree(folder: Path) -> dict[str, str]:
    """The files below `folder`, without records and locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (OUTPUT, LOCK)]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def weights(folder: Path) -> str:
    return (folder / "checkpoints" / "step" / "weights").read_text()


# ---- overwrite


def test_an_overwritten_run_is_renamed_and_deleted_when_the_next_is_finished(tmp_path):
    for text in "123":
        run(tmp_path / "run", text, overwrite=True)
    assert (weights(tmp_path / "run"), weights(tmp_path / "run.previous")) == ("3", "2")
    assert sorted(os.listdir(tmp_path)) == ["run", "run.previous"]
    assert unrecorded(tmp_path / "run") == {}


def test_a_finished_run_outlives_any_number_of_starts_that_fail(tmp_path):
    run(tmp_path / "run", "good")
    for text in "123":
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "run", text, error=ZeroDivisionError(), overwrite=True)
    assert weights(tmp_path / "run.previous") == "good"
    assert (weights(tmp_path / "run"), weights(tmp_path / "run.unfinished")) == ("3", "2")
    run(tmp_path / "run", "better", overwrite=True)
    assert weights(tmp_path / "run.previous") == "good"
    assert sorted(os.listdir(tmp_path)) == ["run", "run.previous", "run.unfinished"]


@pytest.mark.parametrize("name", ["thesis.txt", "checkpoints/step/notes.txt", "mine/a/b.txt", ".hidden", "config.yaml"])
def test_what_a_user_put_there_is_never_deleted(name, tmp_path):
    """Also when the run is resumed, and so written to by castlm, in between."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", "1", error=KeyboardInterrupt())
    write(tmp_path / "run" / name, "mine")
    with output_folder(tmp_path / "run", "train", resume=True) as folder:
        begin_output(folder, "train", resume=True)
        write(folder / "model", "1")
    assert list(unrecorded(tmp_path / "run")) == [name]
    for text in "234":
        run(tmp_path / "run", text, overwrite=True)
    assert (tmp_path / "run.previous-2" / name).read_text() == "mine"
    assert (weights(tmp_path / "run"), weights(tmp_path / "run.previous")) == ("4", "3")


@pytest.mark.parametrize("begins", [False, True])
def test_a_start_that_fails_leaves_all_as_it_was(begins, tmp_path):
    """Before it begins, where nothing has been renamed yet, and after; in a new folder, and over a finished run."""

    def fail(folder: Path, **options: bool) -> None:
        with output_folder(folder, "train", **options) as claimed:
            assert tree(tmp_path) == before
            if begins:
                begin_output(claimed, "train", {"config.yaml": "2"}, resume=options.get("resume", False))
            raise ZeroDivisionError

    before = {}
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(ZeroDivisionError):
            fail(tmp_path / "run", **options)
        assert not list(tmp_path.iterdir())
    run(tmp_path / "run", "1")
    before = tree(tmp_path)
    with pytest.raises(ZeroDivisionError):
        fail(tmp_path / "run", overwrite=True)
    assert tree(tmp_path) == before
    run(tmp_path / "run", "2", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["run", "run.previous"]


@pytest.mark.parametrize("record", ["", "{", "[]", "[" * 100_000, '{"command": ["train"]}', '{"files": 3}'])
def test_a_folder_without_a_whole_record_is_not_overwritten(record, tmp_path):
    write(tmp_path / "run" / OUTPUT, record)
    write(tmp_path / "run" / "metrics.jsonl")
    with pytest.raises(InputError, match="no record"), output_folder(tmp_path / "run", "train", overwrite=True):
        pass
    with pytest.raises(InputError, match="no record"):
        check_output(tmp_path / "run", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [OUTPUT, "metrics.jsonl"]


@pytest.mark.parametrize("moment", slow_but(range(0, 30, 3), range(30)))
def test_a_kill_at_any_moment_of_an_overwriting_start_loses_nothing(moment, tmp_path):
    run(tmp_path / "run", "1")
    killed_at(moment, lambda: run(tmp_path / "run", "2", overwrite=True))
    held = {folder.name: tree(folder) for folder in tmp_path.iterdir() if not folder.name.startswith(".")}
    assert {"config.yaml": "1", "checkpoints/step/weights": "1"} in held.values()
    run(tmp_path / "run", "3", overwrite=True)
    assert weights(tmp_path / "run") == "3"
    assert weights(tmp_path / "run.previous") == "1"
    assert not [name for name in os.listdir(tmp_path) if ".tmp-" in name]


def test_the_page_of_a_run_is_recorded_and_nothing_else_is(tmp_path):
    run(tmp_path / "run", "1")
    write(tmp_path / "run" / "thesis.txt")
    record_file(write(tmp_path / "run" / "report.html"))
    assert list(unrecorded(tmp_path / "run")) == ["thesis.txt"]


# ---- resume


def test_resume_continues_what_is_there_and_starts_where_nothing_is(tmp_path):
    run(tmp_path / "new", "1", resume=True)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", "1", error=KeyboardInterrupt())
    with output_folder(tmp_path / "run", "train", resume=True) as folder:
        begin_output(folder, "train", resume=True)
        assert weights(folder) == "1"
    assert json.loads((tmp_path / "run" / OUTPUT).read_text())["complete"]
    assert sorted(os.listdir(tmp_path)) == ["new", "run"]


def test_resume_is_for_the_same_command(tmp_path):
    run(tmp_path / "run", "1")
    write(tmp_path / "other" / "thesis.txt")
    for folder in (tmp_path / "run", tmp_path / "other"):
        before = tree(folder)
        with pytest.raises(InputError, match="no output of castlm"), output_folder(folder, "compare", resume=True):
            pass
        assert tree(folder) == before


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_command_that_can_continue_says_so_when_it_is_stopped(stop, tmp_path, capsys):
    with pytest.raises(stop):
        run(tmp_path / "run", "1", error=stop(), resume=True)
    assert f"is in {tmp_path / 'run'}" in capsys.readouterr().err


# ---- folders that cannot be used


def test_a_folder_and_its_parents_are_made(tmp_path):
    with output_folder(tmp_path / "a" / "b", "train") as folder:
        assert folder == tmp_path / "a" / "b"
        assert folder.is_dir()
    assert not folder.exists()  # nothing was begun in it
    assert check_output(tmp_path / "c" / "d") == tmp_path / "c" / "d"
    (tmp_path / "empty").mkdir()
    with output_folder(tmp_path / "empty", "train"):
        pass
    assert list((tmp_path / "empty").iterdir()) == []


def test_what_is_taken_is_refused(tmp_path):
    write(tmp_path / "file")
    for path, overwrite, reason in (
        (tmp_path / "file", True, "is a file"),
        (tmp_path / "file" / "below", False, "cannot write"),
        (tmp_path, False, "already holds something"),
        (tmp_path, True, "no record"),
        (tmp_path, torch.ones(2), "overwrite = tensor"),
        (Path("/proc/castlm"), False, "cannot write /proc"),
    ):
        with pytest.raises(InputError, match=reason), output_folder(path, "train", overwrite=overwrite):
            pass
        with pytest.raises(InputError, match=reason):
            check_output(path, overwrite=overwrite)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_home_the_working_folder_and_mount_points_are_not_overwritten(tmp_path, monkeypatch):
    here = tmp_path / "here"
    run(here, "1")
    monkeypatch.chdir(here)
    with pytest.raises(InputError, match="working folder"), output_folder(".", "train", overwrite=True):
        pass
    monkeypatch.chdir("/")
    with monkeypatch.context() as patch:
        patch.setenv("HOME", str(here))
        with pytest.raises(InputError, match="your home"):
            check_output("~", overwrite=True)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == here)
    with pytest.raises(InputError, match="mount point"):
        check_output(here, overwrite=True)


def test_a_folder_alone_that_can_be_written_is_enough_for_a_run(tmp_path, monkeypatch):
    """As a volume mounted at /out, for a user who may not write in /. A result takes its name beside the folder."""
    out = tmp_path / "out"
    out.mkdir()
    refuse_mkdir(monkeypatch, tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path}.*Permission denied"):
        check_output(out)
    run(out, "1")
    with pytest.raises(InputError, match="Permission denied"), output_folder(out, "train", overwrite=True):
        pytest.fail("it is found out before the work")
    assert weights(out) == "1"


# ---- inputs


@pytest.mark.parametrize("how", ["itself", "inside", "link to it", "link inside it", "dots", "glob", "relative"])
def test_an_input_in_the_output_folder_is_refused(how, tmp_path, monkeypatch):
    out = tmp_path / "out"
    data = write(out / "sub" / "data.txt")
    (tmp_path / "link").symlink_to(out)
    outside = write(tmp_path / "elsewhere" / "a.txt")
    (out / "to-outside").symlink_to(outside)
    monkeypatch.chdir(tmp_path)
    value = {
        "itself": str(out),
        "inside": str(data),
        "link to it": str(tmp_path / "link" / "sub" / "data.txt"),
        "link inside it": str(out / "to-outside"),
        "dots": str(tmp_path / "elsewhere" / ".." / "out" / "sub"),
        "glob": str(tmp_path / "*" / "sub" / "*.txt"),
        "relative": "out/sub/data.txt",
    }[how]
    for folder in (out, tmp_path / "link", Path("out")):
        with (
            pytest.raises(InputError, match=r"dataset .* is in the output folder"),
            output_folder(folder, "train", overwrite=True, inputs={"model": None, "dataset": value}),
        ):
            pass
    assert data.read_text() == "x"


def test_other_inputs_are_not_refused(tmp_path):
    write(tmp_path / "out-2" / "data.txt")
    for value in ("owner/name", "demo", "~nosuchuser/x", "a\0b", str(tmp_path / "out-2" / "data.txt"), str(tmp_path)):
        refuse_inputs_inside(tmp_path / "out", {"dataset": value})


def test_a_home_that_does_not_exist_is_not_made(tmp_path, monkeypatch):
    """As of `nobody`, whose home is /nonexistent."""
    monkeypatch.setenv("HOME", str(tmp_path / "nonexistent"))
    for begin in (check_output, user_path):
        with pytest.raises(InputError, match="nonexistent"):
            begin("~/x/out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["", "a\0b", "~nosuchuser/out", os.fsdecode(b"caf\xe9"), None, 3, b"x"])
def test_unusable_names_are_one_line(path):
    with pytest.raises(InputError), output_folder(path, "train"):
        pass


# ---- locks


def hold(folder: Path, held: Path) -> None:
    """Holds the lock of `folder` from the moment on at which there is a file `held`."""
    with output_folder(folder, "train", overwrite=True) as claimed:
        begin_output(claimed, "train")
        held.touch()
        time.sleep(60)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_folder_in_use_is_refused_until_its_process_ends(earlier, tmp_path, capfd):
    if earlier:  # which the process sets aside
        run(tmp_path / "run", "1")
    process = start_process(hold, tmp_path / "run", tmp_path / "held", log=tmp_path / "log")
    try:
        assert wait_for((tmp_path / "held").exists, [process]), (tmp_path / "log").read_text()
        used = rf"in use by process {process.pid} on \S+ \(castlm train\)"
        for options in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(InputError, match=used), output_folder(tmp_path / "run", "train", **options):
                pass
        with pytest.raises(InputError, match=used):
            check_output(tmp_path / "run", overwrite=True)
    finally:
        process.kill()
        process.join()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(InputError), output_folder(tmp_path / "run", "train", resume=True):
            return
        time.sleep(0.01)
    pytest.fail("the lock of a dead process blocks")


@pytest.mark.parametrize("command", ["prune", "pack", "unpack", "quantize", "quantize --packed"])
def test_a_result_that_another_process_wrote_meanwhile_is_refused(command, tmp_path, monkeypatch, capsys):
    model = save_tiny(tmp_path / "m", "llama", hidden_size=64, head_dim=16)
    prune_to(tmp_path / "s", model)
    assert main(["pack", str(tmp_path / "s"), "--output-dir", str(tmp_path / "p")]) == 0
    arguments = {
        "prune": ["prune", str(model), "--solver", "magnitude"],
        "pack": ["pack", str(tmp_path / "s")],
        "unpack": ["unpack", str(tmp_path / "p")],
        "quantize": ["quantize", str(tmp_path / "s")],
        "quantize --packed": ["quantize", str(tmp_path / "s"), "--packed"],
    }[command]

    def check_then_lose(path: str, **options: object) -> Path:
        folder = check_output(path, **options)
        write(folder / "theirs.txt")
        return folder

    monkeypatch.setattr("castlm.files.output.check_output", check_then_lose)
    assert main([*arguments, "--output-dir", str(tmp_path / "out")]) == 2
    assert "already holds something" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == ["theirs.txt"]
    assert not (tmp_path / "out.previous").exists()


def test_a_lock_that_cannot_be_opened_is_named_with_a_remedy(tmp_path):
    (tmp_path / "run" / LOCK).mkdir(parents=True)
    with pytest.raises(InputError, match=rf"{LOCK} cannot be opened .*: remove it, or name"):
        run(tmp_path / "run", "1", resume=True)


def test_a_full_disk_at_the_start_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    run(tmp_path / "run", "1")
    before = tree(tmp_path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_full)
        with pytest.raises(InputError, match="disk full"):
            run(tmp_path / "run", "2", overwrite=True)
        with pytest.raises(InputError, match="disk full"):
            run(tmp_path / "new", "2")
    assert tree(tmp_path) == before
    assert command_of(tmp_path / "run") == "train"


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", none)
    run(tmp_path / "run", "1")
    assert "without locks" in capsys.readouterr().err
