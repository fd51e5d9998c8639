"""docs/architecture.md names files, and functions and classes of them, that exist."""

import re
from pathlib import Path

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
