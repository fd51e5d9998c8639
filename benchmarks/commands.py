"""The page of commands of the site, from `castlm COMMAND --help-all`: a hook of mkdocs, which calls `on_files`."""

from __future__ import annotations

import contextlib
import io
from typing import Any

PAGE = "reference/commands.md"


def help_of(*arguments: str) -> str:
    """The help that a command prints on a terminal of unknown width."""
    from castlm.cli.main import main

    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main([*arguments, "--help-all"])
    return printed.getvalue().rstrip()


def page() -> str:
    """The page: each command with all of its options."""
    from castlm.cli.main import COMMANDS

    parts = ["# Commands", "Every option of every command, as `castlm COMMAND --help-all` prints them."]
    for name in COMMANDS:
        parts += [f"## castlm {name}", f"```text\n{help_of(*name.split())}\n```"]
    return "\n\n".join(parts) + "\n"


def on_files(files: Any, config: Any) -> Any:
    """Adds the page to the files of the site: mkdocs calls this by its name."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=page()))
    return files
