"""The notebooks run from their first to their last cell, on tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chats import save_chat_model
from tests.tiny import save_tiny

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, folder: Path) -> str:
    """Runs a notebook in `folder`; returns what its cells printed and showed."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(folder))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CASTLM_NOTEBOOK_MODEL", str(save_tiny(tmp_path / "dense")))
    monkeypatch.setenv("CASTLM_NOTEBOOK_STEPS", "4")
    assert "2:4" in run("castlm", tmp_path)


def test_the_notebook_of_a_chat_model_fine_tunes_packs_and_talks(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setenv("CASTLM_NOTEBOOK_MODEL", save_chat_model(tmp_path / "dense"))
    monkeypatch.setenv("CASTLM_NOTEBOOK_STEPS", "4")
    printed = run("chat", tmp_path)
    assert "2:4 holds in" in printed
    assert "adapter shira of" in printed
    assert "MB, packed" in printed
