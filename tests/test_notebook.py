"""The notebooks run from their first to their last cell, on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.chats import save_chat_model

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def said(cells: list[Any]) -> str:
    """What cells printed and showed."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)


def test_the_notebooks_run(tmp_path, monkeypatch):
    """In one kernel, which takes longer to start than they to run; each begins without the names of the other."""
    pytest.importorskip("peft")
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("CASTLM_NOTEBOOK_MODEL", save_chat_model(tmp_path / "dense"))
    monkeypatch.setenv("CASTLM_NOTEBOOK_STEPS", "4")
    castlm, chat = (nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4) for name in ("castlm", "chat"))
    both = nbformat.v4.new_notebook(metadata=castlm.metadata)
    both.cells = [*castlm.cells, nbformat.v4.new_code_cell("%reset -f"), *chat.cells]
    nbclient.NotebookClient(both, timeout=600, kernel_name="python3").execute(cwd=str(tmp_path))
    assert "2:4" in said(castlm.cells)
    printed = said(chat.cells)
    assert "2:4 holds in" in printed
    assert "adapter shira of" in printed
    assert "MB, packed" in printed
