"""docs/models.md says for each family what the tables of the code say."""

import re

from benchmarks.render import ROOT

from castlm.oneshot.families import LAYOUTS
from castlm.structured.units import CHANNELS, HEADS
from castlm_runtime.families import FAMILIES


def test_the_page_of_models_has_every_family_with_what_it_can_do():
    page = (ROOT / "docs" / "models.md").read_text()
    rows = re.findall(r"^\| (.*`.*) \| (yes|no) \| (yes|no) \| (yes|no) \| (yes|no) \|$", page, re.M)
    said = {family: tuple(answers) for names, *answers in rows for family in re.findall(r"`(\w+)`", names)}
    tables = (LAYOUTS, CHANNELS, HEADS, FAMILIES)
    families = {family for table in tables for family in table}
    assert said == {f: tuple("yes" if f in table else "no" for table in tables) for f in families}
