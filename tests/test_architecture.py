"""docs/architecture.md names files, functions and classes that exist, and the tiers that imports keep."""

import re
from pathlib import Path

from tests.test_imports import TIERS

ROOT = Path(__file__).parent.parent


def test_every_place_that_the_map_names_exists():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    source, runtime = ROOT / "src" / "castlm", ROOT / "runtime" / "src"
    files = re.findall(r"`([\w/]+\.(?:py|cpp))`", page)
    for file in files:
        assert any((root / file).is_file() for root in (source, ROOT, runtime)), file
    places = re.findall(r"`([\w/]+\.py)`, `([\w.]+)`", page)
    assert len(places) >= 10
    for file, name in places:
        found = next(root / file for root in (source, runtime) if (root / file).is_file())
        assert re.search(rf"^ *(?:def|class) {name.rpartition('.')[2]}\b", found.read_text(), re.M), name
    for room in re.findall(r"^\| `(\w+)/` \|", page, re.M):
        assert (source / room).is_dir(), room


def test_the_tiers_of_the_map_are_those_that_imports_keep():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    lines = page.partition("in a circle:\n\n```\n")[2].partition("\n```")[0].splitlines()
    tiers = [tuple(room for room in rooms if room != "__main__") for rooms in TIERS]
    assert [tuple(line.partition("   ")[0].split(", ")) for line in lines] == tiers
