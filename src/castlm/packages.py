"""Optional packages, which are asked for before the work that needs them."""

from __future__ import annotations

import importlib.util

from castlm.core.errors import InputError


def missing(*packages: str) -> list[str]:
    """Those of `packages` that are not installed; none is imported.

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
