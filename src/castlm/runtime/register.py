"""Lets transformers load packed folders after `import castlm`, without importing transformers.

transformers has no entry point for quantizers: `register_quantizer` must run after `transformers.quantizers.auto` is
imported and before a model is loaded. Importing it from `castlm/__init__.py` would take seconds. So a finder waits for
the import of that module, registers castlm's quantizer after it, and removes itself.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_AWAITED = "transformers.quantizers.auto"


def register() -> None:
    """Registers the quantizer now if transformers' own are imported, otherwise after their import. May be repeated."""
    if _AWAITED in sys.modules:
        _register_now(sys.modules[_AWAITED])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register_now(auto: ModuleType) -> None:
    from castlm.models.layout import QUANT_METHOD
    from castlm.runtime.quantizer import CastlmConfig, CastlmQuantizer

    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(CastlmConfig)
        auto.register_quantizer(QUANT_METHOD)(CastlmQuantizer)


class _Finder(MetaPathFinder):
    """Finds the awaited module once, and registers after its execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register_now(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
