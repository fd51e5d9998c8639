"""The code of docs/how-to/extend.md does what the page says: each file is written and its commands are run."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from castlm.core.decay import DECAYS
from castlm.core.nm import NM
from castlm.methods.table import METHODS
from castlm.oneshot.solvers import SOLVERS
from castlm.patterns import PARSERS
from tests.tiny import TEXT, save_tiny

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "how-to" / "extend.md").read_text()
FILES = {code.splitlines()[0].removeprefix("# "): code for code in re.findall(r"```python\n(.*?)```", PAGE, re.S)}
COMMANDS = re.findall(r"^python (.*)$", PAGE, re.M)

SMALL = "--max-steps 4 --seq-len 32 --per-device-train-batch-size 4 --eval-tokens 128 --save-steps 0 --report-to none"
SMALL += " --calibration-sequences 4 --rotation-iterations 4 --no-report"
SIZES = {"train": SMALL, "prune": "--num-sequences 4 --seq-len 32 --rotation-iterations 4", "verify": ""}


@pytest.fixture
def tables(monkeypatch):
    """Gives the tables back as they were."""
    before = [(table, dict(table)) for table in (DECAYS, METHODS, SOLVERS)]
    monkeypatch.setattr(NM, "solvers", NM.solvers)
    parsers = list(PARSERS)
    yield
    for table, rows in before:
        table.clear()
        table.update(rows)
    PARSERS[:] = parsers


def test_the_page_has_a_file_for_each_row_of_its_table():
    assert set(FILES) == {command.split()[0] for command in COMMANDS}
    assert len(FILES) == 4


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_ones_own_extends_the_command(name, tables, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(FILES[name])
    Path("text.txt").write_text(TEXT)
    save_tiny(tmp_path / "dense")

    def code_of(command: str) -> object:
        file, verb, *options = shlex.split(command.replace("--model demo", "--model dense"))
        monkeypatch.setattr(sys, "argv", [file, verb, *options, *SIZES[verb].split()])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(file, run_name="__main__")
        return ended.value.code

    for command in COMMANDS:
        if command.split()[0] == name:
            assert code_of(command) == 0, command
    if name == "rows.py":
        assert code_of("rows.py verify dense --pattern rows:0.5") == 1  # the count is of this pattern
