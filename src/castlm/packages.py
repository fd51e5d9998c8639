"""Optional packages: whether they are installed is checked before the work that needs them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json

from castlm.core.errors import InputError


def missing(*packages: str) -> list[str]:
    """Returns the packages that are not installed. Imports none of them.

    A folder of that name on Python's path is not enough.
    """
    specs = {package: importlib.util.find_spec(package) for package in packages}
    return [name for name, spec in specs.items() if spec is None or spec.loader is None or spec.origin is None]


def require(what: str, *packages: str, install: str = "") -> None:
    """Raises `InputError` if one of `packages` is not installed.

    Args:
        what: the beginning of the error, such as "serving needs".
        install: the arguments of `pip install`; by default the missing packages.
    """
    if lacking := missing(*packages):
        raise InputError(f"{what} {' and '.join(lacking)}: pip install {install or ' '.join(lacking)}")


def install_line() -> str:
    """How somebody else installs castlm as it is installed here, in Markdown.

    The address of the repository is the one that it was installed from, or `Repository` under `project.urls` in
    pyproject.toml, which `make repository URL=ADDRESS` fills in.
    """
    clone = "`pip install ./runtime .` in a clone of its repository"
    try:
        found = importlib.metadata.distribution("castlm")
    except importlib.metadata.PackageNotFoundError:  # imported from its source, without an installation
        return clone
    origin = json.loads(found.read_text("direct_url.json") or "null")
    if origin is None:  # from an index
        return f"`pip install 'castlm=={found.version}'`"
    urls = dict(line.split(", ", 1) for line in found.metadata.get_all("Project-URL") or [])
    address, commit = urls.get("Repository"), ""
    if "vcs_info" in origin:
        address, commit = origin["url"], f"@{origin['vcs_info']['commit_id']}"
    if address is None:
        return clone
    source = f"git+{address}{commit}"
    return f"`pip install 'castlm-runtime @ {source}#subdirectory=runtime' 'castlm @ {source}'`"
