"""From a dense language model to an n:m sparse one by continued training. The public names, imported when asked for.

`__init__.pyi` lists them, where editors and type checkers read them too (as in scientific Python's SPEC 1). Importing
castlm also lets transformers load packed folders: see `castlm.runtime.register`.
"""

import importlib
import re
from pathlib import Path

import castlm.patterns  # noqa: F401  # functions of core parse its texts too
from castlm.runtime.register import register

__version__ = "0.1.0"

_LINES = re.findall(r"^from (castlm\.\S+) import (\w+) as", Path(__file__).with_suffix(".pyi").read_text("utf-8"), re.M)
_MODULE_OF = {name: module for module, name in _LINES}
__all__ = sorted(_MODULE_OF)
register()


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'castlm' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
