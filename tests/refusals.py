"""Commands that answer bad input with exit code 2 and one line; folders that may not be written."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from castlm.cli.main import main


def assert_refused(cases: Iterable[tuple[Sequence[str], str]], capsys: pytest.CaptureFixture[str]) -> None:
    """Each command is refused in one line that holds its message.

    Args:
        cases: (arguments, message).
    """
    capsys.readouterr()
    for arguments, message in cases:
        assert main(list(arguments)) == 2, message
        said = capsys.readouterr().err
        assert message in said
        assert said.strip().count("\n") == 0, said


def refuse_mkdir(monkeypatch: pytest.MonkeyPatch, parent: Path) -> None:
    """Lets no folder be made in `parent`, as for a user who may not write there."""
    mkdir = os.mkdir

    def refusing(path: str | Path, *arguments: object, **options: object) -> None:
        if Path(path).parent == parent:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", refusing)
