"""Output folders: only castlm's own files are deleted, no input is overwritten, and one process has a folder."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from castlm.core.errors import InputError
from castlm.files.atomic_dir import add_file_list
from castlm.files.output import claimed, continued, locked, read_result, refuse_inputs_inside
from castlm.files.owned import LAYOUT, OUTPUT, command_of, content, discard, foreign_names


def write(file: Path, text: str = "x") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def train_folder(folder: Path) -> Path:
    """What a killed run that replaced a finished one leaves."""
    write(folder / OUTPUT, json.dumps({"command": "train", "run_id": "1", "files": {}}))
    for name in (
        *("sample.json", "wandb/run-20261126_101010-ab/files/config.yaml"),
        *(f"wandb/run-20261126_101010-ab/logs/{name}.log" for name in ("debug", "debug-internal")),
        *("metrics.jsonl", "tensorboard/events.out.tfevents.1.host.2.0", "checkpoints/step-00000002/manifest.json"),
        *("checkpoints/step-00000002/__0_0.distcp", "checkpoints/.step-00000004.tmp/__1_0.distcp"),
        *(".model.tmp-1@host/model.safetensors", ".config.yaml.tmp-1-ab", ".castlm.lock"),
    ):
        write(folder / name)
    for link, target in (
        ("latest-run", ""),
        ("debug.log", "/logs/debug.log"),
        ("debug-internal.log", "/logs/gone.log"),
    ):
        (folder / "wandb" / link).symlink_to(f"run-20261126_101010-ab{target}")
    write(folder / "model" / "model.safetensors")
    add_file_list(folder / "model")
    write(folder / "replaced" / "0" / "metrics.jsonl")
    write(folder / "replaced" / "0" / OUTPUT, json.dumps({"command": "train"}))
    return folder


FOREIGN = (
    *("thesis.txt", "checkpoints/notes.txt", "checkpoints/step-00000002/notes.txt", "model/notes.md", "mine/a/b.txt"),
    *(
        "wandb/mine.txt",
        "checkpoints/step-00000002/__a.py",
        "checkpoints/step-00000002-best/manifest.json",
        "tensorboard/mine",
        "replaced/0/data.txt",
        "replaced/data.txt",
        "checkpoints/.step-00000003.tmp/mine.txt",
        ".hidden",
    ),
)


def test_everything_that_a_run_leaves_is_its_own(tmp_path):
    folder = train_folder(tmp_path / "run")
    assert foreign_names(folder) == []
    assert discard(folder) == []
    assert not folder.exists()


@pytest.mark.parametrize("name", FOREIGN)
def test_what_a_user_put_there_is_named_and_stays(name, tmp_path):
    folder = train_folder(tmp_path / "run")
    write(folder / name, "mine")
    with (
        pytest.raises(InputError, match=f"'{name}', which castlm did not write"),
        claimed(folder, "train", overwrite=True),
    ):
        pass
    assert discard(folder) == [name]
    assert [path.name for path in folder.rglob("*") if path.is_file()] == [Path(name).name]
    assert (folder / name).read_text() == "mine"


def test_a_result_that_was_edited_is_foreign(tmp_path):
    folder = train_folder(tmp_path / "run")
    (folder / "model" / "model.safetensors").write_text("y")
    assert foreign_names(folder) == ["model/model.safetensors"]


def test_links_are_foreign_and_are_not_followed(tmp_path):
    folder = train_folder(tmp_path / "run")
    data = write(tmp_path / "data" / "a.txt")
    (folder / "tensorboard" / "events.out.tfevents.link").symlink_to(data)
    (folder / "checkpoints" / "step-00000003").symlink_to(data.parent)
    (folder / "wandb" / "debug-mine.log").symlink_to(data)
    foreign = ["checkpoints/step-00000003", "tensorboard/events.out.tfevents.link", "wandb/debug-mine.log"]
    assert foreign_names(folder) == foreign
    assert discard(folder) == foreign
    assert data.read_text() == "x"


def test_a_link_of_wandb_is_removed_and_not_followed(tmp_path):
    folder = train_folder(tmp_path / "run")
    data = write(tmp_path / "data" / "a.txt")
    (folder / "wandb" / "latest-run").unlink()
    (folder / "wandb" / "latest-run").symlink_to(data.parent)
    assert discard(folder) == []
    assert not folder.exists()
    assert data.read_text() == "x"
    bare = tmp_path / "bare"
    (bare / "wandb").mkdir(parents=True)
    (bare / "wandb" / "latest-run").symlink_to(data.parent)
    assert foreign_names(bare) == ["wandb/latest-run"]


def test_the_output_of_another_command_within_is_foreign(tmp_path):
    folder = train_folder(tmp_path / "run")
    write(folder / "my-prune" / "model.safetensors")
    add_file_list(folder / "my-prune")
    assert foreign_names(folder) == ["my-prune/castlm.json", "my-prune/model.safetensors"]


@pytest.mark.parametrize(
    "record", ["", "{", "[]", "[" * 100_000, '{"command": "rm"}', '{"command": ["train"]}', '{"files": 3}']
)
def test_a_folder_without_a_whole_record_is_not_overwritten(record, tmp_path):
    write(tmp_path / "run" / OUTPUT, record)
    write(tmp_path / "run" / "metrics.jsonl")
    with pytest.raises(InputError, match="no record of what"), claimed(tmp_path / "run", "train", overwrite=True):
        pass
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [OUTPUT, "metrics.jsonl"]


def test_a_record_cannot_name_what_is_outside(tmp_path):
    data = write(tmp_path / "data.txt")
    write(tmp_path / "run" / "castlm.json", json.dumps({"files": {"../data.txt": "0", str(data): "0"}}))
    assert discard(tmp_path / "run") == []
    assert data.read_text() == "x"
    for name in ("../data.txt", str(data)):
        write(tmp_path / "run" / "castlm.json", json.dumps({"files": {name: "0"}}))
        with pytest.raises(InputError, match="missing or has changed"):
            read_result(tmp_path / "run")


def test_overwrite_is_for_the_same_command(tmp_path):
    for command in LAYOUT:
        write(tmp_path / command / OUTPUT, json.dumps({"command": command}))
        assert command_of(tmp_path / command) == command
        with claimed(tmp_path / command, command, overwrite=True):
            pass
        for other in {*LAYOUT, "result"} - {command}:
            with (
                pytest.raises(InputError, match=f"another command .{command}"),
                claimed(tmp_path / command, other, overwrite=True),
            ):
                pass


# ---- folders that cannot be used


def test_a_folder_and_its_parents_are_made(tmp_path):
    with claimed(tmp_path / "a" / "b", "result") as folder:
        assert folder == tmp_path / "a" / "b"
        assert folder.is_dir()
    (tmp_path / "empty").mkdir()
    with claimed(tmp_path / "empty", "result"):
        pass
    assert list((tmp_path / "empty").iterdir()) == []


def test_what_is_taken_is_refused(tmp_path):
    write(tmp_path / "file")
    for path, options, reason in (
        (tmp_path / "file", {"overwrite": True}, "is a file"),
        (tmp_path / "file" / "below", {}, "Not a directory"),
        (tmp_path, {}, "already holds something"),
        (tmp_path, {"overwrite": True}, "no record of what castlm wrote"),
    ):
        with pytest.raises(InputError, match=reason), claimed(path, "result", **options):
            pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_home_and_the_working_folder_are_not_overwritten(tmp_path, monkeypatch):
    here = tmp_path / "here"
    write(here / "model.safetensors")
    add_file_list(here)
    monkeypatch.chdir(here)
    with pytest.raises(InputError, match="is the working folder"), claimed(".", "result", overwrite=True):
        pass
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(here))
    with pytest.raises(InputError, match="or your home"), claimed("~", "result", overwrite=True):
        pass


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot write /proc/castlm"), claimed("/proc/castlm", "result"):
        pass
    if os.geteuid() == 0:
        pytest.skip("root writes through permissions")
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"), claimed(tmp_path / "out", "result"):
        pass


def test_a_folder_alone_that_can_be_written_is_enough_for_a_run(tmp_path, monkeypatch):
    """As a volume mounted at /out, for a user who may not write in /. A result takes its name beside the folder."""
    out = tmp_path / "out"
    out.mkdir()
    mkdir = Path.mkdir

    def refusing(self: Path, *arguments, **options) -> None:
        if self.parent == tmp_path and self != out:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refusing)
    for command in LAYOUT:
        with claimed(out, command) as folder:
            assert folder == out
    told = f"cannot write {tmp_path}, where the result is written before it becomes {out}: Permission denied"
    with pytest.raises(InputError, match=told), claimed(out, "result"):
        pass
    assert list(out.iterdir()) == []


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
            claimed(folder, "train", overwrite=True, inputs={"model": None, "dataset": value}),
        ):
            pass
    assert data.read_text() == "x"


def test_other_inputs_are_not_refused(tmp_path):
    write(tmp_path / "out-2" / "data.txt")
    for value in ("owner/name", "demo", "~nosuchuser/x", "a\0b", str(tmp_path / "out-2" / "data.txt"), str(tmp_path)):
        refuse_inputs_inside(tmp_path / "out", {"dataset": value})


@pytest.mark.parametrize("path", ["", "a\0b", "~nosuchuser/out", os.fsdecode(b"caf\xe9")])
def test_unusable_names_are_one_line(path):
    with pytest.raises(InputError), claimed(path, "train"):
        pass


# ---- locks


def hold(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the lock of `folder`."""
    program = f"""
from castlm.files.output import claimed
import time
with claimed({str(folder)!r}, "train"):
    print("held", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_a_folder_in_use_is_refused_until_its_process_ends(options, tmp_path):
    process = hold(tmp_path / "run")
    try:
        write(tmp_path / "run" / OUTPUT, json.dumps({"command": "train"}))
        with (
            pytest.raises(InputError, match=rf"in use by process {process.pid} on \S+ \(castlm train\)"),
            claimed(tmp_path / "run", "train", **options),
        ):
            pass
        assert (tmp_path / "run" / OUTPUT).is_file()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with claimed(tmp_path / "run", "train", resume=True):
                break
        except InputError:
            time.sleep(0.01)
    else:
        pytest.fail("the lock of a dead process blocks")


def test_a_stale_record_of_a_holder_does_not_block(tmp_path):
    write(tmp_path / "run" / ".castlm.holder.json", json.dumps({"pid": os.getpid(), "host": "here"}))
    write(tmp_path / "run" / ".castlm.lock", "")
    with locked(tmp_path / "run", "train"):
        pass


def test_a_start_that_fails_leaves_no_trace(tmp_path):
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "run", "train"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    write(tmp_path / "run" / "thesis.txt")
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "run", "train", resume=True):
        raise ZeroDivisionError
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["thesis.txt"]
    assert content(tmp_path / "run").owned == []


@pytest.mark.parametrize("options", [{"overwrite": True}, {"resume": True}])
def test_a_start_that_fails_leaves_no_lock_in_an_earlier_result(options, tmp_path):
    write(tmp_path / "out" / "castlm.json", "{}")
    add_file_list(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "out", "result", **options):
        raise ZeroDivisionError
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["castlm.json"]


def test_a_full_disk_at_the_start_leaves_no_trace(tmp_path, monkeypatch):
    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(InputError, match="No space left on device"), claimed(tmp_path / "run", "train"):
            pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_command_that_can_go_on_says_so_when_it_is_stopped(stop, tmp_path, capsys):
    def stopped():
        with continued(tmp_path / "run", "compare") as folder:
            (folder / "table.md").write_text("begun")
            raise stop

    with pytest.raises(stop):
        stopped()
    assert f"what is done is in {tmp_path / 'run'}: the same command goes on from there" in capsys.readouterr().err


@pytest.mark.parametrize("stop", [KeyboardInterrupt, InputError])
def test_a_folder_in_which_nothing_was_written_before_an_error_is_free_again(stop, tmp_path, capsys):
    with pytest.raises(stop), continued(tmp_path / "run", "compare"):
        raise stop
    assert not list(tmp_path.iterdir())
    assert "goes on from there" not in capsys.readouterr().err
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / OUTPUT).write_text('{"command": "compare"}')
    with pytest.raises(stop), continued(tmp_path / "killed", "compare"):
        raise stop
    assert not list((tmp_path / "killed").iterdir())


def test_an_interrupt_after_a_folder_to_go_on_in_is_deleted_is_passed_on(tmp_path):
    def stopped():
        with continued(tmp_path / "run", "compare") as folder:
            discard(folder)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert not list(tmp_path.iterdir())
