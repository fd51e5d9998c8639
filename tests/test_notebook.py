"""The notebook runs from its first to its last cell, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import save_tiny

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "castlm.ipynb"


def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("CASTLM_NOTEBOOK_MODEL", str(save_tiny(tmp_path / "dense")))
    monkeypatch.setenv("CASTLM_NOTEBOOK_STEPS", "4")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=str(tmp_path))
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "2:4" in printed
