"""Commands that answer bad input with exit code 2 and one line; folders that may not be written."""

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest

from castlm.cli.main import main
from castlm.core.errors import InputError


@contextlib.contextmanager
def refusal(match: str) -> Iterator[pytest.ExceptionInfo[InputError]]:
    """Checks that the block raises an `InputError` of one line that matches."""
    with pytest.raises(InputError, match=match) as raised:
        yield raised
    assert "\n" not in str(raised.value)


def assert_refused(cases: Iterable[tuple[Sequence[str], str]], capsys: pytest.CaptureFixture[str]) -> None:
    """Each command is refused in one line that holds its message.

    Args:
        cases: (arguments, message).
    """
    for arguments, message in cases:
        assert message in refused(arguments, capsys)


def refused(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that is refused."""
    capsys.readouterr()
    assert main(list(arguments)) == 2, arguments
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith("castlm: error: ")
    return said.err


def refuse_mkdir(monkeypatch: pytest.MonkeyPatch, parent: Path) -> None:
    """Lets no folder be made in `parent`, as for a user who may not write there."""
    mkdir = os.mkdir

    def refusing(path: str | Path, *arguments: object, **options: object) -> None:
        if Path(path).parent == parent:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", refusing)


def disk_full(*_: object, **__: object) -> None:
    """Stands in for a function that writes."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
