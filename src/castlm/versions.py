"""The versions that a result was made with, in the form in which every record holds them."""

from __future__ import annotations

import platform
from importlib.metadata import version

from castlm import __version__


def library_versions(*packages: str) -> dict[str, str]:
    """Versions of castlm, Python and the installed `packages`, by name."""
    return {
        "castlm": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def model_versions() -> dict[str, str]:
    """Versions of the libraries that write a model, for its castlm.json."""
    return library_versions("torch", "transformers", "safetensors")
