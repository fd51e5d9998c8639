"""The command as a process and in a pipe, `--json`, and its lines of progress."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from castlm import progress
from castlm.cli.command_line import check_json_path, result_folder, write_json
from castlm.cli.main import COMMANDS, Command, main
from castlm.cli.train import run_training
from castlm.core.errors import DivergedError, InputError
from castlm.export.verify import verify
from castlm.facts import Facts, Verdict
from castlm.files.atomic_file import atomic_write_json
from castlm.progress import shown_progress
from castlm.signals import Interrupted, resume_command
from castlm_runtime.reading import user_path
from tests.runs import prune_to
from tests.slow import slow
from tests.tiny import save_tiny

ARGUMENTS = [
    ["--help"],
    ["verify", "--help"],
    ["plan"],
    ["verify", "{file}"],
    slow(["verify", "{file}", "--json", "-"]),
]
"""Quick commands: each of them is a process of its own."""


@pytest.fixture
def file(tmp_path) -> Path:
    """The folder of a model at 2:4."""
    return Path(prune_to(tmp_path / "sparse", save_tiny(tmp_path / "dense")))


def castlm(arguments, file="", unbuffered="", **streams):
    command = [sys.executable, "-m", "castlm", *(argument.format(file=file) for argument in arguments)]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}  # where it is set, no print waits for the end
    return subprocess.run(command, text=True, env=environment, **streams)


def test_a_run_is_found_where_the_shell_does_not_expand_its_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    assert result_folder("~/run") == str(tmp_path / "run" / "model")
    assert result_folder("hub/name") == "hub/name"
    with pytest.raises(InputError, match="too long"):
        result_folder("x" * 5000)


def test_the_home_of_a_user_without_one_is_not_made(tmp_path, monkeypatch):
    """As that of `nobody`, whose home is /nonexistent: root could make it."""
    monkeypatch.setenv("HOME", str(tmp_path / "nonexistent"))
    with pytest.raises(InputError, match="nonexistent of '~/x' does not exist"):
        user_path("~/x")
    with pytest.raises(InputError, match="a path must be text, not the NoneType None"):
        verify(None)


def test_no_answer_holds_the_control_characters_of_a_name(tmp_path, capsys):
    names = ("model", "packed", "plain", "int8", "pruned", "text.txt")
    first, packed, plain, quantized, pruned, text = (str(tmp_path / f"\x1b[2J\nname-{name}") for name in names)
    save_tiny(Path(first))
    Path(text).write_text("some text of a few words")
    for command in (
        ["prune", "--model", first, "--solver", "magnitude", "--output-dir", pruned],
        ["pack", pruned, "--output-dir", packed],
        ["unpack", packed, "--output-dir", plain],
        ["quantize", plain, "--output-dir", quantized],
        ["verify", quantized],
        ["eval", plain, "--text", text, "--device", "cpu"],
    ):
        assert main(command) == 0
        output = capsys.readouterr()
        assert "\x1b" not in output.out + output.err
        assert "\nname" not in output.out + output.err
        assert r"\x1b[2J\nname" in output.out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_describes_the_everyday_options_and_help_all_every_one(name, capsys):
    texts = []
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as stop:
            main([*name.split(), option])
        assert not stop.value.code
        texts.append(capsys.readouterr().out)
    short, full = texts
    assert short.startswith(f"usage: castlm {name}")
    assert len(short.splitlines()) <= 70
    assert set(re.findall(r"--[a-z][a-z-]+", short)) - {"--help-all"} <= set(re.findall(r"--[a-z][a-z-]+", full))


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=" ".join)
def test_output_that_nobody_reads_is_no_error(arguments, file):
    reader, writer = os.pipe()
    os.close(reader)
    done = castlm(arguments, file, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_deleted_working_folder_and_a_run_that_diverged_have_their_own_lines_and_codes(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["verify", str(tmp_path)]) == 2
    assert "the working folder no longer exists" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)

    def diverge(self, name, arguments):
        raise DivergedError("step 2: the loss is inf")

    monkeypatch.setattr(Command, "run", diverge)
    assert main(["verify", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "castlm: error: step 2: the loss is inf\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("unbuffered", ["", slow("1")])
@pytest.mark.parametrize("arguments", ARGUMENTS[1:], ids=" ".join)
def test_output_that_finds_no_space_is_one_line(arguments, unbuffered, file):
    with open("/dev/full", "w") as full:
        done = castlm(arguments, file, unbuffered, stdout=full, stderr=subprocess.PIPE)
        if arguments == ["plan"]:
            assert castlm(arguments, file, unbuffered, stdout=full, stderr=full).returncode == 2
    line = "castlm: error: the output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, line)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "device cpu, or a larger GPU"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "device cpu, or a larger GPU"),
        (MemoryError(), "or a larger machine"),
    ],
)
def test_memory_that_ran_out_is_said_with_a_remedy(error, remedy, monkeypatch, capsys):
    def run(command, name, arguments):
        raise error

    monkeypatch.setattr(Command, "run", run)
    assert main(["train"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("castlm: error: not enough memory (")
    assert remedy in said


@pytest.mark.parametrize(
    ("verdict", "code"), [({"ok": True}, 0), ({"problem": "FELL SHORT"}, 0), ({"problem": "DIVERGED"}, 1)]
)
def test_a_run_that_saved_a_verified_model_exits_with_0_unless_it_diverged(verdict, code, monkeypatch, tmp_path):
    found = Verdict(**{"ok": False, "reason": ""} | verdict)
    facts = Facts(pattern="2:4", left_dense={}, verdict=found)
    monkeypatch.setattr("castlm.training.train.train", lambda config: facts)
    arguments = ["--model", "m", "--dataset", "d", "--output-dir", str(tmp_path / "run"), "--no-report"]
    assert main(["train", *arguments]) == code


# ---- `--json` replaces nothing but a report, and is checked before the work


@pytest.mark.parametrize(
    "name",
    [
        *("model/config.json", "model/tokenizer.json", "thesis.txt", "link.json", "folder", "no/x"),
        *("castlm-output.json", "progress.json", "text.jsonl.castlm.json", "one.jsonl"),  # records and texts
    ],
)
def test_what_is_not_a_report_is_refused_and_kept(tmp_path, name):
    for file in ("model/config.json", "model/tokenizer.json", "thesis.txt", name):
        if file not in ("link.json", "folder", "no/x"):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).write_text('{"of": "another"}')
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "model" / "config.json")
    with pytest.raises(InputError, match="--json"):
        check_json_path(str(tmp_path / name))
    assert main(["verify", str(tmp_path / "model"), "--json", str(tmp_path / name)]) == 2
    assert {file.read_text() for file in tmp_path.rglob("*") if file.is_file()} == {'{"of": "another"}'}


def test_a_new_file_and_an_older_report_are_accepted(tmp_path):
    for name in (None, "-", str(tmp_path / "new.json")):
        check_json_path(name)
    old = tmp_path / "old.json"
    for _ in range(2):
        write_json(str(old), {"ok": True, "loss": float("nan"), "at": Path("é"), "ids": (1, 2.5)})
        check_json_path(str(old))
    assert list(tmp_path.iterdir()) == [old]


def test_a_file_with_the_marks_of_a_report_is_kept(tmp_path, capsys):
    """Another program's file with the same key, a report that somebody changed, and a file that came meanwhile."""
    write_json(str(tmp_path / "report.json"), {"ok": True})
    report = json.loads((tmp_path / "report.json").read_text())
    contents = [{"written_by": "me"}, {"written_by": "castlm 0.1.0", "sha256": "0"}, report | {"ok": False}]
    for content in (*contents, report | {"mine": 1}, {**report, "sha256": None}):
        (tmp_path / "a.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match="not a report"):
            check_json_path(str(tmp_path / "a.json"))
        write_json(str(tmp_path / "a.json"), {"ok": True})
        assert "a.json-" in capsys.readouterr().err
        assert json.loads((tmp_path / "a.json").read_text()) == content


def test_a_pipe_is_never_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(InputError, match="not a report"):
            check_json_path(str(tmp_path / name))
        with pytest.raises(InputError, match="not a regular file"):
            atomic_write_json(tmp_path / name, {})
    assert (tmp_path / "link").is_symlink()


def test_the_file_behind_a_link_is_replaced(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real.json")
    (tmp_path / "real.json").write_text("{}")
    atomic_write_json(tmp_path / "link", {"a": 1})
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text()) == {"a": 1}


def test_the_command_that_resumes_a_run_starts_as_many_ranks(monkeypatch, tmp_path):
    options = f"train --config {tmp_path}/config.yaml --resume"
    assert resume_command(tmp_path) == f"castlm {options}"
    for size, nodes in (("2", ""), ("4", "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:PORT ")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.setenv("WORLD_SIZE", size)
        assert resume_command(tmp_path) == f"torchrun {nodes}--nproc-per-node 2 -m castlm {options}"


# ---- progress


def test_lines_where_there_is_no_terminal_and_none_of_short_work(capsys, monkeypatch):
    for seconds, num_lines in ((0, 1), (progress.SECONDS_BEFORE_FIRST, 0)):
        monkeypatch.setattr(progress, "SECONDS_BEFORE_FIRST", seconds)
        with shown_progress("perplexity, sequences") as told:
            told(1, 4)
            told(4, 4)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == num_lines
        assert all(line.startswith("castlm: perplexity, sequences 1/4, ") for line in lines)


def test_without_a_terminal_long_work_has_its_first_line_at_once(capsys, monkeypatch):
    with shown_progress("sparsegpt, transformer blocks", before=None) as told:
        told(3, 30)
        assert capsys.readouterr().err == "castlm: sparsegpt, transformer blocks 3/30\n"
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 1e9))
        told(4, 30)
        assert capsys.readouterr().err == ""  # its time holds more than a part's
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 1e9 + 60))
        told(5, 30)
        assert capsys.readouterr().err == "castlm: sparsegpt, transformer blocks 5/30, 25 minutes left\n"


def test_one_rank_tells_how_a_stopped_run_goes_on(capsys, monkeypatch):
    def stop(config):
        raise Interrupted("stopped after step 2, saved", "continue with: torchrun", 130)

    monkeypatch.setattr("castlm.training.train.train", stop)
    for rank, told in (("0", "castlm: stopped after step 2, saved; continue with: torchrun\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert run_training(None, report=False) == 130
        assert capsys.readouterr().err == told


def test_a_terminal_gets_a_bar_that_goes_away(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the stream for a terminal
    with shown_progress("perplexity, sequences") as told:
        told(1, 2)
        told(2, 2)
    shown = capsys.readouterr().err
    assert "perplexity, sequences" in shown
    assert "\x1b[" in shown
    with shown_progress("perplexity, sequences", is_main=False) as told:  # two ranks would write over each other
        told(1, 2)
    assert capsys.readouterr().err == ""
