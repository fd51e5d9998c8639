"""The notebooks run from their first to their last cell, on a tiny model."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chats import save_chat_model
from tests.ranks import start_process

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def said(cells: list[Any]) -> str:
    """The text that the cells printed and showed."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)


def run_kernel(file: str, folder: Path, environment: dict[str, str]) -> None:
    """The kernel that listens where the connection file says."""
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["ipykernel_launcher", "-f", file]
    runpy.run_module("ipykernel_launcher", run_name="__main__", alter_sys=True)


@pytest.mark.slow
def test_the_notebooks_run(tmp_path):
    """In one kernel, which begins as a fork with all imports done; each begins without the names of the other."""
    pytest.importorskip("peft")
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")

    class Manager(pytest.importorskip("jupyter_client").AsyncKernelManager):
        has_kernel = True

        async def shutdown_kernel(self, **_: Any) -> None:
            kernel.kill()

    manager = Manager(connection_file=str(tmp_path / "kernel.json"), owns_kernel=False)
    manager.write_connection_file()
    environment = {"CASTLM_NOTEBOOK_MODEL": save_chat_model(tmp_path / "dense"), "CASTLM_NOTEBOOK_STEPS": "4"}
    kernel = start_process(run_kernel, manager.connection_file, tmp_path, environment, log=tmp_path / "log")
    castlm, chat = (nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4) for name in ("castlm", "chat"))
    both = nbformat.v4.new_notebook(metadata=castlm.metadata)
    both.cells = [*castlm.cells, nbformat.v4.new_code_cell("%reset -f"), *chat.cells]
    try:
        nbclient.NotebookClient(both, timeout=300, km=manager).execute()
    finally:
        kernel.kill()
        kernel.join()
    assert "2:4" in said(castlm.cells)
    printed = said(chat.cells)
    assert "2:4 holds in" in printed
    assert "adapter shira of" in printed
    assert "MB, packed" in printed
