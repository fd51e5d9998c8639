"""docs/promises.md names tests that exist, and no row goes without."""

import re
from pathlib import Path

HERE = Path(__file__).parent
ROWS = [
    line.removesuffix(" |").split(" | ")[-1]
    for line in (HERE.parent / "docs" / "promises.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and line.count(" | ") == 2 and not line.startswith("| promise")
]


def test_every_promise_names_tests_that_exist():
    assert len(ROWS) >= 30
    for row in ROWS:
        parts = re.findall(r"`(\w+\.py)`(?:: ((?:`\w+`(?:, )?)+))?", row)
        assert parts, row
        for file, names in parts:
            source = (HERE / file).read_text(encoding="utf-8")
            for name in re.findall(r"\w+", names):
                assert f"def test_{name}" in source, f"{file} has no test_{name}..."
