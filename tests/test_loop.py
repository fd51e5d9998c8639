"""The end of a run by an error: the checkpoint that is being written then is whole, and the error is what is told."""

import json
import time
from collections.abc import Callable

import pytest

from castlm.core.errors import DivergedError, InputError
from castlm.training import checkpoint
from castlm.training.checkpoint import checkpoint_steps
from castlm.training.teacher_cache import TeacherCache
from castlm.training.train import train
from castlm.training.trainer import Trainer
from tests.runs import assert_equal_weights, before_step, small, train_until
from tests.slow import slow


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.fixture
def _slow_disk(monkeypatch):
    """A checkpoint takes so long that it is being written when the next step fails."""
    write = checkpoint._write

    def slowly(*arguments):
        time.sleep(0.5)
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "_write", slowly)


@pytest.mark.usefixtures("_slow_disk")
@pytest.mark.parametrize(
    ("part", "name", "error"),
    [
        ("optimizer", "step", DivergedError("a sparse weight is NaN")),
        ("objective", "forward", RuntimeError("out of memory")),
    ],
)
def test_an_error_leaves_the_checkpoint_that_is_being_written_whole(
    part, name, error, llama, text, tmp_path, monkeypatch
):
    before_step(monkeypatch, 4, lambda run: setattr(getattr(run, part), name, raising(error)))
    with pytest.raises(type(error), match=str(error)):
        train(small(llama, text, tmp_path / "run", save_steps=2))
    assert list(checkpoint_steps(tmp_path / "run" / "checkpoints")) == [2, 4]
    assert not list((tmp_path / "run" / "checkpoints").glob(".step*"))


@pytest.mark.usefixtures("_slow_disk")
def test_a_checkpoint_holds_the_state_of_its_step_however_late_it_is_written(llama, text, tmp_path):
    late = small(llama, text, tmp_path / "late", save_steps=2)
    for config in (late, late.changed(output_dir=str(tmp_path / "at-once"), async_save=False)):
        train_until(config, 4)
    one, other = (tmp_path / name / "checkpoints" / "step-00000002" for name in ("late", "at-once"))
    assert_equal_weights(one, other)


def test_a_save_that_fails_as_well_does_not_hide_the_error(llama, text, tmp_path, monkeypatch, capsys):
    def broken(run: Trainer) -> None:
        monkeypatch.setattr(checkpoint, "size_and_crc", raising(OSError(28, "No space left on device")))
        run.save()
        run.method.before_forward = raising(InputError("a weight contains NaN"))

    before_step(monkeypatch, 4, broken)
    with pytest.raises(DivergedError, match=r"contains NaN.*no checkpoint"):
        train(small(llama, text, tmp_path / "run"))
    assert "step 4 could not be saved" in capsys.readouterr().err


@pytest.mark.usefixtures("_slow_disk")
@pytest.mark.parametrize(("fails_at", "whole"), [slow(2, [4]), (3, [4, 8])])
def test_a_teacher_cache_that_cannot_be_written_costs_no_checkpoint(
    fails_at, whole, llama, text, tmp_path, monkeypatch
):
    """The saves of steps 4 and 8 cover the cache, and then the end of the run does."""
    original, calls = TeacherCache.cover, []

    def cover(self: TeacherCache, *arguments: int, **options: bool) -> None:
        calls.append(arguments)
        if len(calls) == fails_at:
            raise InputError("the disk is full")
        original(self, *arguments, **options)

    monkeypatch.setattr(TeacherCache, "cover", cover)
    cache = {"teacher_cache": str(tmp_path / "cache"), "teacher_top_k": 8}
    with pytest.raises(InputError, match="the disk is full"):
        train(small(llama, text, tmp_path / "run", save_steps=4, **cache))
    assert list(checkpoint_steps(tmp_path / "run" / "checkpoints")) == whole


def test_a_checkpoint_is_not_ahead_of_the_teacher_cache(llama, text, tmp_path, monkeypatch):
    """A run that is resumed covers what follows its checkpoint: a gap before it would never be closed."""
    ahead = []
    save = checkpoint.Saver.save

    def noted(self, step, *rest) -> None:
        (coverage,) = (tmp_path / "cache").glob("coverage-*.json")
        ahead.append(4 * step - json.loads(coverage.read_text())["blocks"])
        save(self, step, *rest)

    monkeypatch.setattr(checkpoint.Saver, "save", noted)
    cache = {"teacher_cache": str(tmp_path / "cache"), "teacher_top_k": 8}
    train(small(llama, text, tmp_path / "run", save_steps=4, **cache))
    assert ahead == [0, 0]
