"""A figure of the documents has one source, docs/results/*.json: the tables of the pages are rendered from it."""

import json
import re

import pytest
from benchmarks.render import RESULTS, ROOT, TABLE, cell, main, packaged, pages, render, table
from benchmarks.sizes_figure import WAYS, described, frontiers


def test_the_tables_of_the_pages_are_the_results():
    differ = [str(page.relative_to(ROOT)) for page in pages() if render(page.read_text()) != page.read_text()]
    assert not differ, "python -m benchmarks.render"
    results, copy = packaged()
    assert copy.read_bytes() == results.read_bytes(), "python -m benchmarks.render"


def test_every_table_of_results_is_shown():
    stored = {(file.stem, name) for file in RESULTS.glob("*.json") for name in json.loads(file.read_text())}
    shown = {match.group("file", "table") for page in pages() for match in TABLE.finditer(page.read_text())}
    assert stored == shown


OF_RESULTS = [ROOT / "README.md", ROOT / "docs" / "paper.md", ROOT / "docs" / "performance.md", *RESULTS.glob("*.md")]


@pytest.mark.parametrize("page", OF_RESULTS, ids=lambda page: page.stem)
def test_no_page_of_results_has_figures_of_its_own(page):
    own = TABLE.sub("", page.read_text())
    assert not re.findall(r"^\|.*\| *[\d.,]+ *\|.*$", own, re.M)


def test_a_cell_is_shown_with_the_digits_of_its_column():
    assert cell(1402, 0) == "1,402"
    assert cell([7.1, 7.3], 2) == "7.10, 7.30"
    assert cell(None, 2) == ""
    assert cell("7.10 ± 0.02", None) == "7.10 ± 0.02"


def test_a_view_has_some_rows_and_columns():
    found = {
        "columns": [{"name": "format"}, {"name": "MB", "digits": 1}, {"name": "speed", "digits": 0}],
        "rows": [["bf16", 269.0, 79], ["int4", 85.0, 206]],
        "views": {"short": {"columns": ["format", "speed"], "rows": ["int4"]}},
    }
    assert table(found, "short").splitlines() == ["| format | speed |", "|---|---:|", "| int4 | 206 |"]


def test_a_page_that_differs_is_named_and_then_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs" / "results").mkdir(parents=True)
    results = {"speeds": {"columns": [{"name": "format"}, {"name": "MB", "digits": 0}], "rows": [["int4", 85]]}}
    (tmp_path / "docs" / "results" / "f.json").write_text(json.dumps(results))
    (tmp_path / "docs" / "results" / "sizes.json").write_text("{}")
    (tmp_path / "src" / "castlm" / "lab" / "advice").mkdir(parents=True)
    page = tmp_path / "README.md"
    page.write_text("A\n\n<!-- results: f speeds -->\n<!-- end -->\n\nB\n")
    monkeypatch.setattr("benchmarks.render.ROOT", tmp_path)
    monkeypatch.setattr("benchmarks.render.RESULTS", tmp_path / "docs" / "results")
    assert main(["--check"]) == 1
    assert capsys.readouterr().out.split() == ["README.md", "src/castlm/lab/advice/sizes.json"]
    assert "85" not in page.read_text()
    assert main([]) == 0
    assert "| int4 | 85 |" in page.read_text()
    assert main(["--check"]) == 0


def test_the_figure_of_sizes_has_the_points_of_the_results():
    shown = described((RESULTS / "sizes.svg").read_text(encoding="utf-8"))
    expected = frontiers(RESULTS / "sizes.json")
    assert shown == json.loads(json.dumps(expected)), "python -m benchmarks.sizes_figure"


def test_a_recipe_that_another_of_its_side_beats_is_on_no_frontier(tmp_path):
    columns = [{"name": name} for name in ("recipe", "MB", *WAYS)]
    rows = [["dense int4", 80, 21, None], ["dense int3", 60, 29, 27], ["dense int3, int8 head", 70, 28, 30]]
    rows += [["2:4 int4", 60, None, None], ["2:4 int3", 50, 40, 41], ["8:16 int3", 55, None, 40]]
    (tmp_path / "sizes.json").write_text(json.dumps({"smollm2": {"columns": columns, "rows": rows}}))
    found = frontiers(tmp_path / "sizes.json")
    assert [name for _, _, name in found["dense"]] == ["dense int3", "dense int4"]
    assert [name for _, _, name in found["n:m"]] == ["2:4 int3"]
