"""Every command answers bad input with exit code 2 and one line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
